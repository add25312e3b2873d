// Numerics. The vectors of a node are formed in double from the ranks' slices, element by element,
// and never stored; their products and sums are double. So a node's squared norm is wrong by a part
// of itself however much its leaves cancel: relative error about n / 256 * 2^-53 for a segment of n
// elements in a shard. Fixed order; shards in rank order.
#include "kernels/cuda/block_sum.cuh"
#include "kernels/cuda/peer_adasum.cuh"

namespace adareduce::cuda {
namespace {

// Adds <x, y>, |x|^2, |y|^2 of one element to `stats`.
__device__ inline void add_products(double x, double y, double (&stats)[kStatsPerSegment]) {
  stats[0] = add_product(stats[0], x, y);
  stats[1] = add_product(stats[1], x, x);
  stats[2] = add_product(stats[2], y, y);
}

// This thread's part of the products of two nodes over the part of a segment in this rank's shard.
template <typename T>
__device__ void products_of_nodes(const PeerAdasum& args, Range part, const double* c,
                                  unsigned lower, unsigned upper,
                                  double (&stats)[kStatsPerSegment]) {
  constexpr int kNumel = Vector<T>::kNumel;
  const T* const stage = static_cast<const T*>(args.stage);
  const std::int64_t begin = args.work.shard.begin;
  for_each_vector<T, 1>(
      part, static_cast<int>(threadIdx.x), kPeerThreads, [](std::int64_t i) { return i; },
      [&](std::int64_t i, std::int64_t) {
        double x[kNumel] = {}, y[kNumel] = {};
        for (int r = 0; r < args.peers.size; ++r) {
          if (((lower | upper) >> r & 1u) == 0) continue;
          const Vector<T> slice = load_once(stage + r * args.stage_stride + (i - begin));
          const double of_x = lower >> r & 1u ? c[r] : 0, of_y = upper >> r & 1u ? c[r] : 0;
#pragma unroll
          for (int e = 0; e < kNumel; ++e) {
            const double value = value_of(slice.elements[e]);
            x[e] = add_product(x[e], of_x, value);
            y[e] = add_product(y[e], of_y, value);
          }
        }
#pragma unroll
        for (int e = 0; e < kNumel; ++e) add_products(x[e], y[e], stats);
      },
      [&](std::int64_t i) {
        double x = 0, y = 0;
        for (int r = 0; r < args.peers.size; ++r) {
          const double value = value_of(stage[r * args.stage_stride + (i - begin)]);
          if (lower >> r & 1u) x = add_product(x, c[r], value);
          if (upper >> r & 1u) y = add_product(y, c[r], value);
        }
        add_products(x, y, stats);
      });
}

// Combines a node whose statistics all ranks have pushed.
__device__ void combine_node(const PeerAdasum& args, std::int64_t segment, int node,
                             const unsigned* leaves) {
  const int size = args.peers.size;
  double gram[gram_numel(kMaxPeers)], stats[kStatsPerSegment] = {}, c[kMaxPeers];
  args.gather_gram(segment, gram);
  for (int r = 0; r < size; ++r) {
    c[r] = args.coefficients[segment * size + r];
    for (int k = 0; k < kStatsPerSegment; ++k)
      stats[k] += args.stats(args.peers.rank, r, segment, node)[k];
  }
  const unsigned lower = leaves[args.tree.lower[node]], upper = leaves[args.tree.upper[node]];
  adasum_combine(stats, kNothingOfVector * gram_product(size, gram, c, lower, lower).diagonal,
                 kNothingOfVector * gram_product(size, gram, c, upper, upper).diagonal, size, lower,
                 upper, c);
  for (int r = 0; r < size; ++r) args.coefficients[segment * size + r] = c[r];
  if (node == args.tree.num_nodes() - 1 && args.orthogonality_out != nullptr) {
    double sum_of_squares = 0;
    for (int r = 0; r < size; ++r) sum_of_squares += gram[gram_index(r, r, size)];
    args.orthogonality_out[segment] = adasum_orthogonality(stats, sum_of_squares);
  }
}

template <typename T>
__global__ void __launch_bounds__(kPeerThreads, 1) levels_kernel(PeerAdasum args) {
  __shared__ unsigned leaves[2 * GramTree::kMaxLeaves - 1];
  __shared__ int heights[2 * GramTree::kMaxLeaves - 1];
  const Range segments = args.work.segments_of_block();
  const int thread = static_cast<int>(threadIdx.x), size = args.peers.size;
  const int nodes = args.tree.num_nodes();

  // Every warp looks at all of them, and so does the block of this index on every rank.
  bool found = false;
  for (std::int64_t s = segments.begin + lane_of_warp(); s < segments.end; s += kWarp)
    found = found || args.is_flagged(s);
  if (!__any_sync(kWholeWarp, found)) return;

  if (thread == 0) gram_leaves(args.tree, leaves);
  if (thread < size + nodes) heights[thread] = gram_height(args.tree, thread);
  // Products of leaves are those of the Gram matrix.
  for (std::int64_t s = segments.begin + thread; s < segments.end; s += kPeerThreads) {
    if (!args.is_flagged(s)) continue;
    double gram[gram_numel(kMaxPeers)], c[kMaxPeers];
    args.gather_gram(s, gram);
    adasum_of_gram(args.tree, gram, c, 1);
    for (int r = 0; r < size; ++r) args.coefficients[s * size + r] = c[r];
  }
  __syncthreads();

  for (int height = 2; height <= heights[size + nodes - 1]; ++height) {
    for (std::int64_t s = segments.begin; s < segments.end; ++s) {
      if (!args.is_flagged(s)) continue;
      const TensorSegment segment = args.segments[s];
      const Range part = overlap({segment.offset, segment.offset + segment.numel}, args.work.shard);
      for (int n = 0; n < nodes; ++n) {
        if (heights[size + n] != height) continue;
        double stats[kStatsPerSegment] = {};
        products_of_nodes<T>(args, part, args.coefficients + s * size, leaves[args.tree.lower[n]],
                             leaves[args.tree.upper[n]], stats);
        sum_over_block(stats);
        if (thread == 0)
          for (int r = 0; r < size; ++r)
            for (int k = 0; k < kStatsPerSegment; ++k)
              args.stats(r, args.peers.rank, s, n)[k] = stats[k];
      }
    }
    meet_peers(args.peers);
    for (std::int64_t s = segments.begin + thread; s < segments.end; s += kPeerThreads)
      if (args.is_flagged(s))
        for (int n = 0; n < nodes; ++n)
          if (heights[size + n] == height) combine_node(args, s, n, leaves);
    __syncthreads();
  }
}

}  // namespace

void launch_peer_levels(const PeerAdasum& args, DType dtype, int blocks, Stream stream) {
  for_float(dtype, "peer_adasum", [&]<typename T>(TypeTag<T>) {
    launch(levels_kernel<T>, blocks, kPeerThreads, stream, args);
  });
}

}  // namespace adareduce::cuda
