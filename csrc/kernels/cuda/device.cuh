#pragma once
// What all kernels share on the device: element types, 16-byte accesses, sums of a warp. Readable
// by nvcc, and by a plain compiler with tests/cuda_emulation in its include path.
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "base/types.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cuda_emulation/half_types.h>
#endif

namespace adareduce::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

/// Elements in memory. Half types hold bits and compute in float.
struct f16 {
  std::uint16_t bits;
};
struct bf16 {
  std::uint16_t bits;
};

/// What an element is computed in: double for float64, float for the others; and exactly as double.
__device__ inline float value_of(f16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  return cuda_emulation::float_of_half(x.bits);
#endif
}
__device__ inline float value_of(bf16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
__device__ inline float value_of(float x) { return x; }
__device__ inline double value_of(double x) { return x; }

/// Rounds to nearest even, half types by way of float, as the CPU's kernels do.
template <typename T>
__device__ inline T element_of(double x);
template <>
__device__ inline double element_of<double>(double x) {
  return x;
}
template <>
__device__ inline float element_of<float>(double x) {
  return static_cast<float>(x);
}
template <>
__device__ inline f16 element_of<f16>(double x) {
#ifdef __CUDACC__
  return {__half_as_ushort(__float2half_rn(static_cast<float>(x)))};
#else
  return {cuda_emulation::half_of_float(static_cast<float>(x))};
#endif
}
template <>
__device__ inline bf16 element_of<bf16>(double x) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(x)))};
#else
  return {cuda_emulation::bfloat16_of_float(static_cast<float>(x))};
#endif
}

template <typename T>
inline constexpr T kLowest = std::numeric_limits<T>::lowest();
template <typename T>
inline constexpr T kHighest = std::numeric_limits<T>::max();

/// Truncates; what the type cannot hold becomes its nearest value, NaN zero.
template <typename T>
__device__ inline T integer_of(double value) {
  if (value <= static_cast<double>(kLowest<T>)) return kLowest<T>;
  if (value >= static_cast<double>(kHighest<T>)) return kHighest<T>;
  return value == value ? static_cast<T>(value) : T{0};
}

/// 16 bytes as elements.
template <typename T>
union Vector {
  static constexpr int kNumel = 16 / static_cast<int>(sizeof(T));
  uint4 words;
  T elements[kNumel];
};

/// The whole vector at `from`, which is aligned. `load_once`: nothing in this launch writes it, and
/// nobody reads it again soon.
template <typename T>
__device__ inline Vector<T> load(const T* from) {
  Vector<T> vector;
  vector.words = *reinterpret_cast<const uint4*>(from);
  return vector;
}
template <typename T>
__device__ inline Vector<T> load_once(const T* from) {
#ifdef __CUDACC__
  Vector<T> vector;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(vector.words.x), "=r"(vector.words.y), "=r"(vector.words.z),
                 "=r"(vector.words.w)
               : "l"(from));
  return vector;
#else
  return load(from);
#endif
}
/// The same where `wanted`, zeros elsewhere. A compiler that sees an `if` puts the work between the
/// loads; several of these in a row are all under way before the first is used.
template <typename T>
__device__ inline Vector<T> load_if(bool wanted, const T* from) {
  Vector<T> vector;
#ifdef __CUDACC__
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n mov.u32 %0, 0;\n mov.u32 %1, 0;\n"
      " mov.u32 %2, 0;\n mov.u32 %3, 0;\n @p ld.global.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
      : "=&r"(vector.words.x), "=&r"(vector.words.y), "=&r"(vector.words.z), "=&r"(vector.words.w)
      : "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
#else
  if (wanted)
    vector = load(from);
  else
    vector.words = uint4{0, 0, 0, 0};
#endif
  return vector;
}
template <typename T>
__device__ inline Vector<T> load_once_if(bool wanted, const T* from) {
#ifdef __CUDACC__
  Vector<T> vector;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n mov.u32 %0, 0;\n mov.u32 %1, 0;\n"
      " mov.u32 %2, 0;\n mov.u32 %3, 0;\n"
      " @p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
      : "=&r"(vector.words.x), "=&r"(vector.words.y), "=&r"(vector.words.z), "=&r"(vector.words.w)
      : "l"(from), "r"(static_cast<int>(wanted)));
  return vector;
#else
  return load_if(wanted, from);
#endif
}
template <typename T>
__device__ inline void store(T* to, Vector<T> vector) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(vector.words.x),
               "r"(vector.words.y), "r"(vector.words.z), "r"(vector.words.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = vector.words;
#endif
}

/// The sum over a warp's lanes, the same bits on each: a butterfly, lane distance 16, 8, 4, 2, 1.
template <typename Number>
__device__ inline Number sum_of_warp(Number x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

/// Nanoseconds since some time, on the device.
__device__ inline std::uint64_t now_ns() {
#ifdef __CUDACC__
  std::uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
#else
  return cuda_emulation::now_ns();
#endif
}

}  // namespace adareduce::cuda
