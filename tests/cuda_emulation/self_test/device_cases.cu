// The device language: what kernels see and may do.
#include <cuda/atomic>
#include <numeric>
#include <vector>

#include "self_test.h"

namespace {

__device__ int linear_thread() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

__global__ void count_threads(int* counts, unsigned grid_x, unsigned grid_y) {
  const unsigned block = blockIdx.x + grid_x * (blockIdx.y + grid_y * blockIdx.z);
  const unsigned size = blockDim.x * blockDim.y * blockDim.z;
  if (gridDim.x == grid_x && gridDim.y == grid_y) ++counts[block * size + linear_thread()];
}

void every_thread_runs_once() {
  int* counts = device_array<int>(2 * 3 * 2 * 60);
  OK(cudaMemset(counts, 0, 720 * sizeof(int)));
  OK(launch(count_threads, dim3(2, 3, 2), dim3(5, 4, 3), nullptr, counts, 2u, 3u));
  OK(cudaDeviceSynchronize());
  for (int i = 0; i < 720; ++i) EXPECT(counts[i] == 1);
  OK(cudaFree(counts));
}

/// Each warp operation's result for each thread.
__global__ void warp_operations(int* out) {
  const int t = linear_thread();
  out += 8 * t;
  const unsigned all = 0xffffffffu;
  out[0] = __shfl_xor_sync(all, t, 5);
  out[1] = __shfl_down_sync(all, t, 3u);
  out[2] = __shfl_up_sync(all, t, 3u);
  out[3] = __shfl_sync(all, t, t + 1, 8);
  out[4] = static_cast<int>(__ballot_sync(all, t % 3 == 0));
  out[5] = __any_sync(all, t == 40);
  out[6] = __all_sync(all, t < 64);
  double sum = t;  // 8 bytes go as one value
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(all, sum, distance);
  __syncwarp();
  out[7] = static_cast<int>(sum);
}

void warp_operations_exchange_values_of_lanes() {
  constexpr int kThreads = 96;
  for (const dim3 block : {dim3(kThreads), dim3(8, 4, 3)}) {
    int* out = device_array<int>(8 * kThreads);
    OK(launch(warp_operations, 1, block, nullptr, out));
    OK(cudaDeviceSynchronize());
    for (int t = 0; t < kThreads; ++t, out += 8) {
      const int lane = t % 32, first = t - lane;
      unsigned ballot = 0;
      for (int i = 0; i < 32; ++i) ballot |= static_cast<unsigned>((first + i) % 3 == 0) << i;
      EXPECT(out[0] == first + (lane ^ 5));
      EXPECT(out[1] == (lane + 3 < 32 ? t + 3 : t));
      EXPECT(out[2] == (lane >= 3 ? t - 3 : t));
      EXPECT(out[3] == t / 8 * 8 + (t + 1) % 8);
      EXPECT(static_cast<unsigned>(out[4]) == ballot);
      EXPECT(out[5] == (first == 32));
      EXPECT(out[6] == (first < 64));
      EXPECT(out[7] == 32 * first + 496);
    }
    OK(cudaFree(out - 8 * kThreads));
  }
}

/// A sum of the block's numbers by halving; then each thread reads its neighbour's result.
__global__ void sum_by_halving(const int* in, int* out) {
  __shared__ int numbers[1024];
  const unsigned t = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    numbers[t] = in[blockIdx.x * blockDim.x + t];
    __syncthreads();
    for (unsigned n = blockDim.x; n > 1; n = (n + 1) / 2) {
      const int other = t < n / 2 ? numbers[n - 1 - t] : 0;
      __syncthreads();
      numbers[t] += other;
      __syncthreads();
    }
    if (t == blockDim.x - 1) out[blockIdx.x] = numbers[0];
    __syncthreads();
  }
}

void barriers_order_accesses_to_shared_memory() {
  for (const int threads : {1, 31, 32, 96, 256, 1024}) {
    const int blocks = 5;
    int *in = device_array<int>(blocks * threads), *out = device_array<int>(blocks);
    std::iota(in, in + blocks * threads, 1);
    OK(launch(sum_by_halving, blocks, threads, nullptr, in, out));
    OK(cudaDeviceSynchronize());
    for (int b = 0; b < blocks; ++b)
      EXPECT(out[b] == std::accumulate(in + b * threads, in + (b + 1) * threads, 0));
    OK(cudaFree(in));
    OK(cudaFree(out));
  }
}

__global__ void count(unsigned* counters) {
  atomicAdd(counters, 1);
  atomicMax(counters + 1, blockIdx.x * blockDim.x + threadIdx.x);
  atomicCAS(counters + 2, 0u, threadIdx.x + 7);
  if (threadIdx.x == 0) atomicExch_system(counters + 3, blockIdx.x);
}

