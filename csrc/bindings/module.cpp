#include "bindings/bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "Engine, collectives and CPU kernels of adareduce. Links neither MPI nor CUDA.";
  adareduce::bind_errors(module);
  adareduce::bind_engine(module);
  adareduce::bind_local(module);
  adareduce::bind_gain(module);
  auto testing = module.def_submodule("testing", "Schedules as values and kernel entries.");
  adareduce::bind_testing(testing);
  adareduce::bind_device_paths(testing);
  adareduce::bind_gain_testing(testing);
  adareduce::bind_peer_testing(testing);
  adareduce::bind_timing(testing);
  adareduce::bind_shared_memory(testing);
  adareduce::bind_shared_schedule(testing);
}
