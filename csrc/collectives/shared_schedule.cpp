#include "collectives/shared_schedule.h"

#include <algorithm>
#include <utility>

#include "base/errors.h"
#include "collectives/shards.h"

namespace adareduce {
namespace {

constexpr std::int64_t kLineBytes = 64;
constexpr std::int64_t kFewestChunks = 4;  // of a short buffer, so that its works overlap

// A rank's part of a tile: long enough for kernels to run at full speed, short enough for the
// slices of a few ranks to stay in a second-level cache. With many ranks a tile must stay short.
std::int64_t shard_numel(int size) {
  if (size <= 8) return 16384;
  return size <= 16 ? 8192 : 2048;
}

std::int64_t round_down(std::int64_t value, std::int64_t unit) { return value / unit * unit; }
std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

std::int64_t end_of(const std::vector<TensorSegment>& segments) {
  return segments.empty() ? 0 : segments.back().offset + align_up(segments.back().numel);
}

// Elements of a chunk: whole tiles. Short buffers are cut, too.
std::int64_t chunk_numel_of(const SharedGeometry& geometry, std::int64_t numel) {
  const std::int64_t tile = tile_numel(geometry.size);
  const std::int64_t most = std::max(
      tile,
      round_down(std::min(geometry.chunk_bytes, geometry.ring_bytes / kMinSlots) / geometry.width,
                 tile));
  return std::min(most, std::max(tile, round_up(numel / kFewestChunks, tile)));
}

class Builder {
 public:
  Builder(const SharedGeometry& geometry, std::vector<TensorSegment> segments)
      : geometry_(geometry),
        segments_(std::move(segments)),
        end_(end_of(segments_)),
        chunk_numel_(chunk_numel_of(geometry, end_)) {}

  std::int64_t chunk_numel() const { return chunk_numel_; }
  std::int64_t end() const { return end_; }
  std::vector<SharedChunk>& chunks() { return schedule_.chunks; }

  // A chunk of the elements `range` of the buffer; segments from `first` on may have some.
  SharedChunk& add_chunk(Range range, std::size_t first) {
    SharedChunk chunk;
    chunk.ready = static_cast<int>(chunks().size());
    chunk.segments = {static_cast<std::int64_t>(first), static_cast<std::int64_t>(first)};
    chunk.pieces.begin = static_cast<std::int64_t>(schedule_.pieces.size());
    for (std::size_t s = first; s < segments_.size() && segments_[s].offset < range.end; ++s) {
      cut(s, clip(segments_[s].range(), range), range.begin);
      chunk.segments.end = static_cast<std::int64_t>(s) + 1;
    }
    chunk.pieces.end = static_cast<std::int64_t>(schedule_.pieces.size());
    chunks().push_back(chunk);
    return chunks().back();
  }

  void add_pieces(const std::vector<SharedPiece>& pieces) {
    SharedChunk chunk;
    chunk.ready = static_cast<int>(chunks().size());
    chunk.pieces.begin = static_cast<std::int64_t>(schedule_.pieces.size());
    schedule_.pieces.insert(schedule_.pieces.end(), pieces.begin(), pieces.end());
    chunk.pieces.end = static_cast<std::int64_t>(schedule_.pieces.size());
    chunks().push_back(chunk);
  }

  // Chunks one after the other, wherever segments begin or end.
  void add_all() {
    std::size_t first = 0;
    for (std::int64_t begin = 0; begin < end_; begin += chunk_numel_) {
      while (first < segments_.size() && segments_[first].range().end <= begin) ++first;
      add_chunk({begin, std::min(begin + chunk_numel_, end_)}, first);
    }
  }

  // Chunks that end where segments end, several for a segment that is longer. `slots`: how many
  // chunks fit into memory; 0: they are there already.
  void add_segments(int slots) {
    std::size_t first = 0;
    while (first < segments_.size()) {
      const TensorSegment& segment = segments_[first];
      if (segment.numel > chunk_numel_) {
        add_long(first, slots);
        ++first;
        continue;
      }
      std::size_t last = first;
      while (last < segments_.size() &&
             segments_[last].range().end - segment.offset <= chunk_numel_ &&
             static_cast<std::int64_t>(last - first) < geometry_.max_segments)
        ++last;
      add_chunk({segment.offset, segments_[last - 1].range().end}, first);
      // What add_chunk has found may include empty segments behind the range, or not.
      chunks().back().segments.end = static_cast<std::int64_t>(last);
      first = last;
    }
    assign_gram_places();
  }

