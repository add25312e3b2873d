#pragma once
#include <span>
#include <vector>

#include "engine/plan.h"
#include "kernels/kernels.h"

namespace adareduce {

/// Copies the inputs of a request into the fused buffers of its plan, times prescale.
void pack(const KernelTable& kernels, const Request& request, const Plan& plan, void* fused);

/// Copies this rank's part of the fused buffers to the outputs, times postscale. `nonfinite`, where
/// it is not null, has one number per tensor: its infinities and NaNs are added.
void unpack(const KernelTable& kernels, const Request& request, const Plan& plan, const void* fused,
            std::int64_t* nonfinite = nullptr);

/// {sum |g_i|^2, |sum g_i|^2} of each group become {sum |g_i|^2, |mean|^2, sigma^2, mu^2}. Where
/// the squares were given, it is not known of how many gradients, and there are no estimates.
std::vector<double> group_statistics(std::span<const double> squares, int num_ranks,
                                     bool are_given);

/// Bytes of one row.
std::int64_t row_bytes(const TensorArg& tensor);

}  // namespace adareduce
