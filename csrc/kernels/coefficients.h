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

}  // namespace adareduce