  // The order of the works: each chunk goes from one to the next a step later at the earliest, so
  // that peers have had a step's time for their part; and none runs ahead of a work that could go
  // on, so that data are worked on while they are in a cache.
  SharedSchedule finish(const std::vector<SharedSchedule::Work>& works) {
    const auto count = static_cast<int>(chunks().size());
    const bool has_slots = works.front() == SharedSchedule::pack;
    std::vector<int> begun(works.size(), 0);  // chunks whose work has been scheduled
    std::vector<int> occupant(has_slots ? static_cast<std::size_t>(slots()) : 0, -1);
    while (begun.back() < count) {
      const std::vector<int> before = begun;
      const auto can_go = [&](std::size_t w) {
        if (before[w] == count) return false;
        const SharedChunk& chunk = chunks()[static_cast<std::size_t>(before[w])];
        const bool awaits_gram = works[w] == SharedSchedule::combine && w > 0 && chunk.combines;
        if (w > 0 && before[w - 1] <= (awaits_gram ? std::max(chunk.ready, before[w]) : before[w]))
          return false;
        if (works[w] == SharedSchedule::gram) return before.back() > chunk.gram_after;
        return works[w] != SharedSchedule::pack || find_slot(occupant, before.back()) >= 0;
      };
      for (std::size_t w = 0; w < works.size(); ++w) {
        const bool is_ahead = w + 1 < works.size() && before[w] > before[w + 1] + 1;
        if (!can_go(w) || (is_ahead && can_go(w + 1))) continue;
        const int index = begun[w]++;
        if (works[w] == SharedSchedule::pack) take_slot(index, before.back(), occupant);
        schedule_.steps.push_back({works[w], index});
      }
      if (before == begun) throw Error("shared schedule: its steps wait for each other");
    }
    return std::move(schedule_);
  }

  int slots() const { return static_cast<int>(geometry_.ring_bytes / slot_bytes()); }

 private:
  std::int64_t slot_bytes() const { return round_up(chunk_numel_ * geometry_.width, kLineBytes); }

  // Cuts a part of a segment where shards end.
  void cut(std::size_t segment, Range range, std::int64_t chunk_begin) {
    const std::int64_t tile = tile_numel(geometry_.size);
    const std::int64_t offset = segments_[segment].offset;
    for (std::int64_t at = range.begin; at < range.end;) {
      const std::int64_t tile_begin = round_down(at, tile);
      const std::int64_t length = std::min(tile, end_ - tile_begin);
      const std::int64_t shard = shard_of(length, 0, geometry_.size).size();
      const std::int64_t owner = (at - tile_begin) / shard;
      const std::int64_t end = std::min(range.end, tile_begin + (owner + 1) * shard);
      schedule_.pieces.push_back({static_cast<std::int32_t>(segment), static_cast<Rank>(owner),
                                  at - offset, end - at, at - chunk_begin});
      at = end;
    }
  }

  void add_long(std::size_t segment, int slots) {
    const Range range = segments_[segment].range();
    const std::int64_t tile = tile_numel(geometry_.size);
    std::vector<Range> parts;
    for (std::int64_t begin = range.begin; begin < range.end;) {
      const std::int64_t end = std::min(range.end, round_down(begin + chunk_numel_, tile));
      parts.push_back({begin, end});
      begin = end;
    }
    // Two more for what comes before and behind.
    const bool passes_twice = slots > 0 && static_cast<int>(parts.size()) > slots - 2;
    const auto first = static_cast<int>(chunks().size());
    const int ready = first + static_cast<int>(parts.size()) - 1;
    for (int pass = 0; pass < (passes_twice ? 2 : 1); ++pass)
      for (const Range& part : parts) {
        SharedChunk& chunk = add_chunk(part, segment);
        chunk.segments = {static_cast<std::int64_t>(segment),
                          static_cast<std::int64_t>(segment) + 1};
        chunk.ready = ready;
        chunk.has_gram = pass == 0;
        chunk.combines = !passes_twice || pass == 1;
      }
  }

  void assign_gram_places() {
    std::vector<int> last_user(static_cast<std::size_t>(geometry_.gram_places), -1);
    int ready = -1;
    int next = -1;
    int place = 0;
    int after = -1;
    for (std::size_t c = 0; c < chunks().size(); ++c) {
      SharedChunk& chunk = chunks()[c];
      if (chunk.ready != ready) {
        ready = chunk.ready;
        place = ++next % geometry_.gram_places;
        after = last_user[static_cast<std::size_t>(place)];
      }
      chunk.gram_place = place;
      chunk.gram_after = after;
      last_user[static_cast<std::size_t>(place)] = static_cast<int>(c);
    }
  }

  // The first slot whose chunk has been unpacked in an earlier step; -1: none.
  static int find_slot(const std::vector<int>& occupant, int unpacked) {
    const auto slot = std::find_if(occupant.begin(), occupant.end(),
                                   [&](int before) { return before < unpacked; });
    return slot == occupant.end() ? -1 : static_cast<int>(slot - occupant.begin());
  }

