// Sizes and places: all that is decided about the peers' memory without touching it.
#include <algorithm>

#include "kernels/cuda/peer_kernels.h"

namespace adareduce::cuda {
namespace {

constexpr std::int64_t kAlignment = 16;  // elements; of a shard's beginning
// Enough runs that every warp of a large GPU has several, few enough that one block can add up the
// slots of one huge segment in the shadow of moving it.
constexpr std::int64_t kRunsPerShard = 4096;

}  // namespace

Range peer_shard(std::int64_t numel, int rank, int size) {
  const std::int64_t part = (numel + size - 1) / size;
  const std::int64_t length = (part + kAlignment - 1) / kAlignment * kAlignment;
  return {std::min(numel, rank * length), std::min(numel, (rank + 1) * length)};
}

std::int64_t peer_items_per_run(std::int64_t num_items, int size) {
  return std::max<std::int64_t>(1, num_items / size / kRunsPerShard);
}

std::int64_t peer_num_slots(std::int64_t num_segments, std::int64_t num_items, int size) {
  return num_items / peer_items_per_run(num_items, size) + num_segments + 1;
}

std::int64_t peer_scalars_numel(std::int64_t num_segments, int size) {
  // Gram matrices, or squares; and the products of the tree's nodes.
  const int nodes = size - 1;
  return num_segments * size *
         (std::max(gram_numel(size), kSquaresPerGroup) + nodes * kStatsPerSegment);
}

std::int64_t peer_work_numel(std::int64_t num_segments, std::int64_t num_items, int size) {
  const int numbers = std::max(gram_numel(size), kSquaresPerGroup);
  return peer_num_slots(num_segments, num_items, size) * numbers + num_segments * (size + 1);
}

std::int64_t peer_stage_bytes(std::int64_t numel, DType dtype, int size) {
  return peer_shard(numel, 0, size).size() * size * size_of(dtype);
}

}  // namespace adareduce::cuda
