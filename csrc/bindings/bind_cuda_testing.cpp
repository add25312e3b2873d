#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "engine/cuda/standalone_tables.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace adareduce {
namespace {

// Addresses on the device, and streams, cross as integers.
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}
Stream stream_of(Address stream) { return {pointer<void>(stream)}; }

// A fused buffer's layout on the current GPU, and its element type.
struct Buffer {
  cuda::StandaloneTables tables;
  DType dtype;

  Buffer(const std::vector<std::pair<std::int64_t, std::int64_t>>& segments, int code)
      : tables(segments_of(segments)), dtype(static_cast<DType>(code)) {}

  static std::vector<TensorSegment> segments_of(
      const std::vector<std::pair<std::int64_t, std::int64_t>>& pairs) {
    std::vector<TensorSegment> segments;
    for (const auto& [offset, numel] : pairs) segments.push_back({offset, numel});
    return segments;
  }
  VectorPair pair(Address lower, Address upper, std::int64_t begin, std::int64_t end) const {
    return {pointer<const void>(lower),
            pointer<const void>(upper),
            {begin, end},
            dtype,
            &tables.segments()};
  }
};

const KernelTable& kernels_for(const std::string& accumulator) {
  return cuda::cuda_kernels(accumulator == "float32" ? cuda::Accumulator::f32
                                                     : cuda::Accumulator::f64);
}

template <typename T>
std::vector<T> pointers(const std::vector<Address>& addresses) {
  std::vector<T> result;
  for (const Address address : addresses) result.push_back(reinterpret_cast<T>(address));
  return result;
}

}  // namespace

void bind_cuda_testing(py::module_& module) {
  py::class_<Buffer>(module, "Buffer")
      .def(py::init<const std::vector<std::pair<std::int64_t, std::int64_t>>&, int>(), "segments"_a,
           "dtype"_a)
      .def_property_readonly("num_items",
                             [](const Buffer& buffer) { return buffer.tables.num_items(); })
      .def(
          "pair_stats",
          [](const Buffer& buffer, Address lower, Address upper, std::int64_t begin,
             std::int64_t end, Address stats, Address stream, const std::string& accumulator) {
            kernels_for(accumulator)
                .pair_stats({buffer.pair(lower, upper, begin, end), pointer<double>(stats)},
                            stream_of(stream));
          },
          "lower"_a, "upper"_a, "begin"_a, "end"_a, "stats"_a, "stream"_a,
          "accumulator"_a = "float64")
      .def(
          "pair_combine",
          [](const Buffer& buffer, Address lower, Address upper, std::int64_t begin,
             std::int64_t end, Address stats, Address out, Address stream) {
            cuda::cuda_kernels().pair_combine({buffer.pair(lower, upper, begin, end),
                                               pointer<const double>(stats), pointer<void>(out)},
                                              stream_of(stream));
          },
          "lower"_a, "upper"_a, "begin"_a, "end"_a, "stats"_a, "out"_a, "stream"_a)
      .def(
          "pack",
          [](const Buffer& buffer, const std::vector<Address>& tensors, Address fused,
             std::int64_t numel, double scale, Address squares, Address stream) {
            const auto inputs = pointers<const void*>(tensors);
            cuda::cuda_kernels().pack({.tensors = inputs.data(),
                                       .fused = pointer<void>(fused),
                                       .numel = numel,
                                       .dtype = buffer.dtype,
                                       .segments = &buffer.tables.segments(),
                                       .scale = scale,
                                       .squares = pointer<double>(squares)},
                                      stream_of(stream));
          },
          "tensors"_a, "fused"_a, "numel"_a, "scale"_a, "squares"_a, "stream"_a)
      .def(
          "unpack",
          [](const Buffer& buffer, Address fused, const std::vector<Address>& tensors, double scale,
             Address nonfinite, Address squares, Address stream) {
            const auto outputs = pointers<void*>(tensors);
            cuda::cuda_kernels().unpack({.fused = pointer<const void>(fused),
                                         .tensors = outputs.data(),
                                         .dtype = buffer.dtype,
                                         .segments = &buffer.tables.segments(),
                                         .scale = scale,
                                         .nonfinite = pointer<std::int64_t>(nonfinite),
                                         .squares = pointer<double>(squares)},
                                        stream_of(stream));
          },
          "fused"_a, "tensors"_a, "scale"_a, "nonfinite"_a, "squares"_a, "stream"_a)
      .def(
          "reduce_squares",
          [](const Buffer& buffer, const std::vector<Address>& inputs, double divisor, Address out,
             std::int64_t begin, std::int64_t end, Address group_of, Address squares,
             Address stream) {
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
          "inputs"_a, "divisor"_a, "out"_a, "begin"_a, "end"_a, "group_of"_a, "squares"_a,
          "stream"_a);
  module.def(
      "reduce",
      [](int dtype, int op, const std::vector<Address>& inputs, double divisor, Address out,
         std::int64_t numel, Address stream) {
        const auto from = pointers<const void*>(inputs);
        cuda::cuda_kernels().reduce(
            {static_cast<Elementwise>(op), from.data(), static_cast<int>(from.size()),
             pointer<void>(out), numel, static_cast<DType>(dtype), divisor},
            stream_of(stream));
      },
      "dtype"_a, "op"_a, "inputs"_a, "divisor"_a, "out"_a, "numel"_a, "stream"_a);
}

}  // namespace adareduce
