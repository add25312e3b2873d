# Looks for an nvcc that works together with the C++ compiler.

include(CheckLanguage)

# `out`: path of the compiler, empty where there is none; `why`: in words, what was found or is missing.
function(adareduce_find_nvcc out why)
  set(${out} "" PARENT_SCOPE)
  # Asked anew each time: a toolkit may have been installed since this folder was configured.
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(${out} "${CMAKE_CUDA_COMPILER}" PARENT_SCOPE)
    set(${why} "${CMAKE_CUDA_COMPILER}" PARENT_SCOPE)
    return()
  endif()
  find_program(ADAREDUCE_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
  if(ADAREDUCE_NVCC)
    set(${why} "${ADAREDUCE_NVCC} does not compile with ${CMAKE_CXX_COMPILER} (see \
CMakeFiles/CMakeConfigureLog.yaml in the build folder)" PARENT_SCOPE)
  else()
    set(${why} "there is no nvcc: not in CUDACXX, not on PATH, not in CUDA_HOME" PARENT_SCOPE)
  endif()
endfunction()

# Ampere, Hopper and both Blackwells as far as this nvcc knows them, and PTX of the last but one: it is
# compiled by the driver for chips that come later, and for those between that have no code of theirs.
function(adareduce_default_architectures nvcc out)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "release ([0-9.]+)" matched "${text}")
  if(CMAKE_MATCH_1 VERSION_GREATER_EQUAL 12.8)
    set(${out} 80-real 90-real 100 120-real PARENT_SCOPE)
  else()
    set(${out} 80-real 90 PARENT_SCOPE)
  endif()
endfunction()
