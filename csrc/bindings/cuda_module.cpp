#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "engine/cuda/cuda_plugin_table.h"
#include "engine/cuda/describe.h"
#include "transports/nccl/nccl_communicator.h"
#include "transports/nccl/nccl_library.h"

namespace py = pybind11;

namespace adareduce {
namespace {

py::dict describe() {
  const cuda::CudaDescription found = cuda::describe_cuda();
  py::list gpus;
  for (const cuda::Gpu& gpu : found.gpus) {
    py::dict facts;
    facts["name"] = gpu.name;
    facts["uuid"] = gpu.uuid;
    facts["capability"] = gpu.capability;
    facts["multiprocessors"] = gpu.num_multiprocessors;
    facts["memory_bytes"] = gpu.memory_bytes;
    gpus.append(facts);
  }
  const cuda::NcclStatus& nccl = cuda::nccl_status();
  py::dict result;
  result["cuda_runtime"] = found.runtime_version;
  result["cuda_driver"] = found.driver_version;
  result["gpus"] = gpus;
  result["problem"] = found.problem;
  result["nccl_version"] = nccl.version;
  result["nccl_path"] = nccl.path;
  result["nccl_why_not"] = nccl.why_not;
  return result;
}

}  // namespace
}  // namespace adareduce

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Kernels, NCCL and peer memory of CUDA GPUs, as a table for adareduce._core.";
  module.def(
      "plugin",
      [] { return py::capsule(adareduce_cuda_plugin_table(), ADAREDUCE_CUDA_PLUGIN_NAME); },
      "PyCapsule with the table; adareduce._core takes it.");
  module.def("describe", &adareduce::describe,
             "CUDA, GPUs and NCCL of this machine, as plain values. Makes no context.");
  module.def("set_nccl_search_path", &adareduce::cuda::set_nccl_search_path,
             "Folders where libnccl.so.2 may lie, before the system's. Before the first use.",
             py::arg("folders"));
  adareduce::bind_cuda_gain(module);
  py::module_ testing = module.def_submodule("testing", "Kernels by themselves, for tests.");
  adareduce::bind_cuda_testing(testing);
}
