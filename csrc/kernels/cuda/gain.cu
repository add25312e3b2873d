// AdaScale's arithmetic between the reduction and the optimizer: one warp, a lane per group.
//
// Numerics: double throughout; sums over buckets and groups in their order, by one lane each, so
// that bits are equal on all ranks and runs. Beside gain_step() on the host the results differ in
// the last bits, where the compiler fuses a multiply and an add.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gain_kernel.h"
#include "kernels/cuda/launch.h"

namespace adareduce::cuda {
namespace {

struct WarpLanes {
  std::int64_t number = threadIdx.x;
  static constexpr std::int64_t count = kWarp;
  __device__ void meet() const { __syncthreads(); }
  __device__ double sum(double x) const { return sum_of_warp(x); }
};

__global__ void gain_kernel(GainStepArgs args) { gain_step(args, WarpLanes{}); }

}  // namespace

void launch_gain_step(const GainStepArgs& args, Stream stream) {
  launch(gain_kernel, 1, kWarp, stream, args);
}

}  // namespace adareduce::cuda
