#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "base/types.h"

namespace adareduce {

/// Bytes for, or from, one peer. The memory is the caller's and stays until the exchange is done.
struct SendPart {
  Rank peer = 0;
  const void* data = nullptr;
  std::int64_t bytes = 0;
};
struct RecvPart {
  Rank peer = 0;
  void* data = nullptr;
  std::int64_t bytes = 0;
};

/// Messages under way. Destroying one that is not done gives it up: whoever does that must leave
/// its memory untouched for the life of the process (see Transport::abandon).
class Exchange {
 public:
  virtual ~Exchange() = default;
  /// True once every message is complete; makes progress and never blocks.
  /// Throws TransportError, then every later call throws too.
  virtual bool test() = 0;
};

/// Moves bytes between the ranks 0 ... size-1 of one group. Knows nothing of tensors.
/// Messages between two ranks on one tag arrive in the order in which they were sent.
/// Different threads may use different tags at the same time.
class Transport {
 public:
  virtual ~Transport() = default;

  virtual Rank rank() const = 0;
  virtual int size() const = 0;

  /// Starts all of these messages together; any side may be empty. Sizes must match the peer's.
  /// No message goes to the own rank. Never blocks.
  virtual std::unique_ptr<Exchange> start(int tag, std::span<const SendPart> sends,
                                          std::span<const RecvPart> receives) = 0;

  /// A short message that nobody announced: receives one on `tag` if it is there.
  /// Returns its sender, or -1. Never blocks. Throws TransportError when it exceeds `buffer`.
  virtual Rank try_receive(int tag, std::span<std::byte> buffer, std::int64_t& bytes) = 0;

  /// After a failure: the destructor will not wait for anybody.
  virtual void abandon() = 0;
  /// Messages that were given up may still arrive in their memory, which must then stay for ever.
  virtual bool may_write_late() const { return true; }

  /// "mpi", "threads".
  virtual std::string_view kind() const = 0;
};

/// The two groups of a process set: agreement and barriers on one, payload on the other.
struct TransportPair {
  std::unique_ptr<Transport> control;
  std::unique_ptr<Transport> data;
};

/// Makes transports over some ranks of a bootstrap.
class TransportProvider {
 public:
  virtual ~TransportProvider() = default;
  /// Collective over exactly `ranks` (of the bootstrap, increasing, the caller among them); blocks.
  /// `id` is equal on those ranks and differs from that of every pair connected at the same time.
  virtual TransportPair connect(std::span<const Rank> ranks, int id) = 0;
};

}  // namespace adareduce
