// The table of one instruction set: included once by each cpu_runs_*.cpp, which names it.
//
// Numerics. Statistics: products and sums in double; element i of a run adds into virtual lane
// i mod 16, and lanes are added pairwise, (0,8) (1,9) ... then (0,4) ...: every vector width gives
// these bits. Multiplication and addition round separately (-ffp-contract=off), except where the
// product is exact in double (float32 and shorter), where a fused operation has the same bits.
// Results are computed in double and rounded to the type; for half types through float32; where a
// float gives the same bits, in float. Sums run in the order of the inputs, in the element's type,
// in float32 for half types, modulo 2^bits for integers; sums that are only squared, in double. The
// error of a sum of n squares is about n/16 * 2^-53 of it.
#include <limits>
#include <type_traits>

#include "kernels/cpu_runs_gram.h"

namespace adareduce::cpu {
namespace {

// ---- scaling
// --------------------------------------------------------------------------------------------------

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;
template <typename T>
constexpr bool kIsFloat = std::is_floating_point_v<T> || kIsHalf<T>;

// Truncates; what the type cannot hold becomes its nearest value, NaN zero.
template <typename T>
T integer_of(double value) {
  constexpr T kLowest = std::numeric_limits<T>::lowest(), kHighest = std::numeric_limits<T>::max();
  if (value <= static_cast<double>(kLowest)) return kLowest;
  if (value >= static_cast<double>(kHighest)) return kHighest;
  return value == value ? static_cast<T>(value) : T{0};
}

template <typename T>
void scale(const void* in_memory, std::int64_t numel, double scale, void* out_memory) {
  const T* in = static_cast<const T*>(in_memory);
  T* out = static_cast<T*>(out_memory);
  if constexpr (kIsFloat<T>) {
    write_pairs(numel, out, [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
      return scale * doubles_of_some(in + i, count);
    });
  } else {
    for (std::int64_t i = 0; i < numel; ++i)
      out[i] = integer_of<T>(scale * static_cast<double>(in[i]));
  }
}

// ---- reductions of several inputs
// ------------------------------------------------------------------------------------------------

// Blocks that stay in the first-level cache while one input after the other is added.
constexpr std::int64_t kBlock = 512;
static_assert(kBlock % kLanes == 0);

template <typename T, bool is_average>
struct AccumulatorOf {
  // Averages of integers: sums of up to 2^32 of the shorter ones are exact.
  using type = std::conditional_t<is_average && std::is_integral_v<T>, std::int64_t, T>;
};
template <bool is_average>
struct AccumulatorOf<Half, is_average> {
  using type = float;
};
template <bool is_average>
struct AccumulatorOf<BFloat16, is_average> {
  using type = float;
};

template <typename T, typename A>
void widen(const T* in, std::int64_t numel, A* out) {
  if constexpr (kIsHalf<T>) {
    std::int64_t i = 0;
    for (; i + kWidth <= numel; i += kWidth) put(singles(in + i), out + i);
    if (i < numel) {
      const F32 last = singles(Tail<T>(in + i, numel - i).elements);
      __builtin_memcpy(out + i, &last, static_cast<std::size_t>(numel - i) * sizeof(A));
    }
  } else if constexpr (std::is_same_v<T, Bool>) {
    for (std::int64_t i = 0; i < numel; ++i) out[i].bits = in[i].bits != 0;
  } else {
    for (std::int64_t i = 0; i < numel; ++i) out[i] = static_cast<A>(in[i]);
  }
}

template <typename A, typename T>
void narrow(const A* in, std::int64_t numel, T* out) {
  if constexpr (kIsHalf<T>)
    write_pairs(numel, out, [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
      return count == kWidth ? singles(in + i) : singles(Tail<A>(in + i, count).elements);
    });
  else
    __builtin_memcpy(out, in, static_cast<std::size_t>(numel) * sizeof(T));
}

// NaN wins, and of equal ones the first: no instruction set has its own idea of it.
struct MinOf {
  template <typename A>
  static A apply(A a, A b) {
    if constexpr (std::is_same_v<A, Bool>)
      return {static_cast<std::uint8_t>(a.bits & b.bits)};
    else
      return (b < a) | (b != b) ? b : a;
  }
};
struct MaxOf {
  template <typename A>
  static A apply(A a, A b) {
    if constexpr (std::is_same_v<A, Bool>)
      return {static_cast<std::uint8_t>(a.bits | b.bits)};
    else
      return (b > a) | (b != b) ? b : a;
  }
};
struct SumOf {
  template <typename A>
  static A apply(A a, A b) {
    if constexpr (std::is_integral_v<A>)
      return static_cast<A>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
    else
      return a + b;
  }
};
struct ProductOf {
  template <typename A>
  static A apply(A a, A b) {
    if constexpr (std::is_same_v<A, Bool>)
      return {static_cast<std::uint8_t>(a.bits & b.bits)};
    else if constexpr (std::is_integral_v<A>)
      return static_cast<A>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
    else
      return a * b;
  }
};

template <typename T, typename A>
void divide_and_store(const A* block, std::int64_t numel, double divisor, T* out) {
  if (divisor == 1.0) {
    if constexpr (std::is_same_v<T, A> || kIsFloat<T>)
      narrow(block, numel, out);
    else
      for (std::int64_t i = 0; i < numel; ++i) out[i] = static_cast<T>(block[i]);
  } else if constexpr (std::is_integral_v<T>) {
    for (std::int64_t i = 0; i < numel; ++i)
      out[i] = integer_of<T>(static_cast<double>(block[i]) / divisor);
  }
}

template <typename T, typename Op, bool is_average>
void reduce_run(const ReduceRun& run) {
  using A = typename AccumulatorOf<T, is_average>::type;
  A block[kBlock];
  A staged[kBlock];
  for (std::int64_t done = 0; done < run.numel; done += kBlock) {
    const std::int64_t numel = run.numel - done < kBlock ? run.numel - done : kBlock;
    const std::int64_t begin = run.begin + done;
    widen(static_cast<const T*>(run.inputs[0]) + begin, numel, block);
    for (int k = 1; k < run.num_inputs; ++k) {
      const T* in = static_cast<const T*>(run.inputs[k]) + begin;
      const A* next = staged;
      if constexpr (std::is_same_v<T, A> && !std::is_same_v<T, Bool>)
        next = in;
      else
        widen(in, numel, staged);
      for (std::int64_t i = 0; i < numel; ++i) block[i] = Op::apply(block[i], next[i]);
    }
    divide_and_store(block, numel, run.divisor, static_cast<T*>(run.out) + begin);
  }
}

// What a sum is divided by. Products with the reciprocal of a power of 2 round as quotients do, in
// floats as in doubles. Its limits keep the reciprocal a normal float.
bool is_power_of_two(double divisor) {
  const auto mantissa = bits_as<std::uint64_t>(divisor) << 12;
  return mantissa == 0 && divisor >= 0x1p-64 && divisor <= 0x1p64;
}

class PowerOfTwo {
 public:
  explicit PowerOfTwo(double power)
      : reciprocal_(1.0 / power), single_(static_cast<float>(reciprocal_)) {}
  template <typename T>
  void put_quotient(F64 sum, T* out) const {
    put(sum * reciprocal_, out);
  }
  template <typename T>
  void put_quotient(Singles sum, T* out) const {
    put(sum * single_, out);
  }

