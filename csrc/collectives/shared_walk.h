#pragma once
#include <algorithm>
#include <vector>

#include "collectives/context.h"
#include "collectives/reduce_scatter.h"
#include "collectives/shared_schedule.h"
#include "collectives/task.h"
#include "kernels/peer_kernels.h"
#include "transports/shared_memory/shared_memory.h"

namespace adareduce {

/// What the collectives through shared memory work with.
struct SharedContext {
  SharedMemory& memory;
  const KernelTable& kernels;
  const PeerKernelTable& peer_kernels;
  bool streams = false;  ///< copies into slots leave nothing in this core's cache
};

/// The tensors of one dtype and call, by segment. Owns nothing.
struct SharedTensors {
  const void* const* inputs = nullptr;  ///< this rank's; elements are consecutive
  void* const* outputs = nullptr;       ///< may be the inputs; null where this rank gets nothing
  DType dtype = DType::f32;
  double prescale = 1.0;
  double postscale = 1.0;
  std::int64_t* nonfinite = nullptr;  ///< per segment: results that are inf or NaN, added to
  /// `nonfinite` counts what this rank reduces, not all that it gets; who adds up all ranks' has
  /// the same. For averages with squares, whose postscale is 1; the same on all ranks.
  bool owners_count = false;
  /// Where all ranks' tensors can be addressed: [segment * ranks + rank], results go to all of
  /// them. `inputs` and `outputs` are then this rank's, and prescale is 1.
  void* const* resident = nullptr;
};

/// What the collectives do with the pieces of a schedule.
class SharedWalk {
 public:
  SharedWalk(const SharedContext& context, const SharedSchedule& schedule,
             const SharedTensors& tensors);

  Rank rank() const { return context_.memory.rank(); }
  int size() const { return context_.memory.size(); }
  std::int64_t width() const { return width_; }
  const SharedContext& context() const { return context_; }
  const SharedTensors& tensors() const { return tensors_; }
  const SharedSchedule& schedule() const { return schedule_; }
  const SharedChunk& chunk(int index) const {
    return schedule_.chunks[static_cast<std::size_t>(index)];
  }
  bool is_mine(const SharedPiece& piece) const { return piece.owner == rank(); }
  bool is_resident() const { return tensors_.resident != nullptr; }
  /// A rank has given up, and its tensors are its own again.
  bool must_not_write() const {
    return is_resident() && context_.memory.has_any(SharedMemory::kGone, 1);
  }

  /// Chunks are counted over all requests, so that a counter never goes back.
  std::uint32_t epoch_of(int chunk) const { return base_ + static_cast<std::uint32_t>(chunk) + 1; }
  /// After the last step: this rank will not look at any slot of this walk again.
  void finish();
  /// Signal `signal` of all other ranks for `chunk`; -1: for all chunks of earlier walks.
  SharedMemory::Wait wait(SharedMemory::Signal signal, int chunk) const {
    return context_.memory.wait(signal, epoch_of(chunk));
  }
  void signal(SharedMemory::Signal signal, int chunk) const {
    context_.memory.signal(signal, epoch_of(chunk));
  }

  template <typename Body>
  void for_each_piece(const SharedChunk& chunk, Body&& body) const {
    for (std::int64_t p = chunk.pieces.begin; p < chunk.pieces.end; ++p)
      body(schedule_.pieces[static_cast<std::size_t>(p)]);
  }

  /// Where a piece lies: in a rank's slot, in this rank's input, in a rank's tensor.
  char* slot(const SharedChunk& chunk, const SharedPiece& piece, Rank rank) const;
  const char* input(const SharedPiece& piece) const;
  char* output(const SharedPiece& piece) const;  ///< null where it has none
  char* resident(const SharedPiece& piece, Rank rank) const;
  /// Where every rank's elements of a piece that this rank reduces can be read. [size()].
  const std::vector<const void*>& sources(const SharedChunk& chunk, const SharedPiece& piece);

