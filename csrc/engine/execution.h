#pragma once
#include "collectives/context.h"
#include "collectives/task.h"
#include "engine/handle.h"
#include "engine/plan.h"

namespace adareduce {

/// Memory that requests of one process set use one after the other.
struct Workspace {
  Buffer data;     ///< fused buffers
  Buffer scratch;  ///< what arrives from peers
  Buffer stats;    ///< doubles

  /// Makes room for a plan. Throws std::bad_alloc.
  void reserve(const Plan& plan);
  std::int64_t bytes() const;
  /// Forgets the memory without giving it back.
  void leak();
};

/// Runs a request that all ranks agree on, and writes its outputs at the end: all of them or, on an
/// error, none. Collective. The arguments stay until the task has ended.
Task execute(Context context, const Request& request, const Plan& plan, Workspace& workspace,
             Result& result);

}  // namespace adareduce
