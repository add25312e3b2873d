#include "base/errors.h"
#include "bindings/bindings.h"
#include "transports/shared_memory/shared_segment.h"

namespace py = pybind11;

namespace adareduce {

void bind_errors(py::module_& module) {
  // The name is the one that training scripts written for Horovod catch.
  static const py::handle internal =
      py::register_exception<Error>(module, "HorovodInternalError", PyExc_RuntimeError).release();
  py::register_exception<DisagreementError>(module, "DisagreementError", internal);
  py::register_exception<TransportError>(module, "TransportError", internal);
  py::register_exception<DeviceError>(module, "DeviceError", internal);
  py::register_exception<SharedMemoryError>(module, "SharedMemoryError", internal);
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const UsageError& usage) {
      PyErr_SetString(PyExc_ValueError, usage.what());
    }
  });
}

}  // namespace adareduce
