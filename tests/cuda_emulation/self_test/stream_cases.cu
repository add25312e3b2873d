// Streams, events, devices and errors.

#include "self_test.h"

namespace {

__global__ void append(int* list, int value) { list[++list[0]] = value; }

void streams_work_in_order_and_behind_the_hosts_back() {
  int* list = device_array<int>(101);
  const cudaStream_t stream = new_stream();
  Gate gate;
  gate.hold(stream);  // the host only gets to release() if nothing below waits
  OK(cudaMemsetAsync(list, 0, sizeof(int), stream));
  for (int i = 1; i <= 100; ++i) OK(launch(append, 1, 1, stream, list, i));
  EXPECT_ERROR(cudaErrorNotReady, cudaStreamQuery(stream));
  EXPECT(list[1] == -1);  // poison
  gate.release();
  OK(cudaStreamSynchronize(stream));
  OK(cudaStreamQuery(stream));
  for (int i = 1; i <= 100; ++i) EXPECT(list[i] == i);
}

void events_order_streams_by_their_last_record() {
  int* list = device_array<int>(8);
  OK(cudaMemset(list, 0, sizeof(int)));
  OK(cudaDeviceSynchronize());
  const cudaStream_t first = new_stream(), second = new_stream(), third = new_stream();
  const cudaEvent_t event = new_event();
  OK(cudaEventQuery(event));  // never recorded: nothing to wait for
  OK(cudaStreamWaitEvent(third, event));
  OK(launch(append, 1, 1, third, list, 1));
  OK(cudaStreamSynchronize(third));
  Gate gate;
  gate.hold(first);
  OK(launch(append, 1, 1, first, list, 2));
  OK(cudaEventRecord(event, first));
  OK(cudaStreamWaitEvent(second, event));
  OK(launch(append, 1, 1, second, list, 3));
  EXPECT_ERROR(cudaErrorNotReady, cudaEventQuery(event));
  OK(cudaEventRecord(event, third));  // the wait above keeps what it found
  OK(cudaEventSynchronize(event));
  EXPECT_ERROR(cudaErrorNotReady, cudaStreamQuery(second));
  gate.release();
  OK(cudaStreamSynchronize(second));
  for (int i = 1; i <= 3; ++i) EXPECT(list[i] == i);
  OK(cudaEventDestroy(event));
}

void the_legacy_stream_orders_blocking_streams_only() {
  int* list = device_array<int>(8);
  OK(cudaMemset(list, 0, sizeof(int)));
  OK(cudaDeviceSynchronize());
  cudaStream_t blocking = nullptr;
  OK(cudaStreamCreate(&blocking));
  const cudaStream_t free = new_stream();
  Gate gate;
  gate.hold(blocking);
  OK(launch(append, 1, 1, blocking, list, 2));
  OK(launch(append, 1, 1, nullptr, list, 3));
  OK(launch(append, 1, 1, blocking, list, 4));
  OK(launch(append, 1, 1, free, list, 1));
  OK(cudaStreamSynchronize(free));
  EXPECT(list[0] == 1);
  gate.release();
  OK(cudaStreamSynchronize(blocking));
  for (int i = 1; i <= 4; ++i) EXPECT(list[i] == i);
}

void a_destroyed_stream_finishes_its_work() {
  int* list = device_array<int>(4);
  OK(cudaMemset(list, 0, sizeof(int)));
  const cudaStream_t stream = new_stream(), other = new_stream();
  const cudaEvent_t event = new_event();
  OK(cudaDeviceSynchronize());
  Gate gate;
  gate.hold(stream);
  OK(launch(append, 1, 1, stream, list, 5));
  OK(cudaEventRecord(event, stream));
  OK(cudaStreamDestroy(stream));
  OK(cudaStreamWaitEvent(other, event));
  EXPECT_ERROR(cudaErrorNotReady, cudaStreamQuery(other));
  gate.release();
  OK(cudaStreamSynchronize(other));
  EXPECT(list[1] == 5);
}

void elapsed_time_is_that_between_records() {
  cudaEvent_t start = nullptr, end = nullptr;
  const cudaStream_t stream = new_stream();
  float milliseconds = -1;
  OK(cudaEventCreate(&start));
  OK(cudaEventCreate(&end));
  EXPECT_ERROR(cudaErrorInvalidResourceHandle, cudaEventElapsedTime(&milliseconds, start, end));
  const std::uint64_t before = cuda_emulation::now_ns();
  OK(cudaEventRecord(start, stream));
  Gate gate;
  gate.hold(stream);
  OK(cudaEventRecord(end, stream));
  EXPECT_ERROR(cudaErrorNotReady, cudaEventElapsedTime(&milliseconds, start, end));
  OK(cudaEventSynchronize(start));
  const std::uint64_t started = cuda_emulation::now_ns();
  while (cuda_emulation::now_ns() - started < 2000000) {
  }
  const std::uint64_t released = cuda_emulation::now_ns();
  gate.release();
  OK(cudaEventSynchronize(end));
  const std::uint64_t after = cuda_emulation::now_ns();
  OK(cudaEventElapsedTime(&milliseconds, start, end));
  const double rounding = 1e-6 * milliseconds;  // of a float, by far
  EXPECT(milliseconds + rounding >= 1e-6 * static_cast<double>(released - started));
  EXPECT(milliseconds - rounding <= 1e-6 * static_cast<double>(after - before));
  EXPECT_ERROR(cudaErrorInvalidResourceHandle,
               cudaEventElapsedTime(&milliseconds, start, new_event()));
}

void host_waits_are_counted() {
  const cudaStream_t stream = new_stream();
  const cudaEvent_t event = new_event();
  int* list = device_array<int>(4);
  void* pinned = nullptr;
  OK(cudaMallocHost(&pinned, 16));
  const std::int64_t before = cuda_emulation::host_waits();
  OK(cudaMemsetAsync(list, 0, 16, stream));
  OK(launch(append, 1, 1, stream, list, 1));
  OK(cudaMemcpyAsync(pinned, list, 16, cudaMemcpyDeviceToHost, stream));
  OK(cudaEventRecord(event, stream));
  OK(cudaStreamWaitEvent(new_stream(), event));
  (void)cudaEventQuery(event);
  EXPECT(cuda_emulation::host_waits() == before);
  int pageable[4];
  OK(cudaMemcpyAsync(pageable, list, 16, cudaMemcpyDeviceToHost, stream));
  EXPECT(cuda_emulation::host_waits() == before + 1 && pageable[1] == 1);
  OK(cudaStreamSynchronize(stream));
  OK(cudaEventSynchronize(event));
  OK(cudaDeviceSynchronize());
  OK(cudaFree(list));
  EXPECT(cuda_emulation::host_waits() == before + 5);
}

void errors_are_cudas() {
  EXPECT(std::string(cudaGetErrorName(cudaErrorMemoryAllocation)) == "cudaErrorMemoryAllocation");
  EXPECT(std::string(cudaGetErrorString(cudaErrorMemoryAllocation)) == "out of memory");
  OK(cudaGetLastError());
  EXPECT_ERROR(cudaErrorInvalidConfiguration, launch(append, 1, 1025, nullptr, nullptr, 0));
  EXPECT_ERROR(cudaErrorInvalidConfiguration, launch(append, 0, 1, nullptr, nullptr, 0));
  OK(cudaStreamQuery(nullptr));  // a success does not clear the error
  EXPECT_ERROR(cudaErrorInvalidConfiguration, cudaPeekAtLastError());
  EXPECT_ERROR(cudaErrorInvalidConfiguration, cudaGetLastError());
  OK(cudaGetLastError());
  EXPECT_ERROR(cudaErrorInvalidResourceHandle,
               cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(0x7)));
  EXPECT_ERROR(cudaErrorInvalidDevice, cudaSetDevice(7));
  int blocks = 0;
  OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, append, 256, 0));
  EXPECT(blocks == 8);
}

