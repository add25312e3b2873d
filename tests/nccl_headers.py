"""Downloads NVIDIA's wheels of NCCL and keeps what test_nccl_declarations.py compares with.

    export ADAREDUCE_NCCL_HEADERS=$(python tests/nccl_headers.py FOLDER)

Headers and libraries belong to NVIDIA and never enter this repository. About 200 MB per version
are downloaded; with --headers-only 30 KB of each are kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# The floor, one that torch has shipped for long, and one whose configuration has grown a lot.
WHEELS = ["nvidia-nccl-cu12==2.18.1", "nvidia-nccl-cu12==2.21.5", "nvidia-nccl-cu13==2.28.9"]


def fetch(wheel: str, folder: Path, headers_only: bool) -> None:
    """Leaves the header at ``folder/include/nccl.h`` and the library at ``folder/lib``."""
    if (folder / "include" / "nccl.h").exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "--no-deps", "--only-binary=:all:", "-d", scratch, wheel],
            check=True,
            stdout=sys.stderr,
        )
        (archive,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(archive) as content:
            wanted = ["lib/libnccl.so.2"] if not headers_only else []
            for name in [*wanted, "include/nccl.h"]:  # the header last: it says that all is there
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read(f"nvidia/nccl/{name}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to put them; kept if they are there")
    parser.add_argument("wheels", nargs="*", default=WHEELS, help=f"default: {' '.join(WHEELS)}")
    parser.add_argument("--headers-only", action="store_true", help="keep no library")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for wheel in arguments.wheels:
        fetch(wheel, arguments.folder / wheel.replace("==", "-"), arguments.headers_only)
    print(arguments.folder.resolve())


if __name__ == "__main__":
    main()
