// Streams: an OS thread and a queue each.
#include <atomic>
#include <map>
#include <thread>

#include "grid.h"
#include "runtime.h"

namespace cuda_emulation {
namespace {

struct Streams {
  std::mutex mutex;
  std::map<cudaStream_t, StreamPtr> open;
  std::map<int, StreamPtr> legacy;  // by device
  std::uintptr_t last_handle = 0x1000;
};
Streams& streams() {
  static Streams& streams = *new Streams;  // threads may use it until the process has ended
  return streams;
}

StreamPtr new_stream(cudaStream_t handle, unsigned flags, int priority, bool legacy) {
  auto stream = std::make_shared<Stream>();
  stream->handle = handle;
  stream->device = current_device();
  stream->flags = flags;
  stream->priority = priority;
  stream->legacy = legacy;
  stream->start();
  return stream;
}

std::atomic<std::int64_t> kernels{0};

}  // namespace

std::int64_t kernel_runs() { return kernels; }

void Stream::start() {
  std::thread([self = shared_from_this()] { self->run(); }).detach();
}

void Stream::close() {
  std::lock_guard lock(mutex_);
  closed_ = true;
  wake_.notify_all();
}

void Stream::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return closed_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Work work = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    work();
    work = nullptr;
    lock.lock();
    ++done_;
    progress_.notify_all();
  }
}

std::uint64_t Stream::enqueue(Work work) {
  std::lock_guard lock(mutex_);
  queue_.push_back(std::move(work));
  wake_.notify_one();
  return ++enqueued_;
}

std::uint64_t Stream::enqueued() {
  std::lock_guard lock(mutex_);
  return enqueued_;
}

bool Stream::has_done(std::uint64_t count) {
  std::lock_guard lock(mutex_);
  return done_ >= count;
}

void Stream::wait_for(std::uint64_t count) {
  std::unique_lock lock(mutex_);
  progress_.wait(lock, [&] { return done_ >= count; });
}

std::uintptr_t new_handle() {
  std::lock_guard lock(streams().mutex);
  return streams().last_handle += 16;
}

StreamPtr find_stream(cudaStream_t handle) {
  Streams& all = streams();
  std::lock_guard lock(all.mutex);
  if (handle == nullptr || handle == cudaStreamLegacy) {
    StreamPtr& stream = all.legacy[current_device()];
    if (!stream) stream = new_stream(nullptr, 0, 0, true);
    return stream;
  }
  const auto found = all.open.find(handle);
  if (found != all.open.end()) return found->second;
  const auto number = reinterpret_cast<std::uintptr_t>(handle);
  if (number <= all.last_handle && number > 0x1000 && number % 16 == 0)
    fail("a stream is used that was destroyed");
  return nullptr;
}

std::vector<StreamPtr> all_streams() {
  std::lock_guard lock(streams().mutex);
  std::vector<StreamPtr> result;
  for (const auto& [handle, stream] : streams().open) result.push_back(stream);
  for (const auto& [device, stream] : streams().legacy) result.push_back(stream);
  return result;
}

void wait_for_all_streams(int device) {
  for (const StreamPtr& stream : all_streams())
    if (stream->device == device) stream->wait_for(stream->enqueued());
}

Point enqueue_in_order(const StreamPtr& stream, Work work) {
  // The legacy stream and the blocking streams of its device come after each other.
  std::vector<Point> before;
  if (stream->blocks())
    for (const StreamPtr& other : all_streams())
      if (other != stream && other->device == stream->device && other->blocks() &&
          (stream->legacy || other->legacy))
        before.push_back({other, other->enqueued()});
  const std::uint64_t count = stream->enqueue([before = std::move(before), work = std::move(work)] {
    for (const Point& point : before) point.wait();
    work();
  });
  return {stream, count};
}

cudaError_t submit(cudaStream_t handle, Work work) {
  const StreamPtr stream = find_stream(handle);
  if (!stream) return note(cudaErrorInvalidResourceHandle);
  cudaError_t result = check_legacy_stream(*stream);
  if (result != cudaSuccess) return note(result);
  if (add_to_capture(stream, work, &result)) return note(result);
  enqueue_in_order(stream, std::move(work));
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> thread) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.x > 0x7fffffffu ||
      grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    say("a launch with " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
        std::to_string(grid.z) + " blocks of " + std::to_string(threads) + " threads is refused");
    return note(cudaErrorInvalidConfiguration);
  }
  if (config.dynamicSmemBytes != 0) {
    say("dynamic shared memory is not emulated");
    return note(cudaErrorInvalidValue);
  }
  const StreamPtr stream = find_stream(config.stream);
  if (!stream || stream->device != current_device()) return note(cudaErrorInvalidResourceHandle);
  return submit(config.stream, [grid, block, thread = std::move(thread)] {
    ++kernels;
    run_grid(grid, block, thread);
  });
}

namespace {

// What speaks against asking now how far a stream is.
cudaError_t refuse_question(const StreamPtr& stream) {
  cudaError_t refusal = refuse_captured(stream);
  if (refusal == cudaSuccess) refusal = check_legacy_stream(*stream);
  if (refusal == cudaSuccess) refusal = check_unsafe_call();
  return refusal;
}

}  // namespace
}  // namespace cuda_emulation

using namespace cuda_emulation;

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  if (stream == nullptr || flags > cudaStreamNonBlocking) return note(cudaErrorInvalidValue);
  const auto handle = reinterpret_cast<cudaStream_t>(new_handle());
  std::lock_guard lock(streams().mutex);
  streams().open[handle] = new_stream(handle, flags, priority, false);
  *stream = handle;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const StreamPtr stream = find_stream(handle);
  if (!stream || stream->legacy) return note(cudaErrorInvalidResourceHandle);
  const cudaError_t refusal = refuse_captured(stream);
  if (refusal != cudaSuccess) return note(refusal);
  {
    std::lock_guard lock(streams().mutex);
    streams().open.erase(handle);
  }
  stream->close();  // what is enqueued is worked off
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const StreamPtr stream = find_stream(handle);
  if (!stream) return note(cudaErrorInvalidResourceHandle);
  const cudaError_t refusal = refuse_question(stream);
  if (refusal != cudaSuccess) return note(refusal);
  count_host_wait();
  const Point point = enqueue_in_order(stream, [] {});
  point.wait();
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const StreamPtr stream = find_stream(handle);
  if (!stream) return note(cudaErrorInvalidResourceHandle);
  const cudaError_t refusal = refuse_question(stream);
  if (refusal != cudaSuccess) return note(refusal);
  return stream->has_done(stream->enqueued()) ? cudaSuccess : note(cudaErrorNotReady);
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  const StreamPtr stream = find_stream(handle);
  if (!stream) return note(cudaErrorInvalidResourceHandle);
  *priority = stream->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
  const StreamPtr stream = find_stream(handle);
  if (!stream) return note(cudaErrorInvalidResourceHandle);
  *flags = stream->flags;
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return submit(stream, [function, data] { function(data); });
}