 private:
  const double reciprocal_;
  const float single_;
};

class AnyDivisor {
 public:
  explicit AnyDivisor(double divisor) : divisor_(divisor), reciprocal_(1.0 / divisor) {}
  template <typename T>
  void put_quotient(F64 sum, T* out) const {
    put(sum / divisor_, out);
  }
  // A product with the reciprocal rounds to the float that the quotient rounds to: no quotient of
  // a float and a small integer lies close enough to the middle between two floats.
  template <typename T>
  void put_quotient(Singles sum, T* out) const {
    const Halves halves = halves_of(sum);
    put_both(doubles_of(halves.of[0]) * reciprocal_, doubles_of(halves.of[1]) * reciprocal_, out);
  }

 private:
  const double divisor_, reciprocal_;
};

// A sum of floats, 16 lanes at a time. On the way it may add up squares: those of all inputs, and
// of their sum in doubles, before it is divided and rounded. kInputs is run.num_inputs, or 0: any.
// What is known here keeps all lanes in registers.
template <typename T, bool has_squares, int kInputs, typename Divisor>
void sum_run(const ReduceRun& run) {
  using A = Accumulators<T>;
  using Element = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr int kPer = kPerAccumulator<T>, kAccumulators = kLanes / kPer;
  const int num_inputs = kInputs > 0 ? kInputs : run.num_inputs;
  const Divisor divisor(run.divisor);
  Lanes of_inputs, of_result;
  // `input_of(k)` points to kLanes elements.
  const auto reduce_lanes = [&](auto&& input_of, T* out) __attribute__((always_inline)) {
    A sums[kAccumulators] = {};
    F64 wide_sums[kRegisters] = {};
    for (int k = 0; k < num_inputs; ++k) {
      const T* in = input_of(k);
      for (int a = 0; a < kAccumulators; ++a) {
        const A value = accumulators(in + a * kPer);
        sums[a] = k == 0 ? value : sums[a] + value;
        if constexpr (has_squares)
          for_each_half(in + a * kPer, value, [&](int half, F64 x) __attribute__((always_inline)) {
            const int r = a * kPer / kWidth + half;
            of_inputs.of[r] = add_product<Element>(of_inputs.of[r], x, x);
            wide_sums[r] = k == 0 ? x : wide_sums[r] + x;
          });
      }
    }
    if constexpr (has_squares)
      for (int r = 0; r < kRegisters; ++r)
        of_result.of[r] = add_product<double>(of_result.of[r], wide_sums[r], wide_sums[r]);
    for (int a = 0; a < kAccumulators; ++a) divisor.put_quotient(sums[a], out + a * kPer);
  };
  T* out = static_cast<T*>(run.out) + run.begin;
  // The compiler must think that stores to `out` change run.inputs, but not these.
  const T* few[kInputs > 0 ? kInputs : 1];
  for (int k = 0; k < kInputs; ++k) few[k] = static_cast<const T*>(run.inputs[k]) + run.begin;
  const auto input = [&](int k) {
    return kInputs > 0 ? few[k] : static_cast<const T*>(run.inputs[k]) + run.begin;
  };
  const std::int64_t numel = run.numel;
  std::int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes)
    reduce_lanes(
        [&](int k) {
          prefetch(input(k) + i);
          return input(k) + i;
        },
        out + i);
  if (i < numel) {
    T padded[kLanes], last[kLanes];
    reduce_lanes(
        [&](int k) {
          const Tail<T> tail(input(k) + i, numel - i);
          __builtin_memcpy(padded, tail.elements, sizeof padded);
          return padded;
        },
        last);
    __builtin_memcpy(out + i, last, static_cast<std::size_t>(numel - i) * sizeof(T));
  }
  if constexpr (has_squares) {
    run.squares[0] += of_inputs.total();
    run.squares[1] += of_result.total();
  }
}

template <typename T, bool has_squares, int kInputs>
void sum_run_of(const ReduceRun& run) {
  if (is_power_of_two(run.divisor))
    sum_run<T, has_squares, kInputs, PowerOfTwo>(run);
  else
    sum_run<T, has_squares, kInputs, AnyDivisor>(run);
}

template <typename T, bool has_squares>
void sum_run_of(const ReduceRun& run) {
  if (run.num_inputs == 2)
    sum_run_of<T, has_squares, 2>(run);
  else
    sum_run_of<T, has_squares, 0>(run);
}

template <typename T, typename Op>
void reduce(const ReduceRun& run) {
  if constexpr (std::is_integral_v<T>)
    if (run.divisor != 1.0) return reduce_run<T, Op, true>(run);
  if constexpr (kIsFloat<T> && std::is_same_v<Op, SumOf>)
    return run.squares != nullptr ? sum_run_of<T, true>(run) : sum_run_of<T, false>(run);
  else
    reduce_run<T, Op, false>(run);
}

// ---- the rest
// -------------------------------------------------------------------------------------------------

template <typename Bits, Bits kExponent>
std::int64_t count_nonfinite(const void* in_memory, std::int64_t numel) {
  const char* in = static_cast<const char*>(in_memory);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < numel; ++i) {
    Bits bits;
    __builtin_memcpy(&bits, in + i * static_cast<std::int64_t>(sizeof bits), sizeof bits);
    count += (bits & kExponent) == kExponent;
  }
  return count;
}

