#include "collectives/allreduce.h"

#include <cstring>

#include "base/errors.h"
#include "collectives/adasum.h"
#include "collectives/allgather.h"
#include "collectives/reduce_scatter.h"

namespace adareduce {
namespace {

// Reduce-scatter and all-gather. Statistics travel behind the shards: no message more.
Task sharded_allreduce(Context context, const AllreducePlan& plan, FusedBuffer buffer,
                       std::span<double> stats, StatisticsOutput output) {
  const Rank self = context.transport.rank();
  const std::int64_t width = size_of(buffer.dtype);
  const Shards& shards = plan.shards;
  const std::int64_t num_squares = plan.num_groups * kSquaresPerGroup;
  const auto tail_bytes = static_cast<std::size_t>(num_squares) * sizeof(double);

  std::fill_n(stats.begin(), num_squares, 0.0);
  co_await reduce_scatter(context, buffer, shards, reduction_of(plan.op, context.transport.size()),
                          {plan.group_of.data(), plan.num_groups, stats.data()});
  // A sum over all ranks of what each has contributed, wherever it comes from: in the place of its
  // shard's squares.
  for (std::int64_t g = 0; output.local_squares != nullptr && g < plan.num_groups; ++g)
    stats[static_cast<std::size_t>(g * kSquaresPerGroup)] = output.local_squares[g];
  if (num_squares > 0)
    std::memcpy(at(buffer.data, shards.shard(self).end, width), stats.data(), tail_bytes);

  std::vector<Range> blocks;
  for (Rank rank = 0; rank < context.transport.size(); ++rank)
    blocks.push_back(shards.with_tail(rank));
  co_await allgather_ranges(context, kDataTag, buffer.data, width, blocks);

  // In rank order, on every rank: the same bits.
  for (Rank rank = 0; num_squares > 0 && rank < context.transport.size(); ++rank) {
    std::memcpy(stats.data(), at(buffer.data, shards.shard(rank).end, width), tail_bytes);
    for (std::int64_t i = 0; i < num_squares; ++i)
      output.squares[i] += stats[static_cast<std::size_t>(i)];
  }
}

}  // namespace

std::int64_t numel_of_doubles(std::int64_t count, DType dtype) {
  const std::int64_t width = size_of(dtype);
  return align_up((count * static_cast<std::int64_t>(sizeof(double)) + width - 1) / width);
}

Reduction reduction_of(ReduceOp op, int size) {
  switch (op) {
    case ReduceOp::average:
      return {Elementwise::sum, static_cast<double>(size)};
    case ReduceOp::sum:
      return {Elementwise::sum, 1.0};
    case ReduceOp::min:
      return {Elementwise::min, 1.0};
    case ReduceOp::max:
      return {Elementwise::max, 1.0};
    case ReduceOp::product:
      return {Elementwise::product, 1.0};
    case ReduceOp::adasum:
      break;
  }
  throw UsageError(concat("reduction ", name_of(op), " does not work element by element"));
}

AllreducePlan make_adasum_plan(Rank rank, int size, std::int64_t numel, std::int64_t num_segments,
                               DType dtype, bool has_statistics) {
  AllreducePlan plan;
  plan.op = ReduceOp::adasum;
  plan.has_statistics = has_statistics;
  plan.adasum = make_adasum_schedule(make_adasum_tree(size), rank, numel);
  plan.tail_numel = has_statistics ? numel_of_doubles(num_segments, dtype) : 0;
  plan.scratch_numel = size > 1 ? numel : 0;
  plan.stats_numel = adasum_stats_numel(plan.adasum, num_segments, has_statistics);
  return plan;
}

AllreducePlan make_sharded_plan(ReduceOp op, Rank rank, Shards shards,
                                std::vector<std::int32_t> group_of, std::int64_t num_groups) {
  AllreducePlan plan;
  plan.op = op;
  plan.has_statistics = num_groups > 0;
  plan.scratch_numel = reduce_scatter_scratch_numel(shards, rank);
  plan.shards = std::move(shards);
  plan.group_of = std::move(group_of);
  plan.num_groups = num_groups;
  plan.stats_numel = num_groups * kSquaresPerGroup;
  return plan;
}

Task allreduce(Context context, const AllreducePlan& plan, FusedBuffer buffer,
               std::span<double> stats, StatisticsOutput output) {
  if (plan.op == ReduceOp::adasum)
    return adasum_allreduce(context, buffer, plan.adasum, stats, output.orthogonality);
  return sharded_allreduce(context, plan, buffer, stats, output);
}

}  // namespace adareduce
