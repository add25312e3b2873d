#pragma once
#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "collectives/context.h"
#include "collectives/reduce_scatter.h"
#include "collectives/shared_schedule.h"
#include "collectives/task.h"
#include "collectives/workers.h"
#include "kernels/peer_kernels.h"
#include "transports/shared_memory/shared_memory.h"

namespace adareduce {

/// What the collectives through shared memory work with.
struct SharedContext {
  SharedMemory& memory;
  const KernelTable& kernels;
  const PeerKernelTable& peer_kernels;
  bool streams = false;        ///< copies into slots leave nothing in this core's cache
  bool looks_long = false;     ///< callers, while they wait for a work of the others
  Workers* workers = nullptr;  ///< null: the calling thread does everything
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
  /// Nobody but the rank that reduces a piece gets its results.
  bool only_owners_get = false;
  /// Where all ranks' tensors can be addressed: [segment * ranks + rank], results go to all of
  /// them. `inputs` and `outputs` are then this rank's, and prescale is 1.
  void* const* resident = nullptr;
};

/// How the pieces of a chunk are cut, and what a part of one is to the threads that share them.
struct SharedCut {
  static constexpr std::int64_t kWhole = std::numeric_limits<std::int64_t>::max();
  std::int64_t longest = kWhole;  ///< elements of a part
  int num_inputs = 1;             ///< vectors that are read
  std::int64_t num_sums = 0;      ///< numbers that are added up
};

/// What the collectives do with the pieces of a schedule. A part of a piece is a piece.
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
    return context_.memory.wait(signal, epoch_of(chunk), context_.looks_long);
  }
  /// Everything that this thread has copied can be seen before it.
  void signal(SharedMemory::Signal signal, int chunk) const {
    finish_copies();
    context_.memory.signal(signal, epoch_of(chunk));
  }

  template <typename Body>
  void for_each_piece(const SharedChunk& chunk, Body&& body) const {
    for (std::int64_t p = chunk.pieces.begin; p < chunk.pieces.end; ++p)
      body(schedule_.pieces[static_cast<std::size_t>(p)]);
  }

  /// Calls body(part, sums) for the parts of those pieces of a chunk that `picks`, a predicate; on
  /// several threads where there are some and it pays. What is added to the cut.num_sums numbers at
  /// `sums` ends in sums_of(part) with the bits of one thread that takes part after part.
  template <typename Predicate, typename SumsOf, typename Body>
  void for_each_part(const SharedChunk& chunk, const SharedCut& cut, Predicate&& picks,
                     SumsOf&& sums_of, Body&& body);
  /// The same of parts that add up nothing: body(part).
  template <typename Predicate, typename Body>
  void for_each_part(const SharedChunk& chunk, const SharedCut& cut, Predicate&& picks,
                     Body&& body) {
    for_each_part(
        chunk, cut, picks, [](const SharedPiece&) -> double* { return nullptr; },
        [&](const SharedPiece& part, double*) { body(part); });
  }

  /// Where a piece lies: in a rank's slot, in this rank's input, in a rank's tensor.
  char* slot(const SharedChunk& chunk, const SharedPiece& piece, Rank rank) const;
  const char* input(const SharedPiece& piece) const;
  char* output(const SharedPiece& piece) const;  ///< null where it has none
  char* resident(const SharedPiece& piece, Rank rank) const;
  /// Where every rank's elements of a piece that this rank reduces can be read. [size()].
  using Sources = std::array<const void*, kMaxSharedRanks>;
  Sources sources(const SharedChunk& chunk, const SharedPiece& piece) const;

  /// What this thread has copied becomes visible to whoever sees what it writes from here on.
  void finish_copies() const {
    if (context_.streams) context_.peer_kernels.finish_streams();
  }
  /// Copies a piece into this rank's slot, or memory laid out like it, times prescale.
  void pack(const SharedPiece& piece, void* to) const;
  /// Copies the results of a piece to the output, times postscale.
  void unpack(const SharedPiece& piece, const void* from) const;
  /// How many of some results are inf or NaN. Writes the same bytes back.
  std::int64_t count_nonfinite(void* results, std::int64_t numel) const;
  /// Adds to a segment's count. Any thread.
  void add_nonfinite(std::int64_t segment, std::int64_t count) const;
  /// Where the results of this rank are to be written first.
  char* result_of(const SharedChunk& chunk, const SharedPiece& piece) const {
    if (is_resident()) return resident(piece, rank());
    return goes_to_output(piece) ? output(piece) : slot(chunk, piece, rank());
  }
  /// They are there: they go to the output, to the slot for the others and, where tensors are
  /// resident, to those of all ranks.
  void deliver(const SharedChunk& chunk, const SharedPiece& piece) const;
  /// Elements of a block: what is read of two ranks, and results, stay in a first-level cache.
  std::int64_t block_numel() const { return kBlockBytes / width_; }
  /// Copies are cut for other threads only.
  SharedCut cut_for_copies() const {
    return {.longest = context_.workers == nullptr ? SharedCut::kWhole : block_numel()};
  }

 private:
  static constexpr std::int64_t kBlockBytes = 8 << 10;
  // Below this a copy is over before non-temporal stores pay.
  static constexpr std::int64_t kFewestStreamedBytes = 4096;
  // Of what is read. A core moves 64 KiB in some 6 us: below that, telling another one and waiting
  // for it, a few us where it has not gone to sleep, would cost more than its help. An estimate.
  static constexpr std::int64_t kFewestBytesPerThread = 64 << 10;

  template <typename Predicate, typename Body>
  void cut_pieces(const SharedChunk& chunk, std::int64_t longest, Predicate&& picks,
                  Body&& body) const;

  /// Results are computed in the output: they are streamed from there to the slot, or nobody else
  /// wants them.
  bool goes_to_output(const SharedPiece& piece) const {
    return (tensors_.only_owners_get ||
            (context_.streams && piece.numel * width_ >= kFewestStreamedBytes)) &&
           tensors_.postscale == 1.0 && (tensors_.nonfinite == nullptr || tensors_.owners_count) &&
           output(piece) != nullptr;
  }
  std::int64_t unpack_and_count(const void* from, void* to, std::int64_t numel, double scale,
                                bool counts) const;

  const SharedContext context_;
  const SharedSchedule& schedule_;
  const SharedTensors tensors_;
  const std::int64_t width_;
  const std::uint32_t base_;
  std::vector<SharedPiece> parts_;  // of a step that threads share
  std::vector<double> sums_;        // [parts][numbers]
};

