#include "engine/plan.h"

#include <algorithm>
#include <tuple>

#include "collectives/reduce_scatter.h"
#include "kernels/gram.h"
#include "transports/shared_memory/shared_memory.h"

namespace adareduce {
namespace {

constexpr std::int64_t kLineBytes = 64;

// The name and the scale factors change from call to call and change no plan.
Signature plan_key(const Request& request) {
  Hasher hasher;
  hasher.add(static_cast<std::uint64_t>(request.collective))
      .add(static_cast<std::uint64_t>(request.op))
      .add(static_cast<std::uint64_t>(request.root))
      .add(static_cast<std::uint64_t>(request.has_statistics));
  for (const TensorArg& tensor : request.tensors) {
    hasher.add(static_cast<std::uint64_t>(tensor.dtype))
        .add(static_cast<std::uint64_t>(tensor.numel()))
        .add(static_cast<std::uint64_t>(tensor.group));
    if (request.collective == Collective::reducescatter)
      hasher.add(static_cast<std::uint64_t>(tensor.shape.front()));
  }
  return hasher.finish();
}

std::vector<std::int64_t> numels_of(const Plan::Part& part, const Request& request) {
  std::vector<std::int64_t> numels;
  for (const std::size_t i : part.tensors) numels.push_back(request.tensors[i].numel());
  return numels;
}

// One tensor after the other, each in one piece.
void lay_out_whole(Plan::Part& part, const Request& request) {
  std::tie(part.segments, part.numel) = lay_out(numels_of(part, request));
  for (const std::size_t i : part.tensors) part.pieces.push_back({i, 0});
  part.own_pieces = {0, static_cast<std::int64_t>(part.pieces.size())};
}

// The same, cut where one rank's shard ends and the next one's begins, with room for statistics
// between the shards, which have one length.
Shards lay_out_with_tails(Plan::Part& part, const Request& request, int size,
                          std::int64_t tail_numel) {
  const auto [whole, numel] = lay_out(numels_of(part, request));
  const std::int64_t length = shard_of(numel, 0, size).size();
  for (std::size_t t = 0; t < whole.size(); ++t) {
    const Range range = whole[t].range();
    for (std::int64_t begin = range.begin; begin < range.end || begin == range.begin;) {
      const std::int64_t shard = length == 0 ? 0 : std::min<std::int64_t>(begin / length, size - 1);
      const std::int64_t end = std::min(range.end, (shard + 1) * length);
      part.pieces.push_back({part.tensors[t], begin - range.begin});
      part.segments.push_back({begin + shard * tail_numel, end - begin});
      if (end == begin) break;  // an empty tensor is a piece, too
      begin = end;
    }
  }
  part.own_pieces = {0, static_cast<std::int64_t>(part.pieces.size())};
  Shards shards;
  shards.tail_numel = tail_numel;
  for (Rank rank = 0; rank < size; ++rank) {
    const std::int64_t begin = rank * (length + tail_numel);
    shards.of.push_back({begin, begin + length});
  }
  part.numel = size * (length + tail_numel);
  return shards;
}

// By rank: its rows of every tensor.
Shards lay_out_by_rows(Plan::Part& part, const Request& request, Rank self, int size) {
  Shards shards;
  std::vector<std::int64_t> row_begin(part.tensors.size(), 0);
  for (Rank rank = 0; rank < size; ++rank) {
    const std::int64_t begin = part.numel;
    const auto first_piece = static_cast<std::int64_t>(part.pieces.size());
    for (std::size_t t = 0; t < part.tensors.size(); ++t) {
      const TensorArg& tensor = request.tensors[part.tensors[t]];
      const std::int64_t rows = tensor.shape.front();
      const std::int64_t row_numel = rows == 0 ? 0 : tensor.numel() / rows;
      const std::int64_t numel = rows_of(rows, rank, size) * row_numel;
      part.pieces.push_back({part.tensors[t], row_begin[t]});
      part.segments.push_back({part.numel, numel});
      row_begin[t] += numel;
      part.numel += align_up(numel);
    }
    shards.of.push_back({begin, part.numel});
    if (rank == self)
      part.own_pieces = {first_piece, static_cast<std::int64_t>(part.pieces.size())};
  }
  return shards;
}

Shards equal_shards(std::int64_t numel, int size) {
  Shards shards;
  for (Rank rank = 0; rank < size; ++rank) shards.of.push_back(shard_of(numel, rank, size));
  return shards;
}

void plan_part(Plan::Part& part, const Request& request, Rank rank, int size) {
  if (request.collective == Collective::reducescatter) {
    part.reduction =
        make_sharded_plan(request.op, rank, lay_out_by_rows(part, request, rank, size), {}, 0);
    return;
  }
  const std::int64_t num_groups = request.num_groups();
  if (request.collective == Collective::allreduce && num_groups > 0) {
    const std::int64_t tail = numel_of_doubles(num_groups * kSquaresPerGroup, part.dtype);
    Shards shards = lay_out_with_tails(part, request, size, tail);
    std::vector<std::int32_t> group_of;
    for (const Plan::Piece& piece : part.pieces)
      group_of.push_back(request.tensors[piece.tensor].group);
    part.reduction =
        make_sharded_plan(request.op, rank, std::move(shards), std::move(group_of), num_groups);
    return;
  }
  lay_out_whole(part, request);
  if (request.collective != Collective::allreduce) return;
  if (request.op == ReduceOp::adasum)
    part.reduction =
        make_adasum_plan(rank, size, part.numel, static_cast<std::int64_t>(part.segments.size()),
                         part.dtype, request.has_statistics);
  else
    part.reduction = make_sharded_plan(request.op, rank, equal_shards(part.numel, size), {}, 0);
}

// What all ranks read of all payloads is less than what a second synchronisation costs.
constexpr std::int64_t kMostSmallBytes = std::int64_t{128} << 10;

bool is_small(const Request& request, const Plan& plan, int size) {
  if (request.collective != Collective::allreduce && request.collective != Collective::broadcast &&
      request.collective != Collective::reducescatter)
    return false;
  const std::int64_t bytes =
      plan.fused_bytes + request.num_groups() * static_cast<std::int64_t>(sizeof(double));
  const bool is_gram =
      request.collective == Collective::allreduce && request.op == ReduceOp::adasum;
  if (is_gram && size > GramTree::kMaxLeaves) return false;
  return bytes <= SharedMemory::kPayloadBytes && bytes * size <= kMostSmallBytes;
}

}  // namespace

std::pair<std::vector<TensorSegment>, std::int64_t> lay_out(
    const std::vector<std::int64_t>& numels) {
  std::vector<TensorSegment> segments;
  std::int64_t end = 0;
  for (const std::int64_t numel : numels) {
    segments.push_back({end, numel});
    end += align_up(numel);
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
    plan_part(part, request, rank, size);
    const std::int64_t width = size_of(part.dtype);
    const std::int64_t bytes = (part.numel + part.reduction.tail_numel) * width;
    part.offset = plan.fused_bytes;
    plan.fused_bytes += (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
    plan.scratch_bytes = std::max(plan.scratch_bytes, part.reduction.scratch_numel * width);
    plan.stats_numel = std::max(plan.stats_numel, part.reduction.stats_numel);
  }
  plan.is_small = is_small(request, plan, size);
  plan.shared = std::make_shared<std::unordered_map<std::uint32_t, SharedSchedule>>();
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
