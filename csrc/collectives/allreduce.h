#pragma once
#include <span>

#include "collectives/adasum_schedule.h"
#include "collectives/context.h"
#include "collectives/task.h"

namespace adareduce {

/// What an all-reduce needs beside its data, built once per plan.
struct AllreducePlan {
  ReduceOp op = ReduceOp::sum;
  std::vector<AdasumLevel> adasum;  ///< empty for other ops
  std::int64_t scratch_numel = 0;   ///< elements
  std::int64_t stats_numel = 0;     ///< doubles
};

AllreducePlan make_allreduce_plan(ReduceOp op, Rank rank, int size, std::int64_t numel,
                                  std::int64_t num_segments);

/// Reduces `buffer` in place over all ranks of the context. Collective. `plan`, the memory of
/// `buffer` and `stats` stay until the task has ended.
Task allreduce(Context context, const AllreducePlan& plan, FusedBuffer buffer,
               std::span<double> stats);

}  // namespace adareduce
