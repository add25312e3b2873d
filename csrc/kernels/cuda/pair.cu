// Statistics of pairs of vectors, and their combination: Adasum's two kernels.
//
// Numerics. Statistics: a lane adds products of at most 128 elements by fused multiply-add, in
// double (products of float32 and shorter are exact there; relative error of a sum about
// (n / 4096 / threads + 170) * 2^-53) or in float32 (128 * 2^-24; squares of |x| < 1e-19 vanish),
// then lanes, items (slots.cu) in a fixed order, in double. Combination: shares, products and sum
// in double, each rounded by itself (-fmad=false), then once to the type, half types by way of
// float32: the bits of the CPU's kernel.
#include "kernels/coefficients.h"
#include "kernels/cuda/element_types.h"
#include "kernels/cuda/grid.h"
#include "kernels/cuda/item_walk.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/slots.h"
#include "kernels/cuda/table.h"

namespace adareduce::cuda {
namespace {

// Vectors of each operand that a lane has under way.
constexpr int kStatsUnroll = 4;
constexpr int kCombineUnroll = 2;

template <typename T>
struct PairWalk {
  ItemWalk walk;
  const T* lower;
  const T* upper;
};

template <typename Sum>
struct PairSums {
  Sum dot = 0;
  Sum lower = 0;
  Sum upper = 0;

  __device__ void add(Sum a, Sum b) {
    dot = add_product(dot, a, b);
    lower = add_product(lower, a, a);
    upper = add_product(upper, b, b);
  }
};

template <typename T, typename Sum>
__global__ void __launch_bounds__(kItemThreads, kItemBlocks)
    pair_stats_of_items(PairWalk<T> pair, double* slots) {
  const int lane = lane_of_warp();
  for (std::int64_t i = pair.walk.first + warp_of_grid(); i < pair.walk.last;
       i += warps_of_grid()) {
    const Lattice<T> lattice(pair.walk.part(pair.walk.items[i]));
    PairSums<Sum> sums;
    const T* lower = pair.lower + lattice.vectors_begin;
    const T* upper = pair.upper + lattice.vectors_begin;
    for (int v = lane; v < lattice.num_vectors; v += kStatsUnroll * kWarp) {
      Vector<T> a[kStatsUnroll], b[kStatsUnroll];
#pragma unroll
      for (int u = 0; u < kStatsUnroll; ++u) {
        const int at = v + u * kWarp;
        a[u] = load_once_if(at < lattice.num_vectors, lower + at * Vector<T>::kNumel);
        b[u] = load_once_if(at < lattice.num_vectors, upper + at * Vector<T>::kNumel);
      }
#pragma unroll
      for (int u = 0; u < kStatsUnroll; ++u)
#pragma unroll
        for (int e = 0; e < Vector<T>::kNumel; ++e)
          sums.add(value_of(a[u].elements[e]), value_of(b[u].elements[e]));
    }
    if (lane < lattice.num_edges) {
      const std::int64_t at = lattice.edge(lane);
      sums.add(value_of(pair.lower[at]), value_of(pair.upper[at]));
    }
    const double dot = sum_of_warp(static_cast<double>(sums.dot));
    const double lower_square = sum_of_warp(static_cast<double>(sums.lower));
    const double upper_square = sum_of_warp(static_cast<double>(sums.upper));
    if (lane < kStatsPerSegment)
      slots[i * kSlotsPerItem + lane] = lane == 0 ? dot : lane == 1 ? lower_square : upper_square;
  }
}

template <typename T>
__device__ T combine(double lower_share, T a, double upper_share, T b) {
  return element_of<T>(lower_share * static_cast<double>(value_of(a)) +
                       upper_share * static_cast<double>(value_of(b)));
}

template <typename T>
__global__ void __launch_bounds__(kItemThreads, kItemBlocks)
    combine_items(PairWalk<T> pair, const double* stats, T* out) {
  const int lane = lane_of_warp();
  for (std::int64_t i = pair.walk.first + warp_of_grid(); i < pair.walk.last;
       i += warps_of_grid()) {
    const Item item = pair.walk.items[i];
    const Lattice<T> lattice(pair.walk.part(item));
    const double* of_segment = stats + item.segment * std::int64_t{kStatsPerSegment};
    const double lower_share = adasum_share(of_segment[0], of_segment[1]);
    const double upper_share = adasum_share(of_segment[0], of_segment[2]);
    const T* lower = pair.lower + lattice.vectors_begin;
    const T* upper = pair.upper + lattice.vectors_begin;
    // Not load_once_if(): `out` may be an operand.
    for (int v = lane; v < lattice.num_vectors; v += kCombineUnroll * kWarp) {
      Vector<T> a[kCombineUnroll], b[kCombineUnroll];
#pragma unroll
      for (int u = 0; u < kCombineUnroll; ++u) {
        const int at = v + u * kWarp;
        a[u] = load_if(at < lattice.num_vectors, lower + at * Vector<T>::kNumel);
        b[u] = load_if(at < lattice.num_vectors, upper + at * Vector<T>::kNumel);
      }
#pragma unroll
      for (int u = 0; u < kCombineUnroll; ++u)
        if (const int at = v + u * kWarp; at < lattice.num_vectors) {
#pragma unroll
          for (int e = 0; e < Vector<T>::kNumel; ++e)
            a[u].elements[e] =
                combine(lower_share, a[u].elements[e], upper_share, b[u].elements[e]);
          store(out + lattice.vectors_begin + at * Vector<T>::kNumel, a[u]);
        }
    }
    if (lane < lattice.num_edges) {
      const std::int64_t at = lattice.edge(lane);
      out[at] = combine(lower_share, pair.lower[at], upper_share, pair.upper[at]);
    }
  }
}

template <typename T>
PairWalk<T> walk_of(const VectorPair& pair, Range items) {
  return {{pair.segments->items->on_device, items.begin, items.end, pair.range},
          static_cast<const T*>(pair.lower),
          static_cast<const T*>(pair.upper)};
}

}  // namespace

template <Accumulator accumulator>
void pair_stats(const PairStatsArgs& args, Stream stream) {
  const VectorPair& pair = args.pair;
  for_float(pair.dtype, "pair_stats", [&]<typename T>(TypeTag<T>) {
    constexpr bool is_double = accumulator == Accumulator::f64 || sizeof(T) == sizeof(double);
    const auto kernel = pair_stats_of_items<T, std::conditional_t<is_double, double, float>>;
    const Range items = items_in(*pair.segments->items, pair.range);
    if (!items.empty())
      launch(kernel, blocks_for(kernel, kItemThreads, items.size()), kItemThreads, stream,
             walk_of<T>(pair, items), pair.segments->items->slots);
    add_slots({pair.segments, items, kStatsPerSegment, args.stats}, stream);
  });
}
template void pair_stats<Accumulator::f64>(const PairStatsArgs&, Stream);
template void pair_stats<Accumulator::f32>(const PairStatsArgs&, Stream);

void pair_combine(const PairCombineArgs& args, Stream stream) {
  const VectorPair& pair = args.pair;
  for_float(pair.dtype, "pair_combine", [&]<typename T>(TypeTag<T>) {
    const auto kernel = combine_items<T>;
    const Range items = items_in(*pair.segments->items, pair.range);
    if (items.empty()) return;
    launch(kernel, blocks_for(kernel, kItemThreads, items.size()), kItemThreads, stream,
           walk_of<T>(pair, items), args.stats, static_cast<T*>(args.out));
  });
}

}  // namespace adareduce::cuda
