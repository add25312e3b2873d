// NCCL's C functions, as a library that adareduce loads in NCCL's place where the GPU is emulated.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "communicator.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fake_nccl {
namespace {

using namespace nccl;
using CommunicatorPtr = std::shared_ptr<Communicator>;

std::mutex mutex;  // of what follows
std::string last_error;
std::map<ncclComm_t, CommunicatorPtr> communicators;
std::uintptr_t last_handle = 0;

int version() {
  const char* text = std::getenv("FAKE_NCCL_VERSION");
  return text == nullptr ? 23007 : std::atoi(text);
}

CommunicatorPtr find(ncclComm_t comm) {
  const std::lock_guard lock(mutex);
  const auto found = communicators.find(comm);
  return found == communicators.end() ? nullptr : found->second;
}

CommunicatorPtr take(ncclComm_t comm) {
  const std::lock_guard lock(mutex);
  auto node = communicators.extract(comm);
  return node.empty() ? nullptr : node.mapped();
}

// What is enqueued, once: a stream or a graph owns it.
struct Launch {
  CommunicatorPtr communicator;
  std::vector<Op> ops;
  bool is_captured = false;
};
std::vector<std::unique_ptr<Launch>>
    captured;  // for the life of the process: no graph says goodbye

void run(void* data) {
  auto* launch = static_cast<Launch*>(data);
  launch->communicator->run(launch->ops, launch->is_captured);
  if (launch->is_captured) return;
  launch->communicator->launched(-1);
  delete launch;
}

// What a thread has said since ncclGroupStart.
struct Part {
  CommunicatorPtr communicator;
  cudaStream_t stream = nullptr;
  std::vector<Op> ops;
};
struct Group {
  int depth = 0;
  ncclResult_t error = ncclSuccess;
  std::vector<Part> parts;
};
thread_local Group group;

ncclResult_t refuse(ncclResult_t result, const std::string& text, bool is_loud = true) {
  say(text, is_loud);
  if (group.depth > 0) group.error = result;
  return result;
}

// NCCL promises nothing about the order of a group's operations.
bool has_races(const Part& part) {
  const int rank = part.communicator->rank(), size = part.communicator->size();
  for (std::size_t a = 0; a < part.ops.size(); ++a)
    for (std::size_t b = 0; b < part.ops.size(); ++b) {
      const Span written = written_by(part.ops[a], rank, size);
      if (a != b && (written.overlaps(written_by(part.ops[b], rank, size)) ||
                     written.overlaps(read_by(part.ops[b], rank, size))))
        return true;
    }
  return false;
}

bool is_legal_overlap(const Op& op, int rank, int size) {
  const Span in = read_by(op, rank, size), out = written_by(op, rank, size);
  if (!in.overlaps(out)) return true;
  const auto place = static_cast<std::size_t>(rank) * op.bytes();
  if (op.kind == Kind::all_gather) return in.begin == out.begin + place;
  if (op.kind == Kind::reduce_scatter) return out.begin == in.begin + place;
  return in.begin == out.begin;
}

ncclResult_t launch(const Part& part) {
  if (has_races(part))
    return refuse(ncclInvalidUsage, "an operation writes what another of its group uses");
  const ncclResult_t connected = part.communicator->connect(part.ops);
  if (connected != ncclSuccess) return connected;
  auto what = std::make_unique<Launch>(Launch{part.communicator, part.ops});
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(part.stream, &status) != cudaSuccess) return ncclUnhandledCudaError;
  what->is_captured = status != cudaStreamCaptureStatusNone;
  Launch* data = what.get();
  if (data->is_captured) {
    const std::lock_guard lock(mutex);
    captured.push_back(std::move(what));
    part.communicator->captured();
  } else {
    part.communicator->launched(1);
  }
  if (cudaLaunchHostFunc(part.stream, run, data) != cudaSuccess) {
    if (!data->is_captured) part.communicator->launched(-1);
    return refuse(ncclUnhandledCudaError, "cudaLaunchHostFunc failed");
  }
  (void)what.release();
  return ncclSuccess;
}

