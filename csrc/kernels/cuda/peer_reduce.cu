// Numerics. The rules of the CPU's kernels (docs/algorithms.md, "Sum, Average, ..."): in rank
// order; half types in float; float32 and shorter times 1 / divisor in double; integers modulo
// 2^bits, their averages in 64 bits, divided in double and truncated. Squares in double, of the
// inputs and of the result after the division and before it is rounded; element vectors i, i + 32,
// ... of an item add into lane i mod 32, lanes as a butterfly, items in order, shards in rank
// order.
#include <type_traits>

#include "kernels/cuda/peer_adasum.cuh"
#include "kernels/cuda/peer_operations.cuh"

namespace adareduce::cuda {
namespace {

struct PeerReduce {
  Peers peers;
  Range part;      // of the fused buffer: what this rank reduces
  bool keeps_all;  // the result stays here, else it goes to all ranks
  double divisor;
  ShardItems work;  // with squares only
  double* slots;
  double* squares;

  // Of `from` in rank `of`'s window: sums over its part of a segment.
  __device__ double* pushed(int of, int from, std::int64_t segment) const {
    return peers.scalars[of] + (from * work.num_segments + segment) * kSquaresPerGroup;
  }
};

// One element of all ranks, or a vector of them, to the windows that want it.
template <typename T, typename Rule, int kRanks>
struct Reducer {
  const PeerReduce& args;
  const T* from[kRanks];
  T* to[kRanks];  // beginning with this rank, so that not all write to one peer at a time
  double of_inputs = 0, of_result = 0;

  __device__ explicit Reducer(const PeerReduce& args) : args(args) {
    const int size = args.peers.size;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      from[r] = static_cast<const T*>(args.peers.in[r < size ? r : 0]);
      to[r] = static_cast<T*>(args.peers.out[(args.peers.rank + r) % size]);
    }
  }
  __device__ bool receives(int r) const { return r < (args.keeps_all ? 1 : args.peers.size); }

  // `element_of_rank(r)`, r < size.
  template <bool has_squares, typename ElementOf>
  __device__ T reduce(ElementOf&& element_of_rank) {
    typename Rule::Accumulator sum = Rule::widen(element_of_rank(0));
    if constexpr (has_squares) of_inputs += square_of(sum);
#pragma unroll
    for (int r = 1; r < kRanks; ++r) {
      if (r >= args.peers.size) continue;
      const typename Rule::Accumulator next = Rule::widen(element_of_rank(r));
      if constexpr (has_squares) of_inputs += square_of(next);
      sum = Rule::apply(sum, next);
    }
    if constexpr (has_squares) of_result += square_of(Rule::divided(sum, args.divisor));
    return Rule::narrow(sum, args.divisor);
  }
  template <typename Number>
  __device__ static double square_of(Number x) {
    return static_cast<double>(x) * static_cast<double>(x);
  }

