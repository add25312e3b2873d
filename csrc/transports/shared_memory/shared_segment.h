#pragma once
#include <cstdint>
#include <memory>

#include "base/errors.h"
#include "transports/shared_memory/descriptor.h"

namespace adareduce {

/// Memory could not be shared; the caller may go another way.
class SharedMemoryError : public Error {
 public:
  using Error::Error;
};

/// Which segment a descriptor must lead to. Bytes that travel between processes of one build.
struct SegmentIdentity {
  std::uint64_t random[2] = {};  ///< no two segments are ever alike
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  std::int64_t bytes = 0;  ///< as asked for; the memory ends with its page
};

/// Memory that processes of one machine share: a memfd, mapped here. It has no name in any file
/// system and knows no limit of /dev/shm, and goes when the last process that maps it has unmapped
/// it or died. Nobody can change its size.
class SharedSegment {
 public:
  /// Zeroed memory of at least one byte, allocated now and not at the first touch: where machine,
  /// cgroup or limits have no room, it throws SharedMemoryError instead of SIGBUS or a kill later.
  static std::shared_ptr<SharedSegment> create(std::int64_t bytes);
  /// What create() has made in another process, by a descriptor from there; in this process the
  /// same object, so that one memory has one address (race detectors go by addresses).
  /// Throws SharedMemoryError where the descriptor leads elsewhere or cannot be mapped.
  static std::shared_ptr<SharedSegment> open(Descriptor descriptor,
                                             const SegmentIdentity& identity);
  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  char* data() const { return data_; }
  std::int64_t bytes() const { return identity_.bytes; }
  const SegmentIdentity& identity() const { return identity_; }
  /// For sending it to a peer; -1 after close_descriptor(), and where open() has made it.
  int descriptor() const { return descriptor_.number(); }
  /// Nobody can open it any more; those who have keep it. By one thread, the one that created it.
  void close_descriptor() { descriptor_.close(); }

 private:
  SharedSegment(Descriptor descriptor, const SegmentIdentity& identity);
  void map_pages();  ///< now, rather than at the first touch; memory that is allocated

  Descriptor descriptor_;
  SegmentIdentity identity_;
  char* data_ = nullptr;
};

/// 128 bits that nobody can guess.
void fill_with_random(std::uint64_t (&words)[2]);

/// "adareduce: ...: No space left on device", of errno.
[[noreturn]] void throw_shared_memory_error(const std::string& what, int error);

}  // namespace adareduce
