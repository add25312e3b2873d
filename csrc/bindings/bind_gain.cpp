#include "bindings/bindings.h"
#include "bindings/gain_arguments.h"

namespace py = pybind11;
using namespace py::literals;

namespace adareduce {

void bind_gain(py::module_& module) {
  module.def(
      "gain_step",
      [](const py::dict& numbers, const py::dict& memory) {
        cuda::gain_step(gain_arguments(numbers, memory), cuda::OneLane{});
      },
      "numbers"_a, "memory"_a);
}

}  // namespace adareduce
