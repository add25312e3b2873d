// Registers of the instruction set that this file is compiled for: a vector of kWidth doubles, and
// how elements of every type get there and back. Included by cpu_runs_*.h only; everything is
// local to one object file, see cpu_runs.h.
#include <type_traits>

#include "kernels/cpu_runs.h"
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
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
#else
constexpr int kWidth = 4;  // in SSE2 and NEON doubles take two registers
#endif
constexpr int kRegisters = kLanes / kWidth;
constexpr int kPair = 2 * kWidth;

typedef double F64 __attribute__((vector_size(kWidth * 8)));
typedef float F32 __attribute__((vector_size(kWidth * 4)));
typedef std::uint32_t U32 __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t U16 __attribute__((vector_size(kWidth * 2)));

struct Halves {
  F32 of[2];
};
// kPair floats.
#if defined(__AVX2__)
typedef float Singles __attribute__((vector_size(kPair * 4)));
#else
// GCC 12 keeps vectors that are wider than registers in memory.
using Singles = Halves;
__attribute__((always_inline)) inline Singles operator+(Singles a, Singles b) {
  return {{a.of[0] + b.of[0], a.of[1] + b.of[1]}};
}
__attribute__((always_inline)) inline Singles operator*(Singles a, float b) {
  return {{a.of[0] * b, a.of[1] * b}};
}
#endif

// ---- one element
// ----------------------------------------------------------------------------------------------

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// ---- kWidth elements as doubles, or as floats
// ------------------------------------------------------------------------------------------------

template <typename V>
V load_bits(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// Conversions of a register. GCC 12 splits __builtin_convertvector into halves and joins them
// again, which costs half of the speed.
#if defined(__AVX512F__)
F64 doubles_of(F32 value) { return bits_as<F64>(_mm512_cvtps_pd(bits_as<__m256>(value))); }
F32 singles_of(F64 value) { return bits_as<F32>(_mm512_cvtpd_ps(bits_as<__m512d>(value))); }
U32 words_of(U16 value) { return bits_as<U32>(_mm256_cvtepu16_epi32(bits_as<__m128i>(value))); }
U16 lower_halves_of(U32 value) {
  return bits_as<U16>(_mm256_cvtepi32_epi16(bits_as<__m256i>(value)));
}
#elif defined(__AVX2__)
F64 doubles_of(F32 value) { return bits_as<F64>(_mm256_cvtps_pd(bits_as<__m128>(value))); }
F32 singles_of(F64 value) { return bits_as<F32>(_mm256_cvtpd_ps(bits_as<__m256d>(value))); }
U32 words_of(U16 value) {
  return bits_as<U32>(_mm_cvtepu16_epi32(_mm_set_epi64x(0, bits_as<long long>(value))));
}
U16 lower_halves_of(U32 value) {
  const __m128i even = _mm_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 13, 12, 9, 8, 5, 4, 1, 0);
  return bits_as<U16>(_mm_cvtsi128_si64(_mm_shuffle_epi8(bits_as<__m128i>(value), even)));
}
#else
F64 doubles_of(F32 value) { return __builtin_convertvector(value, F64); }
F32 singles_of(F64 value) { return __builtin_convertvector(value, F32); }
U32 words_of(U16 value) { return __builtin_convertvector(value, U32); }
U16 lower_halves_of(U32 value) { return __builtin_convertvector(value, U16); }
#endif

// Comparisons of vectors give signed masks.
template <typename Mask>
U32 mask_of(Mask comparison) {
  return bits_as<U32>(comparison);
}
template <typename Mask>
U32 choose(Mask comparison, U32 yes, U32 no) {
  return (yes & mask_of(comparison)) | (no & ~mask_of(comparison));
}

F32 singles(const float* in) { return load_bits<F32>(in); }

F32 singles(const BFloat16* in) { return bits_as<F32>(words_of(load_bits<U16>(in)) << 16); }

F32 singles(const Half* in) {
#if defined(__AVX512F__)
  return bits_as<F32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
#elif defined(__AVX2__)
  return bits_as<F32>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in))));
