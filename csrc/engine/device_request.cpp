#include "engine/device_request.h"

#include <numeric>

#include "base/errors.h"

namespace adareduce {
namespace {

std::int64_t first_extent(const TensorArg& tensor) {
  return tensor.shape.empty() ? 1 : tensor.shape.front();
}

std::int64_t row_numel(const TensorArg& tensor) {
  std::int64_t numel = 1;
  for (std::size_t i = 1; i < tensor.shape.size(); ++i) numel *= tensor.shape[i];
  return numel;
}

// Rows of the result of tensor `t` on `rank`.
std::int64_t result_rows(const Request& request, std::size_t t, Rank rank, int size) {
  const std::int64_t* rows = request.rows.data();
  std::int64_t sum = 0;
  switch (request.collective) {
    case Collective::reducescatter:
      return rows_of(first_extent(request.tensors[t]), rank, size);
    case Collective::allgather:
      return std::accumulate(rows + t * static_cast<std::size_t>(size),
                             rows + (t + 1) * static_cast<std::size_t>(size), std::int64_t{0});
    case Collective::alltoall:
      for (Rank from = 0; from < size; ++from) sum += rows[from * size + rank];
      return sum;
    default:
      return first_extent(request.tensors[t]);
  }
}

}  // namespace

void check_on_device(const Request& request, Rank rank, int size) {
  const auto refuse = [&](const auto&... words) {
    throw UsageError(concat(name_of(request.collective), ": ", words...));
  };
  const bool is_allgather = request.collective == Collective::allgather;
  const bool is_alltoall = request.collective == Collective::alltoall;
  const auto num_ranks = static_cast<std::size_t>(size);
  const std::size_t wanted = is_allgather  ? request.tensors.size() * num_ranks
                             : is_alltoall ? num_ranks * num_ranks
                                           : 0;
  if (request.rows.size() != wanted)
    refuse("rows must have ", wanted, " entries for ", size, " ranks, got ", request.rows.size());
  for (const std::int64_t rows : request.rows)
    if (rows < 0) refuse("rows must not be negative, got ", rows);
  for (std::size_t t = 0; t < request.tensors.size(); ++t) {
    const TensorArg& tensor = request.tensors[t];
    std::int64_t own = first_extent(tensor);
    if (is_allgather) own = request.rows[t * num_ranks + static_cast<std::size_t>(rank)];
    if (is_alltoall)
      own = std::accumulate(request.rows.begin() + rank * size,
                            request.rows.begin() + (rank + 1) * size, std::int64_t{0});
    if (own != first_extent(tensor))
      refuse("tensor ", t, " must have as many rows as are announced, ", own, ", got ",
             first_extent(tensor));
    const bool is_made_of_rows =
        is_allgather || is_alltoall || request.collective == Collective::reducescatter;
    if (is_made_of_rows && tensor.output == nullptr &&
        result_rows(request, t, rank, size) * row_numel(tensor) > 0)
      refuse("the result of tensor ", t, " has elements but no memory");
  }
}

Signature device_key(const Request& request) {
  Hasher hasher;
  const bool is_reduction = request.collective == Collective::allreduce ||
                            request.collective == Collective::reducescatter;
  hasher.add(static_cast<std::uint64_t>(request.collective))
      .add(is_reduction ? static_cast<std::uint64_t>(request.op) : 0)
      .add(request.collective == Collective::broadcast ? static_cast<std::uint64_t>(request.root)
                                                       : 0)
      .add(static_cast<std::uint64_t>(request.has_statistics))
      .add(static_cast<std::uint64_t>(request.has_local_squares))
      .add(static_cast<std::uint64_t>(request.tensors.size()));
  for (const TensorArg& tensor : request.tensors)
    hasher.add(static_cast<std::uint64_t>(tensor.dtype))
        .add(static_cast<std::uint64_t>(tensor.numel()))
        .add(static_cast<std::uint64_t>(first_extent(tensor)))
        .add(static_cast<std::uint64_t>(row_numel(tensor)))
        .add(request.has_statistics ? static_cast<std::uint64_t>(tensor.group) : 0);
  for (const std::int64_t rows : request.rows) hasher.add(static_cast<std::uint64_t>(rows));
  return hasher.finish();
}

std::vector<adareduce_cuda_tensor> tensors_on_device(const Request& request) {
  std::vector<adareduce_cuda_tensor> tensors;
  for (const TensorArg& tensor : request.tensors)
    tensors.push_back({first_extent(tensor), row_numel(tensor),
                       static_cast<std::int32_t>(tensor.dtype), tensor.group});
  return tensors;
}

}  // namespace adareduce
