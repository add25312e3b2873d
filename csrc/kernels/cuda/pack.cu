// Tensors into a fused buffer and back, with scaling, sums of squares and counts on the way.
//
// Numerics. Scaling: multiplied in double, rounded once, half types by way of float32, integers
// truncated and kept in range: the bits of the CPU's kernel. Scale 1 moves bytes. Squares: of the
// elements in the fused buffer, as pair statistics are summed (pair.cu), whatever the alignment of
// the tensors. Counts are exact.
#include "kernels/cuda/element_types.h"
#include "kernels/cuda/slots.h"
#include "kernels/cuda/table.h"
#include "kernels/cuda/transfer.cuh"

namespace adareduce::cuda {
namespace {

__device__ inline bool is_finite(f16 x) { return (x.bits & 0x7c00u) != 0x7c00u; }
__device__ inline bool is_finite(bf16 x) { return (x.bits & 0x7f80u) != 0x7f80u; }
__device__ inline bool is_finite(float x) { return x - x == 0; }
__device__ inline bool is_finite(double x) { return x - x == 0; }

template <typename T>
__device__ T scaled(T x, double scale) {
  if constexpr (kIsFloat<T>)
    return element_of<T>(scale * static_cast<double>(value_of(x)));
  else
    return integer_of<T>(scale * static_cast<double>(x));
}

template <typename T>
struct ItemSums {
  float squares_f32 = 0;
  double squares_f64 = 0;
  int nonfinite = 0;

  // What is written instead of the first `numel` elements of `x`.
  template <int numel>
  __device__ Vector<T> add(const Transfer& transfer, const Vector<T>& x) {
    Vector<T> y = x;
    if (transfer.scale != 1.0)
#pragma unroll
      for (int e = 0; e < numel; ++e) y.elements[e] = scaled(x.elements[e], transfer.scale);
    if constexpr (kIsFloat<T>) {
      Vector<T> fused;
      fused.words = transfer.packs ? y.words : x.words;
      if (transfer.squares == Squares::f64)
#pragma unroll
        for (int e = 0; e < numel; ++e) {
          const double value = value_of(fused.elements[e]);
          squares_f64 = add_product(squares_f64, value, value);
        }
      else if (transfer.squares == Squares::f32)
#pragma unroll
        for (int e = 0; e < numel; ++e) {
          const auto value = static_cast<float>(value_of(fused.elements[e]));
          squares_f32 = add_product(squares_f32, value, value);
        }
      if (transfer.counts)
#pragma unroll
        for (int e = 0; e < numel; ++e) nonfinite += !is_finite(y.elements[e]);
    }
    return y;
  }
};

template <typename T>
__device__ Vector<T> load_elements(bool wanted, const T* from) {
  Vector<T> vector;
  vector.words = uint4{0, 0, 0, 0};
  if (wanted)
    for (int e = 0; e < Vector<T>::kNumel; ++e) vector.elements[e] = from[e];
  return vector;
}

// A lane has the same elements in the same order whether the tensor is aligned or not.
template <typename T, bool is_aligned>
__device__ void transfer_vectors(const Transfer& transfer, const T* from, T* to, int num_vectors,
                                 ItemSums<T>& sums) {
  constexpr int kVectors = is_aligned ? kTransferUnroll : 1;
  constexpr int kNumel = Vector<T>::kNumel;
  for (int v = lane_of_warp(); v < num_vectors; v += kVectors * kWarp) {
    Vector<T> vectors[kVectors];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int at = v + u * kWarp;
      vectors[u] = is_aligned ? load_once_if(at < num_vectors, from + at * kNumel)
                              : load_elements(at < num_vectors, from + at * kNumel);
    }
    // The next vector moves up: unrolled, this is too much code for the instruction cache.
#pragma unroll 1
    for (int at = v; at < num_vectors && at < v + kVectors * kWarp; at += kWarp) {
      const Vector<T> written = sums.template add<kNumel>(transfer, vectors[0]);
      if constexpr (is_aligned)
        store(to + at * kNumel, written);
      else
        for (int e = 0; e < kNumel; ++e) to[at * kNumel + e] = written.elements[e];
#pragma unroll
      for (int u = 1; u < kVectors; ++u) vectors[u - 1] = vectors[u];
    }
  }
}

template <typename T, int capacity>
__global__ void __launch_bounds__(kItemThreads, kItemBlocks)
    transfer_items(Transfer transfer, const __grid_constant__ Origins<capacity> origins) {
  const int lane = lane_of_warp();
  for (std::int64_t i = transfer.walk.first + warp_of_grid(); i < transfer.walk.last;
       i += warps_of_grid()) {
    const Item item = transfer.walk.items[i];
    const Lattice<T> lattice({item.begin, item.begin + item.numel});
    const std::uintptr_t origin = origins.of[item.segment - transfer.first_segment];
    T* fused = reinterpret_cast<T*>(transfer.fused) + lattice.vectors_begin;
    T* tensor = reinterpret_cast<T*>(origin + static_cast<std::uintptr_t>(lattice.vectors_begin) *
                                                  sizeof(T));
    const T* from = transfer.packs ? tensor : fused;
    T* to = transfer.packs ? fused : tensor;
    ItemSums<T> sums;
    if (origin % sizeof(uint4) == 0)
      transfer_vectors<T, true>(transfer, from, to, lattice.num_vectors, sums);
    else
      transfer_vectors<T, false>(transfer, from, to, lattice.num_vectors, sums);
    if (lane < lattice.num_edges) {
      const std::int64_t at = lattice.edge(lane) - lattice.vectors_begin;
      Vector<T> one;
      one.words = uint4{0, 0, 0, 0};
      one.elements[0] = from[at];
      to[at] = sums.template add<1>(transfer, one).elements[0];
    }
    if (transfer.packs) zero_padding(transfer, i, item);
    if constexpr (kIsFloat<T>) {
      int column = 0;
      if (transfer.squares != Squares::none) {
        const double squares =
            sum_of_warp(transfer.squares == Squares::f64 ? sums.squares_f64
                                                         : static_cast<double>(sums.squares_f32));
        if (lane == 0) transfer.slots[i * kSlotsPerItem + column] = squares;
        ++column;
      }
      if (transfer.counts) {
        const int nonfinite = sum_of_warp(sums.nonfinite);
        if (lane == 0) transfer.slots[i * kSlotsPerItem + column] = nonfinite;
      }
    }
  }
}

template <typename T>
struct TransferKernels {
  // Scaled integers are rare: one kernel of them is enough.
  static constexpr int kLeast = kIsFloat<T> ? 0 : kCapacities[2];
  template <int capacity>
  static auto of() -> void (*)(Transfer, Origins<capacity>) {
    return transfer_items<T, capacity>;
  }
};

void run(Transfer transfer, const SegmentTable& segments, const void* const* tensors, DType dtype,
         double* squares, std::int64_t* nonfinite, const char* kernel, Stream stream) {
  const ItemTable& items = *segments.items;
  transfer.walk.items = items.on_device;
  transfer.num_items = items.count;
  transfer.slots = items.slots;
  transfer.width = static_cast<int>(size_of(dtype));
  transfer.counts = nonfinite != nullptr;
  const bool has_sums = transfer.squares != Squares::none || transfer.counts;
  if (has_sums)
    for_float(dtype, kernel, [&]<typename T>(TypeTag<T>) {
      launch_for_all<TransferKernels<T>>(transfer, segments, tensors, stream);
    });
  else if (transfer.scale != 1.0)
    for_number(dtype, kernel, [&]<typename T>(TypeTag<T>) {
      launch_for_all<TransferKernels<T>>(transfer, segments, tensors, stream);
    });
  else
    move_tensors(transfer, segments, tensors, stream);
  if (has_sums)
    add_slots({&segments, {0, items.count}, squares != nullptr ? 1 : 0, squares, nonfinite},
              stream);
}

template <Accumulator accumulator>
Squares squares_in(const double* squares) {
  if (squares == nullptr) return Squares::none;
  return accumulator == Accumulator::f64 ? Squares::f64 : Squares::f32;
}

}  // namespace

