// The table, and the entries that are too small for files of their own.
//
// Numerics. As on the CPU: double, in the same order (-fmad=false).
#include "kernels/coefficients.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/table.h"

namespace adareduce::cuda {
namespace {

constexpr int kThreads = 256;

// A thread per segment.
__global__ void __launch_bounds__(kThreads) collect_squares(LeafSquaresArgs args) {
  const std::int64_t s = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (s >= args.num_segments) return;
  const double* stats = args.pair_stats + s * kStatsPerSegment;
  double squares = args.carried[s];
  if (args.lower_is_leaf) squares += stats[1];
  if (args.upper_is_leaf) squares += stats[2];
  args.of_node[s] = squares;
  args.orthogonality[s] = adasum_orthogonality(stats, squares);
}

void collect_leaf_squares(const LeafSquaresArgs& args, Stream stream) {
  if (args.num_segments > 0)
    launch(collect_squares, (args.num_segments + kThreads - 1) / kThreads, kThreads, stream, args);
}

void copy(const void* from, std::int64_t bytes, void* to, Stream stream) {
  if (bytes > 0)
    ADAREDUCE_CUDA(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes),
                                   cudaMemcpyDeviceToDevice, native(stream)));
}

void contribute_leaf_squares(const LeafSquaresArgs& args, Stream stream) {
  const std::int64_t bytes = args.num_segments * static_cast<std::int64_t>(sizeof(double));
  if (args.contributes)
    copy(args.of_node, bytes, args.carried, stream);
  else if (bytes > 0)
    ADAREDUCE_CUDA(cudaMemsetAsync(args.carried, 0, static_cast<std::size_t>(bytes),  // 0.0
                                   native(stream)));
}

template <Accumulator accumulator>
constexpr KernelTable kTable{
    "cuda",
    pair_stats<accumulator>,
    pair_combine,
    pack<accumulator>,
    unpack<accumulator>,
    reduce,
    reduce_squares,
    contribute_leaf_squares,
    collect_leaf_squares,
    copy,
};

}  // namespace

const KernelTable& cuda_kernels(Accumulator accumulator) {
  return accumulator == Accumulator::f64 ? kTable<Accumulator::f64> : kTable<Accumulator::f32>;
}

}  // namespace adareduce::cuda
