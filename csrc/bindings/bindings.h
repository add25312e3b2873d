#pragma once
#include <pybind11/pybind11.h>

// One function per group of bindings; module.cpp is their table of contents.
namespace adareduce {

void bind_errors(pybind11::module_& module);
void bind_device_paths(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_local(pybind11::module_& module);
void bind_gain(pybind11::module_& module);
void bind_gain_testing(pybind11::module_& module);
void bind_cuda_gain(pybind11::module_& module);  ///< of `_cuda`
void bind_shared_memory(pybind11::module_& module);
void bind_shared_schedule(pybind11::module_& module);
void bind_testing(pybind11::module_& module);
void bind_peer_testing(pybind11::module_& module);
void bind_timing(pybind11::module_& module);
void bind_cuda_testing(pybind11::module_& module);  ///< of `_cuda`

}  // namespace adareduce
