#pragma once
#include "collectives/shared_walk.h"

namespace adareduce {

/// All-reduce, element by element, of tensors of every rank: pack, combine, unpack; only combine
/// where the tensors are resident, after which the caller waits for kCombined. Collective.
/// `squares`, where there are groups, receives this rank's part. `schedule` and what `tensors` and
/// `output` point to stay until the task has ended.
Task shared_reduce(SharedContext context, const SharedSchedule& schedule, SharedTensors tensors,
                   Reduction reduction, SquaresOutput output);

/// Reduce-scatter: outputs are those of the segments that this rank owns.
Task shared_scatter(SharedContext context, const SharedSchedule& schedule, SharedTensors tensors,
                    Reduction reduction);

/// All-gather and broadcast: every rank gives the segments that it owns (`inputs`) and receives the
/// others (`outputs`).
Task shared_gather(SharedContext context, const SharedSchedule& schedule, SharedTensors tensors);

}  // namespace adareduce