// A line that is written as a whole goes to memory without being read before.
void stream(const void* from_memory, std::int64_t bytes, void* to_memory) {
  const char* from = static_cast<const char*>(from_memory);
  char* to = static_cast<char*>(to_memory);
  const auto move = [&](std::int64_t some) {
    if (some > 0) __builtin_memcpy(to, from, static_cast<std::size_t>(some));
    from += some;
    to += some;
    bytes -= some;
  };
#if defined(__SSE2__)
  constexpr std::int64_t kLine = 64;
  const auto before_line = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(to) % kLine);
  move(bytes < before_line ? bytes : before_line);
  for (; bytes >= kLine; bytes -= kLine, from += kLine, to += kLine) {
    prefetch(from);
    stream_line(from, to);
  }
#endif
  move(bytes);
}

double read(const float* in, std::int64_t numel) {
  typedef std::uint64_t Word __attribute__((vector_size(kWidth * 8)));
  constexpr int kFloats = 2 * kWidth, kChains = 4;
  Word chains[kChains] = {};
  std::int64_t i = 0;
  for (; i + kChains * kFloats <= numel; i += kChains * kFloats)
    for (int c = 0; c < kChains; ++c) chains[c] += load_bits<Word>(in + i + c * kFloats);
  const Word sum = chains[0] + chains[1] + chains[2] + chains[3];
  double total = 0;
  for (int lane = 0; lane < kWidth; ++lane) total += static_cast<double>(sum[lane]);
  for (; i < numel; ++i) total += static_cast<double>(in[i]);
  return total;
}

