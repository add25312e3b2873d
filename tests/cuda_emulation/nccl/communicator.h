#pragma once
// One rank of an emulated communicator: what its launches do when the stream reaches them.
#include <cuda_runtime.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "mesh.h"

namespace fake_nccl {

enum class Kind : std::uint32_t {
  hello = 1,
  connect,
  goodbye,
  all_reduce,
  reduce_scatter,
  all_gather,
  broadcast,
  send,
  receive
};

struct Op {
  Kind kind = Kind::send;
  const void* in = nullptr;
  void* out = nullptr;
  std::size_t count = 0;
  nccl::ncclDataType_t type = nccl::ncclInt8;
  nccl::ncclRedOp_t op = nccl::ncclSum;
  int root = 0;  ///< or the peer

  bool is_collective() const { return kind != Kind::send && kind != Kind::receive; }
  std::size_t bytes() const { return count * size_of(type); }
};

/// Memory that an operation reads or writes.
struct Span {
  const char* begin = nullptr;
  std::size_t bytes = 0;
  bool overlaps(const Span& other) const {
    return bytes > 0 && other.bytes > 0 && begin < other.begin + other.bytes &&
           other.begin < begin + bytes;
  }
};
Span read_by(const Op& op, int rank, int size);
Span written_by(const Op& op, int rank, int size);

/// Keeps `text` for ncclGetLastError; what NCCL would answer with a hang or with wrong numbers
/// goes to stderr, too.
void say(const std::string& text, bool is_loud);

class Communicator {
 public:
  /// Blocks until all have come. Throws SystemFailure; Mismatch where NCCL says invalid usage.
  Communicator(const std::string& name, int rank, int size, int version);
  Communicator(const Communicator&) = delete;
  ~Communicator();

  int rank() const { return mesh_.rank(); }
  int size() const { return mesh_.size(); }
  nccl::ncclResult_t result() const { return result_; }
  bool is_gone() const { return is_gone_; }

  /// Blocks until the peers of these operations have come as far, the first time.
  nccl::ncclResult_t connect(const std::vector<Op>& ops);
  /// In stream order. Outputs are bytes of 0xff afterwards if it fails.
  void run(const std::vector<Op>& ops, bool is_captured);
  void launched(int change);
  void captured() { is_in_graph_ = true; }

  nccl::ncclResult_t destroy();
  void abort();
  void fail(nccl::ncclResult_t result, const std::string& text, bool is_loud);

 private:
  /// As NCCL does where it makes and ends communicators; a capture may forbid it.
  void use_device(const char* when);
  /// NCCL waits until the graphs are destroyed; nobody tells the fake when that is.
  void wait_for_graphs();
  void say_hello(int version);
  void move(const std::vector<Op>& ops, bool is_captured);
  std::string describe(const Header& expected, const Header& got, int peer) const;

  Mesh mesh_;
  cudaEvent_t event_ = nullptr;
  std::mutex running_;  // one launch at a time
  std::uint64_t sequence_ = 0;
  std::vector<bool> is_connected_;
  std::atomic<nccl::ncclResult_t> result_{nccl::ncclSuccess};
  std::atomic<bool> is_gone_{false};
  std::atomic<bool> is_in_graph_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  int launches_ = 0;  // enqueued and not done
};

}  // namespace fake_nccl
