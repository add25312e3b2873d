// Numerics: none, bytes are moved as they are.
#include "kernels/cuda/peer_device.cuh"

namespace adareduce::cuda {
namespace {

struct PeerCopy {
  Peers peers;
  const PeerPiece* pieces;
  std::int64_t num_pieces;
};

// What one block moves of a piece at a time.
constexpr std::int64_t kChunkBytes = 1 << 15;

template <typename Word>
__device__ void copy_words(const char* from, char* to, std::int64_t bytes) {
  const auto* const words_from = reinterpret_cast<const Word*>(from);
  auto* const words_to = reinterpret_cast<Word*>(to);
  const std::int64_t words = bytes / static_cast<std::int64_t>(sizeof(Word));
  constexpr int kUnroll = 4;
  std::int64_t i = threadIdx.x;
  for (; i + (kUnroll - 1) * kPeerThreads < words; i += kUnroll * kPeerThreads) {
    Word loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = words_from[i + u * kPeerThreads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) words_to[i + u * kPeerThreads] = loaded[u];
  }
  for (; i < words; i += kPeerThreads) words_to[i] = words_from[i];
}

// In the widest words that both addresses allow once they are aligned.
__device__ void copy_bytes(const char* from, char* to, std::int64_t bytes) {
  const auto distance =
      reinterpret_cast<std::uintptr_t>(from) ^ reinterpret_cast<std::uintptr_t>(to);
  const std::int64_t width = distance % 2 != 0    ? 1
                             : distance % 4 != 0  ? 2
                             : distance % 8 != 0  ? 4
                             : distance % 16 != 0 ? 8
                                                  : 16;
  const auto misplaced = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(from) % width);
  const std::int64_t to_boundary = misplaced == 0 ? 0 : width - misplaced;
  const std::int64_t head = to_boundary < bytes ? to_boundary : bytes;
  const std::int64_t body = (bytes - head) / width * width, tail = bytes - head - body;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < head) to[thread] = from[thread];
  if (thread < tail) to[head + body + thread] = from[head + body + thread];
  if (width == 16)
    copy_words<uint4>(from + head, to + head, body);
  else if (width == 8)
    copy_words<std::uint64_t>(from + head, to + head, body);
  else if (width == 4)
    copy_words<std::uint32_t>(from + head, to + head, body);
  else if (width == 2)
    copy_words<std::uint16_t>(from + head, to + head, body);
  else
    copy_words<char>(from + head, to + head, body);
}

// Chunks of all pieces are dealt out to the blocks like cards. The barrier at the end tells the
// peers that this rank has read what it wanted of their windows.
__global__ void __launch_bounds__(kPeerThreads, 1) copy_kernel(PeerCopy args) {
  meet_peers(args.peers);
  std::int64_t next = blockIdx.x;  // chunks from the current piece on until this block's next one
  for (std::int64_t p = 0; p < args.num_pieces; ++p) {
    const PeerPiece piece = args.pieces[p];
    const std::int64_t chunks = (piece.bytes + kChunkBytes - 1) / kChunkBytes;
    const char* const from =
        static_cast<const char*>(args.peers.in[piece.rank]) + piece.from_offset;
    char* const to = static_cast<char*>(args.peers.out[args.peers.rank]) + piece.to_offset;
    for (; next < chunks; next += gridDim.x) {
      const std::int64_t begin = next * kChunkBytes;
      const std::int64_t left = piece.bytes - begin;
      copy_bytes(from + begin, to + begin, left < kChunkBytes ? left : kChunkBytes);
    }
    next -= chunks;
  }
  meet_peers(args.peers);
}

}  // namespace

void peer_copy(const PeerCopyArgs& args, Stream stream) {
  const PeerCopy launched{peers_of(*args.view, *args.sync, "peer_copy"), args.pieces,
                          args.num_pieces};
  launch(copy_kernel, args.sync->num_blocks, kPeerThreads, stream, launched);
}

}  // namespace adareduce::cuda
