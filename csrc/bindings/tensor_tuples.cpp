// By hand, because a call may have hundreds of tensors: pybind11's casters take three times as
// long.
#include "bindings/engine_holder.h"

namespace py = pybind11;

namespace adareduce {
namespace {

// A list or tuple as it is, everything else that can be iterated as a list.
class Items {
 public:
  explicit Items(PyObject* object)
      : fast_(py::reinterpret_steal<py::object>(
            PySequence_Fast(object, "tensors must be a sequence of tuples"))) {
    if (!fast_) throw py::error_already_set();
  }
  py::ssize_t size() const { return PySequence_Fast_GET_SIZE(fast_.ptr()); }
  PyObject* operator[](py::ssize_t i) const { return PySequence_Fast_GET_ITEM(fast_.ptr(), i); }

 private:
  py::object fast_;
};

std::int64_t integer(PyObject* object) {
  const std::int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

void* address(PyObject* object) {
  void* pointer = PyLong_AsVoidPtr(object);
  if (pointer == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return pointer;
}

std::vector<std::int64_t> integers(PyObject* object) {
  const Items items(object);
  std::vector<std::int64_t> values(static_cast<std::size_t>(items.size()));
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = integer(items[static_cast<py::ssize_t>(i)]);
  return values;
}

}  // namespace

std::vector<TensorArg> tensors_of(const py::sequence& tuples) {
  constexpr py::ssize_t kFields = 6;
  const Items items(tuples.ptr());
  std::vector<TensorArg> tensors;
  tensors.reserve(static_cast<std::size_t>(items.size()));
  for (py::ssize_t i = 0; i < items.size(); ++i) {
    const Items fields(items[i]);
    if (fields.size() != kFields)
      throw py::type_error(
          concat("tensor ", i, " must be a tuple of ", kFields, ", got ", fields.size()));
    tensors.push_back({integers(fields[0]), static_cast<DType>(integer(fields[1])),
                       address(fields[2]), address(fields[3]), integers(fields[4]),
                       static_cast<std::int32_t>(integer(fields[5]))});
  }
  return tensors;
}

}  // namespace adareduce
