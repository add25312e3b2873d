// Element-wise reductions of several inputs.
//
// Numerics. In the order of the inputs; half types in float32, integers modulo 2^bits,
// for averages exactly. Divided once, in double: float32 and half types times the reciprocal,
// float64 by the divisor, integers by the divisor and truncated. Rounded once, half types by way of
// float32. The bits of the CPU's kernel, but for sign and payload of a NaN.
#include <algorithm>

#include "kernels/cuda/grid.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/reduction.cuh"
#include "kernels/cuda/table.h"

namespace adareduce::cuda {
namespace {

constexpr int kThreads = 256;

// Elements before `head` and behind the vectors are reduced one at a time.
struct Cut {
  std::int64_t head;
  std::int64_t num_vectors;
};

template <typename T, int capacity>
__global__ void __launch_bounds__(kThreads, 3)
    reduce_elements(const __grid_constant__ Inputs<capacity> inputs, Reduction reduction, Cut cut) {
  constexpr int kNumel = Vector<T>::kNumel;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t self = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t v = self; v < cut.num_vectors; v += stride)
    reduce_at<T, kNumel>(inputs, reduction, cut.head + v * kNumel, nullptr);
  const std::int64_t in_vectors = cut.num_vectors * kNumel;
  for (std::int64_t e = self; e < reduction.numel - in_vectors; e += stride)
    reduce_at<T, 1>(inputs, reduction, e < cut.head ? e : e + in_vectors, nullptr);
}

// Vectors only where all arrays miss the multiples of 16 bytes by the same number.
template <typename T>
Cut cut_of(const ReduceArgs& args) {
  const std::uintptr_t misalignment = misalignment_of(args.out);
  for (int k = 0; k < args.num_inputs; ++k)
    if (misalignment_of(args.inputs[k]) != misalignment) return {args.numel, 0};
  const auto before = static_cast<std::int64_t>((sizeof(uint4) - misalignment) % sizeof(uint4));
  const std::int64_t head = std::min<std::int64_t>(args.numel, before / sizeof(T));
  return {head, (args.numel - head) / Vector<T>::kNumel};
}

template <typename T>
void reduce_all(const ReduceArgs& args, Stream stream) {
  with_inputs(args, "reduce", [&]<int capacity>(const Inputs<capacity>& inputs) {
    const Cut cut = cut_of<T>(args);
    const auto kernel = reduce_elements<T, capacity>;
    const std::int64_t threads =
        std::max(cut.num_vectors, args.numel - cut.num_vectors * Vector<T>::kNumel);
    launch(kernel, blocks_for(kernel, kThreads, (threads + kWarp - 1) / kWarp), kThreads, stream,
           inputs, reduction_of(args), cut);
  });
}

}  // namespace

void reduce(const ReduceArgs& args, Stream stream) {
  if (args.dtype == DType::boolean && args.op != Elementwise::sum) {
    if (args.numel > 0 && args.num_inputs > 0) reduce_all<boolean>(args, stream);
    return;
  }
  for_number(args.dtype, "reduce", [&]<typename T>(TypeTag<T>) {
    if (args.numel > 0 && args.num_inputs > 0) reduce_all<T>(args, stream);
  });
}

}  // namespace adareduce::cuda
