// Adasum's arithmetic on runs, of pairs of vectors and of up to 16, and what it shares with other
// runs: sums in 16 lanes, and writing elements. Included by cpu_runs_body.h only.
//
// Numerics: those of cpu_runs_body.h. The numbers of a Gram matrix are sums in 16 lanes of products
// in double, each for itself: which other vectors there are and how the loop is cut changes no bit.
// Combinations of vectors are computed in double in the order of the inputs, every product rounded
// before it is added, because coefficients have all of double's digits.
#include "kernels/cpu_runs_vectors.h"

namespace adareduce::cpu {
namespace {

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

constexpr int kPair = 2 * kWidth;

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

// ---- up to kMostInputs vectors
// ------------------------------------------------------------------------------------------------

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

// More vectors: a block of each is widened into the first-level cache, and there the products of
// one or two vectors with a few others are added at a time.
constexpr std::int64_t kGramBlock = 256;
static_assert(kGramBlock % kLanes == 0);

struct GramBlock {
  alignas(64) double elements[kMostInputs][kGramBlock];
  Lanes sums[kMostInputs][kMostInputs];  // of i <= j
};

#if defined(__AVX512F__)
constexpr int kMostColumns = 6, kTogether = 2;
#elif defined(__AVX2__)
constexpr int kMostColumns = 3, kTogether = 2;
#else
constexpr int kMostColumns = 3, kTogether = 1;
#endif

// Products of kRows vectors from `row` on with kColumns from `column` on. Where a second row meets
// a column before it, the product is computed and dropped.
template <typename T, int kRows, int kColumns>
void add_products(GramBlock& block, std::int64_t numel, int row, int column) {
  for (int r = 0; r < kRegisters; r += kTogether) {
    F64 sums[kRows][kColumns][kTogether];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j)
        for (int t = 0; t < kTogether; ++t)
          sums[i][j][t] = block.sums[row + i][column + j].of[r + t];
    for (std::int64_t e = r * kWidth; e < numel; e += kLanes)
      for (int t = 0; t < kTogether; ++t) {
        F64 x[kRows];
        for (int i = 0; i < kRows; ++i) x[i] = doubles(&block.elements[row + i][e + t * kWidth]);
        for (int j = 0; j < kColumns; ++j) {
          const F64 y = doubles(&block.elements[column + j][e + t * kWidth]);
          for (int i = 0; i < kRows; ++i) sums[i][j][t] = add_product<T>(sums[i][j][t], x[i], y);
        }
      }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j)
        for (int t = 0; t < kTogether; ++t)
          block.sums[row + i][column + j].of[r + t] = sums[i][j][t];
  }
}

template <typename T, int kRows, int kColumns = kMostColumns>
void add_products_of(int columns, GramBlock& block, std::int64_t numel, int row, int column) {
  if (columns == kColumns) return add_products<T, kRows, kColumns>(block, numel, row, column);
  if constexpr (kColumns > 1)
    add_products_of<T, kRows, kColumns - 1>(columns, block, numel, row, column);
}

template <typename T>
void widen_block(const T* in, std::int64_t numel, double* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    prefetch(in + i);
    for (int r = 0; r < kRegisters; ++r) put(doubles(in + i + r * kWidth), out + i + r * kWidth);
  }
  if (i == numel) return;
  const Tail<T> tail(in + i, numel - i);
  for (int r = 0; r < kRegisters; ++r)
    put(doubles(tail.elements + r * kWidth), out + i + r * kWidth);
}

template <typename T>
void gram_of_many(const void* const* inputs, int num_inputs, std::int64_t numel, double* gram) {
  using Product = std::conditional_t<std::is_same_v<T, double>, double, float>;  // exact or not
  GramBlock block;
  for (std::int64_t done = 0; done < numel; done += kGramBlock) {
    const std::int64_t count = numel - done < kGramBlock ? numel - done : kGramBlock;
    for (int k = 0; k < num_inputs; ++k)
      widen_block(static_cast<const T*>(inputs[k]) + done, count, block.elements[k]);
    for (int row = 0; row < num_inputs; row += 2) {
      // In equal parts: one column alone would wait for its own sums.
      const int parts = (num_inputs - row + kMostColumns - 1) / kMostColumns;
      for (int part = 0, column = row; part < parts; ++part) {
        const int columns = (num_inputs - column + parts - part - 1) / (parts - part);
        if (row + 1 < num_inputs)
          add_products_of<Product, 2>(columns, block, count, row, column);
        else
          add_products_of<Product, 1>(columns, block, count, row, column);
        column += columns;
      }
    }
  }
  for (int i = 0; i < num_inputs; ++i)
    for (int j = i; j < num_inputs; ++j) *gram++ += block.sums[i][j].total();
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
