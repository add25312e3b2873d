#include "collectives/shared_adasum.h"

#include <algorithm>
#include <optional>

#include "collectives/adasum_levels.h"

namespace adareduce {
namespace {

std::size_t index_of(std::int64_t index) { return static_cast<std::size_t>(index); }

// Adds the products of this rank's pieces of a chunk to [segments of the chunk][numbers].
void add_products(SharedWalk& walk, const SharedChunk& chunk, std::vector<double>& gram) {
  const std::int64_t numel = gram_numel(walk.size());
  walk.for_each_part(
      chunk, {.num_inputs = walk.size(), .num_sums = numel},
      [&](const SharedPiece& piece) { return walk.is_mine(piece); },
      [&](const SharedPiece& piece) {
        return gram.data() + (piece.segment - chunk.segments.begin) * numel;
      },
      [&](const SharedPiece& piece, double* products) {
        const SharedWalk::Sources sources = walk.sources(chunk, piece);
        walk.context().peer_kernels.gram(
            {.vectors = {sources.data(), walk.size(), piece.numel, walk.tensors().dtype},
             .gram = products});
      });
}

// The Gram matrix of a segment, from all ranks' parts.
void collect_gram(const SharedWalk& walk, const SharedChunk& chunk, std::int64_t segment,
                  std::vector<double>& gram) {
  const auto numel = static_cast<std::int64_t>(gram.size());
  std::ranges::fill(gram, 0.0);
  for (Rank rank = 0; rank < walk.size(); ++rank) {
    const double* const part = walk.context().memory.gram(chunk.gram_place, rank) +
                               (segment - chunk.segments.begin) * numel;
    for (std::int64_t i = 0; i < numel; ++i) gram[index_of(i)] += part[i];
  }
}

// Calls body(piece) for the pieces of a segment in all chunks whose Gram matrix is that of `chunk`.
template <typename Body>
void for_each_piece_of(const SharedWalk& walk, const SharedChunk& chunk, std::int64_t segment,
                       Body&& body) {
  const std::vector<SharedChunk>& chunks = walk.schedule().chunks;
  int first = chunk.ready;
  while (first > 0 && chunks[index_of(first - 1)].ready == chunk.ready) --first;
  for (int c = first; c <= chunk.ready; ++c)
    walk.for_each_piece(chunks[index_of(c)], [&](const SharedPiece& piece) {
      if (piece.segment == segment) body(piece);
    });
}

// Adds the products of a level of one segment over this rank's pieces. Tensors that are not
// resident come through the board's payloads, since what the ring has of them may have been
// overwritten: a rare way, and short rather than fast.
Task add_level(SharedWalk& walk, const SharedChunk& chunk, std::int64_t segment,
               AdasumLevels& levels) {
  SharedMemory& memory = walk.context().memory;
  std::vector<SharedPiece> pieces;
  for_each_piece_of(walk, chunk, segment,
                    [&](const SharedPiece& piece) { pieces.push_back(piece); });
  std::vector<const void*> inputs(index_of(walk.size()));
  for (const SharedPiece& piece : pieces) {
    if (walk.is_resident()) {
      if (!walk.is_mine(piece)) continue;
      const SharedWalk::Sources sources = walk.sources(chunk, piece);
      levels.add(walk.context().peer_kernels,
                 {sources.data(), walk.size(), piece.numel, walk.tensors().dtype});
      continue;
    }
    // Two areas in turn: whoever fills one again has seen that all have begun the round after it.
    const std::int64_t most = SharedMemory::kLevelDataBytes / walk.width();
    for (std::int64_t begin = 0; begin < piece.numel; begin += most) {
      SharedPiece part = piece;
      part.begin += begin;
      part.numel = std::min(most, piece.numel - begin);
      const std::uint32_t round = ++memory.level_rounds;
      walk.pack(part, memory.level_data(round, walk.rank()));
      walk.finish_copies();
      memory.signal(SharedMemory::kLevel, round);
      co_await memory.wait(SharedMemory::kLevel, round, walk.context().looks_long);
      if (!walk.is_mine(piece)) continue;
      for (Rank rank = 0; rank < walk.size(); ++rank)
        inputs[index_of(rank)] = memory.level_data(round, rank);
      levels.add(walk.context().peer_kernels,
                 {inputs.data(), walk.size(), part.numel, walk.tensors().dtype});
    }
  }
}

// Coefficients of a segment that cancels, from vectors.
Task climb(SharedWalk& walk, const SharedChunk& chunk, std::int64_t segment, AdasumLevels& levels) {
  SharedMemory& memory = walk.context().memory;
  while (levels.is_climbing()) {
    co_await add_level(walk, chunk, segment, levels);
    std::vector<double>& stats = levels.stats();
    const std::uint32_t round = ++memory.level_rounds;
    std::ranges::copy(stats, memory.level(round, walk.rank()));
    memory.signal(SharedMemory::kLevel, round);
    co_await memory.wait(SharedMemory::kLevel, round, walk.context().looks_long);
    for (std::size_t i = 0; i < stats.size(); ++i) {
      stats[i] = 0;
      for (Rank rank = 0; rank < walk.size(); ++rank) stats[i] += memory.level(round, rank)[i];
    }
    levels.climb();
  }
}

// Coefficients of all segments of a chunk, [segments][ranks].
Task find_coefficients(SharedWalk& walk, const SharedChunk& chunk, const GramTree& tree,
                       double* orthogonality, std::vector<double>& coefficients) {
  const auto ranks = static_cast<std::size_t>(walk.size());
  coefficients.resize(index_of(chunk.segments.size()) * ranks);
  std::vector<double> gram(index_of(gram_numel(walk.size())));
  for (std::int64_t s = chunk.segments.begin; s < chunk.segments.end; ++s) {
    double* const c = coefficients.data() + index_of(s - chunk.segments.begin) * ranks;
    collect_gram(walk, chunk, s, gram);
    GramResult result = adasum_of_gram(tree, gram.data(), c);
    if (needs_levels(tree, result)) {
      AdasumLevels levels(tree, gram.data());
      co_await climb(walk, chunk, s, levels);
      std::ranges::copy(levels.coefficients(), c);
      result.orthogonality = levels.orthogonality();
    }
    if (orthogonality != nullptr) orthogonality[s] = result.orthogonality;
  }
}

void combine_pieces(SharedWalk& walk, int index, const std::vector<double>& coefficients) {
  const std::int64_t first = walk.chunk(index).segments.begin;
  const auto no_sums = [](const SharedPiece&) -> double* { return nullptr; };
  combine_chunk(walk, index, 0, no_sums,
                [&](const SharedPiece& part, const void* const* inputs, void* out, double*) {
                  walk.context().peer_kernels.weighted_sum(
                      {.vectors = {inputs, walk.size(), part.numel, walk.tensors().dtype},
                       .coefficients = coefficients.data() + (part.segment - first) * walk.size(),
                       .out = out});
                });
}

}  // namespace

Task shared_adasum(SharedContext context, const SharedSchedule& schedule, SharedTensors tensors,
                   const GramTree& tree, double* orthogonality) {
  SharedWalk walk(context, schedule, tensors);
  std::vector<double> gram;          // this rank's parts
  std::vector<double> coefficients;  // of the segments that wait for chunk `known`
  int known = -1;
  // Who has been through with a chunk: the last work of the schedule.
  const auto last = walk.is_resident() ? SharedMemory::kCombined : SharedMemory::kUnpacked;
  std::size_t steps = 0;
  for (const auto& [work, index] : schedule.steps) {
    if (++steps % kStepsPerBreath == 0) co_await Breath();
    const SharedChunk& chunk = walk.chunk(index);
    switch (work) {
      case SharedSchedule::pack:
        co_await walk.wait(SharedMemory::kUnpacked, chunk.slot_after);
        pack_for_owners(walk, index);
        break;
      case SharedSchedule::gram:
        if (chunk.has_gram) {
          if (!walk.is_resident()) co_await walk.wait(SharedMemory::kPacked, index);
          if (index == 0 || walk.chunk(index - 1).ready != chunk.ready)
            gram.assign(index_of(chunk.segments.size() * gram_numel(walk.size())), 0.0);
          add_products(walk, chunk, gram);
          if (index == chunk.ready) {
            if (chunk.gram_after >= 0) co_await walk.wait(last, chunk.gram_after);
            std::ranges::copy(gram, context.memory.gram(chunk.gram_place, walk.rank()));
          }
        }
        walk.signal(SharedMemory::kGram, index);
        break;
      case SharedSchedule::combine:
        if (chunk.combines) {
          if (!walk.is_resident()) co_await walk.wait(SharedMemory::kPacked, index);
          co_await walk.wait(SharedMemory::kGram, chunk.ready);
          if (std::exchange(known, chunk.ready) != chunk.ready)
            co_await find_coefficients(walk, chunk, tree, orthogonality, coefficients);
          if (walk.must_not_write()) co_await Never();
          combine_pieces(walk, index, coefficients);
        }
        walk.signal(SharedMemory::kCombined, index);
        break;
      case SharedSchedule::unpack:
        if (chunk.combines) {
          co_await walk.wait(SharedMemory::kCombined, index);
          unpack_chunk(walk, index);
        }
        walk.signal(SharedMemory::kUnpacked, index);
        break;
    }
  }
  if (walk.is_resident() && !schedule.chunks.empty())
    co_await walk.wait(SharedMemory::kCombined, static_cast<int>(schedule.chunks.size()) - 1);
  walk.finish();
}

void local_gram_adasum(const PeerKernelTable& kernels, const GramTree& tree,
                       const void* const* inputs, const std::vector<TensorSegment>& segments,
                       DType dtype, void* out, double* orthogonality) {
  const std::int64_t width = size_of(dtype);
  std::vector<double> gram(index_of(gram_numel(tree.size))), c(index_of(tree.size));
  std::vector<const void*> vectors(index_of(tree.size));
  for (std::size_t s = 0; s < segments.size(); ++s) {
    for (int r = 0; r < tree.size; ++r)
      vectors[index_of(r)] = at(inputs[r], segments[s].offset, width);
    const VectorsArgs of_segment{vectors.data(), tree.size, segments[s].numel, dtype};
    std::ranges::fill(gram, 0.0);
    kernels.gram({of_segment, gram.data()});
    GramResult result = adasum_of_gram(tree, gram.data(), c.data());
    if (needs_levels(tree, result)) {
      AdasumLevels levels(tree, gram.data());
      for (; levels.is_climbing(); levels.climb()) levels.add(kernels, of_segment);
      c = levels.coefficients();
      result.orthogonality = levels.orthogonality();
    }
    kernels.weighted_sum({of_segment, c.data(), at(out, segments[s].offset, width)});
    if (orthogonality != nullptr) orthogonality[s] = result.orthogonality;
  }
}

}  // namespace adareduce
