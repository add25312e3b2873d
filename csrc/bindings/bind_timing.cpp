// What benchmarks/kernels.py measures: kernels called in a row, without Python in between.
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <thread>

#include "base/core_distance.h"
#include "base/errors.h"
#include "bindings/bindings.h"
#include "kernels/cpu_kernels.h"
#include "kernels/gram.h"
#include "kernels/peer_kernels.h"

namespace py = pybind11;
using namespace py::literals;

namespace adareduce {
namespace {

// The statistics are the kernel's business; combine gets some that give shares of about 1/2.
constexpr double kSomeStats[kStatsPerSegment] = {1.0, 1.0, 1.0};

struct Buffers {
  std::vector<void*> pointers;
  std::int64_t numel;
  DType dtype;

  float* singles(std::size_t index) const { return static_cast<float*>(pointers[index]); }
  std::size_t bytes() const { return static_cast<std::size_t>(numel * size_of(dtype)); }
};

// Holds what the arguments of a call point to.
struct Call {
  Buffers buffers;
  const KernelTable& kernels;
  const PeerKernelTable& peer;
  const cpu::Runs& runs;
  TensorSegment segment{0, buffers.numel};
  SegmentTable segments{&segment, nullptr, 1};
  std::vector<const void*> inputs{buffers.pointers.begin(), buffers.pointers.end()};
  std::int32_t group = 0;
  std::int64_t nonfinite = 0;
  double results[gram_numel(GramTree::kMaxLeaves)] = {};
  std::vector<double> coefficients = std::vector<double>(inputs.size(), 0.5);

  VectorPair pair() const {
    return {inputs[0], inputs[1], {0, buffers.numel}, buffers.dtype, &segments};
  }
  ReduceArgs reduction(double divisor) const {
    return {Elementwise::sum,
            inputs.data(),
            static_cast<int>(inputs.size()) - 1,
            buffers.pointers.back(),
            buffers.numel,
            buffers.dtype,
            divisor};
  }
  VectorsArgs vectors(std::size_t count) const {
    return {inputs.data(), static_cast<int>(count), buffers.numel, buffers.dtype};
  }
  PackArgs packing(bool streams) const {
    return {.tensors = inputs.data(),
            .fused = buffers.pointers[1],
            .numel = buffers.numel,
            .dtype = buffers.dtype,
            .segments = &segments,
            .streams = streams};
  }
  UnpackArgs unpacking(std::int64_t* count) const {
    return {inputs[0], &buffers.pointers[1], buffers.dtype, &segments, 1.0, count};
  }
};

std::function<void(Call&)> call_of(const std::string& kernel) {
  if (kernel == "read")
    return [](Call& c) {
      c.results[0] = c.runs.read(c.buffers.singles(0), c.buffers.numel);
      c.results[1] = c.runs.read(c.buffers.singles(1), c.buffers.numel);
    };
  if (kernel == "memcpy")
    return [](Call& c) {
      std::memcpy(c.buffers.pointers[1], c.buffers.pointers[0], c.buffers.bytes());
    };
  if (kernel == "axpby")
    return [](Call& c) {
      c.runs.axpby(c.buffers.singles(1), 0.5f, c.buffers.singles(0), 0.5f, c.buffers.numel);
    };
  if (kernel == "pair_stats")
    return [](Call& c) { c.kernels.pair_stats({c.pair(), c.results}, {}); };
  if (kernel == "pair_combine")
    return
        [](Call& c) { c.kernels.pair_combine({c.pair(), kSomeStats, c.buffers.pointers[0]}, {}); };
  if (kernel == "gram")
    return [](Call& c) { c.peer.gram({c.vectors(c.inputs.size()), c.results}); };
  if (kernel == "weighted_sum")
    return [](Call& c) {
      c.peer.weighted_sum(
          {c.vectors(c.inputs.size() - 1), c.coefficients.data(), c.buffers.pointers.back()});
    };
  if (kernel == "pack") return [](Call& c) { c.kernels.pack(c.packing(false), {}); };
  if (kernel == "pack_by_streams") return [](Call& c) { c.kernels.pack(c.packing(true), {}); };
  if (kernel == "unpack") return [](Call& c) { c.kernels.unpack(c.unpacking(nullptr), {}); };
  if (kernel == "unpack_and_count")
    return [](Call& c) { c.kernels.unpack(c.unpacking(&c.nonfinite), {}); };
  if (kernel == "reduce") return [](Call& c) { c.kernels.reduce(c.reduction(1.0), {}); };
  if (kernel == "average")
    return [](Call& c) {
      c.kernels.reduce(c.reduction(static_cast<double>(c.inputs.size() - 1)), {});
    };
  if (kernel == "average_and_squares")
    return [](Call& c) {
      c.kernels.reduce_squares({c.reduction(static_cast<double>(c.inputs.size() - 1)), 0,
                                &c.segments, &c.group, c.results},
                               {});
    };
  throw UsageError(concat("time_kernel: kernel must be one that is listed, got ", kernel));
}

double time_kernel(const std::string& kernel, int dtype, std::int64_t numel,
                   const std::vector<py::buffer>& buffers, int calls, const std::string& isa) {
  const KernelTable* kernels = cpu_kernels_for(isa);
  const cpu::Runs* runs = cpu::runs_for(isa);
  if (kernels == nullptr || buffers.size() < 2 || buffers.size() > GramTree::kMaxLeaves)
    throw UsageError("time_kernel: isa must be one that this CPU has, with 2 ... 16 buffers");
  std::vector<void*> pointers;
  for (const py::buffer& buffer : buffers) {
    const py::buffer_info info = buffer.request(true);
    if (info.size * info.itemsize < numel * size_of(static_cast<DType>(dtype)))
      throw UsageError("time_kernel: buffers must have numel elements");
    pointers.push_back(info.ptr);
  }
  Call call{.buffers = {pointers, numel, static_cast<DType>(dtype)},
            .kernels = *kernels,
            .peer = *cpu_peer_kernels_for(isa),
            .runs = *runs};
  const std::function<void(Call&)> run = call_of(kernel);
  const py::gil_scoped_release release;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) run(call);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  return elapsed.count() / calls;
}

}  // namespace

void bind_timing(py::module_& module) {
  module.def("time_kernel", &time_kernel, "kernel"_a, "dtype"_a, "numel"_a, "buffers"_a, "calls"_a,
             "isa"_a);
  module.def(
      "core_round_trip_ns",
      [](int first, int second, double seconds) {
        const py::gil_scoped_release release;
        return core_round_trip_ns(
            first, second, std::chrono::microseconds(static_cast<std::int64_t>(seconds * 1e6)));
      },
      "first"_a, "second"_a, "seconds"_a = 0.01);
}

}  // namespace adareduce
