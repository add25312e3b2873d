#include <pybind11/stl.h>

#include "base/errors.h"
#include "bindings/bindings.h"
#include "collectives/adasum_local.h"
#include "engine/buffer.h"

namespace py = pybind11;

namespace adareduce {
namespace {

// Elements, dtype code, addresses of the workers' tensors, address of the result.
using LocalTensor = std::tuple<std::int64_t, int, std::vector<std::uintptr_t>, std::uintptr_t>;

std::vector<double> adasum_of_workers(int num_workers, const std::vector<LocalTensor>& tensors) {
  const AdasumTree tree = make_adasum_tree(num_workers);
  std::vector<double> orthogonality;
  Buffer work;
  for (const auto& [numel, code, addresses, out] : tensors) {
    const auto dtype = static_cast<DType>(code);
    if (!has_arithmetic(ReduceOp::adasum, dtype))
      throw UsageError(concat("local_adasum: dtype must be a float type, got ", name_of(dtype)));
    if (addresses.size() != static_cast<std::size_t>(num_workers))
      throw UsageError(concat("local_adasum: every worker must have all tensors, got ",
                              addresses.size(), " of ", num_workers));
    std::vector<const void*> inputs;
    for (const std::uintptr_t address : addresses)
      inputs.push_back(reinterpret_cast<const void*>(address));
    work.reserve(
        static_cast<std::size_t>(adasum_local_work_vectors(tree) * numel * size_of(dtype)));
    orthogonality.push_back(adasum_local(cpu_kernels(), tree, inputs, numel, dtype,
                                         reinterpret_cast<void*>(out), work.data()));
  }
  return orthogonality;
}

}  // namespace

void bind_local(py::module_& module) {
  module.def("local_adasum", &adasum_of_workers, py::arg("num_workers"), py::arg("tensors"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace adareduce
