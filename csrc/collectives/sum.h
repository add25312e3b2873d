#pragma once
#include "collectives/context.h"
#include "collectives/task.h"

namespace adareduce {

/// Elements of scratch that sum_allreduce needs.
std::int64_t sum_scratch_numel(std::int64_t numel, int size);

/// buffer.data[i] = (sum over ranks) / divisor, added in rank order: the same bits on every rank,
/// whatever their number of shards. Collective. Reduce-scatter and all-gather with direct
/// messages: 2n(P-1)/P elements sent per rank in two exchanges.
Task sum_allreduce(Context context, FusedBuffer buffer, double divisor);

}  // namespace adareduce
