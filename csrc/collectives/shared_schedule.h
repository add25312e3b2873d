#pragma once
#include <cstdint>
#include <vector>

#include "base/types.h"

namespace adareduce {

/// Some consecutive elements of one tensor.
struct SharedPiece {
  std::int32_t segment = 0;
  Rank owner = 0;          ///< who reduces it, or whose it is
  std::int64_t begin = 0;  ///< element of the segment
  std::int64_t numel = 0;
  std::int64_t place = 0;  ///< element of its chunk's slot
};

/// Pieces that pass through one slot of every rank together.
struct SharedChunk {
  Range pieces;                 ///< indices into the schedule's pieces
  Range segments;               ///< Adasum: indices of the segments that it has pieces of
  std::int64_t slot_begin = 0;  ///< byte of the ring, the same on every rank
  int slot_after = -1;          ///< the chunk that had the slot before; -1: one of an earlier walk
  // Adasum. A segment too long for a chunk has several, and where they do not fit into the ring
  // together it passes twice: first for its Gram matrix, then to be combined.
  bool has_gram = true;  ///< its pieces count for Gram matrices
  bool combines = true;  ///< its pieces are combined
  int ready = 0;         ///< the chunk after which their Gram matrices are known
  int gram_place = -1;   ///< where that chunk puts its ranks' parts of them; same for all it serves
  int gram_after = -1;   ///< the chunk after which that place is free; -1: it is
};

/// Who does what when, in the same order on every rank: a pure function of its arguments. Chunk and
/// ring sizes change no bit of a result.
struct SharedSchedule {
  enum Work : std::uint8_t { pack, gram, combine, unpack };
  static constexpr int kNumWorks = 4;
  struct Step {
    Work work;
    int chunk;
    friend bool operator==(const Step&, const Step&) = default;
  };
  std::vector<SharedPiece> pieces;
  std::vector<SharedChunk> chunks;
  std::vector<Step> steps;
};

/// The memory that a schedule may use.
struct SharedGeometry {
  int size = 1;                   ///< ranks
  std::int64_t width = 4;         ///< bytes of an element
  std::int64_t chunk_bytes = 0;   ///< wanted; a chunk has at least a tile
  std::int64_t ring_bytes = 0;    ///< of every rank; kMinSlots tiles at least
  std::int64_t max_segments = 0;  ///< whose Gram matrices fit into one place
  int gram_places = 0;
};
/// Most ranks that share memory.
inline constexpr std::size_t kMaxSharedRanks = 64;
inline constexpr int kMinSlots = 6;
inline constexpr std::int64_t kMaxTileBytes = std::int64_t{1} << 20;

/// A fused buffer is divided tile by tile: consecutive elements, a shard for each rank. Sums over a
/// segment run over its parts in the shards of the tiles.
std::int64_t tile_numel(int size);

/// Sum and the like: pack, combine, unpack. `segments` as lay_out() makes them.
SharedSchedule make_shared_reduction(const std::vector<TensorSegment>& segments,
                                     const SharedGeometry& geometry);
/// Adasum: pack, gram, combine, unpack.
SharedSchedule make_shared_adasum(const std::vector<TensorSegment>& segments,
                                  const SharedGeometry& geometry);
/// The same where every rank can address the tensors of all: no slots, no steps pack and unpack.
SharedSchedule make_resident_reduction(const std::vector<TensorSegment>& segments,
                                       const SharedGeometry& geometry);
SharedSchedule make_resident_adasum(const std::vector<TensorSegment>& segments,
                                    const SharedGeometry& geometry);

/// A segment of one rank.
struct OwnedSegment {
  Rank owner = 0;
  std::int64_t numel = 0;
};
/// Every rank has its segments, which all get: pack by the owner, unpack by the others.
SharedSchedule make_shared_gather(const std::vector<OwnedSegment>& segments,
                                  const SharedGeometry& geometry);
/// All have all segments, whose owners reduce them: pack, combine.
SharedSchedule make_shared_scatter(const std::vector<OwnedSegment>& segments,
                                   const SharedGeometry& geometry);

}  // namespace adareduce