void atomics_count() {
  unsigned* counters = device_array<unsigned>(4);
  OK(cudaMemset(counters, 0, 16));
  cudaStream_t streams[2] = {new_stream(), new_stream()};
  OK(cudaDeviceSynchronize());
  for (cudaStream_t stream : streams) OK(launch(count, 50, 64, stream, counters));
  OK(cudaDeviceSynchronize());
  EXPECT(counters[0] == 2 * 50 * 64 && counters[1] == 50 * 64 - 1);
  EXPECT(counters[2] == 7 && counters[3] == 49);
}

using Flag = cuda::atomic_ref<unsigned, cuda::thread_scope_system>;

/// Block c of each stream waits for block c of the other.
__global__ void meet(unsigned* mine, unsigned* theirs, int* met) {
  if (threadIdx.x % 32 == 5) {
    const unsigned slot = blockIdx.x * 8 + threadIdx.x / 32;
    Flag(theirs[slot]).store(1, cuda::memory_order_release);
    while (Flag(mine[slot]).load(cuda::memory_order_acquire) == 0) {
    }
  }
  __syncthreads();
  met[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

void kernels_of_two_streams_wait_for_each_other() {
  constexpr int kBlocks = 10, kThreads = 256;
  unsigned* flags = device_array<unsigned>(2 * kBlocks * 8);
  int* met = device_array<int>(2 * kBlocks * kThreads);
  OK(cudaMemset(flags, 0, 2 * kBlocks * 8 * sizeof(unsigned)));
  OK(cudaMemset(met, 0, 2 * kBlocks * kThreads * sizeof(int)));
  OK(cudaDeviceSynchronize());
  for (int i = 0; i < 2; ++i)
    OK(launch(meet, kBlocks, kThreads, new_stream(), flags + i * kBlocks * 8,
              flags + (1 - i) * kBlocks * 8, met + i * kBlocks * kThreads));
  OK(cudaDeviceSynchronize());
  for (int i = 0; i < 2 * kBlocks * kThreads; ++i) EXPECT(met[i] == 1);
}

void half_types_round_to_nearest_even() {
  using namespace cuda_emulation;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {  // every half and its neighbours' midpoints
    const auto half = static_cast<std::uint16_t>(bits);
    const float x = float_of_half(half);
    if (x != x) {
      EXPECT(half_of_float(x) == 0x7fff);
      continue;
    }
    EXPECT(half_of_float(x) == half);
    const bool largest = (bits & 0x7fff) >= 0x7bff;
    const float next = largest ? 65536.0f : std::fabs(float_of_half(half + 1));
    if (std::isinf(x)) continue;
    const float middle = std::copysign((std::fabs(x) + next) / 2, x);
    EXPECT(half_of_float(middle) == half + (bits & 1));
    EXPECT(half_of_float(std::nextafter(middle, 0.0f)) == half);
    EXPECT(half_of_float(std::nextafter(middle, 2 * middle)) == half + 1);
  }
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const float x = __uint_as_float(bits << 16);
    if (x != x) {
      EXPECT(bfloat16_of_float(x) == 0x7fff);
      continue;
    }
    EXPECT(bfloat16_of_float(x) == bits);
    if (std::isinf(x)) continue;
    EXPECT(bfloat16_of_float(__uint_as_float((bits << 16) + 0x8000)) == bits + (bits & 1));
    EXPECT(bfloat16_of_float(__uint_as_float((bits << 16) + 0x7fff)) == bits);
    EXPECT(bfloat16_of_float(__uint_as_float((bits << 16) + 0x8001)) == bits + 1);
  }
}

// Mistakes, each of which ends the process.

__global__ void leave_before_barrier() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}
__global__ void half_a_warp() {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffu, 1, 1);
}
__global__ void one_lane_missing() {
  if (threadIdx.x != 40) __syncwarp();
}
__global__ void different_operations() {
  if (threadIdx.x % 2 == 0)
    __syncwarp();
  else
    __ballot_sync(0xffffffffu, 1);
}
template <void (*kernel)()>
void run_mistake() {
  OK(launch(kernel, 1, 64, nullptr));
  OK(cudaDeviceSynchronize());
}

}  // namespace

const Case device_cases[] = {
    {"every_thread_runs_once", every_thread_runs_once},
    {"warp_operations_exchange_values_of_lanes", warp_operations_exchange_values_of_lanes},
    {"barriers_order_accesses_to_shared_memory", barriers_order_accesses_to_shared_memory},
    {"atomics_count", atomics_count},
    {"kernels_of_two_streams_wait_for_each_other", kernels_of_two_streams_wait_for_each_other},
    {"half_types_round_to_nearest_even", half_types_round_to_nearest_even},
    {"mistake_leave_before_barrier", run_mistake<leave_before_barrier>},
    {"mistake_half_a_warp", run_mistake<half_a_warp>},
    {"mistake_one_lane_missing", run_mistake<one_lane_missing>},
    {"mistake_different_operations", run_mistake<different_operations>},
    {nullptr, nullptr}};
