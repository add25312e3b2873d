#pragma once
#include "kernels/cuda/cuda_kernels.h"

/// The entries of the CUDA side's kernel table. Contracts stand in kernels.h and cuda_kernels.h.
namespace adareduce::cuda {

template <Accumulator accumulator>
void pair_stats(const PairStatsArgs& args, Stream stream);
void pair_combine(const PairCombineArgs& args, Stream stream);
template <Accumulator accumulator>
void pack(const PackArgs& args, Stream stream);
template <Accumulator accumulator>
void unpack(const UnpackArgs& args, Stream stream);
void reduce(const ReduceArgs& args, Stream stream);
void reduce_squares(const ReduceSquaresArgs& args, Stream stream);

}  // namespace adareduce::cuda
