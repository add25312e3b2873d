// The table of one instruction set: included once by each cpu_runs_*.cpp, which names it.
//
// Numerics. Statistics: products and sums in double; element i of a run adds into virtual lane
// i mod 16, and lanes are added pairwise, (0,8) (1,9) ... then (0,4) ...: every vector width gives
// these bits. Multiplication and addition round separately (-ffp-contract=off), except where the
// product is exact in double (float32 and shorter), where a fused operation has the same bits.
// Results are computed in double and rounded to the type; for half types through float32. Sums run
// in the order of the inputs, in the element's type, in float32 for half types, modulo 2^bits for
// integers. The error of a sum of n squares is about n/16 * 2^-53 of it.
#include <limits>
#include <type_traits>

#include "kernels/cpu_runs.h"
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace adareduce::cpu {
namespace {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};
struct Bool {
  std::uint8_t bits;
};

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kWidth = 8;  // doubles in a register
#elif defined(__AVX2__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;  // SSE2, NEON
#endif
constexpr int kRegisters = kLanes / kWidth;

typedef double F64 __attribute__((vector_size(kWidth * 8)));
typedef float F32 __attribute__((vector_size(kWidth * 4)));
typedef std::uint32_t U32 __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t U16 __attribute__((vector_size(kWidth * 2)));

// ---- one element
// ----------------------------------------------------------------------------------------------

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Branches would keep the loops around these from becoming vectors.
std::uint32_t choose(bool condition, std::uint32_t yes, std::uint32_t no) {
  const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

float single_of(Half value) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fff) << 13;
  // The exponent moves from bias 15 to bias 127 by an exact product, which normalises subnormals.
  const auto finite = bits_as<std::uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  const std::uint32_t quiet = choose(magnitude > 0x0f800000u, 0x00400000u, 0u);
  const std::uint32_t special = choose(magnitude >= 0x0f800000u, 0x7f800000u | quiet, 0u);
  return bits_as<float>(finite | special | static_cast<std::uint32_t>(value.bits & 0x8000) << 16);
}

Half half_of(float value) {
  const auto bits = bits_as<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Half's subnormals are multiples of 2^-24, the spacing of floats from 1/2 on.
  const std::uint32_t tiny =
      bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<std::uint32_t>(0.5f);
  std::uint32_t half = choose(magnitude < 0x38800000u, tiny, normal);
  half = choose(magnitude >= 0x47800000u, 0x7c00u, half);
  half = choose(magnitude > 0x7f800000u, 0x7e00u | (magnitude >> 13 & 0x3ffu), half);
  return {static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000u))};
}

float single_of(BFloat16 value) {
  return bits_as<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

BFloat16 bfloat16_of(float value) {
  const auto bits = bits_as<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const std::uint32_t nan = bits >> 16 | 0x40u;
  return {static_cast<std::uint16_t>(choose((bits & 0x7fffffffu) > 0x7f800000u, nan, rounded))};
}

// ---- kWidth elements as doubles, or as floats
// ------------------------------------------------------------------------------------------------

template <typename V>
V load_bits(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

F32 singles(const float* in) { return load_bits<F32>(in); }

F32 singles(const BFloat16* in) {
  return bits_as<F32>(__builtin_convertvector(load_bits<U16>(in), U32) << 16);
}

F32 singles(const Half* in) {
#if defined(__AVX512F__)
  return bits_as<F32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
#elif defined(__AVX2__)
  return bits_as<F32>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in))));
#else
  F32 value;
  for (int lane = 0; lane < kWidth; ++lane) value[lane] = single_of(in[lane]);
  return value;
#endif
}

void put(F32 value, float* out) { __builtin_memcpy(out, &value, sizeof value); }

void put(F32 value, BFloat16* out) {
  const auto bits = bits_as<U32>(value);
  const U32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const auto is_nan = bits_as<U32>((bits & 0x7fffffffu) > 0x7f800000u);
  const U32 chosen = ((bits >> 16 | 0x40u) & is_nan) | (rounded & ~is_nan);
  const U16 narrow = __builtin_convertvector(chosen, U16);
  __builtin_memcpy(out, &narrow, sizeof narrow);
}

void put(F32 value, Half* out) {
#if defined(__AVX512F__)
  const __m128i narrow = _mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow);
#elif defined(__AVX2__)
  const __m128i narrow = _mm_cvtps_ph(bits_as<__m128>(value), _MM_FROUND_TO_NEAREST_INT);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), narrow);
