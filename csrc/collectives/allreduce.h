#pragma once
#include <span>

#include "collectives/adasum_schedule.h"
#include "collectives/context.h"
#include "collectives/shards.h"
#include "collectives/task.h"

namespace adareduce {

/// What an all-reduce needs beside its data, built once per plan.
struct AllreducePlan {
  ReduceOp op = ReduceOp::sum;
  bool has_statistics = false;
  std::vector<AdasumLevel> adasum;     ///< empty for other ops
  Shards shards;                       ///< empty for Adasum
  std::vector<std::int32_t> group_of;  ///< per segment; empty without statistics of groups
  std::int64_t num_groups = 0;
  std::int64_t tail_numel = 0;     ///< elements of room that the buffer must have behind its end
  std::int64_t scratch_numel = 0;  ///< elements
  std::int64_t stats_numel = 0;    ///< doubles
};

/// Statistics of a reduction; each null where they are not wanted or not defined for the op.
struct StatisticsOutput {
  double* squares = nullptr;        ///< [groups][kSquaresPerGroup] over everything; added to
  double* orthogonality = nullptr;  ///< [segments]; docs/algorithms.md, "Orthogonality"
  /// [groups], this rank's share of the first square instead of that of its data; may be null.
  const double* local_squares = nullptr;
};

AllreducePlan make_adasum_plan(Rank rank, int size, std::int64_t numel, std::int64_t num_segments,
                               DType dtype, bool has_statistics);
/// For all ops but Adasum.
AllreducePlan make_sharded_plan(ReduceOp op, Rank rank, Shards shards,
                                std::vector<std::int32_t> group_of, std::int64_t num_groups);

/// Reduction of an op that is not Adasum, over `size` ranks.
struct Reduction;
Reduction reduction_of(ReduceOp op, int size);

/// Elements that hold `count` doubles, up to a whole number of lines.
std::int64_t numel_of_doubles(std::int64_t count, DType dtype);

/// Reduces `buffer` in place over all ranks of the context. Collective. `plan`, the memory of
/// `buffer`, `stats` and `output` stay until the task has ended.
Task allreduce(Context context, const AllreducePlan& plan, FusedBuffer buffer,
               std::span<double> stats, StatisticsOutput output);

}  // namespace adareduce
