#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <random>

#include "transports/cuda_peer/cuda_call.h"
#include "transports/cuda_peer/device_facts.h"

namespace adareduce::cuda {
namespace {

cudaDeviceProp properties_of(int device) {
  cudaDeviceProp properties{};
  succeed(cudaGetDeviceProperties(&properties, device),
          concat("describe_device: reading the properties of GPU ", device));
  return properties;
}

std::string uuid_of(const cudaDeviceProp& properties) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const char byte : properties.uuid.bytes) {
    text += kDigits[static_cast<unsigned char>(byte) >> 4];
    text += kDigits[static_cast<unsigned char>(byte) & 15];
  }
  return text;
}

std::uint64_t number_of_this_process() {
  static const std::uint64_t number = [] {
    std::random_device random;
    return (static_cast<std::uint64_t>(random()) << 32) | random();
  }();
  return number;
}

bool memory_can_be_exported() {
  void* memory = nullptr;
  cudaIpcMemHandle_t handle;
  succeed(cudaMalloc(&memory, 1), "describe_device: allocating one byte");
  const bool can = cudaIpcGetMemHandle(&handle, memory) == cudaSuccess;
  if (!can) (void)cudaGetLastError();
  (void)cudaFree(memory);
  return can;
}

}  // namespace

DeviceFacts describe_device(int device) {
  succeed(cudaSetDevice(device), concat("describe_device: choosing GPU ", device));
  const cudaDeviceProp properties = properties_of(device);
  DeviceFacts facts;
  facts.pid = getpid();
  facts.process = number_of_this_process();
  facts.gpu = uuid_of(properties);
  facts.num_multiprocessors = properties.multiProcessorCount;
  succeed(cudaDriverGetVersion(&facts.driver_version),
          "describe_device: reading the driver's version");
  const char* const shares = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  facts.nccl_may_share_gpu = shares != nullptr && std::strcmp(shares, "1") == 0;
  const char* const host = std::getenv("NCCL_HOSTID");
  facts.nccl_host = host == nullptr ? "" : host;
  facts.can_share_memory = memory_can_be_exported();

  int count = 0;
  succeed(cudaGetDeviceCount(&count), "describe_device: counting the GPUs");
  for (int other = 0; other < count; ++other) {
    int can_read = 1;
    if (other != device)
      succeed(cudaDeviceCanAccessPeer(&can_read, device, other),
              concat("describe_device: asking whether GPU ", device, " reads GPU ", other));
    if (can_read == 0) facts.unreachable.push_back(uuid_of(properties_of(other)));
  }
  return facts;
}

}  // namespace adareduce::cuda
