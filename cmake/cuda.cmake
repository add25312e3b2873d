# Finds out whether `_cuda` is built and makes the library adareduce_cuda of everything that needs CUDA.
#
# In:  ADAREDUCE_CUDA: AUTO (where there is an nvcc that works), ON, OFF, or EMULATED: the same sources
#      for tests/cuda_emulation, which runs kernels on the CPU, slowly; for tests only.
#      CMAKE_CUDA_ARCHITECTURES (or the environment variable CUDAARCHS), e.g. 90 for one architecture
#      ADAREDUCE_CUDA_RESOURCES: print registers and spills of every kernel
# Out: ADAREDUCE_HAVE_CUDA, ADAREDUCE_CUDA_VERSION, ADAREDUCE_CUDA_REASON, target adareduce_cuda

option(ADAREDUCE_CUDA_RESOURCES "Let ptxas print what kernels use (benchmarks/kernel_resources.py)" OFF)

set(ADAREDUCE_HAVE_CUDA OFF)
set(ADAREDUCE_CUDA_VERSION "")
set(kernel_sources
  cuda_kernels.cu gain.cu grid.cpp group_stats.cu move.cu pack.cu pair.cu peer_adasum.cu
  peer_coefficients.cu peer_combine.cu peer_copy.cu peer_gram.cu peer_levels.cu peer_reduce.cu
  reduce.cu reduce_squares.cu slots.cu)
list(TRANSFORM kernel_sources PREPEND csrc/kernels/cuda/)
set(host_sources
  csrc/engine/cuda/cuda_plugin.cpp
  csrc/engine/cuda/describe.cpp
  csrc/engine/cuda/device_execution.cpp
  csrc/engine/cuda/device_group.cpp
  csrc/engine/cuda/device_plan.cpp
  csrc/engine/cuda/standalone_tables.cpp
  csrc/engine/cuda/virtual_ranks.cpp
  csrc/transports/cuda_peer/describe_device.cpp
  csrc/transports/cuda_peer/peer_windows.cpp
  csrc/transports/nccl/nccl_library.cpp
  csrc/transports/nccl/nccl_call.cpp
  csrc/transports/nccl/nccl_communicator.cpp)

if(ADAREDUCE_CUDA STREQUAL "OFF")
  set(ADAREDUCE_CUDA_REASON "ADAREDUCE_CUDA is OFF")
elseif(ADAREDUCE_CUDA STREQUAL "EMULATED")
  set(ADAREDUCE_CUDA_REASON "an emulation on the CPU, for tests")
  set(ADAREDUCE_CUDA_VERSION "emulated")
  set(CMAKE_CUDA_ARCHITECTURES "")
  set(ADAREDUCE_HAVE_CUDA ON)
elseif(ADAREDUCE_CUDA STREQUAL "AUTO" OR ADAREDUCE_CUDA STREQUAL "ON")
  include("${CMAKE_CURRENT_LIST_DIR}/nvcc.cmake")
  adareduce_find_nvcc(nvcc ADAREDUCE_CUDA_REASON)
  if(nvcc)
    # Before enable_language, which would take the compiler's own default.
    if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
      adareduce_default_architectures("${nvcc}" CMAKE_CUDA_ARCHITECTURES)
    endif()
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    set(ADAREDUCE_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
    set(ADAREDUCE_HAVE_CUDA ON)
  elseif(ADAREDUCE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "adareduce: ADAREDUCE_CUDA is ON, but ${ADAREDUCE_CUDA_REASON}. "
      "Set CUDACXX to the path of an nvcc that works, or ADAREDUCE_CUDA to OFF.")
  endif()
else()
  message(FATAL_ERROR
    "adareduce: ADAREDUCE_CUDA must be AUTO, ON, OFF or EMULATED, got ${ADAREDUCE_CUDA}")
endif()

if(NOT ADAREDUCE_HAVE_CUDA)
  set(CMAKE_CUDA_ARCHITECTURES "")
  message(STATUS "adareduce: the module _cuda is not built (${ADAREDUCE_CUDA_REASON})")
  return()
endif()
message(STATUS "adareduce: the module _cuda is built, CUDA ${ADAREDUCE_CUDA_VERSION} "
  "(${ADAREDUCE_CUDA_REASON}), architectures: ${CMAKE_CUDA_ARCHITECTURES}")

add_library(adareduce_cuda STATIC ${kernel_sources} ${host_sources})
target_link_libraries(adareduce_cuda PUBLIC adareduce_engine ${CMAKE_DL_LIBS})
if(ADAREDUCE_CUDA STREQUAL "EMULATED")
  # GCC does not see that slices of ranks that do not exist are not used.
  target_compile_options(adareduce_cuda PRIVATE -xc++ -ffp-contract=off -Wno-maybe-uninitialized)
  add_subdirectory(tests/cuda_emulation)
  add_subdirectory(tests/cuda_emulation/nccl)
  target_link_libraries(adareduce_cuda PUBLIC cuda_emulation)
  set_source_files_properties(${kernel_sources} PROPERTIES LANGUAGE CXX)
else()
  # Host files that include cuda_runtime.h find it, and nothing of CUDA is linked at run time.
  target_link_libraries(adareduce_cuda PUBLIC CUDA::cudart_static)
  # As -ffp-contract=off for the CPU: where operations are fused, the source says so.
  target_compile_options(adareduce_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false>)
  if(ADAREDUCE_CUDA_RESOURCES)
    target_compile_options(adareduce_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
  endif()
endif()