ncclResult_t end_group() {
  if (group.depth == 0) return refuse(ncclInvalidUsage, "ncclGroupEnd: not in a group");
  if (--group.depth > 0) return ncclSuccess;
  const Group done = std::exchange(group, {});
  if (done.error != ncclSuccess) return done.error;
  for (const Part& part : done.parts)
    if (const ncclResult_t result = launch(part); result != ncclSuccess) return result;
  return ncclSuccess;
}

ncclResult_t enqueue(const char* name, const Op& op, ncclComm_t comm, cudaStream_t stream) {
  const auto wrong = [&](const std::string& what) {
    return refuse(ncclInvalidArgument, std::string(name) + ": " + what);
  };
  const CommunicatorPtr communicator = find(comm);
  if (comm == nullptr) return refuse(ncclInvalidArgument, "comm is NULL", false);
  if (!communicator) return wrong("the communicator is destroyed or aborted");
  const int rank = communicator->rank(), size = communicator->size();
  if (op.root < 0 || op.root >= size) return wrong("there is no rank " + std::to_string(op.root));
  if (size_of(op.type) == 0) return wrong("unknown type");
  if (op.op > ncclAvg) return wrong("unknown reduction");
  const Span in = read_by(op, rank, size), out = written_by(op, rank, size);
  if ((in.bytes > 0 && in.begin == nullptr) || (out.bytes > 0 && out.begin == nullptr))
    return wrong("a buffer is null");
  if (!is_legal_overlap(op, rank, size)) return wrong("the buffers overlap");
  ++group.depth;
  auto found = std::find_if(group.parts.begin(), group.parts.end(),
                            [&](const Part& part) { return part.communicator == communicator; });
  if (found == group.parts.end()) {
    group.parts.push_back({communicator, stream, {}});
    found = group.parts.end() - 1;
  }
  if (found->stream != stream)
    refuse(ncclInvalidUsage, std::string(name) + ": a group on two streams is not emulated");
  if (op.count > 0) found->ops.push_back(op);
  return end_group();
}

}  // namespace

void say(const std::string& text, bool is_loud) {
  if (is_loud) std::fprintf(stderr, "fake NCCL: %s\n", text.c_str());
  const std::lock_guard lock(mutex);
  last_error = text;
}

}  // namespace fake_nccl

using namespace fake_nccl;
using namespace fake_nccl::nccl;

EXPORT ncclResult_t ncclGetVersion(int* number) {
  *number = version();
  return ncclSuccess;
}

EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::random_device random;
  *id = {};
  std::snprintf(id->internal, sizeof id->internal, "%08x%08x%08x", random(), random(), random());
  return ncclSuccess;
}

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                           ncclConfig_t* config) {
  *comm = nullptr;
  if (group.depth > 0) return refuse(ncclInvalidUsage, "init in a group is not emulated");
  if (rank < 0 || rank >= size) return refuse(ncclInvalidArgument, "rank must be below size");
  if (config == nullptr || config->magic != 0xcafebeef || config->version < 21400 ||
      config->size < offsetof(ncclConfig_t, splitShare))
    return refuse(ncclInvalidArgument, "the configuration is not initialised");
  if (config->blocking == 0) return refuse(ncclInvalidUsage, "only blocking is emulated");
  try {
    auto made = std::make_shared<Communicator>(id.internal, rank, size, version());
    if (made->result() != ncclSuccess) return made->result();
    const std::lock_guard lock(mutex);
    *comm = reinterpret_cast<ncclComm_t>(last_handle += 16);
    communicators[*comm] = std::move(made);
    return ncclSuccess;
  } catch (const Mismatch& mismatch) {
    return refuse(ncclInvalidUsage, mismatch.text, false);
  } catch (const SystemFailure& failure) {
    return refuse(ncclSystemError, failure.text);
  } catch (const PeerGone& gone) {
    return refuse(ncclRemoteError, "rank " + std::to_string(gone.peer) + " has given up", false);
  }
}

