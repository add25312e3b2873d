#pragma once
#include <vector>

#include "base/cuda_plugin.h"
#include "engine/request.h"

namespace adareduce {

/// What a request on CUDA tensors needs besides: pointers into device memory, all may be null.
struct DeviceArguments {
  void* stream = nullptr;     ///< the caller's
  bool is_capturing = false;  ///< the caller's stream records a graph
  const double* local_squares = nullptr;
  double* group_stats = nullptr;
  double* orthogonality = nullptr;
  double* cancellation = nullptr;
  std::int64_t* nonfinite = nullptr;
};

/// Throws UsageError for what check() cannot see: rows, and memory for results made of rows.
void check_on_device(const Request& request, Rank rank, int size);

/// What a plan on the device depends on: the request without its name, scale factors and pointers.
/// Whether it is known is the same on all ranks of a process set that make the same calls.
Signature device_key(const Request& request);

/// The tensors of a request for adareduce_cuda_request.
std::vector<adareduce_cuda_tensor> tensors_on_device(const Request& request);

}  // namespace adareduce
