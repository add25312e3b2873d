// Stream capture and graphs, with CUDA's rules about what may happen meanwhile.
#include <algorithm>
#include <atomic>
#include <map>
#include <thread>

#include "runtime.h"

namespace cuda_emulation {
namespace {

using GraphPtr = std::shared_ptr<Graph>;
using CapturePtr = std::shared_ptr<Capture>;

struct Graphs {
  std::mutex mutex;                  // of captures, too
  std::vector<CapturePtr> captures;  // that have not ended
  std::map<cudaGraph_t, GraphPtr> graphs;
  std::map<cudaGraphExec_t, GraphPtr> executables;
  unsigned long long last_id = 0;
};
Graphs& graphs() {
  static Graphs& graphs = *new Graphs;
  return graphs;
}

std::uint64_t this_thread() {
  static std::atomic<std::uint64_t> last{0};
  static thread_local const std::uint64_t number = ++last;
  return number;
}
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

void add_unique(std::vector<int>* to, const std::vector<int>& from) {
  for (int node : from)
    if (std::find(to->begin(), to->end(), node) == to->end()) to->push_back(node);
}

int lane_of(Capture& capture, const StreamPtr& stream) {
  const auto found = std::find(capture.streams.begin(), capture.streams.end(), stream);
  if (found == capture.streams.end()) capture.streams.push_back(stream);
  return static_cast<int>(found - capture.streams.begin());
}

bool is_joined(const Graph& graph, const std::vector<int>& frontier) {
  std::vector<bool> seen(graph.nodes.size());
  std::vector<int> open = frontier;
  while (!open.empty()) {
    const int node = open.back();
    open.pop_back();
    if (seen[node]) continue;
    seen[node] = true;
    open.insert(open.end(), graph.nodes[node].after.begin(), graph.nodes[node].after.end());
  }
  return std::find(seen.begin(), seen.end(), false) == seen.end();
}

/// Each lane in its own thread, nodes when those before them are done.
void replay(const Graph& graph) {
  std::mutex mutex;
  std::condition_variable progress;
  std::vector<bool> done(graph.nodes.size());
  const auto run_lane = [&](int lane) {
    for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
      const Graph::Node& node = graph.nodes[i];
      if (node.lane != lane) continue;
      {
        std::unique_lock lock(mutex);
        progress.wait(lock, [&] {
          return std::all_of(node.after.begin(), node.after.end(), [&](int n) { return done[n]; });
        });
      }
      node.work();
      std::lock_guard lock(mutex);
      done[i] = true;
      progress.notify_all();
    }
  };
  std::vector<std::thread> others;
  for (int lane = 1; lane < graph.num_lanes; ++lane) others.emplace_back(run_lane, lane);
  run_lane(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

std::mutex& capture_mutex() { return graphs().mutex; }

void invalidate(Capture& capture) {
  std::lock_guard lock(graphs().mutex);
  if (!capture.ended) capture.invalidated = true;
}

cudaError_t check_unsafe_call() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  std::lock_guard lock(graphs().mutex);
  cudaError_t result = cudaSuccess;
  for (const CapturePtr& capture : graphs().captures) {
    const bool own =
        capture->thread == this_thread() && capture->mode != cudaStreamCaptureModeRelaxed;
    const bool other =
        thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if (!own && !other) continue;
    capture->invalidated = true;
    result = cudaErrorStreamCaptureUnsupported;
  }
  return result;
}

cudaError_t check_legacy_stream(const Stream& stream) {
  if (!stream.legacy) return cudaSuccess;
  std::lock_guard lock(graphs().mutex);
  cudaError_t result = cudaSuccess;
  for (const CapturePtr& capture : graphs().captures)
    for (const StreamPtr& captured : capture->streams)
      if (captured->blocks() && captured->device == stream.device) {
        capture->invalidated = true;
        result = cudaErrorStreamCaptureImplicit;
      }
  return result;
}

cudaError_t refuse_captured(const StreamPtr& stream) {
  std::lock_guard lock(graphs().mutex);
  if (!stream->capture) return cudaSuccess;
  if (stream->capture->invalidated) return cudaErrorStreamCaptureInvalidated;
  stream->capture->invalidated = true;
  return cudaErrorStreamCaptureUnsupported;
}

bool add_to_capture(const StreamPtr& stream, const Work& work, cudaError_t* result) {
  std::lock_guard lock(graphs().mutex);
  if (!stream->capture) return false;
  Capture& capture = *stream->capture;
  *result = capture.invalidated ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
  if (capture.invalidated) return true;
  capture.graph->nodes.push_back({work, stream->frontier, lane_of(capture, stream)});
  stream->frontier = {static_cast<int>(capture.graph->nodes.size()) - 1};
  return true;
}

bool record_in_capture(const StreamPtr& stream, CapturedPoint* point, cudaError_t* result) {
  std::lock_guard lock(graphs().mutex);
  if (!stream->capture) return false;
  *result = stream->capture->invalidated ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
  *point = {stream->capture, stream->frontier};
  return true;
}

bool wait_in_capture(const StreamPtr& stream, const CapturedPoint& point, cudaError_t* result) {
  std::lock_guard lock(graphs().mutex);
  const CapturePtr capture = stream->capture;
  if (!capture && !point.capture) return false;
  *result = cudaSuccess;
  if (capture && capture->invalidated) {
    *result = cudaErrorStreamCaptureInvalidated;
  } else if (!point.capture) {
    *result = cudaErrorStreamCaptureIsolation;
  } else if (point.capture->invalidated) {
    *result = cudaErrorStreamCaptureInvalidated;
  } else if (point.capture->ended) {
    *result = capture ? cudaErrorStreamCaptureIsolation : cudaErrorCapturedEvent;
  } else if (capture && capture != point.capture) {
    *result = cudaErrorStreamCaptureMerge;
    point.capture->invalidated = true;
  } else if (stream->legacy) {
    *result = cudaErrorStreamCaptureImplicit;
    point.capture->invalidated = true;
  }
  if (*result != cudaSuccess) {
    if (capture) capture->invalidated = true;
    return true;
  }
  if (!capture) {
    stream->capture = point.capture;
    stream->frontier.clear();
    lane_of(*point.capture, stream);
  }
  add_unique(&stream->frontier, point.nodes);
  return true;
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const StreamPtr stream = find_stream(handle);
  if (!stream) return note(cudaErrorInvalidResourceHandle);
  if (stream->legacy) return note(cudaErrorStreamCaptureUnsupported);
  std::lock_guard lock(graphs().mutex);
  if (stream->capture) return note(cudaErrorIllegalState);
  auto capture = std::make_shared<Capture>();
  capture->graph = std::make_shared<Graph>();
  capture->origin = stream;
  capture->mode = mode;
  capture->thread = this_thread();
  capture->id = ++graphs().last_id;
  capture->streams = {stream};
  stream->capture = capture;
  stream->frontier.clear();
  graphs().captures.push_back(capture);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const StreamPtr stream = find_stream(handle);
  if (!stream) return note(cudaErrorInvalidResourceHandle);
  const auto number = reinterpret_cast<cudaGraph_t>(new_handle());
  std::lock_guard lock(graphs().mutex);
  *graph = nullptr;
  const CapturePtr capture = stream->capture;
  if (!capture) return note(cudaErrorIllegalState);
  cudaError_t result = cudaSuccess;
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != this_thread())
    return note(cudaErrorStreamCaptureWrongThread);
  if (capture->origin != stream) {
    capture->invalidated = true;
    return note(cudaErrorStreamCaptureUnmatched);
  }
  if (capture->invalidated)
    result = cudaErrorStreamCaptureInvalidated;
  else if (!is_joined(*capture->graph, stream->frontier))
    result = cudaErrorStreamCaptureUnjoined;
  capture->graph->num_lanes = static_cast<int>(capture->streams.size());
  for (const StreamPtr& captured : capture->streams) captured->capture = nullptr;
  capture->streams.clear();
  capture->origin = nullptr;
  capture->ended = true;
  auto& captures = graphs().captures;
  captures.erase(std::find(captures.begin(), captures.end(), capture));
  if (result != cudaSuccess) return note(result);
  graphs().graphs[number] = capture->graph;
  *graph = number;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(handle, status, nullptr);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id) {
  const StreamPtr stream = find_stream(handle);
  if (!stream) return note(cudaErrorInvalidResourceHandle);
  const cudaError_t refusal = check_legacy_stream(*stream);
  if (refusal != cudaSuccess) return note(refusal);
  std::lock_guard lock(graphs().mutex);
  *status = !stream->capture               ? cudaStreamCaptureStatusNone
            : stream->capture->invalidated ? cudaStreamCaptureStatusInvalidated
                                           : cudaStreamCaptureStatusActive;
  if (id != nullptr && *status == cudaStreamCaptureStatusActive) *id = stream->capture->id;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  std::lock_guard lock(graphs().mutex);
  const auto found = graphs().graphs.find(graph);
  if (found == graphs().graphs.end() || nodes != nullptr) return note(cudaErrorInvalidValue);
  *count = found->second->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  const auto number = reinterpret_cast<cudaGraphExec_t>(new_handle());
  std::lock_guard lock(graphs().mutex);
  const auto found = graphs().graphs.find(graph);
  if (found == graphs().graphs.end()) return note(cudaErrorInvalidValue);
  graphs().executables[number] = found->second;
  *executable = number;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  GraphPtr graph;
  {
    std::lock_guard lock(graphs().mutex);
    const auto found = graphs().executables.find(executable);
    if (found == graphs().executables.end()) return note(cudaErrorInvalidValue);
    graph = found->second;
  }
  return submit(stream, [graph] { replay(*graph); });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  std::lock_guard lock(graphs().mutex);
  return graphs().executables.erase(executable) == 1 ? cudaSuccess : note(cudaErrorInvalidValue);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  std::lock_guard lock(graphs().mutex);
  return graphs().graphs.erase(graph) == 1 ? cudaSuccess : note(cudaErrorInvalidValue);
}
