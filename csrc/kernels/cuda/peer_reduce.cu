// Numerics. The rules of reduce.cu: in rank order; half types in float; integers modulo 2^bits,
// their averages exactly; divided once, in double, and rounded once. Squares in double, of the
// inputs and of the results after the division and before they are rounded: a lane's elements one
// after the other, lanes as a butterfly, items and shards in order. Relative error of a sum of n
// squares over P ranks: about (128 P + n / 4096 + 40) * 2^-53.
#include "kernels/cuda/peer_adasum.cuh"
#include "kernels/cuda/reduction.cuh"

namespace adareduce::cuda {
namespace {

struct PeerReduce {
  Peers peers;
  Range part;         // of the fused buffer: what this rank reduces
  bool is_scattered;  // the result stays here, else it goes to all ranks
  Reduction rule;
  ShardItems work;  // with squares only
  double* slots;
  double* squares;

  // Of `from` in rank `of`'s window: sums over its part of a segment.
  __device__ double* pushed(int of, int from, std::int64_t segment) const {
    return peers.scalars[of] + (from * work.num_segments + segment) * kSquaresPerGroup;
  }
};

template <typename T, Elementwise op, int kRanks, bool has_squares>
struct Reducer {
  const PeerReduce& args;
  const T* from[kRanks];
  T* to[kRanks];  // beginning with this rank, so that not all write to one peer at a time
  double of_inputs = 0, of_result = 0;

  __device__ explicit Reducer(const PeerReduce& args) : args(args) {
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      from[r] = static_cast<const T*>(args.peers.in[exists(r) ? r : 0]);
      to[r] = static_cast<T*>(args.peers.out[(args.peers.rank + r) % args.peers.size]);
    }
  }
  __device__ bool exists(int r) const { return r < args.peers.size; }
  __device__ bool receives(int r) const { return r < (args.is_scattered ? 1 : args.peers.size); }

  template <int numel>
  __device__ Vector<T> reduced(const Slices<T, kRanks>& slices) {
    Accumulation<T, numel> sums;
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
      if (exists(r)) sums.add(op, r == 0, slices.of[r], has_squares ? &of_inputs : nullptr);
    if constexpr (has_squares)
#pragma unroll
      for (int e = 0; e < numel; ++e) {
        double wide = sums.values[e];
        if (args.rule.divisor != 1.0)
          wide = std::is_same_v<T, double> ? wide / args.rule.divisor : wide * args.rule.reciprocal;
        of_result = fma(wide, wide, of_result);
      }
    return sums.result(args.rule);
  }