#else
  for (int lane = 0; lane < kWidth; ++lane) out[lane] = half_of(value[lane]);
#endif
}

template <typename T>
F64 doubles(const T* in) {
  return __builtin_convertvector(singles(in), F64);
}
F64 doubles(const double* in) { return load_bits<F64>(in); }

template <typename T>
void put(F64 value, T* out) {
  put(__builtin_convertvector(value, F32), out);
}
void put(F64 value, double* out) { __builtin_memcpy(out, &value, sizeof value); }

// sum + a * b. For T up to float32 the product is exact, and fused is the same as separate.
template <typename T>
F64 add_product(F64 sum, F64 a, F64 b) {
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<T, double>)
    return bits_as<F64>(
        _mm512_fmadd_pd(bits_as<__m512d>(a), bits_as<__m512d>(b), bits_as<__m512d>(sum)));
#elif defined(__AVX2__)
  if constexpr (!std::is_same_v<T, double>)
    return bits_as<F64>(
        _mm256_fmadd_pd(bits_as<__m256d>(a), bits_as<__m256d>(b), bits_as<__m256d>(sum)));
#endif
  return sum + a * b;
}

// ---- sums in 16 lanes
// ------------------------------------------------------------------------------------------------

struct Lanes {
  F64 of[kRegisters] = {};

