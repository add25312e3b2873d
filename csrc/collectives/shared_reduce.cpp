#include "collectives/shared_reduce.h"

#include <array>

namespace adareduce {
namespace {

// Where the squares of a block's inputs add up to less, all are finite and none exceeds 2^100: no
// sum of them overflows in float32, and their average is no larger than the largest.
constexpr double kSquaresOfFinite = 0x1p200;

// reduce() of a block of one segment that also adds up squares, which tell most of the time that an
// average need not be looked at again. `sums` are no other thread's.
void reduce_and_square(const SharedWalk& walk, const ReduceArgs& args, std::int64_t segment,
                       double* sums) {
  constexpr std::int32_t kOnlyGroup = 0;
  const TensorSegment whole{0, args.numel};
  const SegmentTable table{&whole, nullptr, 1, nullptr};
  std::array<double, kSquaresPerGroup> squares{};
  walk.context().kernels.reduce_squares({.reduce = args,
                                         .begin = 0,
                                         .segments = &table,
                                         .group_of = &kOnlyGroup,
                                         .squares = squares.data()},
                                        {});
  for (std::size_t i = 0; i < squares.size(); ++i) sums[i] += squares[i];
  const bool are_finite = squares[0] < kSquaresOfFinite;  // false of NaN, too
  if (walk.tensors().owners_count && !are_finite)
    walk.add_nonfinite(segment, walk.count_nonfinite(args.out, args.numel));
}

void reduce_chunk(SharedWalk& walk, int index, const Reduction& reduction,
                  const SquaresOutput& output) {
  const bool has_squares = output.num_groups > 0;
  const auto squares_of = [&](const SharedPiece& part) {
    return has_squares ? output.squares + output.group_of[part.segment] * kSquaresPerGroup
                       : nullptr;
  };
  const auto reduce = [&](const SharedPiece& part, const void* const* inputs, void* out,
                          double* squares) {
    const ReduceArgs args{.op = reduction.op,
                          .inputs = inputs,
                          .num_inputs = walk.size(),
                          .out = out,
                          .numel = part.numel,
                          .dtype = walk.tensors().dtype,
                          .divisor = reduction.divisor};
    if (has_squares)
      reduce_and_square(walk, args, part.segment, squares);
    else
      walk.context().kernels.reduce(args, {});
  };
  combine_chunk(walk, index, has_squares ? kSquaresPerGroup : 0, squares_of, reduce);
}

}  // namespace

Task shared_reduce(SharedContext context, const SharedSchedule& schedule, SharedTensors tensors,
                   Reduction reduction, SquaresOutput output) {
  SharedWalk walk(context, schedule, tensors);
  std::size_t steps = 0;
  for (const auto& [work, index] : schedule.steps) {
    if (++steps % kStepsPerBreath == 0) co_await Breath();
    const SharedChunk& chunk = walk.chunk(index);
    switch (work) {
      case SharedSchedule::pack:
        co_await walk.wait(SharedMemory::kUnpacked, chunk.slot_after);
        pack_for_owners(walk, index);
        break;
      case SharedSchedule::combine:
        if (!walk.is_resident()) co_await walk.wait(SharedMemory::kPacked, index);
        if (walk.must_not_write()) co_await Never();
        reduce_chunk(walk, index, reduction, output);
        walk.signal(SharedMemory::kCombined, index);
        break;
      case SharedSchedule::unpack:
        co_await walk.wait(SharedMemory::kCombined, index);
        unpack_chunk(walk, index);
        walk.signal(SharedMemory::kUnpacked, index);
        break;
      case SharedSchedule::gram:
        break;
    }
  }
  // Until all have written their results to all tensors.
  if (walk.is_resident() && !schedule.chunks.empty())
    co_await walk.wait(SharedMemory::kCombined, static_cast<int>(schedule.chunks.size()) - 1);
  walk.finish();
}

Task shared_scatter(SharedContext context, const SharedSchedule& schedule, SharedTensors tensors,
                    Reduction reduction) {
  tensors.only_owners_get = true;
  SharedWalk walk(context, schedule, tensors);
  for (const auto& [work, index] : schedule.steps) {
    const SharedChunk& chunk = walk.chunk(index);
    if (work == SharedSchedule::pack) {
      co_await Breath();
      co_await walk.wait(SharedMemory::kUnpacked, chunk.slot_after);
      pack_for_owners(walk, index);
    } else {
      co_await walk.wait(SharedMemory::kPacked, index);
      reduce_chunk(walk, index, reduction, {});
      walk.signal(SharedMemory::kUnpacked, index);  // nothing is left to unpack
    }
  }
  walk.finish();
}

Task shared_gather(SharedContext context, const SharedSchedule& schedule, SharedTensors tensors) {
  SharedWalk walk(context, schedule, tensors);
  for (const auto& [work, index] : schedule.steps) {
    const SharedChunk& chunk = walk.chunk(index);
    if (work == SharedSchedule::pack) {
      co_await Breath();
      co_await walk.wait(SharedMemory::kUnpacked, chunk.slot_after);
      pack_chunk(walk, index, [&](const SharedPiece& piece) { return walk.is_mine(piece); });
    } else {
      co_await walk.wait(SharedMemory::kPacked, index);
      unpack_chunk(walk, index);
      walk.signal(SharedMemory::kUnpacked, index);
    }
  }
  walk.finish();
}

}  // namespace adareduce
