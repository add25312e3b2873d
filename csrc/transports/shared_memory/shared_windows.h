#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"
#include "transports/shared_memory/shared_segment.h"

namespace adareduce {

/// Bytes of all ranks in rank order: a collective call. Throws TransportError.
using GatherStrings = std::function<std::vector<std::string>(const std::string& mine)>;

/// A segment of every rank of a node, mapped into this process.
class SharedWindows {
 public:
  /// Collective over the ranks of `gather`, which must be on one machine. `bytes` may differ
  /// between ranks and may be 0. The memory is zero, and this rank's is allocated: no later write
  /// can fail. Throws SharedMemoryError with the same text on all ranks if it fails on one: that
  /// one may not open another's memory, or there is not enough.
  static std::shared_ptr<SharedWindows> make(Rank rank, int size, std::int64_t bytes,
                                             const GatherStrings& gather);

  Rank rank() const { return rank_; }
  int size() const { return static_cast<int>(segments_.size()); }
  char* of(Rank rank) const;  ///< null where that rank's has no bytes
  std::int64_t bytes_of(Rank rank) const;

 private:
  SharedWindows(Rank rank, std::vector<std::shared_ptr<SharedSegment>> segments)
      : rank_(rank), segments_(std::move(segments)) {}

  Rank rank_;
  std::vector<std::shared_ptr<SharedSegment>> segments_;
};

}  // namespace adareduce
