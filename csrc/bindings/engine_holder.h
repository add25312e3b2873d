#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <shared_mutex>
#include <vector>

#include "base/errors.h"
#include "engine/engine.h"

namespace adareduce {

/// The engine, or nothing in a process that was forked from the one that has it.
struct EngineHolder {
  std::unique_ptr<Engine> engine;
  /// Shared by calls that work without the GIL, so that nobody stops the engine under them.
  std::unique_ptr<std::shared_mutex> in_use = std::make_unique<std::shared_mutex>();

  Engine& get() {
    if (engine == nullptr)
      throw UsageError("this engine was stopped, or belongs to the parent of this process");
    return *engine;
  }
};

/// Tensors from tuples of shape, dtype code, address of the input, address of the output or 0,
/// strides or nothing, group.
std::vector<TensorArg> tensors_of(const pybind11::sequence& tuples);

/// Lets Ctrl-C end a wait that has released the GIL.
inline void throw_if_interrupted() {
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

/// What an engine has for CUDA tensors.
void bind_device(pybind11::module_& module, pybind11::class_<EngineHolder>& engine);

}  // namespace adareduce
