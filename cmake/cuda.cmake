# Finds out whether `_cuda` is built and makes the library adareduce_cuda of everything that needs CUDA.
#
# In:  ADAREDUCE_CUDA: AUTO (where there is an nvcc), ON, OFF, or EMULATED: the same sources for
#      tests/cuda_emulation, which runs kernels on the CPU, slowly; for tests only.
#      CMAKE_CUDA_ARCHITECTURES, e.g. 90 for one architecture
# Out: ADAREDUCE_HAVE_CUDA, ADAREDUCE_CUDA_VERSION, ADAREDUCE_CUDA_REASON, target adareduce_cuda

set(ADAREDUCE_HAVE_CUDA OFF)
set(ADAREDUCE_CUDA_VERSION "")
set(kernel_sources)
list(TRANSFORM kernel_sources PREPEND csrc/kernels/cuda/)
set(host_sources
  csrc/engine/cuda/device_group.cpp
  csrc/transports/nccl/nccl_library.cpp
  csrc/transports/nccl/nccl_call.cpp
  csrc/transports/nccl/nccl_communicator.cpp)

if(ADAREDUCE_CUDA STREQUAL "OFF")
  set(ADAREDUCE_CUDA_REASON "ADAREDUCE_CUDA is OFF")
elseif(ADAREDUCE_CUDA STREQUAL "EMULATED")
  set(ADAREDUCE_CUDA_REASON "an emulation on the CPU, for tests")
  set(ADAREDUCE_CUDA_VERSION "emulated")
  set(ADAREDUCE_HAVE_CUDA ON)
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      # Ampere, Hopper and both Blackwells; what comes later compiles the PTX when it starts.
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 120)
    endif()
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    set(ADAREDUCE_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
    set(ADAREDUCE_CUDA_REASON "${CMAKE_CUDA_COMPILER}")
    set(ADAREDUCE_HAVE_CUDA ON)
  elseif(ADAREDUCE_CUDA STREQUAL "AUTO")
    set(ADAREDUCE_CUDA_REASON "no nvcc was found")
  else()
    message(FATAL_ERROR "adareduce: ADAREDUCE_CUDA is ${ADAREDUCE_CUDA}, but CMake finds no nvcc. "
      "Set CUDACXX to its path, or ADAREDUCE_CUDA to OFF.")
  endif()
endif()

if(NOT ADAREDUCE_HAVE_CUDA)
  message(STATUS "adareduce: the module _cuda is not built (${ADAREDUCE_CUDA_REASON})")
  return()
endif()
message(STATUS "adareduce: CUDA is ${ADAREDUCE_CUDA_VERSION} (${ADAREDUCE_CUDA_REASON}), "
  "architectures: ${CMAKE_CUDA_ARCHITECTURES}")

add_library(adareduce_cuda STATIC ${kernel_sources} ${host_sources})
target_link_libraries(adareduce_cuda PUBLIC adareduce_engine ${CMAKE_DL_LIBS})
if(ADAREDUCE_CUDA STREQUAL "EMULATED")
  set_source_files_properties(${kernel_sources} PROPERTIES LANGUAGE CXX)
  target_compile_options(adareduce_cuda PRIVATE -xc++)
  add_subdirectory(tests/cuda_emulation)
  target_link_libraries(adareduce_cuda PUBLIC cuda_emulation)
else()
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(adareduce_cuda PUBLIC CUDA::cudart_static)
  # Registers and spills of every kernel, for benchmarks/resources.py.
  target_compile_options(adareduce_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
endif()
