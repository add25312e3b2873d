# Writes _build_info.py, from which adareduce.info and adareduce.mpi_library learn what they were built of.

function(python_string out text)
  string(REPLACE "\\" "\\\\" text "${text}")
  string(REPLACE "\"" "\\\"" text "${text}")
  set(${out} "\"${text}\"" PARENT_SCOPE)
endfunction()

set(commit "unknown")
find_package(Git QUIET)
# Only this project's own repository counts, not one that happens to lie around an unpacked archive.
if(Git_FOUND AND EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.git")
  execute_process(
    COMMAND "${GIT_EXECUTABLE}" describe --always --dirty --exclude=*
    WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
    OUTPUT_VARIABLE described OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(described)
    set(commit "${described}")
  endif()
endif()

# A list would be cut by the loop below.
string(REPLACE ";" " " cuda_architectures "${CMAKE_CUDA_ARCHITECTURES}")
set(lines "\"\"\"What this build was made of. Written by CMake.\"\"\"\n\nBUILD = {\n")
foreach(pair IN ITEMS
    "compiler=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    "build_type=${CMAKE_BUILD_TYPE}" "commit=${commit}" "mpi_reason=${ADAREDUCE_MPI_REASON}"
    "cuda=${ADAREDUCE_CUDA_VERSION}" "cuda_reason=${ADAREDUCE_CUDA_REASON}"
    "cuda_architectures=${cuda_architectures}")
  string(REGEX MATCH "^([^=]*)=(.*)$" matched "${pair}")
  set(key "${CMAKE_MATCH_1}")
  python_string(text "${CMAKE_MATCH_2}")
  string(APPEND lines "    \"${key}\": ${text},\n")
endforeach()
string(APPEND lines "}\n\n")

if(ADAREDUCE_HAVE_MPI)
  set(library "${ADAREDUCE_MPI_LIBRARY}")
  set(mpicc "${MPI_C_COMPILER}")
  if(ADAREDUCE_MPI_PLACE STREQUAL "build")
    # Gone after the build; a path below /tmp that is looked up later could be anybody's.
    set(library "")
    set(mpicc "")
  endif()
  string(APPEND lines "MPI = {\n")
  foreach(pair IN ITEMS
      "vendor=${ADAREDUCE_MPI_VENDOR}" "version=${ADAREDUCE_MPI_VERSION}"
      "soname=${ADAREDUCE_MPI_SONAME}" "place=${ADAREDUCE_MPI_PLACE}"
      "library=${library}" "mpicc=${mpicc}")
    string(REGEX MATCH "^([^=]*)=(.*)$" matched "${pair}")
    set(key "${CMAKE_MATCH_1}")
    python_string(text "${CMAKE_MATCH_2}")
    string(APPEND lines "    \"${key}\": ${text},\n")
  endforeach()
  string(APPEND lines "}\n")
else()
  string(APPEND lines "MPI = None\n")
endif()

set(ADAREDUCE_BUILD_INFO "${CMAKE_CURRENT_BINARY_DIR}/_build_info.py")
file(CONFIGURE OUTPUT "${ADAREDUCE_BUILD_INFO}" CONTENT "${lines}" @ONLY)
