#include "collectives/shared_walk.h"

namespace adareduce {
namespace {

// Below this a copy is over before non-temporal stores pay.
constexpr std::int64_t kFewestStreamedBytes = 4096;

}  // namespace

SharedWalk::SharedWalk(const SharedContext& context, const SharedSchedule& schedule,
                       const SharedTensors& tensors)
    : context_(context),
      schedule_(schedule),
      tensors_(tensors),
      width_(size_of(tensors.dtype)),
      base_(context.memory.chunks_done),
      sources_(static_cast<std::size_t>(context.memory.size())),
      block_inputs_(sources_.size()) {}

void SharedWalk::finish() {
  const std::uint32_t done = base_ + static_cast<std::uint32_t>(schedule_.chunks.size());
  context_.memory.chunks_done = done;
  // Also those works that this collective has not: the next one waits for any of them, and no
  // counter falls behind the others by more than a comparison of epochs can bear.
  for (const auto signal : {SharedMemory::kPacked, SharedMemory::kGram, SharedMemory::kCombined,
                            SharedMemory::kUnpacked})
    context_.memory.signal(signal, done);
}

char* SharedWalk::slot(const SharedChunk& chunk, const SharedPiece& piece, Rank rank) const {
  return at(context_.memory.ring(rank) + chunk.slot_begin, piece.place, width_);
}

const char* SharedWalk::input(const SharedPiece& piece) const {
  return at(tensors_.inputs[piece.segment], piece.begin, width_);
}

char* SharedWalk::output(const SharedPiece& piece) const {
  void* const base = tensors_.outputs[piece.segment];
  return base == nullptr ? nullptr : at(base, piece.begin, width_);
}

char* SharedWalk::resident(const SharedPiece& piece, Rank rank) const {
  return at(tensors_.resident[piece.segment * size() + rank], piece.begin, width_);
}

const std::vector<const void*>& SharedWalk::sources(const SharedChunk& chunk,
                                                    const SharedPiece& piece) {
  for (Rank r = 0; r < size(); ++r) {
    const void*& source = sources_[static_cast<std::size_t>(r)];
    if (is_resident())
      source = resident(piece, r);
    else if (r == rank() && tensors_.prescale == 1.0)
      source = input(piece);
    else
      source = slot(chunk, piece, r);
  }
  return sources_;
}

void SharedWalk::pack(const SharedPiece& piece, void* to) const {
  const std::int64_t bytes = piece.numel * width_;
  if (tensors_.prescale == 1.0) {
    context_.peer_kernels.copy(input(piece), bytes, to,
                               context_.streams && bytes >= kFewestStreamedBytes);
    return;
  }
  const TensorSegment segment{0, piece.numel};
  const SegmentTable table{&segment, nullptr, 1, nullptr};
  const void* const from = input(piece);
  context_.kernels.pack({.tensors = &from,
                         .fused = to,
                         .numel = piece.numel,
                         .dtype = tensors_.dtype,
                         .segments = &table,
                         .scale = tensors_.prescale},
                        {});
}

void SharedWalk::unpack(const SharedPiece& piece, std::int64_t begin, std::int64_t numel,
                        const void* from) const {
  void* const to = at(output(piece), begin, width_);
  const bool counts = tensors_.nonfinite != nullptr && !tensors_.owners_count;
  if (tensors_.postscale == 1.0 && !counts) {
    if (to != from) context_.peer_kernels.copy(from, numel * width_, to, false);
    return;
  }
  const std::int64_t count = unpack_and_count(from, to, numel, tensors_.postscale, counts);
  if (counts) tensors_.nonfinite[piece.segment] += count;
}

std::int64_t SharedWalk::count_nonfinite(void* results, std::int64_t numel) const {
  return unpack_and_count(results, results, numel, 1.0, true);
}

std::int64_t SharedWalk::unpack_and_count(const void* from, void* to, std::int64_t numel,
                                          double scale, bool counts) const {
  const TensorSegment segment{0, numel};
  const SegmentTable table{&segment, nullptr, 1, nullptr};
  std::int64_t count = 0;
  context_.kernels.unpack({.fused = from,
                           .tensors = &to,
                           .dtype = tensors_.dtype,
                           .segments = &table,
                           .scale = scale,
                           .nonfinite = counts ? &count : nullptr},
                          {});
  return count;
}

void SharedWalk::deliver(const SharedChunk& chunk, const SharedPiece& piece, std::int64_t begin,
                         std::int64_t numel) const {
  const char* const result = at(result_of(chunk, piece), begin, width_);
  if (output(piece) != nullptr) unpack(piece, begin, numel, result);
  if (!is_resident()) return;
  for (int step = 1; step < size(); ++step) {
    const Rank peer = (rank() + step) % size();
    context_.peer_kernels.copy(result, numel * width_, at(resident(piece, peer), begin, width_),
                               context_.streams);
  }
}

void pack_for_owners(const SharedWalk& walk, int index) {
  // What it reduces itself it reads where it is.
  const bool has_scaled = walk.tensors().prescale != 1.0;
  pack_chunk(walk, index,
             [&](const SharedPiece& piece) { return has_scaled || !walk.is_mine(piece); });
}

void unpack_chunk(const SharedWalk& walk, int index) {
  const SharedChunk& chunk = walk.chunk(index);
  walk.for_each_piece(chunk, [&](const SharedPiece& piece) {
    if (!walk.is_mine(piece))
      walk.unpack(piece, 0, piece.numel, walk.slot(chunk, piece, piece.owner));
  });
}

Task add_totals(SharedMemory& memory, std::vector<double>& mine) {
  if (mine.empty() || memory.size() == 1) co_return;
  std::copy(mine.begin(), mine.end(), memory.totals(memory.rank()));
  memory.signal(SharedMemory::kTotals, ++memory.totals_rounds);
  co_await memory.wait(SharedMemory::kTotals, memory.totals_rounds);
  for (std::size_t i = 0; i < mine.size(); ++i) {
    mine[i] = 0;
    for (Rank rank = 0; rank < memory.size(); ++rank) mine[i] += memory.totals(rank)[i];
  }
}

}  // namespace adareduce