void axpby(const float* x, float a, float* y, float b, std::int64_t numel) {
  for (std::int64_t i = 0; i < numel; ++i) y[i] = a * x[i] + b * y[i];
}

}  // namespace

#define ADAREDUCE_FLOATS(function) \
  {                                \
      nullptr,                     \
      nullptr,                     \
      nullptr,                     \
      nullptr,                     \
      nullptr,                     \
      function<Half>,              \
      function<BFloat16>,          \
      function<float>,             \
      function<double>,            \
      nullptr}
#define ADAREDUCE_NUMBERS(op, boolean)                 \
  {reduce<std::uint8_t, op>, reduce<std::int8_t, op>,  \
   reduce<std::int16_t, op>, reduce<std::int32_t, op>, \
   reduce<std::int64_t, op>, reduce<Half, op>,         \
   reduce<BFloat16, op>,     reduce<float, op>,        \
   reduce<double, op>,       boolean}

const Runs ADAREDUCE_RUNS{
    ADAREDUCE_RUNS_ISA,
    ADAREDUCE_FLOATS(pair_stats),
    ADAREDUCE_FLOATS(pair_combine),
    ADAREDUCE_FLOATS(gram),
    ADAREDUCE_FLOATS(weighted_sum),
    ADAREDUCE_FLOATS(node_stats),
    {scale<std::uint8_t>, scale<std::int8_t>, scale<std::int16_t>, scale<std::int32_t>,
     scale<std::int64_t>, scale<Half>, scale<BFloat16>, scale<float>, scale<double>, nullptr},
    {ADAREDUCE_NUMBERS(SumOf, nullptr), ADAREDUCE_NUMBERS(MinOf, (reduce<Bool, MinOf>)),
     ADAREDUCE_NUMBERS(MaxOf, (reduce<Bool, MaxOf>)),
     ADAREDUCE_NUMBERS(ProductOf, (reduce<Bool, ProductOf>))},
    {nullptr, nullptr, nullptr, nullptr, nullptr, count_nonfinite<std::uint16_t, 0x7c00>,
     count_nonfinite<std::uint16_t, 0x7f80>, count_nonfinite<std::uint32_t, 0x7f800000u>,
     count_nonfinite<std::uint64_t, 0x7ff0000000000000u>, nullptr},
    stream,
    read,
    axpby,
};

}  // namespace adareduce::cpu
