#pragma once
#include <memory>
#include <unordered_map>
#include <vector>

#include "collectives/allreduce.h"
#include "collectives/broadcast.h"
#include "collectives/shared_schedule.h"
#include "engine/request.h"

namespace adareduce {

/// Everything about a request that does not depend on its data: a pure function of the rank, the
/// number of ranks and the request's shapes, dtypes, groups and op. Built once, then looked up.
struct Plan {
  /// Some consecutive elements of a tensor.
  struct Piece {
    std::size_t tensor = 0;  ///< index into the request
    std::int64_t begin = 0;  ///< its first element
  };

  /// The tensors of one dtype and their fused buffer.
  struct Part {
    DType dtype = DType::f32;
    std::vector<std::size_t> tensors;     ///< indices into the request, increasing
    std::vector<Piece> pieces;            ///< of these tensors, in the order of the buffer
    std::vector<TensorSegment> segments;  ///< parallel to `pieces`
    Range own_pieces;                     ///< those that this rank's outputs are made of
    std::int64_t numel = 0;               ///< of the fused buffer, padding included
    std::int64_t offset = 0;              ///< of the fused buffer among those of all parts, bytes
    AllreducePlan reduction;

    SegmentTable table() const { return table_of({0, static_cast<std::int64_t>(pieces.size())}); }
    SegmentTable own_table() const { return table_of(own_pieces); }

   private:
    SegmentTable table_of(Range range) const {
      return {segments.data() + range.begin, nullptr, range.size()};
    }
  };
  std::vector<Part> parts;  ///< by first appearance of their dtypes
  BroadcastSchedule broadcast;
  // What all parts need together, or one after the other.
  std::int64_t fused_bytes = 0;
  std::int64_t scratch_bytes = 0;
  std::int64_t stats_numel = 0;
  /// Over shared memory the data go with the headers: one synchronisation.
  bool is_small = false;
  /// Schedules through shared memory, by part and SharedChoice; made when they are needed first.
  std::shared_ptr<std::unordered_map<std::uint32_t, SharedSchedule>> shared;
};

/// Where each tensor of `numels` lies in a fused buffer: one after the other, each on a multiple of
/// kShardAlignment elements. Returns the segments and the buffer's length.
std::pair<std::vector<TensorSegment>, std::int64_t> lay_out(
    const std::vector<std::int64_t>& numels);

Plan make_plan(const Request& request, Rank rank, int size);

/// Plans of one process set. Used by one thread.
class PlanCache {
 public:
  PlanCache(Rank rank, int size) : rank_(rank), size_(size) {}
  std::shared_ptr<const Plan> get(const Request& request);

  static constexpr std::size_t kMaxPlans = 1024;

 private:
  Rank rank_;
  int size_;
  std::unordered_map<Signature, std::shared_ptr<const Plan>, SignatureHash> plans_;
};

}  // namespace adareduce
