#include <pybind11/pybind11.h>

#include "transports/mpi/mpi_plugin_table.h"

namespace py = pybind11;

PYBIND11_MODULE(_mpi, module) {
  module.doc() =
      "The MPI that adareduce was built for, as a table of functions for adareduce._core.";
  module.def(
      "plugin", [] { return py::capsule(adareduce_mpi_plugin_table(), ADAREDUCE_MPI_PLUGIN_NAME); },
      "PyCapsule with the table; adareduce._core takes it.");
  module.def(
      "library_version", [] { return adareduce_mpi_plugin_table()->library_version(); },
      "Name and version of the MPI library that is loaded. Works before MPI is initialised.");
}