  void take_slot(int index, int unpacked, std::vector<int>& occupant) {
    const int slot = find_slot(occupant, unpacked);
    SharedChunk& chunk = chunks()[static_cast<std::size_t>(index)];
    chunk.slot_begin = slot * slot_bytes();
    chunk.slot_after = std::exchange(occupant[static_cast<std::size_t>(slot)], index);
  }

  const SharedGeometry geometry_;
  const std::vector<TensorSegment> segments_;
  const std::int64_t end_;
  const std::int64_t chunk_numel_;
  SharedSchedule schedule_;
};

// Chunks of segments that have one owner each: every owner gives a slice of its own to each chunk,
// so that all of them work at the same time. `all_in_one`: their slices lie in one slot, else each
// in its owner's.
SharedSchedule make_owned(const std::vector<OwnedSegment>& segments, const SharedGeometry& geometry,
                          bool all_in_one, std::vector<SharedSchedule::Work> works) {
  struct Owner {
    std::vector<std::int32_t> segments;
    std::size_t next = 0;  // of `segments`
    std::int64_t begin = 0;
  };
  std::vector<Owner> owners(static_cast<std::size_t>(geometry.size));
  std::int64_t total = 0, active = 0;
  for (std::size_t s = 0; s < segments.size(); ++s) {
    if (segments[s].numel == 0) continue;
    Owner& owner = owners[static_cast<std::size_t>(segments[s].owner)];
    if (owner.segments.empty()) ++active;
    owner.segments.push_back(static_cast<std::int32_t>(s));
    total += segments[s].numel;
  }
  Builder builder(geometry, {{0, total}});
  const std::int64_t unit = kLineBytes;  // elements: a line at least
  const std::int64_t share =
      std::max(unit, round_down(builder.chunk_numel() / std::max<std::int64_t>(active, 1), unit));
  for (bool has_more = active > 0; has_more;) {
    has_more = false;
    std::vector<SharedPiece> pieces;
    std::int64_t of_all = 0;
    for (std::size_t rank = 0; rank < owners.size(); ++rank) {
      Owner& owner = owners[rank];
      std::int64_t place = all_in_one ? of_all : 0;
      const std::int64_t end = place + share;
      while (owner.next < owner.segments.size() && place < end) {
        const std::int32_t segment = owner.segments[owner.next];
        const std::int64_t left = segments[static_cast<std::size_t>(segment)].numel - owner.begin;
        const std::int64_t numel = std::min(left, end - place);
        pieces.push_back({segment, static_cast<Rank>(rank), owner.begin, numel, place});
        place = round_up(place + numel, kShardAlignment);
        owner.begin += numel;
        if (numel == left) {
          ++owner.next;
          owner.begin = 0;
        }
      }
      of_all = round_up(std::max(of_all, place), unit);
      has_more |= owner.next < owner.segments.size();
    }
    builder.add_pieces(pieces);
  }
  return builder.finish(works);
}

}  // namespace

std::int64_t tile_numel(int size) { return shard_numel(size) * size; }

SharedSchedule make_shared_reduction(const std::vector<TensorSegment>& segments,
                                     const SharedGeometry& geometry) {
  Builder builder(geometry, segments);
  builder.add_all();
  return builder.finish({SharedSchedule::pack, SharedSchedule::combine, SharedSchedule::unpack});
}

SharedSchedule make_shared_adasum(const std::vector<TensorSegment>& segments,
                                  const SharedGeometry& geometry) {
  Builder builder(geometry, segments);
  builder.add_segments(builder.slots());
  return builder.finish({SharedSchedule::pack, SharedSchedule::gram, SharedSchedule::combine,
                         SharedSchedule::unpack});
}

SharedSchedule make_resident_reduction(const std::vector<TensorSegment>& segments,
                                       const SharedGeometry& geometry) {
  Builder builder(geometry, segments);
  builder.add_all();
  return builder.finish({SharedSchedule::combine});
}

SharedSchedule make_resident_adasum(const std::vector<TensorSegment>& segments,
                                    const SharedGeometry& geometry) {
  Builder builder(geometry, segments);
  builder.add_segments(0);
  return builder.finish({SharedSchedule::gram, SharedSchedule::combine});
}

SharedSchedule make_shared_gather(const std::vector<OwnedSegment>& segments,
                                  const SharedGeometry& geometry) {
  return make_owned(segments, geometry, false, {SharedSchedule::pack, SharedSchedule::unpack});
}

SharedSchedule make_shared_scatter(const std::vector<OwnedSegment>& segments,
                                   const SharedGeometry& geometry) {
  return make_owned(segments, geometry, true, {SharedSchedule::pack, SharedSchedule::combine});
}

}  // namespace adareduce
