#pragma once
#include "kernels/cuda/device.cuh"

namespace adareduce::cuda {

inline constexpr int kMostWarps = 32;

/// sums[0 ... columns) become the sums over the block's threads, on thread 0: per warp, then over
/// the warps in their order. All threads of the block call it.
template <int columns>
__device__ inline void sum_over_block(double (&sums)[columns]) {
  __shared__ double of_warp[kMostWarps][columns];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
  for (int c = 0; c < columns; ++c) sums[c] = sum_of_warp(sums[c]);
  if (num_warps == 1) return;
  if (threadIdx.x % kWarp == 0)
    for (int c = 0; c < columns; ++c) of_warp[warp][c] = sums[c];
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < num_warps; ++w)
      for (int c = 0; c < columns; ++c) sums[c] += of_warp[w][c];
  __syncthreads();
}

}  // namespace adareduce::cuda