template <Accumulator accumulator>
void pack(const PackArgs& args, Stream stream) {
  Transfer transfer{};
  transfer.fused = static_cast<char*>(args.fused);
  transfer.numel = args.numel;
  transfer.scale = args.scale;
  transfer.packs = true;
  transfer.squares = squares_in<accumulator>(args.squares);
  run(transfer, *args.segments, args.tensors, args.dtype, args.squares, nullptr, "pack", stream);
  // No item, no warp that zeroes what lies behind it.
  if (args.segments->items->count == 0 && args.numel > 0)
    ADAREDUCE_CUDA(cudaMemsetAsync(
        args.fused, 0, static_cast<std::size_t>(args.numel * size_of(args.dtype)), native(stream)));
}
template void pack<Accumulator::f64>(const PackArgs&, Stream);
template void pack<Accumulator::f32>(const PackArgs&, Stream);

template <Accumulator accumulator>
void unpack(const UnpackArgs& args, Stream stream) {
  Transfer transfer{};
  // Read only: `packs` is false.
  transfer.fused = static_cast<char*>(const_cast<void*>(args.fused));
  transfer.scale = args.scale;
  transfer.squares = squares_in<accumulator>(args.squares);
  run(transfer, *args.segments, const_cast<const void* const*>(args.tensors), args.dtype,
      args.squares, args.nonfinite, "unpack", stream);
}
template void unpack<Accumulator::f64>(const UnpackArgs&, Stream);
template void unpack<Accumulator::f32>(const UnpackArgs&, Stream);

}  // namespace adareduce::cuda