/// With CUDA_EMULATION_DEVICES=2.
void streams_belong_to_a_device() {
  int count = 0, device = -1;
  OK(cudaGetDeviceCount(&count));
  EXPECT(count == 2);
  const cudaStream_t stream = new_stream();
  const cudaEvent_t event = new_event();
  int* list = device_array<int>(2);
  OK(cudaSetDevice(1));
  OK(cudaGetDevice(&device));
  EXPECT(device == 1);
  EXPECT_ERROR(cudaErrorInvalidResourceHandle, launch(append, 1, 1, stream, list, 1));
  EXPECT_ERROR(cudaErrorInvalidResourceHandle, cudaEventRecord(event, new_stream()));
  OK(cudaEventRecord(event, stream));
  OK(cudaStreamWaitEvent(new_stream(), event));  // waiting across devices is allowed
  cudaPointerAttributes attributes;
  OK(cudaPointerGetAttributes(&attributes, list));
  EXPECT(attributes.type == cudaMemoryTypeDevice && attributes.device == 0);
  OK(cudaDeviceEnablePeerAccess(0, 0));
  EXPECT_ERROR(cudaErrorPeerAccessAlreadyEnabled, cudaDeviceEnablePeerAccess(0, 0));
  cudaDeviceProp one, two;
  OK(cudaGetDeviceProperties(&one, 0));
  OK(cudaGetDeviceProperties(&two, 1));
  EXPECT(std::string(one.uuid.bytes) != two.uuid.bytes && one.multiProcessorCount > 0);
}

void mistake_destroyed_stream() {
  const cudaStream_t stream = new_stream();
  OK(cudaStreamDestroy(stream));
  (void)cudaMemsetAsync(nullptr, 0, 0, stream);
}
void mistake_destroyed_event() {
  const cudaEvent_t event = new_event();
  OK(cudaEventDestroy(event));
  (void)cudaEventQuery(event);
}

}  // namespace

const Case stream_cases[] = {
    {"streams_work_in_order_and_behind_the_hosts_back",
     streams_work_in_order_and_behind_the_hosts_back},
    {"events_order_streams_by_their_last_record", events_order_streams_by_their_last_record},
    {"the_legacy_stream_orders_blocking_streams_only",
     the_legacy_stream_orders_blocking_streams_only},
    {"a_destroyed_stream_finishes_its_work", a_destroyed_stream_finishes_its_work},
    {"elapsed_time_is_that_between_records", elapsed_time_is_that_between_records},
    {"host_waits_are_counted", host_waits_are_counted},
    {"errors_are_cudas", errors_are_cudas},
    {"streams_belong_to_a_device", streams_belong_to_a_device},
    {"mistake_destroyed_stream", mistake_destroyed_stream},
    {"mistake_destroyed_event", mistake_destroyed_event},
    {nullptr, nullptr}};
