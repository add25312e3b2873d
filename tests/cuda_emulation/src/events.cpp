// Events: a place in a stream's queue, or in a capture.
#include <atomic>
#include <map>

#include "cuda_emulation/half_types.h"
#include "runtime.h"

namespace cuda_emulation {
namespace {

struct Event {
  int device = 0;
  unsigned flags = 0;
  std::mutex mutex;
  Point point;                                       // of the last cudaEventRecord
  CapturedPoint captured;                            // if that was in a capture
  std::shared_ptr<std::atomic<std::uint64_t>> time;  // when it was reached, ns
};
using EventPtr = std::shared_ptr<Event>;

struct Events {
  std::mutex mutex;
  std::map<cudaEvent_t, EventPtr> open;
  std::map<cudaEvent_t, bool> destroyed;
};
Events& events() {
  static Events& events = *new Events;
  return events;
}

EventPtr find_event(cudaEvent_t handle) {
  std::lock_guard lock(events().mutex);
  const auto found = events().open.find(handle);
  if (found != events().open.end()) return found->second;
  if (events().destroyed.count(handle) != 0) fail("an event is used that was destroyed");
  return nullptr;
}

// Where an event was recorded, for a question about it; or what speaks against asking now.
cudaError_t ask_for_point(cudaEvent_t handle, Point* point) {
  const EventPtr event = find_event(handle);
  if (!event) return cudaErrorInvalidResourceHandle;
  std::lock_guard lock(event->mutex);
  if (event->captured.capture) {
    invalidate(*event->captured.capture);
    return cudaErrorCapturedEvent;
  }
  const cudaError_t refusal = check_unsafe_call();
  if (refusal == cudaSuccess) *point = event->point;
  return refusal;
}

}  // namespace
}  // namespace cuda_emulation

using namespace cuda_emulation;

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (event == nullptr || flags > 7) return note(cudaErrorInvalidValue);
  if ((flags & cudaEventInterprocess) != 0) {
    say("interprocess events are not emulated");
    return note(cudaErrorNotSupported);
  }
  *event = reinterpret_cast<cudaEvent_t>(new_handle() + 8);
  auto created = std::make_shared<Event>();
  created->device = current_device();
  created->flags = flags;
  std::lock_guard lock(events().mutex);
  events().open[*event] = created;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventCreate(cudaEvent_t* event, unsigned flags) {
  return cudaEventCreateWithFlags(event, flags);
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  if (!find_event(handle)) return note(cudaErrorInvalidResourceHandle);
  std::lock_guard lock(events().mutex);
  events().open.erase(handle);
  events().destroyed[handle] = true;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  const EventPtr event = find_event(handle);
  const StreamPtr stream = find_stream(stream_handle);
  if (!event || !stream || event->device != stream->device)
    return note(cudaErrorInvalidResourceHandle);
  cudaError_t result = check_legacy_stream(*stream);
  if (result != cudaSuccess) return note(result);
  std::lock_guard lock(event->mutex);
  CapturedPoint captured;
  if (record_in_capture(stream, &captured, &result)) {
    if (result == cudaSuccess) event->captured = captured;
    return note(result);
  }
  auto time = std::make_shared<std::atomic<std::uint64_t>>(0);
  event->captured = {};
  event->time = time;
  event->point = enqueue_in_order(stream, [time] { *time = now_ns(); });
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  if (flags != cudaEventRecordDefault) return note(cudaErrorNotSupported);
  return cudaEventRecord(event, stream);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned flags) {
  const EventPtr event = find_event(handle);
  const StreamPtr stream = find_stream(stream_handle);
  if (!event || !stream) return note(cudaErrorInvalidResourceHandle);
  if (flags != cudaEventWaitDefault) return note(cudaErrorNotSupported);
  cudaError_t result = check_legacy_stream(*stream);
  if (result != cudaSuccess) return note(result);
  std::lock_guard lock(event->mutex);
  if (wait_in_capture(stream, event->captured, &result)) return note(result);
  if (event->point.stream) enqueue_in_order(stream, [point = event->point] { point.wait(); });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Point point;
  const cudaError_t refusal = ask_for_point(handle, &point);
  if (refusal != cudaSuccess) return note(refusal);
  return point.reached() ? cudaSuccess : note(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Point point;
  const cudaError_t refusal = ask_for_point(handle, &point);
  if (refusal != cudaSuccess) return note(refusal);
  count_host_wait();
  point.wait();
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  std::uint64_t times[2];
  const cudaEvent_t handles[2] = {start, end};
  for (int i = 0; i < 2; ++i) {
    const EventPtr event = find_event(handles[i]);
    if (!event || (event->flags & cudaEventDisableTiming) != 0)
      return note(cudaErrorInvalidResourceHandle);
    std::lock_guard lock(event->mutex);
    if (event->captured.capture) return note(cudaErrorCapturedEvent);
    if (!event->time) return note(cudaErrorInvalidResourceHandle);
    if (!event->point.reached()) return note(cudaErrorNotReady);
    times[i] = *event->time;
  }
  *milliseconds = static_cast<float>(static_cast<double>(times[1] - times[0]) * 1e-6);
  return cudaSuccess;
}
