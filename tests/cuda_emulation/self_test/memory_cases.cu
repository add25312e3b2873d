// Memory: poison, guards, copies, failures and other processes.
#include <cmath>
#include <cstring>
#include <vector>

#include "self_test.h"

namespace {

void fresh_memory_is_poisoned() {
  float* floats = device_array<float>(1000);
  for (int i = 0; i < 1000; ++i) EXPECT(std::isnan(floats[i]));
  double* pinned = nullptr;
  OK(cudaHostAlloc(&pinned, 80, cudaHostAllocMapped));
  for (int i = 0; i < 10; ++i) EXPECT(std::isnan(pinned[i]));
  double* mapped = nullptr;
  OK(cudaHostGetDevicePointer(&mapped, pinned, 0));
  EXPECT_ERROR(cudaErrorInvalidValue, cudaHostGetDevicePointer(&mapped, floats, 0));
  EXPECT(cuda_emulation::device_bytes() == 4000 && cuda_emulation::pinned_bytes() == 80);
  EXPECT_ERROR(cudaErrorInvalidValue, cudaFree(pinned));
  EXPECT_ERROR(cudaErrorInvalidValue, cudaFree(floats + 1));
  OK(cudaFree(floats));
  OK(cudaFreeHost(pinned));
  OK(cudaFree(nullptr));
  EXPECT(cuda_emulation::device_bytes() == 0 && cuda_emulation::pinned_bytes() == 0);
}

void copies_know_their_sides() {
  const cudaStream_t stream = new_stream();
  int* there = device_array<int>(100);
  std::vector<int> here(100, 5);
  Gate gate;
  gate.hold(stream);
  OK(cudaMemcpyAsync(there, here.data(), 400, cudaMemcpyHostToDevice, stream));
  here.assign(100, 6);  // pageable memory has been read
  gate.release();
  OK(cudaStreamSynchronize(stream));
  EXPECT(there[0] == 5 && there[99] == 5);
  OK(cudaMemcpy(there, here.data(), 400, cudaMemcpyDefault));
  EXPECT(there[0] == 6 && there[99] == 6);
  EXPECT_ERROR(cudaErrorInvalidValue, cudaMemcpy(there, here.data(), 404, cudaMemcpyHostToDevice));
  EXPECT_ERROR(cudaErrorInvalidValue, cudaMemset(there + 1, 0, 400));
  EXPECT_ERROR(cudaErrorInvalidValue, cudaMemcpy(here.data(), there, 4, cudaMemcpyHostToDevice));
  EXPECT_ERROR(cudaErrorInvalidMemcpyDirection,
               cudaMemcpy(there, here.data(), 4, static_cast<cudaMemcpyKind>(9)));
}

void allocations_fail_when_told_to() {
  void* memory = nullptr;
  cuda_emulation::fail_allocation_after(2);
  OK(cudaMalloc(&memory, 8));
  OK(cudaMallocHost(&memory, 8));
  EXPECT_ERROR(cudaErrorMemoryAllocation, cudaMalloc(&memory, 8));
  EXPECT(memory == nullptr);
  OK(cudaMalloc(&memory, 8));
  EXPECT_ERROR(cudaErrorMemoryAllocation, cudaMalloc(&memory, size_t{1} << 50));
}

/// With CUDA_EMULATION_FAIL_ALLOCATION=1.
void allocations_fail_by_environment() {
  void* memory = nullptr;
  OK(cudaMalloc(&memory, 8));
  EXPECT_ERROR(cudaErrorMemoryAllocation, cudaMalloc(&memory, 8));
  OK(cudaMalloc(&memory, 8));
}

__global__ void twice(int* numbers, int count) {
  for (int i = 0; i < count; ++i) numbers[i] *= 2;
}

std::string hexadecimal(const cudaIpcMemHandle_t& handle) {
  std::string text;
  char digits[3];
  for (const char byte : handle.reserved) {
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(byte));
    text += digits;
  }
  return text;
}

