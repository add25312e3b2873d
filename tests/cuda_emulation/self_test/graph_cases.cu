// Stream capture: what is recorded, how it is replayed, and what CUDA forbids meanwhile.
#include <cuda/atomic>
#include <thread>

#include "self_test.h"

namespace {

__global__ void add(const int* a, const int* b, int* out) { *out = *a + *b; }

using Flag = cuda::atomic_ref<unsigned, cuda::thread_scope_system>;
__global__ void meet(unsigned* mine, unsigned* theirs) {
  Flag(*theirs).fetch_add(1, cuda::memory_order_release);
  while (Flag(*mine).load(cuda::memory_order_acquire) == 0) {
  }
  Flag(*mine).fetch_sub(1, cuda::memory_order_relaxed);
}

void begin(cudaStream_t stream, cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) {
  OK(cudaStreamBeginCapture(stream, mode));
}
cudaStreamCaptureStatus status_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  OK(cudaStreamIsCapturing(stream, &status));
  return status;
}
/// Ends a capture that must fail like that, and leaves the stream usable.
void expect_failed_capture(cudaStream_t stream,
                           cudaError_t error = cudaErrorStreamCaptureInvalidated) {
  cudaGraph_t graph = reinterpret_cast<cudaGraph_t>(1);
  EXPECT_ERROR(error, cudaStreamEndCapture(stream, &graph));
  EXPECT(graph == nullptr && status_of(stream) == cudaStreamCaptureStatusNone);
  OK(cudaStreamSynchronize(stream));
}
cudaGraphExec_t end(cudaStream_t stream, size_t nodes) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  size_t count = 0;
  OK(cudaStreamEndCapture(stream, &graph));
  OK(cudaGraphGetNodes(graph, nullptr, &count));
  EXPECT(count == nodes);
  OK(cudaGraphInstantiate(&executable, graph));
  OK(cudaGraphDestroy(graph));  // the executable stays
  return executable;
}

void replays_follow_changed_inputs() {
  int* numbers = device_array<int>(6);
  OK(cudaMemset(numbers, 0, 6 * sizeof(int)));
  OK(cudaDeviceSynchronize());
  const cudaStream_t stream = new_stream(), side = new_stream();
  const cudaEvent_t forked = new_event(), joined = new_event();
  begin(stream);
  OK(launch(add, 1, 1, stream, numbers, numbers + 1, numbers + 2));
  OK(cudaEventRecord(forked, stream));
  OK(cudaStreamWaitEvent(side, forked));
  EXPECT(status_of(side) == cudaStreamCaptureStatusActive);
  OK(launch(add, 1, 1, side, numbers + 2, numbers + 2, numbers + 3));
  OK(cudaMemcpyAsync(numbers + 4, numbers + 2, sizeof(int), cudaMemcpyDeviceToDevice, stream));
  OK(cudaEventRecord(joined, side));
  OK(cudaStreamWaitEvent(stream, joined));
  OK(launch(add, 1, 1, stream, numbers + 3, numbers + 4, numbers + 5));
  OK(cudaMemsetAsync(numbers + 2, 0, sizeof(int), stream));
  const cudaGraphExec_t graph = end(stream, 5);
  for (int i = 0; i < 6; ++i) EXPECT(numbers[i] == 0);  // recorded, not executed
  EXPECT(status_of(side) == cudaStreamCaptureStatusNone);
  for (int i = 1; i <= 20; ++i) {
    const int inputs[2] = {i, 2 * i};
    OK(cudaMemcpyAsync(numbers, inputs, sizeof inputs, cudaMemcpyHostToDevice, stream));
    OK(cudaGraphLaunch(graph, stream));
    OK(cudaStreamSynchronize(stream));
    EXPECT(numbers[2] == 0 && numbers[3] == 6 * i && numbers[4] == 3 * i && numbers[5] == 9 * i);
  }
  OK(cudaGraphExecDestroy(graph));
  EXPECT_ERROR(cudaErrorInvalidValue, cudaGraphLaunch(graph, stream));
}