#else
  const U32 bits = words_of(load_bits<U16>(in));
  const U32 magnitude = (bits & 0x7fffu) << 13;
  // The exponent moves from bias 15 to bias 127 by an exact product, which normalises subnormals.
  const auto finite = bits_as<U32>(bits_as<F32>(magnitude) * 0x1p112f);
  const U32 special = mask_of(magnitude >= 0x0f800000u) & 0x7f800000u;
  const U32 quiet = mask_of(magnitude > 0x0f800000u) & 0x00400000u;
  return bits_as<F32>(finite | special | quiet | (bits & 0x8000u) << 16);
#endif
}

void put(F32 value, float* out) { __builtin_memcpy(out, &value, sizeof value); }

// To nearest, ties to even; NaN stays NaN.
void put(F32 value, BFloat16* out) {
  const auto bits = bits_as<U32>(value);
  const U32 rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const U32 chosen = choose(value != value, bits | 0x00400000u, rounded);
  const U16 narrow = lower_halves_of(chosen >> 16);
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
  const auto bits = bits_as<U32>(value);
  const U32 magnitude = bits & 0x7fffffffu;
  const U32 normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Half's subnormals are multiples of 2^-24, the spacing of floats from 1/2 on.
  const U32 tiny = bits_as<U32>(bits_as<F32>(magnitude) + 0.5f) - 0x3f000000u;
  U32 half = choose(magnitude < 0x38800000u, tiny, normal);
  half = choose(magnitude >= 0x47800000u, U32{} + 0x7c00u, half);
  half = choose(magnitude > 0x7f800000u, 0x7e00u | (magnitude >> 13 & 0x3ffu), half);
  const U16 narrow = lower_halves_of(half | (bits >> 16 & 0x8000u));
  __builtin_memcpy(out, &narrow, sizeof narrow);
#endif
}

template <typename T>
F64 doubles(const T* in) {
  return doubles_of(singles(in));
}
F64 doubles(const double* in) { return load_bits<F64>(in); }

template <typename T>
void put(F64 value, T* out) {
  put(singles_of(value), out);
}
void put(F64 value, double* out) { __builtin_memcpy(out, &value, sizeof value); }

// ---- kPair elements as floats
// ---------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
Halves halves_of(Singles value) {
  const auto all = bits_as<__m512>(value);
  return {bits_as<F32>(_mm512_castps512_ps256(all)), bits_as<F32>(_mm512_extractf32x8_ps(all, 1))};
}
Singles joined(F32 first, F32 second) {
  return bits_as<Singles>(_mm512_insertf32x8(_mm512_castps256_ps512(bits_as<__m256>(first)),
                                             bits_as<__m256>(second), 1));
}
#elif defined(__AVX2__)
Halves halves_of(Singles value) {
  const auto all = bits_as<__m256>(value);
  return {bits_as<F32>(_mm256_castps256_ps128(all)), bits_as<F32>(_mm256_extractf128_ps(all, 1))};
}
Singles joined(F32 first, F32 second) {
  return bits_as<Singles>(_mm256_set_m128(bits_as<__m128>(second), bits_as<__m128>(first)));
}
#else
Halves halves_of(Singles value) { return value; }
Singles joined(F32 first, F32 second) { return {{first, second}}; }
#endif

template <typename T>
Singles pair_of_singles(const T* in) {
  return joined(singles(in), singles(in + kWidth));
}
#if defined(__AVX2__)
Singles pair_of_singles(const float* in) { return load_bits<Singles>(in); }
#endif

template <typename T>
void put(Singles value, T* out) {
  const Halves halves = halves_of(value);
  put(halves.of[0], out);
  put(halves.of[1], out + kWidth);
}
#if defined(__AVX2__)
void put(Singles value, float* out) { __builtin_memcpy(out, &value, sizeof value); }
#endif