  template <bool has_squares>
  __device__ void walk(Range part, int lane, int lanes) {
    for_each_vector<T, 8 / kRanks>(
        part, lane, lanes,
        [&](std::int64_t at) {
          Slices<T, kRanks> slices;
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
            if (r < args.peers.size) slices.of[r] = load(from[r] + at);
          return slices;
        },
        [&](std::int64_t at, const Slices<T, kRanks>& slices) {
          Vector<T> result;
#pragma unroll
          for (int e = 0; e < Vector<T>::kNumel; ++e)
            result.elements[e] =
                reduce<has_squares>([&](int r) { return slices.of[r].elements[e]; });
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
            if (receives(r)) store(to[r] + at, result);
        },
        [&](std::int64_t at) {
          const T result = reduce<has_squares>([&](int r) { return from[r][at]; });
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
            if (receives(r)) to[r][at] = result;
        });
  }
};

template <typename T, typename Rule, int kRanks>
__global__ void __launch_bounds__(kPeerThreads, 1) reduce_kernel(PeerReduce args) {
  meet_peers(args.peers);
  Reducer<T, Rule, kRanks> reducer(args);
  reducer.template walk<false>(args.part, static_cast<int>(blockIdx.x * kPeerThreads + threadIdx.x),
                               static_cast<int>(gridDim.x) * kPeerThreads);
  meet_peers(args.peers);
}

// The barrier of squares_kernel, which follows, is the exit barrier of this one.
template <typename T, typename Rule, int kRanks>
__global__ void __launch_bounds__(kPeerThreads, 1) reduce_squares_kernel(PeerReduce args) {
  meet_peers(args.peers);
  Reducer<T, Rule, kRanks> reducer(args);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for_each_run(
      args.work, [&](Range part) { reducer.template walk<true>(part, lane, kWarp); },
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

__global__ void __launch_bounds__(kPeerThreads) squares_kernel(PeerReduce args) {
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

[[noreturn]] void refuse(DType dtype) {
  throw UsageError(
      concat("peer_reduce: dtype must be one that it is defined for, got ", name_of(dtype)));
}

template <typename T, typename Rule, int kRanks>
void launch_reduce(const PeerReduce& args, int blocks, Stream stream) {
  launch(reduce_kernel<T, Rule, kRanks>, blocks, kPeerThreads, stream, args);
}

template <typename T>
void reduce_floats(const PeerReduce& args, Elementwise op, int blocks, Stream stream) {
  if (op == Elementwise::sum)
    with_capacity(args.peers.size, [&](auto ranks) {
      using Rule = FloatRule<T, SumOf>;
      if (args.squares == nullptr) return launch_reduce<T, Rule, ranks()>(args, blocks, stream);
      launch(reduce_squares_kernel<T, Rule, ranks()>, blocks, kPeerThreads, stream, args);
      launch(squares_kernel, blocks, kPeerThreads, stream, args);
    });
  else if (op == Elementwise::min)
    launch_reduce<T, FloatRule<T, MinOf>, kMaxPeers>(args, blocks, stream);
  else if (op == Elementwise::max)
    launch_reduce<T, FloatRule<T, MaxOf>, kMaxPeers>(args, blocks, stream);
  else
    launch_reduce<T, FloatRule<T, ProductOf>, kMaxPeers>(args, blocks, stream);
}

template <typename T>
void reduce_integers(const PeerReduce& args, Elementwise op, int blocks, Stream stream) {
  if (op == Elementwise::sum && args.divisor != 1.0)
    launch_reduce<T, AverageRule<T>, kMaxPeers>(args, blocks, stream);
  else if (op == Elementwise::sum)
    launch_reduce<T, IntegerRule<T, SumOf>, kMaxPeers>(args, blocks, stream);
  else if (op == Elementwise::min)
    launch_reduce<T, IntegerRule<T, MinOf>, kMaxPeers>(args, blocks, stream);
  else if (op == Elementwise::max)
    launch_reduce<T, IntegerRule<T, MaxOf>, kMaxPeers>(args, blocks, stream);
  else
    launch_reduce<T, IntegerRule<T, ProductOf>, kMaxPeers>(args, blocks, stream);
}

void reduce_booleans(const PeerReduce& args, Elementwise op, int blocks, Stream stream) {
  if (op == Elementwise::sum) refuse(DType::boolean);
  if (op == Elementwise::max)
    launch_reduce<std::uint8_t, BooleanRule<false>, kMaxPeers>(args, blocks, stream);
  else
    launch_reduce<std::uint8_t, BooleanRule<true>, kMaxPeers>(args, blocks, stream);
}

}  // namespace

void peer_reduce(const PeerReduceArgs& args, Stream stream) {
  const PeerContext& context = args.peers;
  PeerReduce launched{};
  launched.peers = peers_of(*context.view, *context.sync, "peer_reduce");
  const int size = launched.peers.size;
  launched.part = args.scatters ? args.keeps : peer_shard(context.numel, launched.peers.rank, size);
  launched.keeps_all = args.scatters;
  launched.divisor = args.divisor;
  if (args.squares != nullptr) {
    launched.work = shard_items(*context.segments, launched.part, size);
    launched.slots = args.work;
    launched.squares = args.squares;
  }
  if (args.divisor != 1.0 && args.op != Elementwise::sum)
    throw UsageError(concat("peer_reduce: divisor must be 1 except for sums, got ", args.divisor));
  // About one item's worth of elements for each warp, and the same on all ranks.
  const std::int64_t warps = context.numel / size / kItemNumel + 1;
  const int blocks = static_cast<int>(std::clamp<std::int64_t>(warps, 1, context.sync->num_blocks));
  switch (context.dtype) {
    case DType::u8:
      return reduce_integers<std::uint8_t>(launched, args.op, blocks, stream);
    case DType::i8:
      return reduce_integers<std::int8_t>(launched, args.op, blocks, stream);
    case DType::i16:
      return reduce_integers<std::int16_t>(launched, args.op, blocks, stream);
    case DType::i32:
      return reduce_integers<std::int32_t>(launched, args.op, blocks, stream);
    case DType::i64:
      return reduce_integers<std::int64_t>(launched, args.op, blocks, stream);
    case DType::f16:
      return reduce_floats<f16>(launched, args.op, blocks, stream);
    case DType::bf16:
      return reduce_floats<bf16>(launched, args.op, blocks, stream);
    case DType::f32:
      return reduce_floats<float>(launched, args.op, blocks, stream);
    case DType::f64:
      return reduce_floats<double>(launched, args.op, blocks, stream);
    case DType::boolean:
      return reduce_booleans(launched, args.op, blocks, stream);
  }
  refuse(context.dtype);
}

}  // namespace adareduce::cuda