void processes_share_device_memory() {
  int *first = device_array<int>(5000), *second = device_array<int>(3), *freed = nullptr;
  for (int i = 0; i < 5000; ++i) first[i] = i;
  cudaIpcMemHandle_t handles[3];
  OK(cudaIpcGetMemHandle(&handles[0], first));
  OK(cudaIpcGetMemHandle(&handles[1], second));
  void* pointer = nullptr;
  EXPECT_ERROR(cudaErrorInvalidValue, cudaIpcGetMemHandle(&handles[2], first + 1));
  EXPECT_ERROR(cudaErrorDeviceUninitialized,
               cudaIpcOpenMemHandle(&pointer, handles[0], cudaIpcMemLazyEnablePeerAccess));
  freed = device_array<int>(5);
  OK(cudaIpcGetMemHandle(&handles[2], freed));
  OK(cudaFree(freed));
  std::string command = "'" + program + "' other_process ";
  for (const cudaIpcMemHandle_t& handle : handles) command += hexadecimal(handle);
  EXPECT(std::system(command.c_str()) == 0);
  for (int i = 0; i < 5000; ++i) EXPECT(first[i] == 2 * i);
  EXPECT(second[0] == 7 && second[1] == -1);
  OK(cudaFree(first));
  OK(cudaFree(second));
}

void other_process() {
  const std::string text = std::getenv("SELF_TEST_ARGUMENT");
  cudaIpcMemHandle_t handles[3];
  for (size_t i = 0; i < sizeof handles; ++i)
    reinterpret_cast<char*>(handles)[i] =
        static_cast<char>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  int *first = nullptr, *second = nullptr, *again = nullptr;
  const auto open = [](int** to, const cudaIpcMemHandle_t& handle) {
    return cudaIpcOpenMemHandle(reinterpret_cast<void**>(to), handle,
                                cudaIpcMemLazyEnablePeerAccess);
  };
  OK(open(&first, handles[0]));
  OK(open(&second, handles[1]));
  OK(open(&again, handles[0]));
  EXPECT(again == first);
  OK(cudaIpcCloseMemHandle(again));
  EXPECT_ERROR(cudaErrorMapBufferObjectFailed, open(&again, handles[2]));
  const cudaStream_t stream = new_stream();
  OK(launch(twice, 1, 1, stream, first, 5000));
  OK(cudaStreamSynchronize(stream));
  second[0] = 7;
  EXPECT_ERROR(cudaErrorInvalidValue, cudaFree(first));
  OK(cudaIpcCloseMemHandle(first));
  EXPECT_ERROR(cudaErrorInvalidValue, cudaIpcCloseMemHandle(first));
  OK(cudaIpcCloseMemHandle(second));
}

__global__ void write(char* to) { *to = 0; }
template <int offset>
void mistake_write() {
  char* memory = device_array<char>(100);
  OK(launch(write, 1, 1, nullptr, memory + offset));
  OK(cudaFree(memory));
}
void mistake_freed_memory() {
  char* memory = device_array<char>(100);
  OK(cudaFree(memory));
  OK(launch(write, 1, 1, nullptr, memory));
  OK(cudaDeviceSynchronize());
}

}  // namespace

const Case memory_cases[] = {{"fresh_memory_is_poisoned", fresh_memory_is_poisoned},
                             {"copies_know_their_sides", copies_know_their_sides},
                             {"allocations_fail_when_told_to", allocations_fail_when_told_to},
                             {"allocations_fail_by_environment", allocations_fail_by_environment},
                             {"processes_share_device_memory", processes_share_device_memory},
                             {"other_process", other_process},
                             {"mistake_write_behind", mistake_write<100>},
                             {"mistake_write_before", mistake_write<-1>},
                             {"mistake_freed_memory", mistake_freed_memory},
                             {nullptr, nullptr}};
