#pragma once
// Sums, averages, products and extremes as NCCL takes them.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "transports/nccl/nccl_api.h"

namespace fake_nccl {

namespace nccl = adareduce::cuda::nccl;

/// Bytes per element; 0 for a type that NCCL does not have.
std::size_t size_of(nccl::ncclDataType_t type);
std::string name_of(nccl::ncclDataType_t type);
std::string name_of(nccl::ncclRedOp_t op);

/// out[i] = inputs[0][i] op inputs[1][i] op ..., rounded to the type after each step; integers
/// wrap, Min and Max pass over NaN, averages multiply before they add. `out` may be one of the
/// inputs.
void reduce(nccl::ncclRedOp_t op, nccl::ncclDataType_t type, const std::vector<const void*>& inputs,
            std::size_t count, void* out);

}  // namespace fake_nccl
