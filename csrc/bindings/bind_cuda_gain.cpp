#include "bindings/bindings.h"
#include "bindings/gain_arguments.h"

namespace py = pybind11;
using namespace py::literals;

namespace adareduce {

void bind_cuda_gain(py::module_& module) {
  module.def(
      "gain_step",
      [](const py::dict& numbers, const py::dict& memory, std::uintptr_t stream) {
        cuda::launch_gain_step(gain_arguments(numbers, memory),
                               Stream{reinterpret_cast<void*>(stream)});
      },
      "numbers"_a, "memory"_a, "stream"_a);
}

}  // namespace adareduce
