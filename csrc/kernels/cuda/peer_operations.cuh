#pragma once
// What becomes of the elements of all ranks, one after the other, as the CPU's kernels have it
// (kernels/cpu_runs_body.h). A rule has: Accumulator, widen(T), apply(a, b), divided(a, divisor)
// and narrow(a, divisor).
#include <limits>
#include <type_traits>

#include "kernels/cuda/device.cuh"

namespace adareduce::cuda {

// NaN wins, and of equal ones the first.
struct MinOf {
  template <typename A>
  __device__ static A apply(A a, A b) {
    return (b < a) | (b != b) ? b : a;
  }
};
struct MaxOf {
  template <typename A>
  __device__ static A apply(A a, A b) {
    return (b > a) | (b != b) ? b : a;
  }
};
struct SumOf {
  template <typename A>
  __device__ static A apply(A a, A b) {
    if constexpr (std::is_integral_v<A>)
      return static_cast<A>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
    else
      return a + b;
  }
};
struct ProductOf {
  template <typename A>
  __device__ static A apply(A a, A b) {
    if constexpr (std::is_integral_v<A>)
      return static_cast<A>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
    else
      return a * b;
  }
};

/// Floats: in float, doubles in double; divided in double; rounded once more to half types.
template <typename T, typename Op>
struct FloatRule {
  using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;
  __device__ static Accumulator widen(T x) { return value_of(x); }
  __device__ static Accumulator apply(Accumulator a, Accumulator b) { return Op::apply(a, b); }
  __device__ static double divided(Accumulator a, double divisor) {
    if (divisor == 1.0) return a;
    // The float that the quotient rounds to: see sum_run in kernels/cpu_runs_body.h.
    return std::is_same_v<T, double> ? a / divisor : a * (1.0 / divisor);
  }
  __device__ static T narrow(Accumulator a, double divisor) {
    return element_of<T>(divided(a, divisor));
  }
};

/// Integers, modulo 2^bits.
template <typename T, typename Op>
struct IntegerRule {
  using Accumulator = T;
  __device__ static T widen(T x) { return x; }
  __device__ static T apply(T a, T b) { return Op::apply(a, b); }
  __device__ static T narrow(T a, double) { return a; }
};

/// Averages of integers: in 64 bits, divided in double, truncated, kept in the type's range.
template <typename T>
struct AverageRule {
  using Accumulator = std::int64_t;
  static constexpr T kLowest = std::numeric_limits<T>::lowest();
  static constexpr T kHighest = std::numeric_limits<T>::max();
  __device__ static std::int64_t widen(T x) { return static_cast<std::int64_t>(x); }
  __device__ static std::int64_t apply(std::int64_t a, std::int64_t b) {
    return SumOf::apply(a, b);
  }
  __device__ static T narrow(std::int64_t a, double divisor) {
    const double value = static_cast<double>(a) / divisor;
    if (value <= static_cast<double>(kLowest)) return kLowest;
    if (value >= static_cast<double>(kHighest)) return kHighest;
    return static_cast<T>(value);
  }
};

/// Booleans: any byte but zero is true.
template <bool is_and>
struct BooleanRule {
  using Accumulator = std::uint8_t;
  __device__ static std::uint8_t widen(std::uint8_t x) { return x != 0; }
  __device__ static std::uint8_t apply(std::uint8_t a, std::uint8_t b) {
    return static_cast<std::uint8_t>(is_and ? a & b : a | b);
  }
  __device__ static std::uint8_t narrow(std::uint8_t a, double) { return a; }
};

}  // namespace adareduce::cuda
