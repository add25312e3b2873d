#include <pybind11/stl.h>

#include <numeric>
#include <optional>

#include "base/errors.h"
#include "bindings/bindings.h"
#include "engine/cuda/virtual_ranks.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace adareduce {
namespace {

// Addresses on the device, and streams, cross as integers. tests/gpu/README.md says what they are.
using Address = std::uintptr_t;
using Segments = std::vector<std::pair<std::int64_t, std::int64_t>>;  // (offset, numel)

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}
template <typename T>
std::vector<T> pointers(const std::vector<Address>& addresses) {
  std::vector<T> result;
  for (const Address address : addresses) result.push_back(reinterpret_cast<T>(address));
  return result;
}
Stream stream_of(Address stream) { return {pointer<void>(stream)}; }

std::vector<TensorSegment> segments_of(const Segments& pairs) {
  std::vector<TensorSegment> segments;
  for (const auto& [offset, numel] : pairs) segments.push_back({offset, numel});
  return segments;
}

const KernelTable& kernels_for(const std::string& accumulator) {
  if (accumulator == "f32") return cuda::cuda_kernels(cuda::Accumulator::f32);
  if (accumulator.empty() || accumulator == "f64") return cuda::cuda_kernels();
  throw UsageError("accumulator must be f64 or f32, got " + accumulator);
}

// A fused buffer's layout on the current GPU, and its element type.
struct Buffer {
  cuda::StandaloneTables tables;
  DType dtype;
  std::int64_t numel = 0;

  Buffer(const Segments& segments, int code)
      : tables(segments_of(segments)), dtype(static_cast<DType>(code)) {
    constexpr std::int64_t kAlignment = 16;
    for (const auto& [offset, count] : segments)
      numel = std::max(numel, (offset + count + kAlignment - 1) / kAlignment * kAlignment);
  }
  VectorPair pair(Address lower, Address upper, std::int64_t begin, std::int64_t end) const {
    return {pointer<const void>(lower),
            pointer<const void>(upper),
            {begin, end},
            dtype,
            &tables.segments()};
  }
};

void bind_buffer(py::module_& module) {
  py::class_<Buffer>(module, "Buffer")
      .def(py::init<const Segments&, int>(), "segments"_a, "dtype"_a)
      .def_readonly("numel", &Buffer::numel)
      .def_property_readonly("items", [](const Buffer& buffer) {
        std::vector<std::tuple<std::int64_t, std::int32_t, std::int32_t>> items;
        for (const Item& item : buffer.tables.items_from_device())
          items.emplace_back(item.begin, item.numel, item.segment);
        return items;
      });
  module.def(
      "pair_stats",
      [](const Buffer& buffer, Address lower, Address upper, std::int64_t begin, std::int64_t end,
         Address stats, Address stream, const std::string& accumulator) {
        kernels_for(accumulator)
            .pair_stats({buffer.pair(lower, upper, begin, end), pointer<double>(stats)},
                        stream_of(stream));
      },
      "buffer"_a, "lower"_a, "upper"_a, "begin"_a, "end"_a, "stats"_a, "stream"_a,
      "accumulator"_a = "");
  module.def(
      "pair_combine",
      [](const Buffer& buffer, Address lower, Address upper, std::int64_t begin, std::int64_t end,
         Address stats, Address out, Address stream) {
        cuda::cuda_kernels().pair_combine({buffer.pair(lower, upper, begin, end),
                                           pointer<const double>(stats), pointer<void>(out)},
                                          stream_of(stream));
      },
      "buffer"_a, "lower"_a, "upper"_a, "begin"_a, "end"_a, "stats"_a, "out"_a, "stream"_a);
  module.def(
      "pack",
      [](const Buffer& buffer, const std::vector<Address>& tensors, Address fused, double scale,
         Address squares, Address stream, const std::string& accumulator) {
        const auto inputs = pointers<const void*>(tensors);
        kernels_for(accumulator)
            .pack({.tensors = inputs.data(),
                   .fused = pointer<void>(fused),
                   .numel = buffer.numel,
                   .dtype = buffer.dtype,
                   .segments = &buffer.tables.segments(),
                   .scale = scale,
                   .squares = pointer<double>(squares)},
                  stream_of(stream));
      },
      "buffer"_a, "tensors"_a, "fused"_a, "scale"_a, "squares"_a, "stream"_a, "accumulator"_a = "");
  module.def(
      "unpack",
      [](const Buffer& buffer, Address fused, const std::vector<Address>& tensors, double scale,
         Address nonfinite, Address squares, Address stream, const std::string& accumulator) {
        const auto outputs = pointers<void*>(tensors);
        kernels_for(accumulator)
            .unpack({.fused = pointer<const void>(fused),
                     .tensors = outputs.data(),
                     .dtype = buffer.dtype,
                     .segments = &buffer.tables.segments(),
                     .scale = scale,
                     .nonfinite = pointer<std::int64_t>(nonfinite),
                     .squares = pointer<double>(squares)},
                    stream_of(stream));
      },
      "buffer"_a, "fused"_a, "tensors"_a, "scale"_a, "nonfinite"_a, "squares"_a, "stream"_a,
      "accumulator"_a = "");
}

