// One rank that makes windows with other ranks, which may be other processes. A C library for
// tests/window_ranks.py: functions return null or an error's text, which stays until the thread's
// next call.
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "guarded.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/peer_kernels.h"
#include "transports/cuda_peer/peer_windows.h"

namespace adareduce::cuda {

extern "C" {

// Hands this rank's bytes to all; fills `all` with those of `size` ranks, each `capacity` bytes
// long at most, and `lengths`. Returns 0, or 1 where the other ranks are gone.
using ExchangeBytes = int (*)(const char* mine, std::int64_t bytes, char* all,
                              std::int64_t capacity, std::int64_t* lengths);

struct WindowRank {
  std::vector<DeviceFacts> facts;
  std::unique_ptr<PeerWindows> windows;
};

EXPORT const char* window_rank_make(int rank, int size, int device, std::int64_t bytes,
                                    ExchangeBytes exchange, WindowRank** made) {
  return guarded([&] {
    const Allgather allgather = [&](const std::string& mine) {
      constexpr std::int64_t kCapacity = 4096;
      std::vector<char> all(static_cast<std::size_t>(size * kCapacity));
      std::vector<std::int64_t> lengths(static_cast<std::size_t>(size));
      if (exchange(mine.data(), static_cast<std::int64_t>(mine.size()), all.data(), kCapacity,
                   lengths.data()) != 0)
        throw TransportError("exchange: the other ranks are gone");
      std::vector<std::string> result;
      for (int r = 0; r < size; ++r)
        result.emplace_back(all.data() + r * kCapacity,
                            static_cast<std::size_t>(lengths[static_cast<std::size_t>(r)]));
      return result;
    };
    auto ready = std::make_unique<WindowRank>();
    DeviceFacts mine = describe_device(device);
    mine.host = "here";
    for (const std::string& facts : allgather(mine.to_bytes()))
      ready->facts.push_back(DeviceFacts::from_bytes(facts));
    ready->windows = PeerWindows::make(rank, ready->facts, bytes, allgather);
    *made = ready.release();
  });
}
EXPORT void window_rank_free(WindowRank* rank) { delete rank; }
EXPORT void* window_rank_of(WindowRank* rank, int peer) { return rank->windows->of(peer); }
EXPORT std::int64_t window_rank_bytes(WindowRank* rank) { return rank->windows->bytes(); }

EXPORT const char* window_rank_copy(void* to, const void* from, std::int64_t bytes) {
  return guarded([&] {
    ADAREDUCE_CUDA(cudaMemcpy(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDefault));
    ADAREDUCE_CUDA(cudaStreamSynchronize(nullptr));
  });
}

// A sum of `numel` floats by peer_reduce. A window is {input, result, counters}, one behind the
// other; the result goes to all of them. `repeats` times.
EXPORT const char* window_rank_sum(WindowRank* rank, int self, std::int64_t numel, int num_blocks,
                                   int repeats, double deadline_seconds,
                                   std::uint32_t* error_word) {
  return guarded([&] {
    const int size = static_cast<int>(rank->facts.size());
    std::vector<const void*> in;
    std::vector<void*> out;
    std::vector<double*> scalars;
    std::vector<std::uint32_t*> flags;
    for (int r = 0; r < size; ++r) {
      auto* const values = static_cast<float*>(rank->windows->of(r));
      in.push_back(values);
      out.push_back(values + numel);
      scalars.push_back(nullptr);
      flags.push_back(reinterpret_cast<std::uint32_t*>(values + 2 * numel));
    }
    std::uint32_t *epochs = nullptr, *error = nullptr;
    ADAREDUCE_CUDA(cudaMalloc(reinterpret_cast<void**>(&epochs),
                              static_cast<std::size_t>(num_blocks) * sizeof *epochs));
    ADAREDUCE_CUDA(cudaMemset(epochs, 0, static_cast<std::size_t>(num_blocks) * sizeof *epochs));
    ADAREDUCE_CUDA(cudaStreamSynchronize(nullptr));  // the stream below does not wait for others
    ADAREDUCE_CUDA(
        cudaHostAlloc(reinterpret_cast<void**>(&error), sizeof *error, cudaHostAllocMapped));
    *error = 0;
    const PeerView view{self, size, in.data(), out.data(), scalars.data(), flags.data()};
    const PeerSync sync{num_blocks, epochs, error,
                        static_cast<std::uint64_t>(deadline_seconds * 1e9)};
    cudaStream_t stream = nullptr;
    ADAREDUCE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    PeerReduceArgs args;
    args.peers = {&view, &sync, DType::f32, numel, nullptr};
    for (int i = 0; i < repeats; ++i) peer_reduce(args, {stream});
    ADAREDUCE_CUDA(cudaStreamSynchronize(stream));
    *error_word = *error;
    ADAREDUCE_CUDA(cudaStreamDestroy(stream));
    ADAREDUCE_CUDA(cudaFreeHost(error));
    ADAREDUCE_CUDA(cudaFree(epochs));
  });
}

}  // extern "C"

}  // namespace adareduce::cuda
