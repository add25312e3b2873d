# Finds the MPI whose compiler wrapper is MPI_C_COMPILER (set by the build backend; CMake looks for
# one itself otherwise) and learns from a small program which libmpi a process really gets.
#
# In:  ADAREDUCE_MPI, MPI_C_COMPILER, ADAREDUCE_MPI_REASON, and ADAREDUCE_MPI_PLACE: "environment" (the
#      one installed into), "build" (a temporary one) or "outside"
# Out: ADAREDUCE_HAVE_MPI, ADAREDUCE_MPI_{LIBRARY,SONAME,VENDOR,VERSION,RPATH}, target MPI::MPI_C

set(ADAREDUCE_HAVE_MPI OFF)
set(ADAREDUCE_MPI_PLACE "outside" CACHE STRING "Where the MPI lies: environment, build or outside")
if(ADAREDUCE_MPI STREQUAL "OFF")
  return()
endif()

# A kept build folder may remember another MPI, and FindMPI trusts what it remembers.
get_cmake_property(cached CACHE_VARIABLES)
list(FILTER cached INCLUDE REGEX "^MPI_|^ADAREDUCE_PROBE_")
list(FILTER cached EXCLUDE REGEX "^MPI_C_COMPILER$")
foreach(variable IN LISTS cached)
  unset(${variable} CACHE)
endforeach()

set(MPI_CXX_SKIP_MPICXX ON)
set(MPI_SKIP_GUESSING ON)
find_package(MPI QUIET COMPONENTS C)
if(NOT MPI_C_FOUND)
  if(ADAREDUCE_MPI STREQUAL "AUTO")
    message(STATUS "adareduce: no MPI found, the module _mpi is not built")
    return()
  endif()
  message(FATAL_ERROR
    "adareduce: ${MPI_C_COMPILER} (${ADAREDUCE_MPI_REASON}) is no MPI compiler wrapper that CMake can "
    "use: no program that includes mpi.h and calls MPI_Init compiles and links with what it says. "
    "Set ADAREDUCE_MPI to the path of an mpicc that works, or to 'off' to build without MPI.")
endif()

# The wrapper's own run path would point into pip's temporary environment.
string(REGEX REPLACE "-Wl,--?rpath( +-Wl,|,|=)[^ ]+|-Wl,--(enable|disable)-new-dtags" ""
  flags "${MPI_C_LINK_FLAGS}")
string(STRIP "${flags}" flags)
set_property(TARGET MPI::MPI_C PROPERTY INTERFACE_LINK_OPTIONS "$<$<BOOL:${flags}>:SHELL:${flags}>")

try_run(ADAREDUCE_PROBE_RAN ADAREDUCE_PROBE_COMPILED
  SOURCES "${CMAKE_CURRENT_LIST_DIR}/mpi_probe.c"
  LINK_LIBRARIES MPI::MPI_C ${CMAKE_DL_LIBS}
  COMPILE_OUTPUT_VARIABLE compile_output
  RUN_OUTPUT_VARIABLE run_output)
if(NOT ADAREDUCE_PROBE_COMPILED OR NOT ADAREDUCE_PROBE_RAN EQUAL 0)
  message(FATAL_ERROR
    "adareduce: a small MPI program made by ${MPI_C_COMPILER} does not compile or does not start here.\n"
    "${compile_output}\n${run_output}")
endif()
foreach(word IN ITEMS LIBRARY VENDOR VERSION)
  string(REGEX MATCH "adareduce-${word}=([^\n]*)" matched "${run_output}")
  set(ADAREDUCE_MPI_${word} "${CMAKE_MATCH_1}")
endforeach()
cmake_path(GET ADAREDUCE_MPI_LIBRARY FILENAME ADAREDUCE_MPI_SONAME)
cmake_path(GET ADAREDUCE_MPI_LIBRARY PARENT_PATH folder)

# <environment>/lib, seen from <environment>/lib/pythonX.Y/site-packages/adareduce.
set(ADAREDUCE_MPI_RPATH "$ORIGIN/../../..")
if(ADAREDUCE_MPI_PLACE STREQUAL "outside" AND NOT folder IN_LIST CMAKE_C_IMPLICIT_LINK_DIRECTORIES)
  list(PREPEND ADAREDUCE_MPI_RPATH "${folder}")
endif()
set(ADAREDUCE_HAVE_MPI ON)
message(STATUS "adareduce: MPI is ${ADAREDUCE_MPI_VENDOR} ${ADAREDUCE_MPI_VERSION}, ${ADAREDUCE_MPI_LIBRARY}")
