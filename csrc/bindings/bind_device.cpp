#include "bindings/engine_holder.h"

namespace py = pybind11;

namespace adareduce {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::uintptr_t address_of(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

void attach_cuda(EngineHolder& self, const py::capsule& plugin, int wanted_path) {
  const char* name = plugin.name();
  if (name == nullptr || std::string_view(name) != ADAREDUCE_CUDA_PLUGIN_NAME)
    throw UsageError(concat("attach_cuda: plugin must be a capsule named '",
                            ADAREDUCE_CUDA_PLUGIN_NAME, "', got '", name == nullptr ? "" : name,
                            "'"));
  self.get().attach_cuda(plugin.get_pointer<adareduce_cuda_plugin>(), wanted_path);
}

}  // namespace

void bind_device(py::module_& module, py::class_<EngineHolder>& engine) {
  py::class_<DeviceHandle, std::shared_ptr<DeviceHandle>>(module, "DeviceHandle")
      .def("is_finished", &DeviceHandle::is_finished, NoGil())
      .def(
          "order",
          [](const DeviceHandle& handle, std::uintptr_t stream) {
            handle.order(pointer<void>(stream));
          },
          py::arg("stream"), NoGil())
      .def(
          "stream", [](const DeviceHandle& handle) { return address_of(handle.stream()); },
          NoGil());

  engine.def("attach_cuda", &attach_cuda, py::arg("plugin"), py::arg("wanted_path"))
      .def(
          "cuda_path",
          [](EngineHolder& self, int process_set, int device) {
            return self.get().device_calls(process_set)->path(device, throw_if_interrupted);
          },
          py::arg("process_set"), py::arg("device"), NoGil())
      .def(
          "cuda_stream",
          [](EngineHolder& self, int process_set) {
            return address_of(self.get().device_calls(process_set)->stream());
          },
          py::arg("process_set"), NoGil())
      .def(
          "launch",
          [](EngineHolder& self, int process_set, int device, std::uintptr_t stream,
             bool is_capturing, int collective, std::string name, int op, Rank root,
             double prescale, double postscale, const py::sequence& tensors,
             std::vector<std::int64_t> rows, bool has_statistics, std::uintptr_t local_squares,
             std::uintptr_t group_stats, std::uintptr_t orthogonality, std::uintptr_t cancellation,
             std::uintptr_t nonfinite) {
            Request request{.collective = static_cast<Collective>(collective),
                            .name = std::move(name),
                            .device = {DeviceKind::cuda, device},
                            .op = static_cast<ReduceOp>(op),
                            .root = root,
                            .prescale = prescale,
                            .postscale = postscale,
                            .tensors = tensors_of(tensors),
                            .has_statistics = has_statistics,
                            .rows = std::move(rows)};
            const DeviceArguments arguments{.stream = pointer<void>(stream),
                                            .is_capturing = is_capturing,
                                            .local_squares = pointer<const double>(local_squares),
                                            .group_stats = pointer<double>(group_stats),
                                            .orthogonality = pointer<double>(orthogonality),
                                            .cancellation = pointer<double>(cancellation),
                                            .nonfinite = pointer<std::int64_t>(nonfinite)};
            const py::gil_scoped_release no_gil;
            return self.get()
                .device_calls(process_set)
                ->launch(std::move(request), arguments, throw_if_interrupted);
          },
          py::kw_only(), py::arg("process_set"), py::arg("device"), py::arg("stream"),
          py::arg("is_capturing"), py::arg("collective"), py::arg("name"), py::arg("op"),
          py::arg("root"), py::arg("prescale"), py::arg("postscale"), py::arg("tensors"),
          py::arg("rows") = std::vector<std::int64_t>(), py::arg("has_statistics") = false,
          py::arg("local_squares") = 0, py::arg("group_stats") = 0, py::arg("orthogonality") = 0,
          py::arg("cancellation") = 0, py::arg("nonfinite") = 0);
}

}  // namespace adareduce