// As those of a half register, twice as many at once.
#if defined(__AVX512F__)
Singles pair_of_singles(const BFloat16* in) {
  const __m512i words = _mm512_cvtepu16_epi32(load_bits<__m256i>(in));
  return bits_as<Singles>(_mm512_slli_epi32(words, 16));
}
Singles pair_of_singles(const Half* in) {
  return bits_as<Singles>(_mm512_cvtph_ps(load_bits<__m256i>(in)));
}
void put(Singles singles, BFloat16* out) {
  const auto value = bits_as<__m512>(singles);
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x00400000));
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
  __builtin_memcpy(out, &narrow, sizeof narrow);
}
void put(Singles value, Half* out) {
  const __m256i narrow = _mm512_cvtps_ph(bits_as<__m512>(value), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(out, &narrow, sizeof narrow);
}
#elif defined(__AVX2__)
Singles pair_of_singles(const BFloat16* in) {
  const __m256i words = _mm256_cvtepu16_epi32(load_bits<__m128i>(in));
  return bits_as<Singles>(_mm256_slli_epi32(words, 16));
}
Singles pair_of_singles(const Half* in) {
  return bits_as<Singles>(_mm256_cvtph_ps(load_bits<__m128i>(in)));
}
void put(Singles singles, BFloat16* out) {
  const auto value = bits_as<__m256>(singles);
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  // Packing works in each half of the register by itself.
  const __m256i packed = _mm256_packus_epi32(words, words);
  const __m128i narrow = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
  __builtin_memcpy(out, &narrow, sizeof narrow);
}
void put(Singles value, Half* out) {
  const __m128i narrow = _mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(out, &narrow, sizeof narrow);
}
#endif

// Registers that sums of T are added in: of doubles, or of twice as many floats.
template <typename T>
using Accumulators = std::conditional_t<std::is_same_v<T, double>, F64, Singles>;
template <typename T>
constexpr int kPerAccumulator = std::is_same_v<T, double> ? kWidth : kPair;
template <typename T>
Accumulators<T> accumulators(const T* in) {
  if constexpr (std::is_same_v<T, double>)
    return doubles(in);
  else
    return pair_of_singles(in);
}

// body(i, doubles) for the i-th kWidth elements of an accumulator; `in` is where they come from.
template <typename Body>
__attribute__((always_inline)) inline void for_each_half(F64 value, Body&& body) {
  body(0, value);
}
template <typename Body>
__attribute__((always_inline)) inline void for_each_half(Singles value, Body&& body) {
  const Halves halves = halves_of(value);
  body(0, doubles_of(halves.of[0]));
  body(1, doubles_of(halves.of[1]));
}
template <typename T, typename Body>
__attribute__((always_inline)) inline void for_each_half(const T*, Accumulators<T> value,
                                                         Body&& body) {
  for_each_half(value, body);
}
// From memory at once: quicker than to take a register apart.
template <typename Body>
__attribute__((always_inline)) inline void for_each_half(const float* in, Singles, Body&& body) {
  body(0, doubles(in));
  body(1, doubles(in + kWidth));
}

// Two registers into kPair elements. Rounding to a half type is half of the work, and is done on
// both at once, where it is more than one instruction.
template <typename T>
void put_both(F32 first, F32 second, T* out) {
  put(joined(first, second), out);
}
template <typename T>
void put_both(F64 first, F64 second, T* out) {
  put(joined(singles_of(first), singles_of(second)), out);
}
#if !defined(__AVX512F__)
void put_both(F64 first, F64 second, Half* out) {
  put(first, out);
  put(second, out + kWidth);
}
#endif
void put_both(F64 first, F64 second, double* out) {
  put(first, out);
  put(second, out + kWidth);
}

// sum + a * b, of values of T. Up to float32 the product is exact: fused is the same as separate.
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

// The hardware's own prefetching follows one stream well and two less so: without this, statistics
// of 64 MiB arrays ran at 0.75 to 0.8 of the read-only sum, with it as fast (measured on an Intel
// Xeon with AVX-512, distances from 1 to 4 KiB alike). Beyond the end of an array it does nothing.
constexpr int kPrefetchBytes = 2048;
template <typename T>
void prefetch(const T* in) {
  __builtin_prefetch(reinterpret_cast<const char*>(in) + kPrefetchBytes);
}

#if defined(__SSE2__)
// 64 bytes to an address that is a multiple of 64, past the caches.
void stream_line(const char* from, char* to) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), load_bits<__m512i>(from));
#elif defined(__AVX2__)
  for (int part = 0; part < 64; part += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + part), load_bits<__m256i>(from + part));
#else
  for (int part = 0; part < 64; part += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + part), load_bits<__m128i>(from + part));
#endif
}
#endif

}  // namespace
}  // namespace adareduce::cpu
