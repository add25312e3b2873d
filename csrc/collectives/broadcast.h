#pragma once
#include <vector>

#include "collectives/context.h"
#include "collectives/task.h"

namespace adareduce {

/// A rank's place in the binomial tree of a broadcast.
struct BroadcastSchedule {
  Rank parent = -1;            ///< -1 at the root
  std::vector<Rank> children;  ///< the one with the largest subtree first
};

BroadcastSchedule make_broadcast_schedule(Rank rank, int size, Rank root);

/// Copies `bytes` of the root's `data` to every rank's. Collective. Pieces of kBroadcastPiece bytes
/// follow each other down the tree: a piece is sent on while the next one arrives.
Task broadcast(Context context, BroadcastSchedule schedule, void* data, std::int64_t bytes);

inline constexpr std::int64_t kBroadcastPiece = std::int64_t{1} << 20;

}  // namespace adareduce
