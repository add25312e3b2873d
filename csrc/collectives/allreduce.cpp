#include "collectives/allreduce.h"

#include "base/errors.h"
#include "collectives/adasum.h"
#include "collectives/sum.h"

namespace adareduce {

AllreducePlan make_allreduce_plan(ReduceOp op, Rank rank, int size, std::int64_t numel,
                                  std::int64_t num_segments) {
  AllreducePlan plan;
  plan.op = op;
  if (op == ReduceOp::adasum) {
    plan.adasum = make_adasum_schedule(make_adasum_tree(size), rank, numel);
    plan.scratch_numel = size > 1 ? numel : 0;
    plan.stats_numel = adasum_stats_numel(plan.adasum, num_segments);
  } else {
    plan.scratch_numel = sum_scratch_numel(numel, size);
  }
  return plan;
}

Task allreduce(Context context, const AllreducePlan& plan, FusedBuffer buffer,
               std::span<double> stats) {
  switch (plan.op) {
    case ReduceOp::average:
      return sum_allreduce(context, buffer, context.transport.size());
    case ReduceOp::sum:
      return sum_allreduce(context, buffer, 1.0);
    case ReduceOp::adasum:
      return adasum_allreduce(context, buffer, plan.adasum, stats);
  }
  throw UsageError(concat("allreduce: reduction code ", static_cast<int>(plan.op), " is unknown"));
}

}  // namespace adareduce
