/* Says which MPI library a program gets that is built as `_mpi` is built. Initialises nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <mpi.h>
#include <stdio.h>

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

#if defined(OMPI_MAJOR_VERSION)
#define VENDOR "Open MPI"
#define VERSION TEXT(OMPI_MAJOR_VERSION) "." TEXT(OMPI_MINOR_VERSION) "." TEXT(OMPI_RELEASE_VERSION)
#elif defined(I_MPI_VERSION)
#define VENDOR "Intel MPI"
#define VERSION I_MPI_VERSION
#elif defined(MVAPICH2_VERSION)
#define VENDOR "MVAPICH2"
#define VERSION MVAPICH2_VERSION
#elif defined(MPICH_VERSION)
#define VENDOR "MPICH"
#define VERSION MPICH_VERSION
#else
#define VENDOR "unknown"
#define VERSION "MPI-" TEXT(MPI_VERSION)
#endif

int main(void) {
  Dl_info info;
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  /* A real call, so that the linker keeps the library under --as-needed. */
  if (MPI_Get_library_version(text, &length) != MPI_SUCCESS) return 1;
  void* symbol = dlsym(RTLD_DEFAULT, "MPI_Get_library_version");
  if (symbol == NULL || dladdr(symbol, &info) == 0) return 2;
  printf("adareduce-LIBRARY=%s\nadareduce-VENDOR=%s\nadareduce-VERSION=%s\n", info.dli_fname,
         VENDOR, VERSION);
  return 0;
}
