#pragma once
// What tests ask of the emulation itself.
#include <cstdint>

namespace cuda_emulation {

/// The next `successes` allocations succeed, the one after fails with cudaErrorMemoryAllocation,
/// later ones succeed; negative: none fails. Also set by CUDA_EMULATION_FAIL_ALLOCATION=successes.
void fail_allocation_after(std::int64_t successes);

/// How often a host thread was made to wait for the device: synchronisations, blocking copies,
/// copies to pageable memory, cudaFree.
std::int64_t host_waits();

/// Kernels that were started so far, replays of graphs included.
std::int64_t kernel_runs();

/// Bytes of device memory that are allocated now; of pinned host memory.
std::int64_t device_bytes();
std::int64_t pinned_bytes();

/// Lets other threads of the block run, then other streams. For loops that wait for memory.
void yield();

}  // namespace cuda_emulation
