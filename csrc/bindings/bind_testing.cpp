#include <pybind11/stl.h>

#include "base/errors.h"
#include "bindings/bindings.h"
#include "bindings/counting_kernels.h"
#include "collectives/adasum_schedule.h"
#include "collectives/broadcast.h"
#include "collectives/shards.h"
#include "engine/plan.h"
#include "kernels/coefficients.h"
#include "kernels/gram.h"
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
  module.def("adasum_of_gram", [](int size, const std::vector<double>& gram) {
    const GramTree tree = gram_tree(make_adasum_tree(size));
    if (gram.size() != static_cast<std::size_t>(gram_numel(size)))
      throw UsageError(concat("adasum_of_gram: gram must have ", gram_numel(size), " numbers, got ",
                              gram.size()));
    std::vector<double> c(static_cast<std::size_t>(size));
    const GramResult result = adasum_of_gram(tree, gram.data(), c.data());
    return py::dict("coefficients"_a = c, "orthogonality"_a = result.orthogonality,
                    "cancellation"_a = result.cancellation);
  });
  module.attr("MOST_CANCELLATION") = kMostCancellation;
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

struct Table {
  std::vector<TensorSegment> host;
  SegmentTable table;

  explicit Table(const Segments& segments)
      : host(to_table(segments)),
        table{host.data(), nullptr, static_cast<std::int64_t>(host.size())} {}
};

std::vector<const void*> inputs_of(const std::vector<py::buffer>& buffers) {
  std::vector<const void*> pointers;
  for (const py::buffer& buffer : buffers) pointers.push_back(buffer.request().ptr);
  return pointers;
}

const KernelTable& kernels_for(const std::string& isa) {
  const KernelTable* table = isa.empty() ? &cpu_kernels() : cpu_kernels_for(isa);
  if (table == nullptr) throw UsageError(concat("isa must be one that this CPU has, got ", isa));
  return *table;
}

VectorPair pair_of(int dtype, const py::buffer& lower, const py::buffer& upper, const Table& table,
                   std::pair<std::int64_t, std::int64_t> range) {
  return {lower.request().ptr,
          upper.request().ptr,
          {range.first, range.second},
          static_cast<DType>(dtype),
          &table.table};
}