template <typename Predicate, typename Body>
void SharedWalk::cut_pieces(const SharedChunk& chunk, std::int64_t longest, Predicate&& picks,
                            Body&& body) const {
  for_each_piece(chunk, [&](const SharedPiece& piece) {
    if (!picks(piece)) return;
    for (std::int64_t begin = 0; begin < piece.numel;) {
      const std::int64_t numel = std::min(longest, piece.numel - begin);
      body(
          SharedPiece{piece.segment, piece.owner, piece.begin + begin, numel, piece.place + begin});
      begin += numel;
    }
  });
}

template <typename Predicate, typename SumsOf, typename Body>
void SharedWalk::for_each_part(const SharedChunk& chunk, const SharedCut& cut, Predicate&& picks,
                               SumsOf&& sums_of, Body&& body) {
  const auto alone = [&](const SharedPiece& part) { body(part, sums_of(part)); };
  if (context_.workers == nullptr) return cut_pieces(chunk, cut.longest, picks, alone);
  parts_.clear();
  std::int64_t numel = 0;
  cut_pieces(chunk, cut.longest, picks, [&](const SharedPiece& part) {
    parts_.push_back(part);
    numel += part.numel;
  });
  if (numel * width_ * cut.num_inputs < 2 * kFewestBytesPerThread) {
    std::for_each(parts_.begin(), parts_.end(), alone);
    return;
  }
  const auto count = static_cast<std::int64_t>(parts_.size());
  sums_.assign(static_cast<std::size_t>(count * cut.num_sums), 0.0);
  const auto sums_at = [&](std::int64_t i) { return sums_.data() + i * cut.num_sums; };
  const auto part_at = [&](std::int64_t i) -> const SharedPiece& {
    return parts_[static_cast<std::size_t>(i)];
  };
  context_.workers->run(count, [&](std::int64_t i) {
    body(part_at(i), sums_at(i));
    finish_copies();  // of a thread that signals nothing itself
  });
  // In the order of the parts, whichever thread was first: the bits of one thread.
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t number = 0; number < cut.num_sums; ++number)
      sums_of(part_at(i))[number] += sums_at(i)[number];
}

/// Step pack of a chunk: what this rank `gives`, a predicate on pieces.
template <typename Predicate>
void pack_chunk(SharedWalk& walk, int index, Predicate&& gives) {
  const SharedChunk& chunk = walk.chunk(index);
  walk.for_each_part(chunk, walk.cut_for_copies(), gives, [&](const SharedPiece& part) {
    walk.pack(part, walk.slot(chunk, part, walk.rank()));
  });
  walk.signal(SharedMemory::kPacked, index);
}

/// Step pack of a reduction: what sources() of any rank reads in this rank's slot.
void pack_for_owners(SharedWalk& walk, int index);

/// Step combine: kernel(part, sources, out, sums) for the pieces of a chunk that this rank reduces,
/// block by block, so that a result is still in the first-level cache when it is delivered. `sums`
/// as in for_each_part.
template <typename SumsOf, typename Kernel>
void combine_chunk(SharedWalk& walk, int index, std::int64_t num_sums, SumsOf&& sums_of,
                   Kernel&& kernel) {
  const SharedChunk& chunk = walk.chunk(index);
  walk.for_each_part(
      chunk, {.longest = walk.block_numel(), .num_inputs = walk.size(), .num_sums = num_sums},
      [&](const SharedPiece& piece) { return walk.is_mine(piece); }, sums_of,
      [&](const SharedPiece& part, double* sums) {
        const SharedWalk::Sources sources = walk.sources(chunk, part);
        kernel(part, sources.data(), walk.result_of(chunk, part), sums);
        walk.deliver(chunk, part);
      });
}

/// Step unpack of a chunk: what other ranks have reduced, or given.
void unpack_chunk(SharedWalk& walk, int index);

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
Task add_totals(const SharedContext& context, std::vector<double>& mine);

}  // namespace adareduce
