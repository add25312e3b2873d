#pragma once

// One function for every device, so that the host, the CPU kernels and CUDA cannot disagree.
#ifdef __CUDACC__
#define ADAREDUCE_HOST_DEVICE __host__ __device__
#else
#define ADAREDUCE_HOST_DEVICE
#endif

namespace adareduce {

/// sqrt(DBL_MIN). A squared norm below it has lost bits to underflow: the vector counts as zero.
inline constexpr double kSmallestSquaredNorm = 0x1p-511;

/// The share of a vector that Adasum keeps: 1 - <a,b> / (2 |a|^2), or all of it when |a| vanishes.
/// NaN where the statistics are not finite in a way that matters (docs/algorithms.md, "Adasum").
ADAREDUCE_HOST_DEVICE inline double adasum_share(double dot, double squared_norm) {
  return squared_norm < kSmallestSquaredNorm ? 1.0 : 1.0 - 0.5 * (dot / squared_norm);
}

/// |share_a a + share_b b|^2 / sum of |g_i|^2, from {<a,b>, |a|^2, |b|^2} of the last pair: 1 where
/// all leaves are orthogonal (or zero), 1 / leaves where they are equal.
ADAREDUCE_HOST_DEVICE inline double adasum_orthogonality(const double* stats,
                                                         double sum_of_squares) {
  const double lower = adasum_share(stats[0], stats[1]), upper = adasum_share(stats[0], stats[2]);
  if (sum_of_squares == 0.0) return 1.0;
  return (lower * lower * stats[1] + upper * upper * stats[2] + 2 * lower * upper * stats[0]) /
         sum_of_squares;
}

/// Unbiased estimates from `scale` gradients g_i: sigma^2, the trace of their covariance, and mu^2,
/// the squared norm of their expectation. Either may be negative. NaN for scale 1.
/// Source: arXiv 2007.05105, section 3.
struct VarianceAndNorm {
  double variance;
  double squared_norm;
};
ADAREDUCE_HOST_DEVICE inline VarianceAndNorm variance_and_norm(double sum_of_squares,
                                                               double squared_norm_of_mean,
                                                               double scale) {
  const double variance = (sum_of_squares - scale * squared_norm_of_mean) / (scale - 1);
  return {variance, squared_norm_of_mean - variance / scale};
}

}  // namespace adareduce