// Arrays are anything with the buffer protocol; the caller vouches for their sizes. `isa` chooses
// an instruction set; empty is the best one.
void bind_kernels(py::module_& module) {
  module.def("isas", [] {
    std::vector<std::string> names;
    for (const char* isa : {"baseline", "avx2", "avx512"})
      if (cpu_kernels_for(isa) != nullptr) names.emplace_back(isa);
    return names;
  });
  module.def("adasum_share", &adasum_share);
  module.def("variance_and_norm", [](double sum_of_squares, double of_mean, double scale) {
    const VarianceAndNorm estimate = variance_and_norm(sum_of_squares, of_mean, scale);
    return std::pair(estimate.variance, estimate.squared_norm);
  });
  module.def(
      "pair_stats",
      [](int dtype, const py::buffer& lower, const py::buffer& upper, const Segments& segments,
         std::pair<std::int64_t, std::int64_t> range, const std::string& isa) {
        const Table table(segments);
        std::vector<double> stats(table.host.size() * kStatsPerSegment);
        kernels_for(isa).pair_stats({pair_of(dtype, lower, upper, table, range), stats.data()}, {});
        return stats;
      },
      "dtype"_a, "lower"_a, "upper"_a, "segments"_a, "range"_a, "isa"_a = "");
  module.def(
      "pair_combine",
      [](int dtype, const py::buffer& lower, const py::buffer& upper, const Segments& segments,
         std::pair<std::int64_t, std::int64_t> range, const std::vector<double>& stats,
         const py::buffer& out, const std::string& isa) {
        const Table table(segments);
        kernels_for(isa).pair_combine(
            {pair_of(dtype, lower, upper, table, range), stats.data(), out.request(true).ptr}, {});
      },
      "dtype"_a, "lower"_a, "upper"_a, "segments"_a, "range"_a, "stats"_a, "out"_a, "isa"_a = "");
  module.def(
      "pack",
      [](int dtype, const std::vector<py::buffer>& tensors, const Segments& segments, double scale,
         const py::buffer& fused, std::int64_t numel, bool streams, const std::string& isa) {
        const Table table(segments);
        const std::vector<const void*> inputs = inputs_of(tensors);
        kernels_for(isa).pack({.tensors = inputs.data(),
                               .fused = fused.request(true).ptr,
                               .numel = numel,
                               .dtype = static_cast<DType>(dtype),
                               .segments = &table.table,
                               .scale = scale,
                               .streams = streams},
                              {});
      },
      "dtype"_a, "tensors"_a, "segments"_a, "scale"_a, "fused"_a, "numel"_a, "streams"_a = false,
      "isa"_a = "");
  module.def(
      "unpack",
      [](int dtype, const py::buffer& fused, const Segments& segments, double scale,
         const std::vector<py::buffer>& tensors, bool counts_nonfinite, const std::string& isa) {
        const Table table(segments);
        std::vector<void*> outputs;
        for (const py::buffer& tensor : tensors) outputs.push_back(tensor.request(true).ptr);
        std::vector<std::int64_t> nonfinite(counts_nonfinite ? table.host.size() : 0);
        kernels_for(isa).unpack(
            {fused.request().ptr, outputs.data(), static_cast<DType>(dtype), &table.table, scale,
             counts_nonfinite ? nonfinite.data() : nullptr},
            {});
        return nonfinite;
      },
      "dtype"_a, "fused"_a, "segments"_a, "scale"_a, "tensors"_a, "counts_nonfinite"_a = false,
      "isa"_a = "");
  module.def(
      "reduce",
      [](int dtype, int op, const std::vector<py::buffer>& inputs, double divisor,
         const py::buffer& out, std::int64_t numel, const std::string& isa) {
        const std::vector<const void*> pointers = inputs_of(inputs);
        kernels_for(isa).reduce(
            {static_cast<Elementwise>(op), pointers.data(), static_cast<int>(pointers.size()),
             out.request(true).ptr, numel, static_cast<DType>(dtype), divisor},
            {});
      },
      "dtype"_a, "op"_a, "inputs"_a, "divisor"_a, "out"_a, "numel"_a, "isa"_a = "");
  module.def(
      "reduce_squares",
      [](int dtype, const std::vector<py::buffer>& inputs, double divisor, const py::buffer& out,
         std::pair<std::int64_t, std::int64_t> bounds, const Segments& segments,
         const std::vector<std::int32_t>& group_of, int num_groups, const std::string& isa) {
        const Table table(segments);
        const std::vector<const void*> pointers = inputs_of(inputs);
        const Range range{bounds.first, bounds.second};
        std::vector<double> squares(static_cast<std::size_t>(num_groups * kSquaresPerGroup));
        kernels_for(isa).reduce_squares(
            {{Elementwise::sum, pointers.data(), static_cast<int>(pointers.size()),
              out.request(true).ptr, range.size(), static_cast<DType>(dtype), divisor},
             range.begin,
             &table.table,
             group_of.data(),
             squares.data()},
            {});
        return squares;
      },
      "dtype"_a, "inputs"_a, "divisor"_a, "out"_a, "range"_a, "segments"_a, "group_of"_a,
      "num_groups"_a, "isa"_a = "");
}

void bind_work_counts(py::module_& module) {
  module.def("counted_work", [] {
    std::map<std::string, std::pair<std::int64_t, std::int64_t>> counts;
    for (const auto& [entry, count] : counted_work()) counts[entry] = {count.calls, count.elements};
    return counts;
  });
  module.def("reset_counted_work", &reset_counted_work);
}

}  // namespace

void bind_testing(py::module_& module) {
  bind_schedules(module);
  bind_kernels(module);
  bind_work_counts(module);
}

}  // namespace adareduce
