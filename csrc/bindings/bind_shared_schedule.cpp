#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"
#include "collectives/shared_schedule.h"
#include "engine/plan.h"
#include "engine/shared_tuning.h"
#include "transports/shared_memory/shared_memory.h"

namespace py = pybind11;
using namespace py::literals;

namespace adareduce {
namespace {

py::tuple to_tuple(Range range) { return py::make_tuple(range.begin, range.end); }

py::dict to_dict(const SharedSchedule& schedule) {
  constexpr std::array kWorks{"pack", "gram", "combine", "unpack"};
  static_assert(kWorks.size() == SharedSchedule::kNumWorks);
  py::list pieces, chunks, steps;
  for (const SharedPiece& piece : schedule.pieces)
    pieces.append(
        py::make_tuple(piece.segment, piece.owner, piece.begin, piece.numel, piece.place));
  for (const SharedChunk& chunk : schedule.chunks)
    chunks.append(py::dict(
        "pieces"_a = to_tuple(chunk.pieces), "segments"_a = to_tuple(chunk.segments),
        "slot_begin"_a = chunk.slot_begin, "slot_after"_a = chunk.slot_after,
        "has_gram"_a = chunk.has_gram, "combines"_a = chunk.combines, "ready"_a = chunk.ready,
        "gram_place"_a = chunk.gram_place, "gram_after"_a = chunk.gram_after));
  for (const auto& [work, chunk] : schedule.steps)
    steps.append(py::make_tuple(kWorks[static_cast<std::size_t>(work)], chunk));
  return py::dict("pieces"_a = pieces, "chunks"_a = chunks, "steps"_a = steps);
}

using MakeForAll = SharedSchedule (*)(const std::vector<TensorSegment>&, const SharedGeometry&);
using MakeForOwners = SharedSchedule (*)(const std::vector<OwnedSegment>&, const SharedGeometry&);

void bind_schedules(py::module_& module) {
  py::class_<SharedGeometry>(module, "SharedGeometry")
      .def(py::init([](int size, std::int64_t width, std::int64_t chunk_bytes,
                       std::int64_t ring_bytes, std::int64_t max_segments, int gram_places) {
             return SharedGeometry{size, width, chunk_bytes, ring_bytes, max_segments, gram_places};
           }),
           py::kw_only(), "size"_a, "width"_a, "chunk_bytes"_a, "ring_bytes"_a, "max_segments"_a,
           "gram_places"_a);
  module.def("shared_tile_numel", &tile_numel);
  module.attr("SHARED_MIN_SLOTS") = kMinSlots;
  module.attr("SHARED_MAX_TILE_BYTES") = kMaxTileBytes;
  module.attr("SHARED_MAX_RANKS") = kMaxSharedRanks;
  module.attr("SHARED_RING_BYTES") = SharedMemory::kRingBytes;
  module.attr("SHARED_GRAM_NUMEL") = SharedMemory::kGramNumel;
  module.attr("SHARED_GRAM_PLACES") = SharedMemory::kGramPlaces;

  // Segments are those that lay_out() makes of `numels`.
  const auto for_all = [&](const char* name, MakeForAll make) {
    module.def(
        name,
        [make](const std::vector<std::int64_t>& numels, const SharedGeometry& geometry) {
          return to_dict(make(lay_out(numels).first, geometry));
        },
        "numels"_a, "geometry"_a);
  };
  for_all("shared_reduction", &make_shared_reduction);
  for_all("shared_adasum", &make_shared_adasum);
  for_all("resident_reduction", &make_resident_reduction);
  for_all("resident_adasum", &make_resident_adasum);

  // Segments are pairs (owner, numel).
  const auto for_owners = [&](const char* name, MakeForOwners make) {
    module.def(
        name,
        [make](const std::vector<std::pair<Rank, std::int64_t>>& segments,
               const SharedGeometry& geometry) {
          std::vector<OwnedSegment> owned;
          for (const auto& [owner, numel] : segments) owned.push_back({owner, numel});
          return to_dict(make(owned, geometry));
        },
        "segments"_a, "geometry"_a);
  };
  for_owners("shared_gather", &make_shared_gather);
  for_owners("shared_scatter", &make_shared_scatter);
}

Request allreduce_of(bool is_adasum) {
  Request request;
  request.collective = Collective::allreduce;
  request.op = is_adasum ? ReduceOp::adasum : ReduceOp::sum;
  return request;
}

void bind_tuning(py::module_& module) {
  py::class_<SharedTuning>(module, "SharedTuning")
      .def(py::init<>())
      .def_static("choices",
                  [] {
                    std::vector<std::string> texts;
                    for (const SharedChoice& choice : SharedTuning::choices())
                      texts.push_back(choice.text());
                    return texts;
                  })
      .def("propose",
           [](SharedTuning& tuning, bool is_adasum, std::int64_t bytes, bool is_caller) {
             return tuning.propose(allreduce_of(is_adasum), bytes, is_caller);
           })
      .def("record",
           [](SharedTuning& tuning, bool is_adasum, std::int64_t bytes, bool is_caller,
              std::uint32_t choice, double took) {
             tuning.record(allreduce_of(is_adasum), bytes, is_caller, choice, Seconds{took});
           })
      .def("rows", [](const SharedTuning& tuning) {
        py::list rows;
        for (const SharedTuning::Row& row : tuning.rows())
          rows.append(py::make_tuple(row.what, row.choice, row.requests));
        return rows;
      });
}

}  // namespace

void bind_shared_schedule(py::module_& module) {
  bind_schedules(module);
  bind_tuning(module);
}

}  // namespace adareduce
