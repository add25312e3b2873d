#include "engine/plan.h"

#include <tuple>

#include "collectives/shards.h"

namespace adareduce {
namespace {

// The name and the scale factors change from call to call and change no plan.
Signature plan_key(const Request& request) {
  Hasher hasher;
  hasher.add(static_cast<std::uint64_t>(request.collective))
      .add(static_cast<std::uint64_t>(request.dtype))
      .add(static_cast<std::uint64_t>(request.op))
      .add(static_cast<std::uint64_t>(request.root));
  for (const TensorArg& tensor : request.tensors)
    hasher.add(static_cast<std::uint64_t>(tensor.numel()));
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
  plan.dtype = request.dtype;
  std::vector<std::int64_t> numels;
  for (const TensorArg& tensor : request.tensors) numels.push_back(tensor.numel());
  std::tie(plan.segments, plan.numel) = lay_out(numels);
  if (request.collective == Collective::allreduce)
    plan.allreduce = make_allreduce_plan(request.op, rank, size, plan.numel,
                                         static_cast<std::int64_t>(plan.segments.size()));
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
