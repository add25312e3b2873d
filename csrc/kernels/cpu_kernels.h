#pragma once
#include "kernels/kernels.h"

/// The entries of kCpuKernels. Contracts stand in kernels.h.
namespace adareduce::cpu {

void pair_stats(const PairStatsArgs& args, Stream);
void pair_combine(const PairCombineArgs& args, Stream);
void pack(const PackArgs& args, Stream);
void unpack(const UnpackArgs& args, Stream);
void sum(const SumArgs& args, Stream);

}  // namespace adareduce::cpu