  __device__ void walk(Range part, int lane, int lanes) {
    for_each_vector<T, 8 / kRanks>(
        part, lane, lanes,
        [&](std::int64_t at) {
          Slices<T, kRanks> slices;
#pragma unroll
          for (int r = 0; r < kRanks; ++r) slices.of[r] = load_if(exists(r), from[r] + at);
          return slices;
        },
        [&](std::int64_t at, const Slices<T, kRanks>& slices) {
          const Vector<T> result = reduced<Vector<T>::kNumel>(slices);
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
            if (receives(r)) store(to[r] + at, result);
        },
        [&](std::int64_t at) {
          Slices<T, kRanks> slices;
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
            if (exists(r)) slices.of[r].elements[0] = from[r][at];
          const T result = reduced<1>(slices).elements[0];
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
            if (receives(r)) to[r][at] = result;
        });
  }
};

template <typename T, Elementwise op, int kRanks>
__global__ void __launch_bounds__(kPeerThreads, 1) reduce_kernel(PeerReduce args) {
  meet_peers(args.peers);
  Reducer<T, op, kRanks, false>(args).walk(
      args.part, static_cast<int>(blockIdx.x * kPeerThreads + threadIdx.x),
      static_cast<int>(gridDim.x) * kPeerThreads);
  meet_peers(args.peers);
}

// The barrier of squares_kernel, which follows, is the exit barrier of this one.
template <typename T, int kRanks>
__global__ void __launch_bounds__(kPeerThreads, 1) reduce_squares_kernel(PeerReduce args) {
  meet_peers(args.peers);
  Reducer<T, Elementwise::sum, kRanks, true> reducer(args);
  const int lane = lane_of_warp();
  for_each_run(
      args.work, [&](Range part) { reducer.walk(part, lane, kWarp); },
      [&](std::int64_t slot) {
        const double of_inputs = sum_of_warp(reducer.of_inputs);
        const double of_result = sum_of_warp(reducer.of_result);
        reducer.of_inputs = reducer.of_result = 0;
        if (lane == 0) {
          args.slots[slot * kSquaresPerGroup] = of_inputs;
          args.slots[slot * kSquaresPerGroup + 1] = of_result;
        }
      });
}

__global__ void __launch_bounds__(kPeerThreads, 1) squares_kernel(PeerReduce args) {
  const int size = args.peers.size;
  sum_slots(args.work, args.slots, kSquaresPerGroup, [&](std::int64_t s, int number, double sum) {
    for (int r = 0; r < size; ++r) args.pushed(r, args.peers.rank, s)[number] = sum;
  });
  meet_peers(args.peers);
  const Range segments = args.work.segments_of_block();
  for (std::int64_t s = segments.begin + threadIdx.x; s < segments.end; s += kPeerThreads)
    for (int number = 0; number < kSquaresPerGroup; ++number) {
      double sum = 0;
      for (int r = 0; r < size; ++r) sum += args.pushed(args.peers.rank, r, s)[number];
      args.squares[number * args.work.num_segments + s] = sum;
    }
}

// ---- launchers
// -------------------------------------------------------------------------------------------------

template <typename T>
void reduce_as(const PeerReduce& args, int blocks, Stream stream) {
  if (args.squares != nullptr && (!kIsFloat<T> || args.rule.op != Elementwise::sum))
    throw UsageError("peer_reduce: squares must be those of a sum of floats, got others");
  const auto with = [&](auto kernel) { launch(kernel, blocks, kPeerThreads, stream, args); };
  switch (args.rule.op) {
    case Elementwise::sum:
      if constexpr (std::is_same_v<T, boolean>)
        return refuse("peer_reduce", DType::boolean);
      else if constexpr (!kIsFloat<T>)
        return with(reduce_kernel<T, Elementwise::sum, kMaxPeers>);
      else
        return with_capacity(args.peers.size, [&](auto ranks) {
          if (args.squares == nullptr) return with(reduce_kernel<T, Elementwise::sum, ranks()>);
          with(reduce_squares_kernel<T, ranks()>);
          with(squares_kernel);
        });
    case Elementwise::min:
      return with(reduce_kernel<T, Elementwise::min, kMaxPeers>);
    case Elementwise::max:
      return with(reduce_kernel<T, Elementwise::max, kMaxPeers>);
    case Elementwise::product:
      return with(reduce_kernel<T, Elementwise::product, kMaxPeers>);
  }
}

}  // namespace

void peer_reduce(const PeerReduceArgs& args, Stream stream) {
  const PeerContext& context = args.peers;
  PeerReduce launched{};
  launched.peers = peers_of(*context.view, *context.sync, "peer_reduce");
  const int size = launched.peers.size;
  if (args.divisor != 1.0 && args.op != Elementwise::sum)
    throw UsageError(concat("peer_reduce: divisor must be 1 except for sums, got ", args.divisor));
  launched.part = args.scatters ? args.keeps : peer_shard(context.numel, launched.peers.rank, size);
  launched.is_scattered = args.scatters;
  launched.rule.op = args.op;
  launched.rule.divisor = args.divisor;
  launched.rule.reciprocal = 1.0 / args.divisor;
  if (args.squares != nullptr) {
    launched.work = shard_items(*context.segments, launched.part, size);
    launched.slots = args.work;
    launched.squares = args.squares;
  }
  // About one item's worth of elements for each block at least, and the same on all ranks.
  const int blocks = static_cast<int>(
      std::clamp<std::int64_t>(context.numel / size / kItemNumel + 1, 1, context.sync->num_blocks));
  if (context.dtype == DType::boolean) return reduce_as<boolean>(launched, blocks, stream);
  for_number(context.dtype, "peer_reduce",
             [&]<typename T>(TypeTag<T>) { reduce_as<T>(launched, blocks, stream); });
}

}  // namespace adareduce::cuda
