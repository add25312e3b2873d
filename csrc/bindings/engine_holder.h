#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "base/errors.h"
#include "engine/engine.h"

namespace adareduce {

/// The engine, or nothing in a process that was forked from the one that has it.
struct EngineHolder {
  std::unique_ptr<Engine> engine;

  Engine& get() {
    if (engine == nullptr)
      throw UsageError("this engine was stopped, or belongs to the parent of this process");
    return *engine;
  }
};

/// Shape, dtype code, address of the input, address of the output or 0, strides or nothing, group.
using TensorTuple = std::tuple<std::vector<std::int64_t>, int, std::uintptr_t, std::uintptr_t,
                               std::vector<std::int64_t>, std::int32_t>;

inline Request make_request(int collective, std::string name, int op, Rank root, double prescale,
                            double postscale, const std::vector<TensorTuple>& tensors) {
  Request request;
  request.collective = static_cast<Collective>(collective);
  request.name = std::move(name);
  request.op = static_cast<ReduceOp>(op);
  request.root = root;
  request.prescale = prescale;
  request.postscale = postscale;
  request.tensors.reserve(tensors.size());
  for (const auto& [shape, dtype, input, output, strides, group] : tensors)
    request.tensors.push_back({shape, static_cast<DType>(dtype),
                               reinterpret_cast<const void*>(input),
                               reinterpret_cast<void*>(output), strides, group});
  return request;
}

/// Lets Ctrl-C end a wait that has released the GIL.
inline void throw_if_interrupted() {
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

/// What an engine has for CUDA tensors.
void bind_device(pybind11::module_& module, pybind11::class_<EngineHolder>& engine);

}  // namespace adareduce