EXPORT ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  const CommunicatorPtr communicator = take(comm);
  if (!communicator)
    return refuse(ncclInvalidArgument, "ncclCommDestroy: the communicator is gone already");
  return communicator->destroy();
}

EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm) {
  const CommunicatorPtr communicator = take(comm);
  if (!communicator)
    return refuse(ncclInvalidArgument, "ncclCommAbort: the communicator is gone already");
  communicator->abort();
  return ncclSuccess;
}

EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  const CommunicatorPtr communicator = find(comm);
  if (!communicator)
    return refuse(ncclInvalidArgument, "ncclCommGetAsyncError: the communicator is gone");
  *error = communicator->result();
  return ncclSuccess;
}

EXPORT const char* ncclGetErrorString(ncclResult_t result) {
  constexpr const char* kNames[] = {"no error",       "unhandled cuda error", "system error",
                                    "internal error", "invalid argument",     "invalid usage",
                                    "remote error",   "in progress"};
  return result < std::size(kNames) ? kNames[result] : "unknown result code";
}

EXPORT const char* ncclGetLastError(ncclComm_t) {
  static thread_local std::string copy;
  const std::lock_guard lock(mutex);
  copy = last_error;
  return copy.c_str();
}

EXPORT ncclResult_t ncclGroupStart() {
  ++group.depth;
  return ncclSuccess;
}

EXPORT ncclResult_t ncclGroupEnd() { return end_group(); }

EXPORT ncclResult_t ncclAllReduce(const void* in, void* out, std::size_t count, ncclDataType_t type,
                                  ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return enqueue("ncclAllReduce", {Kind::all_reduce, in, out, count, type, op}, comm, stream);
}

EXPORT ncclResult_t ncclReduceScatter(const void* in, void* out, std::size_t count,
                                      ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                                      cudaStream_t stream) {
  return enqueue("ncclReduceScatter", {Kind::reduce_scatter, in, out, count, type, op}, comm,
                 stream);
}

EXPORT ncclResult_t ncclAllGather(const void* in, void* out, std::size_t count, ncclDataType_t type,
                                  ncclComm_t comm, cudaStream_t stream) {
  return enqueue("ncclAllGather", {Kind::all_gather, in, out, count, type}, comm, stream);
}

EXPORT ncclResult_t ncclBroadcast(const void* in, void* out, std::size_t count, ncclDataType_t type,
                                  int root, ncclComm_t comm, cudaStream_t stream) {
  return enqueue("ncclBroadcast", {Kind::broadcast, in, out, count, type, ncclSum, root}, comm,
                 stream);
}

EXPORT ncclResult_t ncclSend(const void* data, std::size_t count, ncclDataType_t type, int peer,
                             ncclComm_t comm, cudaStream_t stream) {
  return enqueue("ncclSend", {Kind::send, data, nullptr, count, type, ncclSum, peer}, comm, stream);
}

EXPORT ncclResult_t ncclRecv(void* data, std::size_t count, ncclDataType_t type, int peer,
                             ncclComm_t comm, cudaStream_t stream) {
  return enqueue("ncclRecv", {Kind::receive, nullptr, data, count, type, ncclSum, peer}, comm,
                 stream);
}

/// For tests: every communicator of `rank` in this process reports `result` from now on.
EXPORT void fakeNcclFail(int rank, int result, const char* text) {
  std::vector<CommunicatorPtr> all;
  {
    const std::lock_guard lock(mutex);
    for (const auto& [comm, communicator] : communicators) all.push_back(communicator);
  }
  for (const CommunicatorPtr& communicator : all)
    if (communicator->rank() == rank)
      communicator->fail(static_cast<ncclResult_t>(result), text, false);
}

// The declarations that adareduce calls through.
#define SAME(name) static_assert(std::is_same_v<decltype(&::name), decltype(NcclFunctions::name)>);
ADAREDUCE_NCCL_FUNCTIONS(SAME)
