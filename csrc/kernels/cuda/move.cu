// Tensors into a fused buffer and back, byte by byte the same: pack and unpack without arithmetic.
//
// Numerics. None.
#include "kernels/cuda/transfer.cuh"

namespace adareduce::cuda {
namespace {

template <typename Word>
__device__ void move_words(const char* from, char* to, int bytes) {
  constexpr int kWidth = static_cast<int>(sizeof(Word));
  const Word* in = reinterpret_cast<const Word*>(from);
  Word* out = reinterpret_cast<Word*>(to);
  const int num_words = bytes / kWidth;
  for (int w = lane_of_warp(); w < num_words; w += kTransferUnroll * kWarp) {
    Word words[kTransferUnroll];
#pragma unroll
    for (int u = 0; u < kTransferUnroll; ++u)
      if (w + u * kWarp < num_words) words[u] = in[w + u * kWarp];
#pragma unroll
    for (int u = 0; u < kTransferUnroll; ++u)
      if (w + u * kWarp < num_words) out[w + u * kWarp] = words[u];
  }
  const int rest = num_words * kWidth + lane_of_warp();
  if (rest < bytes) to[rest] = from[rest];
}

__device__ inline void move_vectors(const char* from, char* to, int bytes) {
  using Chunk = Vector<std::uint8_t>;
  const auto* in = reinterpret_cast<const std::uint8_t*>(from);
  auto* out = reinterpret_cast<std::uint8_t*>(to);
  const int num_vectors = bytes / Chunk::kNumel;
  for (int v = lane_of_warp(); v < num_vectors; v += kTransferUnroll * kWarp) {
    Chunk chunks[kTransferUnroll];
#pragma unroll
    for (int u = 0; u < kTransferUnroll; ++u)
      chunks[u] = load_once_if(v + u * kWarp < num_vectors, in + (v + u * kWarp) * Chunk::kNumel);
#pragma unroll
    for (int u = 0; u < kTransferUnroll; ++u)
      if (v + u * kWarp < num_vectors) store(out + (v + u * kWarp) * Chunk::kNumel, chunks[u]);
  }
  const int rest = num_vectors * Chunk::kNumel + lane_of_warp();
  if (rest < bytes) to[rest] = from[rest];
}

// 3 blocks ask for more registers than ptxas then takes: 64, and 4 blocks fit. Asked for 4, it
// stores the first vector before it loads the last.
template <int capacity>
__global__ void __launch_bounds__(kItemThreads, 3)
    move_items(Transfer transfer, const __grid_constant__ Origins<capacity> origins) {
  for (std::int64_t i = transfer.walk.first + warp_of_grid(); i < transfer.walk.last;
       i += warps_of_grid()) {
    const Item item = transfer.walk.items[i];
    const std::int64_t offset = item.begin * transfer.width;
    char* fused = transfer.fused + offset;
    char* tensor = reinterpret_cast<char*>(origins.of[item.segment - transfer.first_segment] +
                                           static_cast<std::uintptr_t>(offset));
    const char* from = transfer.packs ? tensor : fused;
    char* to = transfer.packs ? fused : tensor;
    const int bytes = item.numel * transfer.width;
    const auto misalignment = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(from) |
                                                    reinterpret_cast<std::uintptr_t>(to)) %
                              16;
    if (misalignment == 0)
      move_vectors(from, to, bytes);
    else if (misalignment % 8 == 0)
      move_words<std::uint64_t>(from, to, bytes);
    else if (misalignment % 4 == 0)
      move_words<std::uint32_t>(from, to, bytes);
    else if (misalignment % 2 == 0)
      move_words<std::uint16_t>(from, to, bytes);
    else
      move_words<std::uint8_t>(from, to, bytes);
    if (transfer.packs) zero_padding(transfer, i, item);
  }
}

struct MoveKernels {
  static constexpr int kLeast = 0;
  template <int capacity>
  static auto of() -> void (*)(Transfer, Origins<capacity>) {
    return move_items<capacity>;
  }
};
}  // namespace

void move_tensors(const Transfer& transfer, const SegmentTable& segments,
                  const void* const* tensors, Stream stream) {
  launch_for_all<MoveKernels>(transfer, segments, tensors, stream);
}

}  // namespace adareduce::cuda