void branches_of_a_graph_run_side_by_side() {
  unsigned* flags = device_array<unsigned>(2);
  OK(cudaMemset(flags, 0, 8));
  OK(cudaDeviceSynchronize());
  const cudaStream_t stream = new_stream(), side = new_stream();
  const cudaEvent_t forked = new_event(), joined = new_event();
  const std::int64_t runs = cuda_emulation::kernel_runs();
  begin(stream);
  OK(cudaEventRecord(forked, stream));
  OK(cudaStreamWaitEvent(side, forked));
  OK(launch(meet, 1, 1, stream, flags, flags + 1));
  OK(launch(meet, 1, 1, side, flags + 1, flags));
  OK(cudaEventRecord(joined, side));
  OK(cudaStreamWaitEvent(stream, joined));
  const cudaGraphExec_t graph = end(stream, 2);
  for (int i = 0; i < 10; ++i) OK(cudaGraphLaunch(graph, stream));
  OK(cudaStreamSynchronize(stream));
  EXPECT(flags[0] == 0 && flags[1] == 0 && cuda_emulation::kernel_runs() == runs + 20);
}

void captures_must_be_joined_and_stay_apart() {
  int* numbers = device_array<int>(3);
  const cudaStream_t stream = new_stream(), side = new_stream(), other = new_stream();
  const cudaEvent_t forked = new_event(), outside = new_event();
  cudaGraph_t graph = nullptr;
  EXPECT_ERROR(cudaErrorIllegalState, cudaStreamEndCapture(stream, &graph));
  EXPECT_ERROR(cudaErrorStreamCaptureUnsupported,
               cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal));

  begin(stream);  // work on a side stream that nobody waits for
  EXPECT_ERROR(cudaErrorIllegalState, cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  OK(cudaEventRecord(forked, stream));
  OK(cudaStreamWaitEvent(side, forked));
  OK(launch(add, 1, 1, side, numbers, numbers, numbers));
  expect_failed_capture(stream, cudaErrorStreamCaptureUnjoined);
  OK(cudaStreamSynchronize(side));

  begin(stream);  // a side stream without work need not be joined
  OK(cudaEventRecord(forked, stream));
  OK(cudaStreamWaitEvent(side, forked));
  OK(cudaStreamEndCapture(stream, &graph));
  EXPECT_ERROR(cudaErrorCapturedEvent, cudaEventQuery(forked));  // also when it is over

  OK(cudaEventRecord(outside, other));  // an event from outside
  begin(stream);
  EXPECT_ERROR(cudaErrorStreamCaptureIsolation, cudaStreamWaitEvent(stream, outside));
  expect_failed_capture(stream);

  begin(stream, cudaStreamCaptureModeRelaxed);  // two captures
  begin(other, cudaStreamCaptureModeRelaxed);
  OK(cudaEventRecord(forked, stream));
  EXPECT_ERROR(cudaErrorStreamCaptureMerge, cudaStreamWaitEvent(other, forked));
  expect_failed_capture(other);
  expect_failed_capture(stream);

  begin(stream);  // ended where it did not begin
  OK(cudaEventRecord(forked, stream));
  OK(cudaStreamWaitEvent(side, forked));
  EXPECT_ERROR(cudaErrorStreamCaptureUnmatched, cudaStreamEndCapture(side, &graph));
  expect_failed_capture(stream);

  begin(stream);
  std::thread([&] {
    EXPECT_ERROR(cudaErrorStreamCaptureWrongThread, cudaStreamEndCapture(stream, &graph));
  }).join();
  OK(cudaStreamEndCapture(stream, &graph));
}

