#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>

/// Ends the process with the line that failed.
#define EXPECT(condition)                                                          \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)
/// The call's result; cudaSuccess for OK.
#define EXPECT_ERROR(wanted, call)                                                                 \
  do {                                                                                             \
    const cudaError_t got = (call);                                                                \
    if (got != wanted) {                                                                           \
      std::fprintf(stderr, "%s:%d: %s is %s\n", __FILE__, __LINE__, #call, cudaGetErrorName(got)); \
      std::exit(1);                                                                                \
    }                                                                                              \
  } while (false)
#define OK(call) EXPECT_ERROR(cudaSuccess, call)

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, cudaStream_t stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename T>
T* device_array(size_t numel) {
  T* array = nullptr;
  OK(cudaMalloc(&array, numel * sizeof(T)));
  return array;
}
inline cudaStream_t new_stream() {
  cudaStream_t stream = nullptr;
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}
inline cudaEvent_t new_event() {
  cudaEvent_t event = nullptr;
  OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

/// Holds up the stream that runs `wait_for_gate` until the host opens it.
struct Gate {
  std::atomic<bool> open{false};
  void hold(cudaStream_t stream) { OK(cudaLaunchHostFunc(stream, wait, this)); }
  static void wait(void* gate) { static_cast<Gate*>(gate)->open.wait(false); }
  void release() {
    open = true;
    open.notify_all();
  }
};

struct Case {
  const char* name;
  void (*run)();
};
extern const Case device_cases[], stream_cases[], graph_cases[], memory_cases[];
extern std::string program;  ///< to start another process
