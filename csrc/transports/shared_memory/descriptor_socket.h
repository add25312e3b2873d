#pragma once
#include <chrono>
#include <optional>
#include <string>

#include "transports/shared_memory/descriptor.h"

namespace adareduce {

/// A letter box for descriptors: a datagram socket with a name that no file system knows. It
/// reaches every process of one network namespace, whichever user, PID or mount namespace a
/// container has put it into, and nothing of it is left when its process has died.
class DescriptorSocket {
 public:
  /// Throws SharedMemoryError.
  DescriptorSocket();

  /// Where peers send to; no two are alike.
  const std::string& name() const { return name_; }

  enum class Sent { yes, not_yet, nobody_there };
  /// Sends bytes, and a descriptor where it is not -1. Never blocks; not_yet: try again.
  /// Throws SharedMemoryError.
  Sent send(const std::string& to, const std::string& bytes, int descriptor) const;

  struct Letter {
    std::string bytes;
    Descriptor descriptor;
    bool is_cut = false;  ///< a descriptor was sent and could not be taken
  };
  /// The oldest letter of at most `most` bytes. Never blocks. Throws SharedMemoryError.
  std::optional<Letter> receive(std::size_t most) const;

  /// Returns when there is a letter or after `limit`.
  void wait(std::chrono::milliseconds limit) const;

  /// Somebody's socket has this name.
  static bool exists(const std::string& name);

 private:
  Descriptor socket_;
  std::string name_;
};

}  // namespace adareduce
