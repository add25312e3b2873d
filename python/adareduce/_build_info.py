"""What this build was made of. Written by CMake."""

BUILD = {
    "compiler": "GNU 12.2.0",
    "build_type": "Release",
    "commit": "021c3c4-dirty",
    "mpi_reason": "found in the environment /work/main/.venv",
}

MPI = {
    "vendor": "MPICH",
    "version": "5.0.2",
    "soname": "libmpi.so.12",
    "place": "environment",
    "library": "/work/main/.venv/lib/libmpi.so.12",
    "mpicc": "/work/main/.venv/bin/mpicc",
}
