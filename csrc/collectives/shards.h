#pragma once
#include <algorithm>
#include <vector>

#include "base/types.h"

namespace adareduce {

/// Shards start on a multiple of this many elements: whole cache lines from 4 bytes up.
inline constexpr std::int64_t kShardAlignment = 16;

inline std::int64_t align_up(std::int64_t numel) {
  return (numel + kShardAlignment - 1) / kShardAlignment * kShardAlignment;
}

/// The part of `numel` elements that `rank` of `size` reduces. Ranges follow each other in rank
/// order and cover everything; all have the same length except for the last non-empty one and
/// empty ones behind it.
inline Range shard_of(std::int64_t numel, Rank rank, int size) {
  const std::int64_t length = align_up((numel + size - 1) / size);
  return {std::min(numel, rank * length), std::min(numel, (rank + 1) * length)};
}

/// Which rank reduces what of a fused buffer. Behind every shard there may be room for statistics
/// that travel with it.
struct Shards {
  std::vector<Range> of;        ///< by rank, in rank order
  std::int64_t tail_numel = 0;  ///< elements of room behind each shard; a whole number of lines

  Range shard(Rank rank) const { return of[static_cast<std::size_t>(rank)]; }
  Range with_tail(Rank rank) const {
    const Range range = shard(rank);
    return {range.begin, range.end + tail_numel};
  }
  std::int64_t longest() const {
    std::int64_t longest = 0;
    for (const Range& range : of) longest = std::max(longest, range.size());
    return longest;
  }
};

}  // namespace adareduce