  /// Copies a piece into this rank's slot, or memory laid out like it, times prescale.
  void pack(const SharedPiece& piece, void* to) const;
  /// Copies `numel` results from element `begin` of a piece to the output, times postscale.
  void unpack(const SharedPiece& piece, std::int64_t begin, std::int64_t numel,
              const void* from) const;
  /// How many of some results are inf or NaN. Writes the same bytes back.
  std::int64_t count_nonfinite(void* results, std::int64_t numel) const;
  /// Results of this rank have been written to result_of(): they go to the output and, where
  /// tensors are resident, to those of all ranks.
  void deliver(const SharedChunk& chunk, const SharedPiece& piece, std::int64_t begin,
               std::int64_t numel) const;
  char* result_of(const SharedChunk& chunk, const SharedPiece& piece) const {
    return is_resident() ? resident(piece, rank()) : slot(chunk, piece, rank());
  }
  /// Elements that pass through the first-level cache together, and room for their addresses.
  std::int64_t block_numel() const { return kBlockBytes / width_; }
  std::vector<const void*>& block_inputs() { return block_inputs_; }

 private:
  static constexpr std::int64_t kBlockBytes = 16 << 10;

  std::int64_t unpack_and_count(const void* from, void* to, std::int64_t numel, double scale,
                                bool counts) const;

  const SharedContext context_;
  const SharedSchedule& schedule_;
  const SharedTensors tensors_;
  const std::int64_t width_;
  const std::uint32_t base_;
  std::vector<const void*> sources_;
  std::vector<const void*> block_inputs_;
};

/// Step pack of a chunk: what this rank `gives`, a predicate on pieces.
template <typename Predicate>
void pack_chunk(const SharedWalk& walk, int index, Predicate&& gives) {
  const SharedChunk& chunk = walk.chunk(index);
  walk.for_each_piece(chunk, [&](const SharedPiece& piece) {
    if (gives(piece)) walk.pack(piece, walk.slot(chunk, piece, walk.rank()));
  });
  walk.signal(SharedMemory::kPacked, index);
}

/// Step pack of a reduction: what sources() of any rank reads in this rank's slot.
void pack_for_owners(const SharedWalk& walk, int index);

/// Step combine: kernel(piece, inputs, numel, out) for the pieces of a chunk that this rank
/// reduces, block by block, so that a result is still in the first-level cache when it is
/// delivered.
template <typename Kernel>
void combine_chunk(SharedWalk& walk, int index, Kernel&& kernel) {
  const SharedChunk& chunk = walk.chunk(index);
  std::vector<const void*>& inputs = walk.block_inputs();
  walk.for_each_piece(chunk, [&](const SharedPiece& piece) {
    if (!walk.is_mine(piece)) return;
    const std::vector<const void*>& sources = walk.sources(chunk, piece);
    char* const result = walk.result_of(chunk, piece);
    for (std::int64_t begin = 0; begin < piece.numel; begin += walk.block_numel()) {
      const std::int64_t numel = std::min(walk.block_numel(), piece.numel - begin);
      for (std::size_t r = 0; r < sources.size(); ++r)
        inputs[r] = at(sources[r], begin, walk.width());
      kernel(piece, inputs.data(), numel, at(result, begin, walk.width()));
      walk.deliver(chunk, piece, begin, numel);
    }
  });
}

/// Step unpack of a chunk: what other ranks have reduced, or given.
void unpack_chunk(const SharedWalk& walk, int index);

/// Gives the thread back now and then: a large request must not keep it from everything else.
class Breath final : public Exchange {
 public:
  bool is_soon() const { return false; }
  bool test() override { return std::exchange(has_paused_, true); }

 private:
  bool has_paused_ = false;
};
inline constexpr std::size_t kStepsPerBreath = 64;

/// For what only the end of the process set can end.
class Never final : public Exchange {
 public:
  bool is_soon() const { return false; }
  bool test() override { return false; }
};

/// A sum over all ranks of `mine`, in rank order: equal bits everywhere. At most once per request.
/// Collective; at most SharedMemory::kTotalsNumel numbers.
Task add_totals(SharedMemory& memory, std::vector<double>& mine);

}  // namespace adareduce
