#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "base/errors.h"

namespace adareduce {

/// Memory could not be shared; the caller may go another way.
class SharedMemoryError : public Error {
 public:
  using Error::Error;
};

/// Memory that processes of one machine share: a memfd, mapped here. It has no name in any file
/// system, and goes when the last process that maps it has unmapped it or died.
class SharedSegment {
 public:
  /// Zeroed memory of at least one byte, allocated now and not at the first touch: where /dev/shm,
  /// the cgroup or the machine has no room, it throws SharedMemoryError instead of SIGBUS later.
  static std::shared_ptr<SharedSegment> create(std::int64_t bytes);
  /// What create() has made in this process or another one, by its address().
  /// Throws SharedMemoryError where this process may not open it or it has another size.
  static std::shared_ptr<SharedSegment> open(const std::string& address, std::int64_t bytes);
  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  char* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }
  /// How another process of this machine finds it, while this process lives and has not closed it.
  std::string address() const;
  /// Nobody can open it any more; those who have keep it.
  void close_descriptor();

 private:
  SharedSegment(int descriptor, char* data, std::int64_t bytes)
      : descriptor_(descriptor), data_(data), bytes_(bytes) {}

  int descriptor_;
  char* data_;
  std::int64_t bytes_;
};

/// Bytes that could be allocated now: free memory of the machine, and what is left of this
/// process's cgroup. Never more than there is; an estimate, since others allocate, too.
std::int64_t room_for_shared_memory();

}  // namespace adareduce