void bind_reductions(py::module_& module) {
  module.def(
      "reduce",
      [](int dtype, int op, const std::vector<Address>& inputs, Address out, std::int64_t numel,
         double divisor, Address stream) {
        const auto from = pointers<const void*>(inputs);
        cuda::cuda_kernels().reduce(
            {static_cast<Elementwise>(op), from.data(), static_cast<int>(from.size()),
             pointer<void>(out), numel, static_cast<DType>(dtype), divisor},
            stream_of(stream));
      },
      "dtype"_a, "op"_a, "inputs"_a, "out"_a, "numel"_a, "divisor"_a, "stream"_a);
  module.def(
      "reduce_squares",
      [](const Buffer& buffer, const std::vector<Address>& inputs, Address out, std::int64_t begin,
         std::int64_t end, double divisor, Address group_of, Address squares, Address stream) {
        const auto from = pointers<const void*>(inputs);
        cuda::cuda_kernels().reduce_squares(
            {{Elementwise::sum, from.data(), static_cast<int>(from.size()), pointer<void>(out),
              end - begin, buffer.dtype, divisor},
             begin,
             &buffer.tables.segments(),
             pointer<const std::int32_t>(group_of),
             pointer<double>(squares)},
            stream_of(stream));
      },
      "buffer"_a, "inputs"_a, "out"_a, "begin"_a, "end"_a, "divisor"_a, "group_of"_a, "squares"_a,
      "stream"_a);
  module.def(
      "copy",
      [](Address source, std::int64_t num_bytes, Address target, Address stream) {
        cuda::cuda_kernels().copy(pointer<const void>(source), num_bytes, pointer<void>(target),
                                  stream_of(stream));
      },
      "source"_a, "num_bytes"_a, "target"_a, "stream"_a);
  module.def(
      "group_stats",
      [](std::int64_t num_segments, Address group_of, std::int64_t num_groups, int num_ranks,
         Address squares, bool squares_are_of_groups, Address result_squares,
         double result_is_mean_times, bool has_estimates, Address out, Address stream) {
        cuda::group_stats({.num_segments = num_segments,
                           .group_of = pointer<const std::int32_t>(group_of),
                           .num_groups = num_groups,
                           .num_ranks = num_ranks,
                           .num_rows = num_ranks,
                           .squares = pointer<const double>(squares),
                           .squares_are_of_groups = squares_are_of_groups,
                           .result_squares = pointer<const double>(result_squares),
                           .result_is_mean_times = result_is_mean_times,
                           .has_estimates = has_estimates,
                           .out = pointer<double>(out)},
                          stream_of(stream));
      },
      "num_segments"_a, "group_of"_a, "num_groups"_a, "num_ranks"_a, "squares"_a,
      "squares_are_of_groups"_a, "result_squares"_a, "result_is_mean_times"_a, "has_estimates"_a,
      "out"_a, "stream"_a);
}

