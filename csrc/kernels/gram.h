#pragma once
#include <cmath>
#include <limits>

#include "kernels/coefficients.h"

// Adasum without vectors: every node of its tree is a combination sum c_i g_i of the leaves, and
// all that the coefficients need follows from the Gram matrix <g_i, g_j> (docs/algorithms.md,
// "One-shot Adasum"). One code for the host, the CPU's kernels and CUDA's.
namespace adareduce {

/// Adasum's tree as plain data, so that a kernel can take it as an argument. Leaves are
/// 0 ... size-1, node size+i has the children lower[i] and upper[i], children come before parents,
/// the last node is the root.
struct GramTree {
  static constexpr int kMaxLeaves = 16;
  int size = 1;
  signed char lower[kMaxLeaves - 1] = {};
  signed char upper[kMaxLeaves - 1] = {};

  ADAREDUCE_HOST_DEVICE int num_nodes() const { return size - 1; }
};

/// Where <g_i, g_j>, i <= j, stands among the size*(size+1)/2 numbers of a Gram matrix.
ADAREDUCE_HOST_DEVICE constexpr int gram_index(int i, int j, int size) {
  return i * size - i * (i - 1) / 2 + (j - i);
}
ADAREDUCE_HOST_DEVICE constexpr int gram_numel(int size) { return size * (size + 1) / 2; }

/// A product of two nodes taken from a Gram matrix has lost digits when its terms are larger than
/// what they add up to. Beyond this ratio the products of nodes are taken from vectors: ten bits of
/// double's 53 may go.
inline constexpr double kMostCancellation = 1024.0;
/// A node counts as zero where its squared norm is less than this part of sum c_i^2 |g_i|^2. From a
/// Gram matrix: what the rounding of its entries leaves. From a vector: of its elements, squared.
inline constexpr double kNothingOfGram = 1e-15;
inline constexpr double kNothingOfVector = 0x1p-100;

inline constexpr double kWithoutBound = std::numeric_limits<double>::infinity();

/// For every leaf and node the set of leaves below it, bit i for leaf i. [2 size - 1].
ADAREDUCE_HOST_DEVICE inline void gram_leaves(const GramTree& tree, unsigned* leaves) {
  for (int i = 0; i < tree.size; ++i) leaves[i] = 1u << i;
  for (int n = 0; n < tree.num_nodes(); ++n)
    leaves[tree.size + n] = leaves[tree.lower[n]] | leaves[tree.upper[n]];
}

/// Levels below a leaf (0) or node.
ADAREDUCE_HOST_DEVICE inline int gram_height(const GramTree& tree, int index) {
  signed char heights[2 * GramTree::kMaxLeaves - 1] = {};
  for (int n = 0; tree.size + n <= index; ++n) {
    const signed char lower = heights[tree.lower[n]], upper = heights[tree.upper[n]];
    heights[tree.size + n] = static_cast<signed char>(1 + (lower > upper ? lower : upper));
  }
  return heights[index];
}

/// <x, y> of two combinations of leaves: its terms added, their magnitudes added, and the part
/// sum c_i^2 |g_i|^2.
struct GramProduct {
  double value = 0;
  double magnitude = 0;
  double diagonal = 0;

  /// How many times larger the terms are than the sum: 1 where nothing cancels.
  ADAREDUCE_HOST_DEVICE double cancellation() const {
    if (magnitude == 0) return 1;
    return value <= 0 ? kWithoutBound : magnitude / value;
  }
};
ADAREDUCE_HOST_DEVICE inline GramProduct gram_product(int size, const double* gram, const double* c,
                                                      unsigned x, unsigned y) {
  GramProduct product;
  for (int i = 0; i < size; ++i) {
    if ((x >> i & 1u) == 0) continue;
    for (int j = 0; j < size; ++j) {
      if ((y >> j & 1u) == 0) continue;
      const double term =
          c[i] * gram[i < j ? gram_index(i, j, size) : gram_index(j, i, size)] * c[j];
      product.value += term;
      product.magnitude += term < 0 ? -term : term;
      if (i == j) product.diagonal += term;
    }
  }
  return product;
}

/// Combines two nodes with {<a,b>, |a|^2, |b|^2}: multiplies the coefficients of their leaves by
/// their shares. `nothing_*`: squared norms below these count as zero, and |<a,b>| is at most
/// |a| |b|; `stats` is changed accordingly. What is not finite stays so.
ADAREDUCE_HOST_DEVICE inline void adasum_combine(double* stats, double nothing_of_lower,
                                                 double nothing_of_upper, int size, unsigned lower,
                                                 unsigned upper, double* c) {
  if (stats[1] < nothing_of_lower) stats[1] = 0;
  if (stats[2] < nothing_of_upper) stats[2] = 0;
  const double most = std::sqrt(stats[1] * stats[2]);
  if (stats[0] > most) stats[0] = most;
  if (stats[0] < -most) stats[0] = -most;
  const double of_lower = adasum_share(stats[0], stats[1]);
  const double of_upper = adasum_share(stats[0], stats[2]);
  for (int i = 0; i < size; ++i) {
    if (lower >> i & 1u) c[i] *= of_lower;
    if (upper >> i & 1u) c[i] *= of_upper;
  }
}

/// The larger of two cancellations; NaN, once there, stays.
ADAREDUCE_HOST_DEVICE inline double worse_cancellation(double worst, double other) {
  return worst == worst && !(other <= worst) ? other : worst;
}

struct GramResult {
  double orthogonality = 1;  ///< |Adasum|^2 / sum |g_i|^2, see adasum_orthogonality()
  /// The largest of sum |c_i c_j G_ij| / |x|^2 over the vectors x that the tree combines: leaves
  /// (1) and nodes but the root, whose products nobody takes. NaN where the Gram matrix is not
  /// finite.
  double cancellation = 1;
};

/// Adasum(g_0, g_1, ...) = sum c[i] g_i, from gram[gram_index(i, j)] = <g_i, g_j>. c: [size].
/// All c are NaN that meet a NaN or an infinity of the matrix. `highest`: nodes above this height
/// are left out; c is then that of the vectors below them.
ADAREDUCE_HOST_DEVICE inline GramResult adasum_of_gram(const GramTree& tree, const double* gram,
                                                       double* c,
                                                       int highest = GramTree::kMaxLeaves) {
  unsigned leaves[2 * GramTree::kMaxLeaves - 1];
  gram_leaves(tree, leaves);
  double sum_of_squares = 0;
  for (int i = 0; i < tree.size; ++i) {
    c[i] = 1;
    sum_of_squares += gram[gram_index(i, i, tree.size)];
  }
  GramResult result;
  double stats[3] = {0, 0, 0};
  for (int n = 0; n < tree.num_nodes(); ++n) {
    if (gram_height(tree, tree.size + n) > highest) continue;
    const unsigned a = leaves[tree.lower[n]], b = leaves[tree.upper[n]];
    const GramProduct aa = gram_product(tree.size, gram, c, a, a);
    const GramProduct bb = gram_product(tree.size, gram, c, b, b);
    result.cancellation = worse_cancellation(result.cancellation, aa.cancellation());
    result.cancellation = worse_cancellation(result.cancellation, bb.cancellation());
    stats[0] = gram_product(tree.size, gram, c, a, b).value;
    stats[1] = aa.value;
    stats[2] = bb.value;
    adasum_combine(stats, kNothingOfGram * aa.diagonal, kNothingOfGram * bb.diagonal, tree.size, a,
                   b, c);
  }
  if (tree.size > 1) result.orthogonality = adasum_orthogonality(stats, sum_of_squares);
  return result;
}

}  // namespace adareduce
