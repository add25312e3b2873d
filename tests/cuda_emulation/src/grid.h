#pragma once
#include <functional>
#include <string>

#include "cuda_emulation/types.h"

namespace cuda_emulation {

/// Runs `body` for every thread of the grid, on the calling OS thread.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& body);

/// Whether the caller is a kernel.
bool in_kernel();

}  // namespace cuda_emulation
