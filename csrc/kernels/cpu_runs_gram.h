// Gram matrices of up to 16 runs. Included by cpu_runs_body.h only.
//
// Numerics: every number is a sum in 16 lanes of products in double, as in pair_stats: which other
// vectors there are and how the loops are cut changes no bit of it.
#include "kernels/cpu_runs_adasum.h"

namespace adareduce::cpu {
namespace {

// How many vectors have products whose sums fit into the registers, with an operand of each.
#if defined(__AVX512F__)
constexpr int kFewVectors = 4;
#else
constexpr int kFewVectors = 2;
#endif

template <typename T, int kVectors>
void gram_of_few(const void* const* inputs, std::int64_t numel, double* gram) {
  constexpr int kProducts = kVectors * (kVectors + 1) / 2;
  Lanes sums[kProducts];
  // `at(k)` points to kLanes elements.
  const auto add = [&](auto&& at) __attribute__((always_inline)) {
    for (int r = 0; r < kRegisters; ++r) {
      F64 x[kVectors];
      for (int k = 0; k < kVectors; ++k) x[k] = doubles(at(k) + r * kWidth);
      for (int i = 0, product = 0; i < kVectors; ++i)
        for (int j = i; j < kVectors; ++j, ++product)
          sums[product].of[r] = add_product<T>(sums[product].of[r], x[i], x[j]);
    }
  };
  const T* in[kVectors];
  for (int k = 0; k < kVectors; ++k) in[k] = static_cast<const T*>(inputs[k]);
  std::int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    for (int k = 0; k < kVectors; ++k) prefetch(in[k] + i);
    add([&](int k) { return in[k] + i; });
  }
  if (i < numel) {
    T last[kVectors][kLanes];
    for (int k = 0; k < kVectors; ++k) {
      const Tail<T> tail(in[k] + i, numel - i);
      __builtin_memcpy(last[k], tail.elements, sizeof last[k]);
    }
    add([&](int k) { return last[k]; });
  }
  for (int product = 0; product < kProducts; ++product) gram[product] += sums[product].total();
}

// More vectors: blocks of all of them that stay in the first-level cache, in which the products of
// a group with itself (a triangle) or with another one (a rectangle) are added at a time. Groups
// are as large as the registers allow, because every conversion to double is for one group only.
#if defined(__AVX512F__)
constexpr int kGroup = 4, kLargestTriangle = 6;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kGroup = 3, kLargestTriangle = 4;
#else
constexpr int kGroup = 2, kLargestTriangle = 2;
#endif
// Of 8, 16 and 32 KiB the best for 8 and 16 vectors, in the caches and in memory, on an Intel Xeon
// with AVX-512.
constexpr int kGramBlockBytes = 16384;

template <typename E>
struct GramBlock {
  const E* rows[kMostInputs];                                 // of elements, half types widened
  std::int64_t numel;                                         // a multiple of kLanes
  const char* next[kMostInputs];                              // where the next block lies in memory
  int element_bytes;                                          // there
  alignas(64) double sums[kMostInputs][kMostInputs][kLanes];  // of i <= j
};

// Of a triangle i <= j. GCC keeps an array in registers only if it unrolls the loops over it early.
template <bool is_triangle, int kRows, int kColumns, typename Body>
__attribute__((always_inline)) inline void for_each_product(Body&& body) {
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < (is_triangle ? j + 1 : kRows); ++i) body(i, j);
}

// Products of the vectors from `row` on with those from `column` on; of a triangle these are the
// same, and it fetches what it will need of the next block.
template <typename E, bool is_triangle, int kRows, int kColumns>
void add_products(GramBlock<E>& block, int row, int column) {
  for (int lane = 0; lane < kLanes; lane += kWidth) {
    F64 sums[kRows][kColumns];
    const auto in_memory = [&](int i, int j) { return &block.sums[row + i][column + j][lane]; };
    for_each_product<is_triangle, kRows, kColumns>(
        [&](int i, int j)
            __attribute__((always_inline)) { sums[i][j] = doubles(in_memory(i, j)); });
    for (std::int64_t e = lane; e < block.numel; e += kLanes) {
      F64 x[kRows], y[kColumns];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        if (is_triangle) __builtin_prefetch(block.next[row + i] + e * block.element_bytes, 0, 2);
        x[i] = doubles(block.rows[row + i] + e);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j)
        y[j] = is_triangle ? x[j] : doubles(block.rows[column + j] + e);
      for_each_product<is_triangle, kRows, kColumns>(
          [&](int i, int j) __attribute__((always_inline)) {
            sums[i][j] = add_product<E>(sums[i][j], x[i], y[j]);
          });
    }
    for_each_product<is_triangle, kRows, kColumns>(
        [&](int i, int j) __attribute__((always_inline)) { put(sums[i][j], in_memory(i, j)); });
  }
}