  double total() const {
    double lanes[kLanes];
    __builtin_memcpy(lanes, of, sizeof lanes);
    for (int width = kLanes / 2; width > 0; width /= 2)
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
  for (; i + kLanes <= numel; i += kLanes) add(lower + i, upper + i);
  if (i < numel) {
    const Tail<T> l(lower + i, numel - i), u(upper + i, numel - i);
    add(l.elements, u.elements);
  }
  stats[0] = dot.total();
  stats[1] = lower_sq.total();
  stats[2] = upper_sq.total();
}

// Calls body(in + i, out + i) for every kWidth elements; the last ones come in a padded copy.
template <typename T, typename Body>
void for_each_register(std::int64_t numel, T* out, Body&& body) {
  std::int64_t i = 0;
  for (; i + kWidth <= numel; i += kWidth) body(i, out + i, kWidth);
  if (i < numel) {
    T last[kWidth];
    body(i, last, numel - i);
    __builtin_memcpy(out + i, last, static_cast<std::size_t>(numel - i) * sizeof(T));
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
  for_each_register(numel, static_cast<T*>(out),
                    [&](std::int64_t i, T* to, std::int64_t count) __attribute__((always_inline)) {
                      put(lower_share * doubles_of_some(lower + i, count) +
                              upper_share * doubles_of_some(upper + i, count),
                          to);
                    });
}

// ---- scaling
// --------------------------------------------------------------------------------------------------

template <typename T>
constexpr bool kIsFloat =
    std::is_floating_point_v<T> || std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;

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
    for_each_register(
        numel, out, [&](std::int64_t i, T* to, std::int64_t count) __attribute__((always_inline)) {
          put(scale * doubles_of_some(in + i, count), to);
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
  if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>) {
    std::int64_t i = 0;
    for (; i + kWidth <= numel; i += kWidth) put(singles(in + i), out + i);
    for (; i < numel; ++i) out[i] = single_of(in[i]);
  } else if constexpr (std::is_same_v<T, Bool>) {
    for (std::int64_t i = 0; i < numel; ++i) out[i].bits = in[i].bits != 0;
  } else {
    for (std::int64_t i = 0; i < numel; ++i) out[i] = static_cast<A>(in[i]);
  }
}

template <typename A, typename T>
void narrow(const A* in, std::int64_t numel, T* out) {
  if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>) {
    std::int64_t i = 0;
    for (; i + kWidth <= numel; i += kWidth) put(singles(in + i), out + i);
    if constexpr (std::is_same_v<T, Half>)
      for (; i < numel; ++i) out[i] = half_of(in[i]);
    else
      for (; i < numel; ++i) out[i] = bfloat16_of(in[i]);
  } else {
    __builtin_memcpy(out, in, static_cast<std::size_t>(numel) * sizeof(T));
  }
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

template <typename A>
void add_squares(const A* block, std::int64_t numel, Lanes& lanes) {
  const auto add = [&](const A* in) __attribute__((always_inline)) {
    for (int r = 0; r < kRegisters; ++r) {
      const F64 value = doubles(in + r * kWidth);
      lanes.of[r] = add_product<A>(lanes.of[r], value, value);
    }
  };
  std::int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) add(block + i);
  if (i < numel) add(Tail<A>(block + i, numel - i).elements);
}

template <typename T, typename A>
void divide_and_store(const A* block, std::int64_t numel, double divisor, T* out) {
  if (divisor == 1.0) {
    if constexpr (std::is_same_v<T, A> || kIsFloat<T>)
      narrow(block, numel, out);
    else
      for (std::int64_t i = 0; i < numel; ++i) out[i] = static_cast<T>(block[i]);
  } else if constexpr (std::is_same_v<T, double>) {
    for (std::int64_t i = 0; i < numel; ++i) out[i] = block[i] / divisor;
  } else if constexpr (kIsFloat<T>) {
    // A product with the reciprocal rounds to the float that the quotient rounds to: no quotient of
    // a float and a small integer lies close enough to the middle between two floats.
    const double reciprocal = 1.0 / divisor;
    for_each_register(
        numel, out, [&](std::int64_t i, T* to, std::int64_t count) __attribute__((always_inline)) {
          put(doubles_of_some(block + i, count) * reciprocal, to);
        });
  } else if constexpr (std::is_integral_v<T>) {
    for (std::int64_t i = 0; i < numel; ++i)
      out[i] = integer_of<T>(static_cast<double>(block[i]) / divisor);
  }
}

template <typename T, typename Op, bool is_average>
void reduce_run(const ReduceRun& run) {
  using A = typename AccumulatorOf<T, is_average>::type;
  constexpr bool kHasSquares = kIsFloat<T> && std::is_same_v<Op, SumOf>;
  A block[kBlock];
  A staged[kBlock];
  Lanes of_inputs, of_result;
  for (std::int64_t done = 0; done < run.numel; done += kBlock) {
    const std::int64_t numel = run.numel - done < kBlock ? run.numel - done : kBlock;
    const std::int64_t begin = run.begin + done;
    widen(static_cast<const T*>(run.inputs[0]) + begin, numel, block);
    if constexpr (kHasSquares)
      if (run.squares != nullptr) add_squares(block, numel, of_inputs);
    for (int k = 1; k < run.num_inputs; ++k) {
      const T* in = static_cast<const T*>(run.inputs[k]) + begin;
      const A* next = staged;
      if constexpr (std::is_same_v<T, A> && !std::is_same_v<T, Bool>)
        next = in;
      else
        widen(in, numel, staged);
      if constexpr (kHasSquares)
        if (run.squares != nullptr) add_squares(next, numel, of_inputs);
      for (std::int64_t i = 0; i < numel; ++i) block[i] = Op::apply(block[i], next[i]);
    }
    if constexpr (kHasSquares)
      if (run.squares != nullptr) add_squares(block, numel, of_result);
    divide_and_store(block, numel, run.divisor, static_cast<T*>(run.out) + begin);
  }
  if constexpr (kHasSquares)
    if (run.squares != nullptr) {
      run.squares[0] += of_inputs.total();
      run.squares[1] += of_result.total();
    }
}

template <typename T, typename Op>
void reduce(const ReduceRun& run) {
  if constexpr (std::is_integral_v<T>)
    if (run.divisor != 1.0) return reduce_run<T, Op, true>(run);
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
    {scale<std::uint8_t>, scale<std::int8_t>, scale<std::int16_t>, scale<std::int32_t>,
     scale<std::int64_t>, scale<Half>, scale<BFloat16>, scale<float>, scale<double>, nullptr},
    {ADAREDUCE_NUMBERS(SumOf, nullptr), ADAREDUCE_NUMBERS(MinOf, (reduce<Bool, MinOf>)),
     ADAREDUCE_NUMBERS(MaxOf, (reduce<Bool, MaxOf>)),
     ADAREDUCE_NUMBERS(ProductOf, (reduce<Bool, ProductOf>))},
    {nullptr, nullptr, nullptr, nullptr, nullptr, count_nonfinite<std::uint16_t, 0x7c00>,
     count_nonfinite<std::uint16_t, 0x7f80>, count_nonfinite<std::uint32_t, 0x7f800000u>,
     count_nonfinite<std::uint64_t, 0x7ff0000000000000u>, nullptr},
    read,
    axpby,
};

}  // namespace adareduce::cpu
