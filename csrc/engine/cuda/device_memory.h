#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/cuda/launch.h"

namespace adareduce::cuda {

/// Makes a GPU the current one of this thread, and the former one again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    ADAREDUCE_CUDA(cudaGetDevice(&former_));
    if (former_ != device) ADAREDUCE_CUDA(cudaSetDevice(device));
    device_ = device;
  }
  ~DeviceGuard() {
    if (former_ != device_) (void)cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  int device_ = 0;
};

/// Lets this thread allocate and look at events while another thread, or this one, captures a
/// stream that has nothing to do with it.
class RelaxedCapture {
 public:
  RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Memory of the current GPU. Uninitialised. Freeing waits for the GPU.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(std::int64_t bytes) : bytes_(bytes) {
    if (bytes > 0) ADAREDUCE_CUDA(cudaMalloc(&data_, static_cast<std::size_t>(bytes)));
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) (void)cudaFree(data_);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  void* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }
  template <typename T>
  T* at(std::int64_t byte_offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
  }
  /// Forgets the memory without giving it back.
  void leak() {
    data_ = nullptr;
    bytes_ = 0;
  }

 private:
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

/// A number in host memory that kernels can write, too.
class MappedWord {
 public:
  MappedWord() {
    void* data = nullptr;
    ADAREDUCE_CUDA(cudaHostAlloc(&data, sizeof(std::uint32_t), cudaHostAllocMapped));
    on_host_ = static_cast<std::uint32_t*>(data);
    *on_host_ = 0;
    ADAREDUCE_CUDA(cudaHostGetDevicePointer(&data, on_host_, 0));
    on_device_ = static_cast<std::uint32_t*>(data);
  }
  ~MappedWord() { (void)cudaFreeHost(on_host_); }
  MappedWord(const MappedWord&) = delete;
  MappedWord& operator=(const MappedWord&) = delete;

  std::uint32_t* on_device() const { return on_device_; }
  std::uint32_t read() const { return __atomic_load_n(on_host_, __ATOMIC_ACQUIRE); }
  void write(std::uint32_t value) { __atomic_store_n(on_host_, value, __ATOMIC_RELEASE); }

 private:
  std::uint32_t* on_host_ = nullptr;
  std::uint32_t* on_device_ = nullptr;
};

/// A stream of the current GPU that does not wait for the legacy one, before others in priority.
class OwnStream {
 public:
  OwnStream() {
    int least = 0, greatest = 0;
    ADAREDUCE_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    ADAREDUCE_CUDA(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
  }
  ~OwnStream() { (void)cudaStreamDestroy(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  cudaStream_t native() const { return stream_; }
  Stream stream() const { return {stream_}; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace adareduce::cuda