template <typename E, int kSize = kLargestTriangle>
void add_triangle(GramBlock<E>& block, int first, int size) {
  if (size == kSize) return add_products<E, true, kSize, kSize>(block, first, first);
  if constexpr (kSize > 1) add_triangle<E, kSize - 1>(block, first, size);
}

template <typename E, int kColumns = kGroup>
void add_rectangle(GramBlock<E>& block, int row, int column, int columns) {
  if (columns == kColumns) return add_products<E, false, kGroup, kColumns>(block, row, column);
  if constexpr (kColumns > 1) add_rectangle<E, kColumns - 1>(block, row, column, columns);
}

// Elements as they are, or in `room`, which is filled up with zeros to a multiple of kLanes.
template <typename T, typename E>
const E* elements_of(const T* in, std::int64_t numel, E* room) {
  if constexpr (std::is_same_v<T, E>)
    if (numel % kLanes == 0) return in;
  std::int64_t i = 0;
  const auto widen_lanes = [&](const T* from) {
    for (int e = 0; e < kLanes; e += kPerAccumulator<T>) put(accumulators(from + e), room + i + e);
  };
  for (; i + kLanes <= numel; i += kLanes) widen_lanes(in + i);
  if (i < numel) widen_lanes(Tail<T>(in + i, numel - i).elements);
  return room;
}

template <typename T>
void gram_of_many(const void* const* inputs, int num_inputs, std::int64_t numel, double* gram) {
  using E = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr int kRoom = kGramBlockBytes / static_cast<int>(sizeof(E));
  alignas(64) E room[kRoom];
  const int most = kRoom / num_inputs / kLanes * kLanes;
  GramBlock<E> block;
  block.element_bytes = static_cast<int>(sizeof(T));
  for (int i = 0; i < num_inputs; ++i)
    __builtin_memset(block.sums[i][i], 0,
                     static_cast<std::size_t>(num_inputs - i) * sizeof block.sums[i][i]);
  for (std::int64_t done = 0; done < numel; done += most) {
    const std::int64_t count = numel - done < most ? numel - done : most;
    for (int k = 0; k < num_inputs; ++k) {
      block.rows[k] = elements_of(static_cast<const T*>(inputs[k]) + done, count, room + k * most);
      block.next[k] = static_cast<const char*>(inputs[k]) + (done + most) * block.element_bytes;
    }
    block.numel = (count + kLanes - 1) / kLanes * kLanes;
    const int group = num_inputs <= kLargestTriangle ? num_inputs : kGroup;
    for (int row = 0; row < num_inputs; row += group) {
      add_triangle(block, row, num_inputs - row < group ? num_inputs - row : group);
      for (int column = row + group; column < num_inputs; column += group)
        add_rectangle(block, row, column,
                      num_inputs - column < group ? num_inputs - column : group);
    }
  }
  for (int i = 0; i < num_inputs; ++i)
    for (int j = i; j < num_inputs; ++j) *gram++ += Lanes(block.sums[i][j]).total();
}

template <typename T, int kVectors = kFewVectors>
void gram(const void* const* inputs, int num_inputs, std::int64_t numel, double* gram_matrix) {
  if (num_inputs > kFewVectors)
    gram_of_many<T>(inputs, num_inputs, numel, gram_matrix);
  else if (num_inputs == kVectors)
    gram_of_few<T, kVectors>(inputs, numel, gram_matrix);
  else if constexpr (kVectors > 1)
    gram<T, kVectors - 1>(inputs, num_inputs, numel, gram_matrix);
}

}  // namespace
}  // namespace adareduce::cpu
