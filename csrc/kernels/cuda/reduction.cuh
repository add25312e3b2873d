#pragma once
// One element, or one vector of elements, of several inputs.
#include "kernels/cuda/element_types.h"
#include "kernels/kernels.h"

namespace adareduce::cuda {

/// Addresses of inputs, as a kernel's parameter.
template <int capacity>
struct Inputs {
  const void* of[capacity];
};
inline constexpr int kFewInputs = 16;
inline constexpr int kManyInputs = 3840;

struct Reduction {
  void* out;
  std::int64_t numel;
  int num_inputs;
  Elementwise op;
  double divisor;
  double reciprocal;  ///< of the divisor
};

/// Sums of squares of the inputs, and of the results before they are divided and rounded.
struct ReductionSquares {
  double of_inputs = 0;
  double of_result = 0;
};

template <typename T>
__device__ inline AccumulatorOf<T> accumulator_of(T x) {
  if constexpr (std::is_same_v<T, boolean>)
    return x.bits != 0;
  else if constexpr (std::is_integral_v<T>)
    return x;
  else
    return value_of(x);
}

// NaN wins, and of equal ones the first, as on the CPU.
template <typename A>
__device__ inline void put_min(A& a, A b) {
  a = (b < a) | (b != b) ? b : a;
}
template <typename A>
__device__ inline void put_max(A& a, A b) {
  a = (b > a) | (b != b) ? b : a;
}
template <typename A>
__device__ inline void put_sum(A& a, A b) {
  if constexpr (std::is_integral_v<A>)
    a = static_cast<A>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
  else
    a += b;
}
template <typename A>
__device__ inline void put_product(A& a, A b) {
  if constexpr (std::is_integral_v<A>)
    a = static_cast<A>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
  else
    a *= b;
}

/// The first `numel` elements of a vector, reduced over the inputs.
template <typename T, int numel>
struct Accumulation {
  AccumulatorOf<T> values[numel] = {};

  /// sums[i] += x[i]^2 on the way, where `squares` is not null.
  __device__ void add(Elementwise op, bool is_first, const Vector<T>& x, double* squares) {
    AccumulatorOf<T> next[numel];
#pragma unroll
    for (int e = 0; e < numel; ++e) next[e] = accumulator_of(x.elements[e]);
    if constexpr (kIsFloat<T>)
      if (squares != nullptr)
#pragma unroll
        for (int e = 0; e < numel; ++e) {
          const double wide = next[e];
          *squares = fma(wide, wide, *squares);
        }
    if (is_first)
#pragma unroll
      for (int e = 0; e < numel; ++e) values[e] = next[e];
    else if (op == Elementwise::sum)
#pragma unroll
      for (int e = 0; e < numel; ++e) put_sum(values[e], next[e]);
    else if (op == Elementwise::min)
#pragma unroll
      for (int e = 0; e < numel; ++e) put_min(values[e], next[e]);
    else if (op == Elementwise::max)
#pragma unroll
      for (int e = 0; e < numel; ++e) put_max(values[e], next[e]);
    else
#pragma unroll
      for (int e = 0; e < numel; ++e) put_product(values[e], next[e]);
  }

  __device__ Vector<T> result(const Reduction& reduction) const {
    Vector<T> out;
#pragma unroll
    for (int e = 0; e < numel; ++e) {
      if constexpr (std::is_same_v<T, boolean>)
        out.elements[e].bits = values[e] != 0;
      else if constexpr (std::is_integral_v<T>)
        out.elements[e] = reduction.divisor == 1.0
                              ? static_cast<T>(values[e])
                              : integer_of<T>(static_cast<double>(values[e]) / reduction.divisor);
      else if constexpr (std::is_same_v<T, double>)
        out.elements[e] = reduction.divisor == 1.0 ? values[e] : values[e] / reduction.divisor;
      else
        out.elements[e] = element_of<T>(reduction.divisor == 1.0 ? static_cast<double>(values[e])
                                                                 : static_cast<double>(values[e]) *
                                                                       reduction.reciprocal);
    }
    return out;
  }
};

/// Reduces the vector (numel = Vector<T>::kNumel, all inputs aligned) or the single element
/// (numel = 1) at `index` of all inputs, in their order.
template <typename T, int numel, int capacity>
__device__ inline void reduce_at(const Inputs<capacity>& inputs, const Reduction& reduction,
                                 std::int64_t index, ReductionSquares* squares) {
  // Inputs that are under way together.
  constexpr int kUnroll = 4;
  Accumulation<T, numel> sums;
#pragma unroll 1
  for (int k = 0; k < reduction.num_inputs; k += kUnroll) {
    Vector<T> next[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool exists = k + u < reduction.num_inputs;
      const T* from = static_cast<const T*>(inputs.of[exists ? k + u : 0]) + index;
      if constexpr (numel == 1) {
        if (exists) next[u].elements[0] = *from;
      } else {
        next[u] = load_if(exists, from);
      }
    }
    // The next vector moves up: unrolled, this is too much code for the instruction cache.
#pragma unroll 1
    for (int i = k; i < k + kUnroll && i < reduction.num_inputs; ++i) {
      sums.add(reduction.op, i == 0, next[0], squares == nullptr ? nullptr : &squares->of_inputs);
#pragma unroll
      for (int u = 1; u < kUnroll; ++u) next[u - 1] = next[u];
    }
  }
  if constexpr (kIsFloat<T>)
    if (squares != nullptr)
#pragma unroll
      for (int e = 0; e < numel; ++e) {
        const double wide = sums.values[e];
        squares->of_result = fma(wide, wide, squares->of_result);
      }
  const Vector<T> out = sums.result(reduction);
  T* to = static_cast<T*>(reduction.out) + index;
  if constexpr (numel == 1)
    *to = out.elements[0];
  else
    store(to, out);
}

/// Calls launch_one(Inputs<capacity>) with the smallest capacity that holds all inputs.
template <typename Launch>
void with_inputs(const ReduceArgs& args, const char* kernel, Launch&& launch_one) {
  const auto filled = [&]<int capacity>(Inputs<capacity> inputs) {
    for (int k = 0; k < capacity; ++k) inputs.of[k] = args.inputs[k < args.num_inputs ? k : 0];
    launch_one(inputs);
  };
  if (args.num_inputs <= kFewInputs)
    filled(Inputs<kFewInputs>{});
  else if (args.num_inputs <= kManyInputs)
    filled(Inputs<kManyInputs>{});
  else
    throw UsageError(
        concat(kernel, ": num_inputs must be at most ", kManyInputs, ", got ", args.num_inputs));
}

inline Reduction reduction_of(const ReduceArgs& args) {
  return {args.out, args.numel, args.num_inputs, args.op, args.divisor, 1.0 / args.divisor};
}

/// The bytes by which `pointer` + `offset` misses a multiple of 16.
inline std::uintptr_t misalignment_of(const void* pointer, std::int64_t offset = 0) {
  return (reinterpret_cast<std::uintptr_t>(pointer) + static_cast<std::uintptr_t>(offset)) %
         sizeof(uint4);
}

}  // namespace adareduce::cuda
