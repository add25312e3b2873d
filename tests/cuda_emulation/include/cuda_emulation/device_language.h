#pragma once
// What nvcc understands beyond C++, as plain C++. Threads of a block are fibers of one OS thread.
#include <cuda_emulation/control.h>
#include <cuda_emulation/half_types.h>
#include <cuda_emulation/types.h>
#include <math.h>
#include <sched.h>

#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
/// A block runs on one OS thread from beginning to end.
#define __shared__ static thread_local

extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local dim3 blockDim;
extern constinit thread_local dim3 gridDim;
inline constexpr int warpSize = 32;

namespace cuda_emulation {

enum class WarpOperation { none, sync, shuffle, vote };

/// Waits for all threads of the block; aborts the process where they cannot all come.
void sync_block();

/// Waits for all lanes of the warp, which `mask` must name; the values of all lanes, which stay
/// until the lane's next warp operation. Aborts the process where lanes disagree or do not come.
const std::uint64_t* gather_warp(WarpOperation operation, unsigned mask, std::uint64_t value);

/// The calling thread's lane, and how many lanes its warp has.
int lane();
int lanes();

template <typename T>
T shuffle(unsigned mask, T value, int from) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const std::uint64_t* all = gather_warp(WarpOperation::shuffle, mask, bits);
  std::memcpy(&value, &all[from], sizeof(T));
  return value;
}
/// First lane of the part of `width` lanes in which the calling thread is.
inline int first_lane(int width) { return lane() & ~(width - 1); }

}  // namespace cuda_emulation

inline void __syncthreads() { cuda_emulation::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulation::gather_warp(cuda_emulation::WarpOperation::sync, mask, 0);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return cuda_emulation::shuffle(mask, value,
                                 cuda_emulation::first_lane(width) + (from & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int own = cuda_emulation::lane(), from = own ^ bits;
  const bool inside = from < cuda_emulation::first_lane(width) + width;
  return cuda_emulation::shuffle(mask, value, inside ? from : own);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = cuda_emulation::lane(), from = own + static_cast<int>(delta);
  const bool inside = from < cuda_emulation::first_lane(width) + width;
  return cuda_emulation::shuffle(mask, value, inside ? from : own);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = cuda_emulation::lane(), from = own - static_cast<int>(delta);
  return cuda_emulation::shuffle(mask, value,
                                 from >= cuda_emulation::first_lane(width) ? from : own);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const std::uint64_t* all =
      cuda_emulation::gather_warp(cuda_emulation::WarpOperation::vote, mask, predicate != 0);
  unsigned ballot = 0;
  for (int i = 0; i < cuda_emulation::lanes(); ++i) ballot |= static_cast<unsigned>(all[i]) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __nanosleep(unsigned) { cuda_emulation::yield(); }
[[noreturn]] inline void __trap() { std::abort(); }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int __clzll(unsigned long long x) { return std::countl_zero(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}

// CUDA's min and max of two numbers: of a number and a NaN they take the number.
template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  return x != x || y < x ? y : x;
}
template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  return x != x || x < y ? y : x;
}

// Atomics on integers only: on floating-point numbers they would make bits depend on timing.
#define CUDA_EMULATION_ATOMIC(name, order, expression)            \
  template <typename T>                                           \
    requires std::is_integral_v<T>                                \
  T name(T* address, std::type_identity_t<T> value) {             \
    return std::atomic_ref<T>(*address).expression(value, order); \
  }                                                               \
  template <typename T>                                           \
    requires std::is_integral_v<T>                                \
  T name##_system(T* address, std::type_identity_t<T> value) {    \
    return name(address, value);                                  \
  }
CUDA_EMULATION_ATOMIC(atomicAdd, std::memory_order_relaxed, fetch_add)
CUDA_EMULATION_ATOMIC(atomicSub, std::memory_order_relaxed, fetch_sub)
CUDA_EMULATION_ATOMIC(atomicOr, std::memory_order_relaxed, fetch_or)
CUDA_EMULATION_ATOMIC(atomicAnd, std::memory_order_relaxed, fetch_and)
CUDA_EMULATION_ATOMIC(atomicExch, std::memory_order_relaxed, exchange)
#undef CUDA_EMULATION_ATOMIC
template <typename T>
  requires std::is_integral_v<T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}
template <typename T>
  requires std::is_integral_v<T>
T atomicCAS_system(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return atomicCAS(address, expected, value);
}
template <typename T>
  requires std::is_integral_v<T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  T seen = *address;
  for (T old; seen < value; seen = old)
    if ((old = atomicCAS(address, seen, value)) == seen) break;
  return seen;
}
