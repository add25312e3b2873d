#pragma once
// What the parts of the emulated runtime know of each other.
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_emulation/host_api.h"

namespace cuda_emulation {

using Work = std::function<void()>;

/// Keeps `error` for cudaGetLastError, unless it is cudaSuccess, and returns it.
cudaError_t note(cudaError_t error);

/// A line on stderr.
void say(const std::string& text);
[[noreturn]] void fail(const std::string& text);

int current_device();
int device_count();

/// Counts a wait of the calling host thread.
void count_host_wait();

struct Capture;

/// An OS thread that works off a queue. The thread ends when the stream is closed and empty.
struct Stream : std::enable_shared_from_this<Stream> {
  cudaStream_t handle = nullptr;
  int device = 0, priority = 0;
  unsigned flags = 0;
  bool legacy = false;
  std::shared_ptr<Capture> capture;  ///< guarded by capture_mutex()
  std::vector<int> frontier;         ///< of the capture: nodes that come before the next one

  void start();
  void close();
  /// How many pieces of work have been enqueued, this one included.
  std::uint64_t enqueue(Work work);
  std::uint64_t enqueued();
  bool has_done(std::uint64_t count);
  void wait_for(std::uint64_t count);
  bool blocks() const { return legacy || (flags & cudaStreamNonBlocking) == 0; }

 private:
  void run();
  std::mutex mutex_;
  std::condition_variable wake_, progress_;
  std::deque<Work> queue_;
  std::uint64_t enqueued_ = 0, done_ = 0;
  bool closed_ = false;
};
using StreamPtr = std::shared_ptr<Stream>;

/// A place in a stream's queue: reached when what was enqueued before has been done.
struct Point {
  StreamPtr stream;
  std::uint64_t count = 0;
  bool reached() const { return !stream || stream->has_done(count); }
  void wait() const {
    if (stream) stream->wait_for(count);
  }
};

/// The stream of a handle; null if there never was one. A destroyed one ends the process.
StreamPtr find_stream(cudaStream_t handle);
std::vector<StreamPtr> all_streams();

/// Enqueues behind what the legacy stream's rules put before it. `stream` is not captured.
Point enqueue_in_order(const StreamPtr& stream, Work work);
/// Enqueues, or adds a node where the stream is captured.
cudaError_t submit(cudaStream_t handle, Work work);
void wait_for_all_streams(int device);

/// Numbers of handles: never used twice.
std::uintptr_t new_handle();

// --- graphs.cpp ---

struct Graph {
  struct Node {
    Work work;
    std::vector<int> after;
    int lane = 0;  ///< the captured stream it came from: lanes of a replay run side by side
  };
  std::vector<Node> nodes;
  int num_lanes = 0;
};

struct Capture {
  std::shared_ptr<Graph> graph;
  StreamPtr origin;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::uint64_t thread = 0;
  unsigned long long id = 0;
  bool invalidated = false, ended = false;
  std::vector<StreamPtr> streams;  ///< a lane each
};

std::mutex& capture_mutex();

/// What an event that was recorded in a captured stream stands for.
struct CapturedPoint {
  std::shared_ptr<Capture> capture;
  std::vector<int> nodes;
};

/// Of an error that belongs to a capture.
void invalidate(Capture& capture);
/// cudaSuccess, or why the calling thread may not make a potentially unsafe call now; then the
/// captures that forbid it are invalidated.
cudaError_t check_unsafe_call();
/// cudaSuccess, or why the legacy stream may not be used now.
cudaError_t check_legacy_stream(const Stream& stream);
/// Where `stream` is captured: invalidates the capture and says no.
cudaError_t refuse_captured(const StreamPtr& stream);
/// Adds a node; false where the stream is not captured.
bool add_to_capture(const StreamPtr& stream, const Work& work, cudaError_t* result);
/// Of cudaEventRecord; false where the stream is not captured.
bool record_in_capture(const StreamPtr& stream, CapturedPoint* point, cudaError_t* result);
/// Of cudaStreamWaitEvent; false where neither the stream nor the event has to do with a capture.
bool wait_in_capture(const StreamPtr& stream, const CapturedPoint& point, cudaError_t* result);

}  // namespace cuda_emulation
