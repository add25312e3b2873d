#include "engine/plan.h"

#include <algorithm>
#include <tuple>

#include "collectives/shards.h"

namespace adareduce {
namespace {

// The name and the scale factors change from call to call and change no plan.
Signature plan_key(const Request& request) {
  Hasher hasher;
  hasher.add(static_cast<std::uint64_t>(request.collective))
      .add(static_cast<std::uint64_t>(request.op))
      .add(static_cast<std::uint64_t>(request.root));
  for (const TensorArg& tensor : request.tensors)
    hasher.add(static_cast<std::uint64_t>(tensor.dtype))
        .add(static_cast<std::uint64_t>(tensor.numel()));
  return hasher.finish();
}

}  // namespace

std::pair<std::vector<TensorSegment>, std::int64_t> lay_out(
    const std::vector<std::int64_t>& numels) {
  std::vector<TensorSegment> segments;
  std::int64_t end = 0;
  for (const std::int64_t numel : numels) {
    segments.push_back({end, numel});
    end += (numel + kShardAlignment - 1) / kShardAlignment * kShardAlignment;
  }
  return {std::move(segments), end};
}

Plan make_plan(const Request& request, Rank rank, int size) {
  Plan plan;
  for (std::size_t i = 0; i < request.tensors.size(); ++i) {
    const DType dtype = request.tensors[i].dtype;
    auto part = std::find_if(plan.parts.begin(), plan.parts.end(),
                             [&](const Plan::Part& p) { return p.dtype == dtype; });
    if (part == plan.parts.end()) {
      part = plan.parts.emplace(part);
      part->dtype = dtype;
    }
    part->tensors.push_back(i);
  }
  for (Plan::Part& part : plan.parts) {
    std::vector<std::int64_t> numels;
    for (const std::size_t i : part.tensors) numels.push_back(request.tensors[i].numel());
    std::tie(part.segments, part.numel) = lay_out(numels);
    const std::int64_t width = size_of(part.dtype);
    part.offset = plan.fused_bytes;
    plan.fused_bytes += part.numel * width;
    if (request.collective != Collective::allreduce) continue;
    part.allreduce = make_allreduce_plan(request.op, rank, size, part.numel,
                                         static_cast<std::int64_t>(part.segments.size()));
    plan.scratch_bytes = std::max(plan.scratch_bytes, part.allreduce.scratch_numel * width);
    plan.stats_numel = std::max(plan.stats_numel, part.allreduce.stats_numel);
  }
  if (request.collective == Collective::broadcast)
    plan.broadcast = make_broadcast_schedule(rank, size, request.root);
  return plan;
}

std::shared_ptr<const Plan> PlanCache::get(const Request& request) {
  const Signature key = plan_key(request);
  const auto found = plans_.find(key);
  if (found != plans_.end()) return found->second;
  if (plans_.size() >= kMaxPlans) plans_.clear();
  return plans_.emplace(key, std::make_shared<const Plan>(make_plan(request, rank_, size_)))
      .first->second;
}

}  // namespace adareduce
