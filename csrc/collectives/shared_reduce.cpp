#include "collectives/shared_reduce.h"

#include <algorithm>

namespace adareduce {
namespace {

// Reduces the pieces of a chunk that are this rank's, block by block, so that a result is still in
// the first-level cache when it is delivered.
void combine_chunk(SharedWalk& walk, int index, const Reduction& reduction,
                   const SquaresOutput& output, std::vector<const void*>& inputs) {
  const SharedChunk& chunk = walk.chunk(index);
  const KernelTable& kernels = walk.context().kernels;
  walk.for_each_piece(chunk, [&](const SharedPiece& piece) {
    if (!walk.is_mine(piece)) return;
    const std::vector<const void*>& sources = walk.sources(chunk, piece);
    char* const result = walk.result_of(chunk, piece);
    for (std::int64_t begin = 0; begin < piece.numel; begin += walk.block_numel()) {
      const std::int64_t numel = std::min(walk.block_numel(), piece.numel - begin);
      for (std::size_t r = 0; r < sources.size(); ++r)
        inputs[r] = at(sources[r], begin, walk.width());
      const ReduceArgs args{.op = reduction.op,
                            .inputs = inputs.data(),
                            .num_inputs = walk.size(),
                            .out = at(result, begin, walk.width()),
                            .numel = numel,
                            .dtype = walk.tensors().dtype,
                            .divisor = reduction.divisor};
      if (output.num_groups == 0) {
        kernels.reduce(args, {});
      } else {
        const TensorSegment segment{0, numel};
        const SegmentTable table{&segment, nullptr, 1, nullptr};
        kernels.reduce_squares({.reduce = args,
                                .begin = 0,
                                .segments = &table,
                                .group_of = output.group_of + piece.segment,
                                .squares = output.squares},
                               {});
      }
      walk.deliver(chunk, piece, begin, numel);
    }
  });
}

void unpack_chunk(const SharedWalk& walk, int index) {
  const SharedChunk& chunk = walk.chunk(index);
  walk.for_each_piece(chunk, [&](const SharedPiece& piece) {
    if (!walk.is_mine(piece))
      walk.unpack(piece, 0, piece.numel, walk.slot(chunk, piece, piece.owner));
  });
}

}  // namespace

Task shared_reduce(SharedContext context, const SharedSchedule& schedule, SharedTensors tensors,
                   Reduction reduction, SquaresOutput output) {
  SharedWalk walk(context, schedule, tensors);
  std::vector<const void*> inputs(static_cast<std::size_t>(walk.size()));
  std::size_t steps = 0;
  for (const auto& [work, index] : schedule.steps) {
    if (++steps % kStepsPerBreath == 0) co_await Breath();
    const SharedChunk& chunk = walk.chunk(index);
    switch (work) {
      case SharedSchedule::pack:
        co_await walk.wait(SharedMemory::kUnpacked, chunk.slot_after);
        // What it reduces itself it reads where it is.
        pack_chunk(walk, index, [&](const SharedPiece& piece) {
          return !walk.is_mine(piece) || tensors.prescale != 1.0;
        });
        break;
      case SharedSchedule::combine:
        if (!walk.is_resident()) co_await walk.wait(SharedMemory::kPacked, index);
        if (walk.must_not_write()) co_await Never();
        combine_chunk(walk, index, reduction, output, inputs);
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
  SharedWalk walk(context, schedule, tensors);
  std::vector<const void*> inputs(static_cast<std::size_t>(walk.size()));
  for (const auto& [work, index] : schedule.steps) {
    const SharedChunk& chunk = walk.chunk(index);
    if (work == SharedSchedule::pack) {
      co_await Breath();
      co_await walk.wait(SharedMemory::kUnpacked, chunk.slot_after);
      pack_chunk(walk, index, [&](const SharedPiece& piece) {
        return !walk.is_mine(piece) || tensors.prescale != 1.0;
      });
    } else {
      co_await walk.wait(SharedMemory::kPacked, index);
      combine_chunk(walk, index, reduction, {}, inputs);
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
