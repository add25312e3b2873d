#pragma once
#include "kernels/coefficients.h"

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

}  // namespace adareduce
