#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "collectives/adasum_schedule.h"
#include "collectives/broadcast.h"
#include "collectives/shards.h"
#include "engine/plan.h"
#include "kernels/coefficients.h"
#include "kernels/kernels.h"

namespace py = pybind11;
using namespace py::literals;

namespace adareduce {
namespace {

using Segments = std::vector<std::pair<std::int64_t, std::int64_t>>;

std::vector<TensorSegment> to_table(const Segments& segments) {
  std::vector<TensorSegment> table;
  for (const auto& [offset, numel] : segments) table.push_back({offset, numel});
  return table;
}

py::tuple to_tuple(Range range) { return py::make_tuple(range.begin, range.end); }

void bind_schedules(py::module_& module) {
  module.def("adasum_tree", [](int size) {
    py::list nodes;
    for (const AdasumTree::Node& node : make_adasum_tree(size).nodes)
      nodes.append(py::dict("kind"_a = node.kind == AdasumTree::Kind::fold ? "fold" : "halve",
                            "lower"_a = node.lower, "upper"_a = node.upper,
                            "owners"_a = node.owners));
    return nodes;
  });
  module.def("parallel_weights", [](int size) { return parallel_weights(make_adasum_tree(size)); });
  module.def("adasum_schedule", [](int size, Rank rank, std::int64_t numel) {
    py::list levels;
    for (const AdasumLevel& level : make_adasum_schedule(make_adasum_tree(size), rank, numel))
      levels.append(py::dict("peer"_a = level.peer, "is_lower"_a = level.is_lower,
                             "keep"_a = to_tuple(level.keep), "give"_a = to_tuple(level.give),
                             "group"_a = level.group));
    return levels;
  });
  module.def("shard_of", [](std::int64_t numel, Rank rank, int size) {
    return to_tuple(shard_of(numel, rank, size));
  });
  module.def("broadcast_schedule", [](Rank rank, int size, Rank root) {
    const BroadcastSchedule schedule = make_broadcast_schedule(rank, size, root);
    return py::make_tuple(schedule.parent, schedule.children);
  });
  module.def("lay_out", [](const std::vector<std::int64_t>& numels) {
    const auto [segments, numel] = lay_out(numels);
    Segments out;
    for (const TensorSegment& segment : segments) out.emplace_back(segment.offset, segment.numel);
    return std::pair(out, numel);
  });
}

// Arrays are anything with the buffer protocol; the caller vouches for their sizes.
void bind_kernels(py::module_& module) {
  module.def("adasum_share", &adasum_share);
  module.def(
      "pair_stats", [](int dtype, const py::buffer& lower, const py::buffer& upper,
                       const Segments& segments, std::pair<std::int64_t, std::int64_t> range) {
        const std::vector<TensorSegment> host = to_table(segments);
        const SegmentTable table{host.data(), nullptr, static_cast<std::int64_t>(host.size())};
        std::vector<double> stats(host.size() * kStatsPerSegment);
        kCpuKernels.pair_stats({{lower.request().ptr,
                                 upper.request().ptr,
                                 {range.first, range.second},
                                 static_cast<DType>(dtype),
                                 &table},
                                stats.data()},
                               {});
        return stats;
      });
  module.def(
      "pair_combine", [](int dtype, const py::buffer& lower, const py::buffer& upper,
                         const Segments& segments, std::pair<std::int64_t, std::int64_t> range,
                         const std::vector<double>& stats, const py::buffer& out) {
        const std::vector<TensorSegment> host = to_table(segments);
        const SegmentTable table{host.data(), nullptr, static_cast<std::int64_t>(host.size())};
        kCpuKernels.pair_combine({{lower.request().ptr,
                                   upper.request().ptr,
                                   {range.first, range.second},
                                   static_cast<DType>(dtype),
                                   &table},
                                  stats.data(),
                                  out.request(true).ptr},
                                 {});
      });
  module.def("pack", [](int dtype, const std::vector<py::buffer>& tensors, const Segments& segments,
                        double scale, const py::buffer& fused, std::int64_t numel) {
    const std::vector<TensorSegment> host = to_table(segments);
    const SegmentTable table{host.data(), nullptr, static_cast<std::int64_t>(host.size())};
    std::vector<const void*> inputs;
    for (const py::buffer& tensor : tensors) inputs.push_back(tensor.request().ptr);
    kCpuKernels.pack(
        {inputs.data(), fused.request(true).ptr, numel, static_cast<DType>(dtype), &table, scale},
        {});
  });
  module.def("unpack", [](int dtype, const py::buffer& fused, const Segments& segments,
                          double scale, const std::vector<py::buffer>& tensors) {
    const std::vector<TensorSegment> host = to_table(segments);
    const SegmentTable table{host.data(), nullptr, static_cast<std::int64_t>(host.size())};
    std::vector<void*> outputs;
    for (const py::buffer& tensor : tensors) outputs.push_back(tensor.request(true).ptr);
    kCpuKernels.unpack(
        {fused.request().ptr, outputs.data(), static_cast<DType>(dtype), &table, scale}, {});
  });
  module.def("sum", [](int dtype, const std::vector<py::buffer>& inputs, double divisor,
                       const py::buffer& out, std::int64_t numel) {
    std::vector<const void*> pointers;
    for (const py::buffer& input : inputs) pointers.push_back(input.request().ptr);
    kCpuKernels.sum({pointers.data(), static_cast<int>(pointers.size()), out.request(true).ptr,
                     numel, static_cast<DType>(dtype), divisor},
                    {});
  });
}

}  // namespace

void bind_testing(py::module_& module) {
  bind_schedules(module);
  bind_kernels(module);
}

}  // namespace adareduce
