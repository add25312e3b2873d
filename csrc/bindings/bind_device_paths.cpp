#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "transports/cuda_peer/choose_path.h"

namespace py = pybind11;
using namespace py::literals;

namespace adareduce {

void bind_device_paths(py::module_& module) {
  using cuda::DeviceFacts;
  py::class_<DeviceFacts>(module, "DeviceFacts")
      .def(py::init<>())
      .def_readwrite("host", &DeviceFacts::host)
      .def_readwrite("pid", &DeviceFacts::pid)
      .def_readwrite("process", &DeviceFacts::process)
      .def_readwrite("gpu", &DeviceFacts::gpu)
      .def_readwrite("num_multiprocessors", &DeviceFacts::num_multiprocessors)
      .def_readwrite("driver_version", &DeviceFacts::driver_version)
      .def_readwrite("nccl_version", &DeviceFacts::nccl_version)
      .def_readwrite("nccl_why_not", &DeviceFacts::nccl_why_not)
      .def_readwrite("nccl_may_share_gpu", &DeviceFacts::nccl_may_share_gpu)
      .def_readwrite("nccl_host", &DeviceFacts::nccl_host)
      .def_readwrite("can_share_memory", &DeviceFacts::can_share_memory)
      .def_readwrite("unreachable", &DeviceFacts::unreachable)
      .def_readwrite("wanted_path", &DeviceFacts::wanted_path)
      .def("to_bytes", [](const DeviceFacts& facts) { return py::bytes(facts.to_bytes()); })
      .def_static("from_bytes", &DeviceFacts::from_bytes)
      .def("__eq__", [](const DeviceFacts& a, const DeviceFacts& b) { return a == b; });
  module.def("choose_path", [](const std::vector<DeviceFacts>& ranks) {
    const cuda::PathChoice choice = cuda::choose_path(ranks);
    return py::dict(
        "path"_a = choice.path, "why"_a = choice.why, "num_blocks"_a = choice.num_blocks,
        "peer_memory_is_possible"_a = choice.peer_memory_is_possible,
        "why_no_peer_memory"_a = choice.why_no_peer_memory, "warning"_a = choice.warning);
  });
}

}  // namespace adareduce
