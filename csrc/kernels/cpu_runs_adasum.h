// Adasum's arithmetic on runs, of two vectors and of up to 16, and what it shares with other runs:
// sums in 16 lanes, and writing elements. Included by cpu_runs_body.h only.
//
// Numerics: those of cpu_runs_body.h. Combinations of vectors are computed in double in the order
// of the inputs, every product rounded before it is added: coefficients have all of double's
// digits.
#include "kernels/cpu_runs_vectors.h"

namespace adareduce::cpu {
namespace {

// ---- sums in 16 lanes
// ------------------------------------------------------------------------------------------------

struct Lanes {
  F64 of[kRegisters];

  // GCC 12 would fill an array with zeros by "rep stos", which takes as long as 100 elements.
  __attribute__((always_inline)) Lanes() {
#pragma GCC unroll 8
    for (F64& some : of) some = F64{};
  }
  explicit Lanes(const double (&lanes)[kLanes]) { __builtin_memcpy(of, lanes, sizeof of); }

  // Lanes (0,8) (1,9) ..., then (0,4) ..., (0,2) (1,3), (0,1).
  double total() const {
    F64 sums[kRegisters];
    for (int r = 0; r < kRegisters; ++r) sums[r] = of[r];
#pragma GCC unroll 8
    for (int registers = kRegisters / 2; registers > 0; registers /= 2)
#pragma GCC unroll 8
      for (int r = 0; r < registers; ++r) sums[r] = sums[r] + sums[r + registers];
    double lanes[kWidth];
    __builtin_memcpy(lanes, sums, sizeof lanes);
    for (int width = kWidth / 2; width > 0; width /= 2)
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    return lanes[0];
  }
};

// Up to kLanes elements, filled up with zeros: adding their squares to a lane changes no bit.
template <typename T>
struct Tail {
  T elements[kLanes] = {};
  Tail(const T* in, std::int64_t numel) {
    if (numel > 0) __builtin_memcpy(elements, in, static_cast<std::size_t>(numel) * sizeof(T));
  }
};

template <typename T>
void pair_stats(const void* lower_memory, const void* upper_memory, std::int64_t numel,
                double* stats) {
  const T* lower = static_cast<const T*>(lower_memory);
  const T* upper = static_cast<const T*>(upper_memory);
  Lanes dot, lower_sq, upper_sq;
  const auto add = [&](const T* l, const T* u) __attribute__((always_inline)) {
    for (int r = 0; r < kRegisters; ++r) {
      const F64 a = doubles(l + r * kWidth), b = doubles(u + r * kWidth);
      dot.of[r] = add_product<T>(dot.of[r], a, b);
      lower_sq.of[r] = add_product<T>(lower_sq.of[r], a, a);
      upper_sq.of[r] = add_product<T>(upper_sq.of[r], b, b);
    }
  };
  std::int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    prefetch(lower + i);
    prefetch(upper + i);
    add(lower + i, upper + i);
  }
  if (i < numel) {
    const Tail<T> l(lower + i, numel - i), u(upper + i, numel - i);
    add(l.elements, u.elements);
  }
  stats[0] = dot.total();
  stats[1] = lower_sq.total();
  stats[2] = upper_sq.total();
}

// out[i ...] = value_of(i, kWidth) for every register of elements; for the last one, of `count`
// elements, value_of(i, count), which must not read beyond them.
template <typename T, typename Body>
void write_pairs(std::int64_t numel, T* out, Body&& value_of) {
  std::int64_t i = 0;
  for (; i + kPair <= numel; i += kPair)
    put_both(value_of(i, kWidth), value_of(i + kWidth, kWidth), out + i);
  for (; i < numel; i += kWidth) {
    const std::int64_t count = numel - i < kWidth ? numel - i : kWidth;
    T last[kWidth];
    put(value_of(i, count), last);
    __builtin_memcpy(out + i, last, static_cast<std::size_t>(count) * sizeof(T));
  }
}

template <typename T>
F64 doubles_of_some(const T* in, std::int64_t count) {
  return count == kWidth ? doubles(in) : doubles(Tail<T>(in, count).elements);
}

template <typename T>
void pair_combine(const void* lower_memory, const void* upper_memory, std::int64_t numel,
                  double lower_share, double upper_share, void* out) {
  const T* lower = static_cast<const T*>(lower_memory);
  const T* upper = static_cast<const T*>(upper_memory);
  write_pairs(numel, static_cast<T*>(out),
              [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
                prefetch(lower + i);
                prefetch(upper + i);
                return lower_share * doubles_of_some(lower + i, count) +
                       upper_share * doubles_of_some(upper + i, count);
              });
}

// ---- combinations of up to kMostInputs vectors
// ------------------------------------------------------------------------------------------------

// kVectors inputs; 0: num_inputs of them.
template <typename T, int kVectors>
void weighted_sum_of(const void* const* inputs, int num_inputs, std::int64_t numel,
                     const double* coefficients, void* out) {
  const int count_of_inputs = kVectors > 0 ? kVectors : num_inputs;
  const T* in[kMostInputs];
  double c[kMostInputs];
  for (int k = 0; k < count_of_inputs; ++k) {
    in[k] = static_cast<const T*>(inputs[k]);
    c[k] = coefficients[k];
  }
  write_pairs(numel, static_cast<T*>(out),
              [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
                F64 sum = c[0] * doubles_of_some(in[0] + i, count);
                prefetch(in[0] + i);
                for (int k = 1; k < count_of_inputs; ++k) {
                  prefetch(in[k] + i);
                  sum = sum + c[k] * doubles_of_some(in[k] + i, count);
                }
                return sum;
              });
}

template <typename T>
void weighted_sum(const void* const* inputs, int num_inputs, std::int64_t numel,
                  const double* coefficients, void* out) {
  switch (num_inputs) {
    case 2:
      return weighted_sum_of<T, 2>(inputs, num_inputs, numel, coefficients, out);
    case 3:
      return weighted_sum_of<T, 3>(inputs, num_inputs, numel, coefficients, out);
    case 4:
      return weighted_sum_of<T, 4>(inputs, num_inputs, numel, coefficients, out);
    default:
      return weighted_sum_of<T, 0>(inputs, num_inputs, numel, coefficients, out);
  }
}

// out = sum c_k x_k of `count` elements over the inputs whose bits are set, kLanes numbers of which
// those from `count` on are zero.
template <typename T>
void combine_lanes(const void* const* inputs, unsigned leaves, const double* coefficients,
                   std::int64_t begin, std::int64_t count, double* out) {
  F64 sums[kRegisters] = {};
  for (int k = 0; leaves >> k != 0; ++k) {
    if ((leaves >> k & 1u) == 0) continue;
    const Tail<T> some(static_cast<const T*>(inputs[k]) + begin, count);
    for (int r = 0; r < kRegisters; ++r)
      sums[r] = sums[r] + coefficients[k] * doubles(some.elements + r * kWidth);
  }
  __builtin_memcpy(out, sums, sizeof sums);
  for (std::int64_t lane = count; lane < kLanes; ++lane) out[lane] = 0;
}

template <typename T>
void node_stats(const void* const* inputs, std::int64_t numel, const double* coefficients,
                unsigned lower, unsigned upper, double* stats) {
  Lanes dot, lower_sq, upper_sq;
  for (std::int64_t i = 0; i < numel; i += kLanes) {
    const std::int64_t count = numel - i < kLanes ? numel - i : kLanes;
    double l[kLanes], u[kLanes];
    combine_lanes<T>(inputs, lower, coefficients, i, count, l);
    combine_lanes<T>(inputs, upper, coefficients, i, count, u);
    for (int r = 0; r < kRegisters; ++r) {
      const F64 a = doubles(l + r * kWidth), b = doubles(u + r * kWidth);
      dot.of[r] = add_product<double>(dot.of[r], a, b);
      lower_sq.of[r] = add_product<double>(lower_sq.of[r], a, a);
      upper_sq.of[r] = add_product<double>(upper_sq.of[r], b, b);
    }
  }
  stats[0] += dot.total();
  stats[1] += lower_sq.total();
  stats[2] += upper_sq.total();
}

}  // namespace
}  // namespace adareduce::cpu
