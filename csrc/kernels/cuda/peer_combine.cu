// Numerics. The weighted sum of all ranks' slices in double, in rank order, and one rounding to the
// tensor's type, half types by way of float: |error| <= (P + 1) 2^-53 sum |c_i g_i| beside it.
#include "kernels/cuda/peer_adasum.cuh"

namespace adareduce::cuda {
namespace {

template <typename T>
__device__ inline double weighted(double c, T x, double sum) {
  return fma(c, static_cast<double>(value_of(x)), sum);
}

// The exit barrier makes all ranks' out windows complete for whatever follows in a rank's stream:
// that starts after all blocks of this kernel have ended, each of them after it has met the block
// of its index on every peer, which had pushed all it had to push by then; and every element is
// pushed by some block of its shard's owner. It also ends the request: no peer reads this rank's
// windows or scalars after it, since its earlier kernels had to end before its blocks of this one
// began.
template <typename T, int kRanks>
__global__ void __launch_bounds__(kPeerThreads, 1) combine_kernel(PeerAdasum args) {
  const int size = args.peers.size;
  const int lane = lane_of_warp();
  const std::int64_t begin = args.work.shard.begin;
  const T* const stage = static_cast<const T*>(args.stage);
  T* to[kRanks];  // beginning with this rank, so that not all write to one peer at a time
#pragma unroll
  for (int r = 0; r < kRanks; ++r)
    to[r] = static_cast<T*>(args.peers.out[(args.peers.rank + r) % size]);

  for (std::int64_t i = args.work.indices.begin + warp_of_grid(); i < args.work.indices.end;
       i += warps_of_grid()) {
    const Item item = args.work.items[i];
    double c[kRanks];
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
      c[r] = r < size ? args.coefficients[item.segment * static_cast<std::int64_t>(size) + r] : 0;
    for_each_vector<T, 8 / kRanks>(
        overlap(elements_of(item), args.work.shard), lane, kWarp,
        [&](std::int64_t at) {
          Slices<T, kRanks> slices;
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
            slices.of[r] = load_once_if(r < size, stage + r * args.stage_stride + (at - begin));
          return slices;
        },
        [&](std::int64_t at, const Slices<T, kRanks>& slices) {
          Vector<T> result;
#pragma unroll
          for (int e = 0; e < Vector<T>::kNumel; ++e) {
            double sum = c[0] * value_of(slices.of[0].elements[e]);
#pragma unroll
            for (int r = 1; r < kRanks; ++r)
              if (r < size) sum = weighted(c[r], slices.of[r].elements[e], sum);
            result.elements[e] = element_of<T>(sum);
          }
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
            if (r < size) store(to[r] + at, result);
        },
        [&](std::int64_t at) {
          double sum = c[0] * value_of(stage[at - begin]);
#pragma unroll
          for (int r = 1; r < kRanks; ++r)
            if (r < size) sum = weighted(c[r], stage[r * args.stage_stride + (at - begin)], sum);
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
            if (r < size) to[r][at] = element_of<T>(sum);
        });
  }
  meet_peers(args.peers);
}

}  // namespace

void launch_peer_combine(const PeerAdasum& args, DType dtype, int blocks, Stream stream) {
  for_float(dtype, "peer_adasum", [&]<typename T>(TypeTag<T>) {
    with_capacity(args.peers.size, [&](auto ranks) {
      launch(combine_kernel<T, ranks()>, blocks, kPeerThreads, stream, args);
    });
  });
}

}  // namespace adareduce::cuda
