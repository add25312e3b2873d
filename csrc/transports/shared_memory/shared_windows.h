#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"
#include "bootstrap/bootstrap.h"
#include "transports/shared_memory/shared_segment.h"

namespace adareduce {

/// Bytes of all ranks in rank order: a collective call. Throws TransportError.
using GatherStrings = std::function<std::vector<std::string>(const std::string& mine)>;

/// A segment of every rank of a node, mapped into this process.
class SharedWindows {
 public:
  /// Collective over the ranks of `gather`, which must be on one machine and in one network
  /// namespace; gathers twice. `bytes` may differ between ranks and may be 0. The memory is zero,
  /// and this rank's is allocated: no later write can fail. Throws SharedMemoryError with the same
  /// text on all ranks if it fails on one: there is not enough, or it may not open another's
  /// memory, or one took longer than `patience` (and a second per 128 MB). What `gather` throws
  /// passes through. Nothing of it is left in either case.
  static std::shared_ptr<SharedWindows> make(Rank rank, int size, std::int64_t bytes,
                                             const GatherStrings& gather,
                                             Seconds patience = Seconds{60});

  Rank rank() const { return rank_; }
  int size() const { return static_cast<int>(segments_.size()); }
  char* of(Rank rank) const;  ///< null where that rank's has no bytes
  std::int64_t bytes_of(Rank rank) const;

 private:
  using Segments = std::vector<std::shared_ptr<SharedSegment>>;  ///< null where there are no bytes
  SharedWindows(Rank rank, Segments segments) : rank_(rank), segments_(std::move(segments)) {}

  Rank rank_;
  Segments segments_;
};

}  // namespace adareduce