void calls_that_a_capture_forbids_fail_and_invalidate_it() {
  const cudaStream_t stream = new_stream(), other = new_stream();
  cudaStream_t blocking = nullptr;
  const cudaEvent_t captured = new_event(), outside = new_event();
  void* memory = nullptr;
  OK(cudaStreamCreate(&blocking));
  OK(cudaEventRecord(outside, other));
  int* numbers = device_array<int>(3);
  OK(cudaDeviceSynchronize());
  const auto forbidden = [&](cudaError_t error, auto call) {
    begin(stream);
    OK(cudaEventRecord(captured, stream));
    EXPECT_ERROR(error, call());
    EXPECT(status_of(stream) == cudaStreamCaptureStatusInvalidated);
    EXPECT_ERROR(cudaErrorStreamCaptureInvalidated,
                 launch(add, 1, 1, stream, numbers, numbers, numbers));
    expect_failed_capture(stream);
  };
  forbidden(cudaErrorStreamCaptureUnsupported, [&] { return cudaMalloc(&memory, 8); });
  forbidden(cudaErrorStreamCaptureUnsupported, [&] { return cudaFree(numbers); });
  forbidden(cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamSynchronize(stream); });
  forbidden(cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamQuery(stream); });
  forbidden(cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamSynchronize(other); });
  forbidden(cudaErrorStreamCaptureUnsupported, [&] { return cudaDeviceSynchronize(); });
  forbidden(cudaErrorStreamCaptureUnsupported, [&] { return cudaEventQuery(outside); });
  forbidden(cudaErrorCapturedEvent, [&] { return cudaEventQuery(captured); });
  forbidden(cudaErrorCapturedEvent, [&] { return cudaEventSynchronize(captured); });
  forbidden(cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamDestroy(stream); });

  // Work on the legacy stream only matters to a capture in a blocking stream.
  begin(stream, cudaStreamCaptureModeRelaxed);
  OK(cudaMemsetAsync(numbers, 0, 4));
  begin(blocking);
  EXPECT_ERROR(cudaErrorStreamCaptureImplicit, cudaMemsetAsync(numbers, 0, 4));
  expect_failed_capture(blocking);
}

void modes_say_whom_a_capture_concerns() {
  const cudaStream_t stream = new_stream();
  cudaGraph_t graph = nullptr;
  const auto allocate = [] {
    void* memory = nullptr;
    return cudaMalloc(&memory, 8);
  };
  const auto in_another_thread = [&](cudaStreamCaptureMode mode) {
    cudaError_t error = cudaErrorUnknown;
    std::thread([&] {
      OK(cudaThreadExchangeStreamCaptureMode(&mode));
      EXPECT(mode == cudaStreamCaptureModeGlobal);  // what it was
      error = allocate();
    }).join();
    return error;
  };
  begin(stream, cudaStreamCaptureModeGlobal);
  EXPECT(in_another_thread(cudaStreamCaptureModeRelaxed) == cudaSuccess);
  EXPECT(in_another_thread(cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  OK(cudaThreadExchangeStreamCaptureMode(&mode));
  EXPECT(allocate() == cudaSuccess);
  EXPECT(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);  // even so
  OK(cudaThreadExchangeStreamCaptureMode(&mode));
  expect_failed_capture(stream);

  begin(stream, cudaStreamCaptureModeGlobal);
  EXPECT(in_another_thread(cudaStreamCaptureModeGlobal) == cudaErrorStreamCaptureUnsupported);
  expect_failed_capture(stream);

  begin(stream, cudaStreamCaptureModeThreadLocal);
  EXPECT(in_another_thread(cudaStreamCaptureModeGlobal) == cudaSuccess);
  EXPECT(allocate() == cudaErrorStreamCaptureUnsupported);
  expect_failed_capture(stream);

  begin(stream, cudaStreamCaptureModeRelaxed);
  EXPECT(allocate() == cudaSuccess);
  OK(cudaStreamEndCapture(stream, &graph));
}

}  // namespace

const Case graph_cases[] = {
    {"replays_follow_changed_inputs", replays_follow_changed_inputs},
    {"branches_of_a_graph_run_side_by_side", branches_of_a_graph_run_side_by_side},
    {"captures_must_be_joined_and_stay_apart", captures_must_be_joined_and_stay_apart},
    {"calls_that_a_capture_forbids_fail_and_invalidate_it",
     calls_that_a_capture_forbids_fail_and_invalidate_it},
    {"modes_say_whom_a_capture_concerns", modes_say_whom_a_capture_concerns},
    {nullptr, nullptr}};
