// Devices and errors.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace cuda_emulation {
namespace {

constexpr int kMultiprocessors = 4;
thread_local cudaError_t last_error = cudaSuccess;
thread_local int device = 0;
std::atomic<std::int64_t> waits{0};

}  // namespace

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

void say(const std::string& text) { std::fprintf(stderr, "cuda_emulation: %s\n", text.c_str()); }

void fail(const std::string& text) {
  say(text);
  std::abort();
}

int current_device() { return device; }

int device_count() {
  static const int count = [] {
    const char* text = std::getenv("CUDA_EMULATION_DEVICES");
    return text == nullptr ? 1 : std::clamp(std::atoi(text), 0, 64);
  }();
  return count;
}

void count_host_wait() { ++waits; }
std::int64_t host_waits() { return waits; }

cudaError_t function_attributes(cudaFuncAttributes* attributes) {
  *attributes = {0, 0, 0, 1024, 32, 90, 90};
  return cudaSuccess;
}

cudaError_t blocks_per_multiprocessor(int* blocks, int threads) {
  if (threads < 1 || threads > 1024) return note(cudaErrorInvalidValue);
  *blocks = std::min(2048 / threads, 32);
  return cudaSuccess;
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define X(name, value, text) \
  case name:                 \
    return #name;
    CUDA_EMULATION_ERRORS(X)
#undef X
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
#define X(name, value, text) \
  case name:                 \
    return text;
    CUDA_EMULATION_ERRORS(X)
#undef X
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return *count == 0 ? note(cudaErrorNoDevice) : cudaSuccess;
}
cudaError_t cudaGetDevice(int* number) {
  *number = device;
  return device_count() == 0 ? note(cudaErrorNoDevice) : cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
  if (number < 0 || number >= device_count()) return note(cudaErrorInvalidDevice);
  device = number;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int number) {
  if (number < 0 || number >= device_count()) return note(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "CUDA emulation on the CPU");
  std::snprintf(properties->uuid.bytes, sizeof properties->uuid.bytes, "gpu-%d", number);
  size_t available = 0;
  cudaMemGetInfo(&available, &properties->totalGlobalMem);
  properties->sharedMemPerBlock = 48 << 10;
  properties->regsPerBlock = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  for (int i = 0; i < 3; ++i) {
    properties->maxThreadsDim[i] = i < 2 ? 1024 : 64;
    properties->maxGridSize[i] = i < 1 ? 0x7fffffff : 65535;
  }
  properties->major = 9;
  properties->multiProcessorCount = kMultiprocessors;
  properties->l2CacheSize = 1 << 20;
  properties->canMapHostMemory = properties->unifiedAddressing = properties->concurrentKernels = 1;
  properties->pciBusID = number + 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (number < 0 || number >= device_count()) return note(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
      return *value = 1024, cudaSuccess;
    case cudaDevAttrMaxGridDimX:
      return *value = 0x7fffffff, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = 48 << 10, cudaSuccess;
    case cudaDevAttrWarpSize:
      return *value = 32, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = kMultiprocessors, cudaSuccess;
    case cudaDevAttrL2CacheSize:
      return *value = 1 << 20, cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return *value = 2048, cudaSuccess;
    case cudaDevAttrClockRate:
    case cudaDevAttrMemoryClockRate:
      return *value = 1000000, cudaSuccess;
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
      return *value = 1, cudaSuccess;
    case cudaDevAttrPciBusId:
      return *value = number + 1, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrIntegrated:
    case cudaDevAttrComputeMode:
    case cudaDevAttrPciDeviceId:
    case cudaDevAttrPciDomainId:
    case cudaDevAttrComputeCapabilityMinor:
    case cudaDevAttrCooperativeLaunch:
      return *value = 0, cudaSuccess;
  }
  return note(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int number) {
  if (number < 0 || number >= device_count()) return note(cudaErrorInvalidDevice);
  std::snprintf(text, static_cast<std::size_t>(length), "0000:%02X:00.0", number + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int number, int peer) {
  if (std::min(number, peer) < 0 || std::max(number, peer) >= device_count())
    return note(cudaErrorInvalidDevice);
  *can = number != peer;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  if (flags != 0) return note(cudaErrorInvalidValue);
  if (peer < 0 || peer >= device_count() || peer == device) return note(cudaErrorInvalidDevice);
  static std::atomic<bool> enabled[64][64];
  return enabled[device][peer].exchange(true) ? note(cudaErrorPeerAccessAlreadyEnabled)
                                              : cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  const cudaError_t refusal = check_unsafe_call();
  if (refusal != cudaSuccess) return note(refusal);
  count_host_wait();
  wait_for_all_streams(device);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
