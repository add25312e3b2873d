#pragma once
#include <algorithm>

#include "base/types.h"

namespace adareduce {

/// Shards start on a multiple of this many elements: whole cache lines from 4 bytes up.
inline constexpr std::int64_t kShardAlignment = 16;

/// The part of `numel` elements that `rank` of `size` reduces. Ranges follow each other in rank
/// order and cover everything; all have the same length except for the last non-empty one and
/// empty ones behind it.
inline Range shard_of(std::int64_t numel, Rank rank, int size) {
  const std::int64_t blocks = (numel + kShardAlignment - 1) / kShardAlignment;
  const std::int64_t length = (blocks + size - 1) / size * kShardAlignment;
  return {std::min(numel, rank * length), std::min(numel, (rank + 1) * length)};
}

}  // namespace adareduce
