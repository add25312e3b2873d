#include "collectives/shared_walk.h"

#include <atomic>

namespace adareduce {
SharedWalk::SharedWalk(const SharedContext& context, const SharedSchedule& schedule,
                       const SharedTensors& tensors)
    : context_(context),
      schedule_(schedule),
      tensors_(tensors),
      width_(size_of(tensors.dtype)),
      base_(context.memory.chunks_done) {}

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

SharedWalk::Sources SharedWalk::sources(const SharedChunk& chunk, const SharedPiece& piece) const {
  Sources places;
  for (Rank r = 0; r < size(); ++r) {
    const void*& source = places[static_cast<std::size_t>(r)];
    if (is_resident())
      source = resident(piece, r);
    else if (r == rank() && tensors_.prescale == 1.0)
      source = input(piece);
    else
      source = slot(chunk, piece, r);
  }
  return places;
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

void SharedWalk::unpack(const SharedPiece& piece, const void* from) const {
  void* const to = output(piece);
  const bool counts = tensors_.nonfinite != nullptr && !tensors_.owners_count;
  if (tensors_.postscale == 1.0 && !counts) {
    if (to != from) context_.peer_kernels.copy(from, piece.numel * width_, to, false);
    return;
  }
  const std::int64_t count = unpack_and_count(from, to, piece.numel, tensors_.postscale, counts);
  if (counts) add_nonfinite(piece.segment, count);
}

std::int64_t SharedWalk::count_nonfinite(void* results, std::int64_t numel) const {
  return unpack_and_count(results, results, numel, 1.0, true);
}

void SharedWalk::add_nonfinite(std::int64_t segment, std::int64_t count) const {
  // Several threads may have parts of the same segment; the order of whole numbers is no matter.
  if (count > 0)
    std::atomic_ref(tensors_.nonfinite[segment]).fetch_add(count, std::memory_order_relaxed);
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

void SharedWalk::deliver(const SharedChunk& chunk, const SharedPiece& piece) const {
  const char* const result = result_of(chunk, piece);
  if (!is_resident() && goes_to_output(piece)) {
    if (!tensors_.only_owners_get)
      context_.peer_kernels.copy(result, piece.numel * width_, slot(chunk, piece, rank()), true);
    return;
  }
  if (output(piece) != nullptr) unpack(piece, result);
  if (!is_resident()) return;
  for (int step = 1; step < size(); ++step) {
    const Rank peer = (rank() + step) % size();
    context_.peer_kernels.copy(result, piece.numel * width_, resident(piece, peer),
                               context_.streams);
  }
}

void pack_for_owners(SharedWalk& walk, int index) {
  // What it reduces itself it reads where it is.
  const bool has_scaled = walk.tensors().prescale != 1.0;
  pack_chunk(walk, index,
             [&](const SharedPiece& piece) { return has_scaled || !walk.is_mine(piece); });
}

void unpack_chunk(SharedWalk& walk, int index) {
  const SharedChunk& chunk = walk.chunk(index);
  walk.for_each_part(
      chunk, walk.cut_for_copies(), [&](const SharedPiece& piece) { return !walk.is_mine(piece); },
      [&](const SharedPiece& part) { walk.unpack(part, walk.slot(chunk, part, part.owner)); });
}

Task add_totals(const SharedContext& context, std::vector<double>& mine) {
  SharedMemory& memory = context.memory;
  if (mine.empty() || memory.size() == 1) co_return;
  std::copy(mine.begin(), mine.end(), memory.totals(memory.rank()));
  memory.signal(SharedMemory::kTotals, ++memory.totals_rounds);
  co_await memory.wait(SharedMemory::kTotals, memory.totals_rounds, context.looks_long);
  for (std::size_t i = 0; i < mine.size(); ++i) {
    mine[i] = 0;
    for (Rank rank = 0; rank < memory.size(); ++rank) mine[i] += memory.totals(rank)[i];
  }
}

}  // namespace adareduce
