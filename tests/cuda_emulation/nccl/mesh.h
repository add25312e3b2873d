#pragma once
// A stream socket between every two ranks of a communicator, be they threads or processes.
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

namespace fake_nccl {

/// Another rank has closed its end: it has died, aborted or failed.
struct PeerGone {
  int peer;
};
/// interrupt() was called.
struct Interrupted {};
/// A peer sent what was not expected of it.
struct Mismatch {
  std::string text;
};
/// Sockets could not be made, or a peer did not come in time.
struct SystemFailure {
  std::string text;
};

/// What goes before every message: what the sender believes is happening.
struct Header {
  std::uint32_t magic = 0x4e43434c;
  std::uint32_t kind = 0;
  std::uint64_t count = 0;
  std::uint32_t type = 0;
  std::uint32_t op = 0;
  std::int32_t root = 0;
  std::uint32_t is_captured = 0;
  std::uint64_t sequence = 0;  ///< of collectives
  std::uint64_t bytes = 0;     ///< that follow
};
struct Outgoing {
  Header header;
  const void* data = nullptr;
};
struct Incoming {
  Header header;  ///< expected
  void* data = nullptr;
};
/// Messages to and from each peer, in their order.
struct Traffic {
  explicit Traffic(int size)
      : out(static_cast<std::size_t>(size)), in(static_cast<std::size_t>(size)) {}
  std::vector<std::deque<Outgoing>> out;
  std::vector<std::deque<Incoming>> in;
};

class Mesh {
 public:
  /// Blocks until all ranks of the communicator `name` are connected.
  Mesh(const std::string& name, int rank, int size);
  Mesh(const Mesh&) = delete;
  ~Mesh();

  int rank() const { return rank_; }
  int size() const { return size_; }

  /// Moves all messages; `describe(expected, got, peer)` puts a difference into words. Throws
  /// Mismatch, PeerGone, Interrupted, and SystemFailure after `seconds` (0: never) in which nothing
  /// has moved. Different threads may have traffic with different peers.
  void exchange(Traffic& traffic,
                const std::function<std::string(const Header&, const Header&, int)>& describe,
                double seconds = 0.0);
  /// Ends every exchange now and in future. Any thread.
  void interrupt();
  /// What has been sent arrives, and then the peers find this rank gone. Any thread.
  void hang_up();

 private:
  void close();
  int rank_, size_;
  int wake_ = -1;  // an eventfd that stays readable
  std::vector<int> sockets_;
};

}  // namespace fake_nccl