// All ranks, where none are named.
std::vector<Rank> ranks_or_all(const cuda::VirtualRanks& ranks, std::vector<Rank> named) {
  if (!named.empty()) return named;
  named.resize(static_cast<std::size_t>(ranks.size()));
  std::iota(named.begin(), named.end(), 0);
  return named;
}
Address entry(const std::vector<Address>& addresses, Rank rank) {
  return addresses.empty() ? 0 : addresses.at(static_cast<std::size_t>(rank));
}

void bind_peer_ranks(py::module_& module) {
  using Ranks = cuda::VirtualRanks;
  const std::vector<Address> nothing;
  const std::vector<Rank> all;
  py::class_<Ranks>(module, "PeerRanks")
      .def(py::init([](int size, std::int64_t numel, int dtype, const Segments& segments,
                       int num_blocks, double deadline_seconds) {
             return std::make_unique<Ranks>(size, numel, static_cast<DType>(dtype),
                                            segments_of(segments), num_blocks, deadline_seconds);
           }),
           "size"_a, "numel"_a, "dtype"_a, "segments"_a, "num_blocks"_a = 0,
           "deadline_seconds"_a = 10.0)
      .def(
          "input",
          [](const Ranks& ranks, Rank rank) {
            return reinterpret_cast<Address>(ranks.input(rank));
          },
          "rank"_a)
      .def(
          "output",
          [](const Ranks& ranks, Rank rank) {
            return reinterpret_cast<Address>(ranks.output(rank));
          },
          "rank"_a)
      .def(
          "adasum",
          [](Ranks& ranks, const std::vector<Address>& streams,
             const std::vector<Address>& orthogonality, const std::vector<Address>& cancellation,
             const std::vector<Rank>& who) {
            for (const Rank rank : ranks_or_all(ranks, who))
              ranks.adasum(rank, stream_of(entry(streams, rank)),
                           pointer<double>(entry(orthogonality, rank)),
                           pointer<double>(entry(cancellation, rank)));
          },
          "streams"_a, "orthogonality"_a = nothing, "cancellation"_a = nothing, "ranks"_a = all)
      .def(
          "reduce",
          [](Ranks& ranks, int op, double divisor, const std::vector<Address>& streams,
             const std::vector<Address>& squares, const std::vector<Rank>& who) {
            for (const Rank rank : ranks_or_all(ranks, who))
              ranks.reduce(rank, stream_of(entry(streams, rank)), static_cast<Elementwise>(op),
                           divisor, pointer<double>(entry(squares, rank)));
          },
          "op"_a, "divisor"_a, "streams"_a, "squares"_a = nothing, "ranks"_a = all)
      .def("error", &Ranks::error);
}

}  // namespace

void bind_cuda_testing(py::module_& module) {
  module.def("synchronize", &cuda::synchronize_device, py::call_guard<py::gil_scoped_release>());
  module.def("make_stream", [] { return reinterpret_cast<Address>(cuda::make_stream()); });
  module.def(
      "synchronize_stream", [](Address stream) { cuda::synchronize_stream(pointer<void>(stream)); },
      "stream"_a, py::call_guard<py::gil_scoped_release>());
  module.def(
      "begin_capture", [](Address stream) { cuda::begin_capture(pointer<void>(stream)); },
      "stream"_a);
  module.def(
      "end_capture",
      [](Address stream) {
        return reinterpret_cast<Address>(cuda::end_capture(pointer<void>(stream)));
      },
      "stream"_a);
  module.def(
      "launch_graph",
      [](Address graph, Address stream) {
        cuda::launch_graph(pointer<void>(graph), pointer<void>(stream));
      },
      "graph"_a, "stream"_a);
  module.def("accumulators", [] { return std::vector<std::string>{"f64", "f32"}; });
  bind_buffer(module);
  bind_reductions(module);
  bind_peer_ranks(module);
}

}  // namespace adareduce
