// Numerics. Products and sums in double from the first element on: element vectors i, i + 32, ...
// of an item add into lane i mod 32, the lanes as a butterfly, one item of a run after the other.
// All inputs' products are exact in double, but for float64's. Relative error of a dot product of n
// elements: about n / 32 * 2^-53 of the sum of magnitudes within a run, and less above.
#include "kernels/cuda/peer_adasum.cuh"

namespace adareduce::cuda {
namespace {

template <typename T, int kRanks>
__global__ void __launch_bounds__(kPeerThreads, 1) gram_kernel(PeerAdasum args) {
  constexpr int kPairs = gram_numel(kRanks);
  const int size = args.peers.size;
  const int lane = lane_of_warp();
  T* const stage = static_cast<T*>(args.stage);
  double sums[kPairs];
#pragma unroll
  for (int q = 0; q < kPairs; ++q) sums[q] = 0;

  const auto add = [&](const double (&x)[kRanks]) {
#pragma unroll
    for (int i = 0; i < kRanks; ++i)
#pragma unroll
      for (int j = i; j < kRanks; ++j) {
        double& sum = sums[gram_index(i, j, kRanks)];
        sum = fma(x[i], x[j], sum);
      }
  };
  const auto load_slices = [&](std::int64_t i) {
    Slices<T, kRanks> slices;
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
      slices.of[r] = load_if(r < size, static_cast<const T*>(args.peers.in[r]) + i);
    return slices;
  };
  const auto use_slices = [&](std::int64_t i, const Slices<T, kRanks>& slices) {
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
      if (r < size)
        store(stage + r * args.stage_stride + (i - args.work.shard.begin), slices.of[r]);
#pragma unroll
    for (int e = 0; e < Vector<T>::kNumel; ++e) {
      double x[kRanks];
#pragma unroll
      for (int r = 0; r < kRanks; ++r) x[r] = value_of(slices.of[r].elements[e]);
      add(x);
    }
  };
  const auto use_element = [&](std::int64_t i) {
    double x[kRanks];
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      x[r] = 0;
      if (r >= size) continue;
      const T element = static_cast<const T*>(args.peers.in[r])[i];
      stage[r * args.stage_stride + (i - args.work.shard.begin)] = element;
      x[r] = value_of(element);
    }
    add(x);
  };

  meet_peers(args.peers);  // their inputs are complete
  for_each_run(
      args.work,
      [&](Range part) {
        for_each_vector<T, 8 / kRanks>(part, lane, kWarp, load_slices, use_slices, use_element);
      },
      [&](std::int64_t slot) {
        double* const to = args.slots + slot * args.pairs();
#pragma unroll
        for (int i = 0; i < kRanks; ++i)
#pragma unroll
          for (int j = i; j < kRanks; ++j) {
            double& sum = sums[gram_index(i, j, kRanks)];
            const double total = sum_of_warp(sum);
            sum = 0;
            if (lane == 0 && j < size) to[gram_index(i, j, size)] = total;
          }
      });
}

}  // namespace

void launch_peer_gram(const PeerAdasum& args, DType dtype, int blocks, Stream stream) {
  for_float(dtype, "peer_adasum", [&]<typename T>(TypeTag<T>) {
    with_capacity(args.peers.size, [&](auto ranks) {
      launch(gram_kernel<T, ranks()>, blocks, kPeerThreads, stream, args);
    });
  });
}

}  // namespace adareduce::cuda
