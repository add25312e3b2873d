#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "transports/shared_memory/memory_room.h"
#include "transports/shared_memory/shared_windows.h"

namespace py = pybind11;
using namespace py::literals;

namespace adareduce {
namespace {

using Windows = SharedWindows;

// `gather` is a function of Python: bytes to a list of bytes.
GatherStrings strings_of(const py::function& gather) {
  return [&gather](const std::string& mine) {
    const py::gil_scoped_acquire lock;
    return gather(py::bytes(mine)).cast<std::vector<std::string>>();
  };
}

std::shared_ptr<Windows> make_windows(Rank rank, int size, std::int64_t bytes,
                                      const py::function& gather, double patience) {
  const GatherStrings strings = strings_of(gather);
  const py::gil_scoped_release release;
  return Windows::make(rank, size, bytes, strings, Seconds{patience});
}

char* place_of(const Windows& windows, Rank rank, std::int64_t offset, std::int64_t bytes) {
  if (offset < 0 || offset + bytes > windows.bytes_of(rank))
    throw UsageError(
        concat("offset and bytes must lie in the window, got ", offset, " and ", bytes));
  return windows.of(rank) + offset;
}

void bind_windows(py::module_& module) {
  py::class_<Windows, std::shared_ptr<Windows>>(module, "SharedWindows")
      .def(py::init(&make_windows), "rank"_a, "size"_a, "bytes"_a, "gather"_a, "patience"_a = 60.0)
      .def_property_readonly("rank", &Windows::rank)
      .def_property_readonly("size", &Windows::size)
      .def("bytes_of", &Windows::bytes_of)
      .def("address_of",
           [](const Windows& w, Rank r) { return reinterpret_cast<std::uintptr_t>(w.of(r)); })
      .def("read",
           [](const Windows& windows, Rank rank, std::int64_t offset, std::int64_t bytes) {
             return py::bytes(place_of(windows, rank, offset, bytes),
                              static_cast<std::size_t>(bytes));
           })
      .def("write",
           [](const Windows& windows, Rank rank, std::int64_t offset, const std::string& bytes) {
             const auto count = static_cast<std::int64_t>(bytes.size());
             bytes.copy(place_of(windows, rank, offset, count), bytes.size());
           });
}

}  // namespace

void bind_shared_memory(py::module_& module) {
  module.def("room_for_shared_memory", &room_for_shared_memory, "root"_a = "");
  bind_windows(module);
}

}  // namespace adareduce
