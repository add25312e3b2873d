// The peer kernels for tests, on arrays of one process.
#include <pybind11/stl.h>

#include "base/errors.h"
#include "bindings/bindings.h"
#include "kernels/gram.h"
#include "kernels/peer_kernels.h"

namespace py = pybind11;
using namespace py::literals;

namespace adareduce {
namespace {

const PeerKernelTable& kernels_for(const std::string& isa) {
  const PeerKernelTable* table = isa.empty() ? &cpu_peer_kernels() : cpu_peer_kernels_for(isa);
  if (table == nullptr) throw UsageError(concat("isa must be one that this CPU has, got ", isa));
  return *table;
}

// Holds what VectorsArgs point to. The buffers must have `numel` elements.
struct Inputs {
  std::vector<const void*> pointers;
  VectorsArgs vectors;

  Inputs(int dtype, const std::vector<py::buffer>& buffers, std::int64_t numel) {
    for (const py::buffer& buffer : buffers) {
      pointers.push_back(buffer.request().ptr);
      if (buffer.request().size < numel) throw UsageError("inputs must have numel elements");
    }
    vectors = {pointers.data(), static_cast<int>(pointers.size()), numel,
               static_cast<DType>(dtype)};
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  void check_coefficients(const std::vector<double>& coefficients) const {
    if (coefficients.size() != pointers.size())
      throw UsageError("coefficients must be as many as the inputs");
  }
};

}  // namespace

void bind_peer_testing(py::module_& module) {
  module.def(
      "gram",
      [](int dtype, const std::vector<py::buffer>& inputs, std::int64_t numel,
         std::vector<double> gram, const std::string& isa) {
        const Inputs in(dtype, inputs, numel);
        // Room for the numbers of as many inputs as there are, and no check of how many those are:
        // that is the kernel's.
        gram.resize(static_cast<std::size_t>(gram_numel(in.vectors.num_inputs)));
        kernels_for(isa).gram({in.vectors, gram.data()});
        return gram;
      },
      "dtype"_a, "inputs"_a, "numel"_a, "gram"_a = std::vector<double>{}, "isa"_a = "");
  module.def(
      "weighted_sum",
      [](int dtype, const std::vector<py::buffer>& inputs, std::int64_t numel,
         const std::vector<double>& coefficients, const py::buffer& out, const std::string& isa) {
        const Inputs in(dtype, inputs, numel);
        in.check_coefficients(coefficients);
        kernels_for(isa).weighted_sum({in.vectors, coefficients.data(), out.request(true).ptr});
      },
      "dtype"_a, "inputs"_a, "numel"_a, "coefficients"_a, "out"_a, "isa"_a = "");
  module.def(
      "node_stats",
      [](int dtype, const std::vector<py::buffer>& inputs, std::int64_t numel,
         const std::vector<double>& coefficients, unsigned lower, unsigned upper,
         std::array<double, kStatsPerSegment> stats, const std::string& isa) {
        const Inputs in(dtype, inputs, numel);
        in.check_coefficients(coefficients);
        kernels_for(isa).node_stats({in.vectors, coefficients.data(), lower, upper, stats.data()});
        return stats;
      },
      "dtype"_a, "inputs"_a, "numel"_a, "coefficients"_a, "lower"_a, "upper"_a,
      "stats"_a = std::array<double, kStatsPerSegment>{}, "isa"_a = "");
  module.def(
      "peer_copy",
      [](const py::buffer& from, const py::buffer& to, bool streams, const std::string& isa) {
        const py::buffer_info in = from.request(), out = to.request(true);
        if (in.size * in.itemsize > out.size * out.itemsize)
          throw UsageError("to must have room for all of from");
        kernels_for(isa).copy(in.ptr, in.size * in.itemsize, out.ptr, streams);
      },
      "from"_a, "to"_a, "streams"_a, "isa"_a = "");
}

}  // namespace adareduce
