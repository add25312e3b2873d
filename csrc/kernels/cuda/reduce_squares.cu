// Sums of several inputs of a part of a fused buffer, and sums of squares per group of segments.
//
// Numerics. Results as in reduce.cu. Squares in double, of the accumulators and not of the rounded
// results; a lane's elements one after the other, each over all inputs, then lanes, items, segments
// (slots.cu), in a fixed order. Relative error: about (128 inputs + n / 4096 + 40) * 2^-53.
#include "kernels/cuda/grid.h"
#include "kernels/cuda/item_walk.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/reduction.cuh"
#include "kernels/cuda/slots.h"
#include "kernels/cuda/table.h"

namespace adareduce::cuda {
namespace {

template <typename T, int capacity>
__global__ void __launch_bounds__(kItemThreads, 2)
    reduce_items(const __grid_constant__ Inputs<capacity> inputs, Reduction reduction,
                 ItemWalk walk, bool is_aligned, double* slots) {
  constexpr int kNumel = Vector<T>::kNumel;
  const int lane = lane_of_warp();
  // Indices of elements are those of the fused buffer, where the inputs start at walk.range.begin.
  const auto reduce_padding = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = begin + lane; e < end; e += kWarp)
      reduce_at<T, 1>(inputs, reduction, e - walk.range.begin, nullptr);
  };
  for (std::int64_t i = walk.first + warp_of_grid(); i < walk.last; i += warps_of_grid()) {
    const Range part = walk.part(walk.items[i]);
    const Lattice<T> lattice(part);
    ReductionSquares squares;
    if (is_aligned) {
      for (int v = lane; v < lattice.num_vectors; v += kWarp)
        reduce_at<T, kNumel>(inputs, reduction, lattice.vector(v) - walk.range.begin, &squares);
      if (lane < lattice.num_edges)
        reduce_at<T, 1>(inputs, reduction, lattice.edge(lane) - walk.range.begin, &squares);
    } else {
      for (std::int64_t e = part.begin + lane; e < part.end; e += kWarp)
        reduce_at<T, 1>(inputs, reduction, e - walk.range.begin, &squares);
    }
    if (i == walk.first) reduce_padding(walk.range.begin, part.begin);
    reduce_padding(part.end, i + 1 < walk.last ? walk.items[i + 1].begin : walk.range.end);
    const double of_inputs = sum_of_warp(squares.of_inputs);
    const double of_result = sum_of_warp(squares.of_result);
    if (lane < kSquaresPerGroup)
      slots[i * kSlotsPerItem + lane] = lane == 0 ? of_inputs : of_result;
  }
}

// Whether vectors of the fused buffer are vectors of all arrays.
bool are_aligned(const ReduceArgs& args, std::int64_t begin) {
  const std::int64_t offset = -begin * size_of(args.dtype);
  bool all = misalignment_of(args.out, offset) == 0;
  for (int k = 0; k < args.num_inputs; ++k)
    all = all && misalignment_of(args.inputs[k], offset) == 0;
  return all;
}

}  // namespace

void reduce_squares(const ReduceSquaresArgs& args, Stream stream) {
  const ReduceArgs& reduction = args.reduce;
  for_float(reduction.dtype, "reduce_squares", [&]<typename T>(TypeTag<T>) {
    if (reduction.numel == 0 || reduction.num_inputs == 0) return;
    const Range range{args.begin, args.begin + reduction.numel};
    const ItemTable& table = *args.segments->items;
    const Range items = items_in(table, range);
    if (items.empty()) return reduce(reduction, stream);  // padding only
    with_inputs(reduction, "reduce_squares", [&]<int capacity>(const Inputs<capacity>& inputs) {
      const auto kernel = reduce_items<T, capacity>;
      launch(kernel, blocks_for(kernel, kItemThreads, items.size()), kItemThreads, stream, inputs,
             reduction_of(reduction), ItemWalk{table.on_device, items.begin, items.end, range},
             are_aligned(reduction, args.begin), table.slots);
    });
    add_slots_to_groups({args.segments, items, args.group_of, args.squares}, stream);
  });
}

}  // namespace adareduce::cuda
