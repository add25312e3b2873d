#include "engine/execution.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/errors.h"
#include "collectives/allgather.h"
#include "collectives/reduce_scatter.h"
#include "engine/packing.h"

namespace adareduce {
namespace {

void copy(void* to, const void* from, std::int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

FusedBuffer fused_buffer(const Plan::Part& part, Workspace& workspace) {
  return {at(workspace.data.data(), part.offset, 1), workspace.scratch.data(), part.numel,
          part.dtype, part.table()};
}

std::span<double> stats_of(const Plan::Part& part, Workspace& workspace) {
  return {static_cast<double*>(workspace.stats.data()),
          static_cast<std::size_t>(part.reduction.stats_numel)};
}

Task execute_allreduce(Context context, const Request& request, const Plan& plan,
                       Workspace& workspace, Result& result) {
  pack(context.kernels, request, plan, workspace.data.data());
  std::vector<double> squares(static_cast<std::size_t>(request.num_groups() * kSquaresPerGroup));
  ReductionStatistics& statistics = result.statistics;
  const bool has_orthogonality = request.has_statistics && request.op == ReduceOp::adasum;
  statistics.orthogonality.resize(has_orthogonality ? request.tensors.size() : 0);
  std::vector<double> local_squares = request.local_squares;
  for (const Plan::Part& part : plan.parts) {
    std::vector<double> of_part(has_orthogonality ? part.tensors.size() : 0);
    co_await allreduce(context, part.reduction, fused_buffer(part, workspace),
                       stats_of(part, workspace),
                       {squares.data(), has_orthogonality ? of_part.data() : nullptr,
                        local_squares.empty() ? nullptr : local_squares.data()});
    std::ranges::fill(local_squares, 0.0);  // they count once
    for (std::size_t t = 0; t < of_part.size(); ++t)
      statistics.orthogonality[part.tensors[t]] = of_part[t];
  }
  statistics.groups = group_statistics(squares, context.transport.size(), !local_squares.empty());
  if (request.has_statistics) statistics.nonfinite.resize(request.tensors.size());
  // Only now: all tensors are written, or none.
  unpack(context.kernels, request, plan, workspace.data.data(),
         request.has_statistics ? statistics.nonfinite.data() : nullptr);
}

Task execute_reducescatter(Context context, const Request& request, const Plan& plan,
                           Workspace& workspace) {
  pack(context.kernels, request, plan, workspace.data.data());
  for (const Plan::Part& part : plan.parts)
    co_await reduce_scatter(context, fused_buffer(part, workspace), part.reduction.shards,
                            reduction_of(request.op, context.transport.size()), {});
  unpack(context.kernels, request, plan, workspace.data.data());
}

Task execute_broadcast(Context context, const Request& request, const Plan& plan,
                       Workspace& workspace) {
  if (context.transport.rank() == request.root)
    pack(context.kernels, request, plan, workspace.data.data());
  co_await broadcast(context, plan.broadcast, workspace.data.data(), plan.fused_bytes);
  unpack(context.kernels, request, plan, workspace.data.data());
}

Task execute_allgather(Context context, const Request& request, Result& result) {
  const std::size_t num_tensors = request.tensors.size();
  const auto num_ranks = static_cast<std::size_t>(context.transport.size());
  const auto self = static_cast<std::size_t>(context.transport.rank());

  // How many rows every rank brings to each tensor.
  std::vector<std::int64_t> rows(num_ranks * num_tensors);
  for (std::size_t t = 0; t < num_tensors; ++t)
    rows[self * num_tensors + t] = request.tensors[t].shape.front();
  co_await allgather_numbers(context, kDataTag, rows, static_cast<std::int64_t>(num_tensors));

  const auto bytes_from = [&](std::size_t from, std::size_t t) {
    return rows[from * num_tensors + t] * row_bytes(request.tensors[t]);
  };
  std::vector<std::int64_t> bytes_of(num_ranks, 0);
  std::vector<std::int64_t> begin_of{0};
  for (std::size_t from = 0; from < num_ranks; ++from) {
    for (std::size_t t = 0; t < num_tensors; ++t) bytes_of[from] += bytes_from(from, t);
    begin_of.push_back(begin_of.back() + bytes_of[from]);
  }

  const auto all = std::make_shared<Buffer>(static_cast<std::size_t>(begin_of.back()));
  std::int64_t place = begin_of[self];
  for (std::size_t t = 0; t < num_tensors; ++t) {
    copy(at(all->data(), place, 1), request.tensors[t].input, bytes_from(self, t));
    place += bytes_from(self, t);
  }
  co_await allgather(context, kDataTag, all->data(), bytes_of);

  // Blocks came by rank, results are wanted by tensor; for one tensor these are the same.
  for (std::size_t t = 0; t < num_tensors; ++t) {
    GatheredTensor gathered{all, request.tensors[t].shape, {}};
    std::int64_t bytes = 0;
    for (std::size_t from = 0; from < num_ranks; ++from) {
      gathered.rows_from.push_back(rows[from * num_tensors + t]);
      bytes += bytes_from(from, t);
    }
    gathered.shape.front() =
        std::accumulate(gathered.rows_from.begin(), gathered.rows_from.end(), std::int64_t{0});
    if (num_tensors > 1) {
      gathered.memory = std::make_shared<Buffer>(static_cast<std::size_t>(bytes));
      std::int64_t filled = 0;
      for (std::size_t from = 0; from < num_ranks; ++from) {
        copy(at(gathered.memory->data(), filled, 1), at(all->data(), begin_of[from], 1),
             bytes_from(from, t));
        filled += bytes_from(from, t);
        begin_of[from] += bytes_from(from, t);
      }
    }
    result.gathered.push_back(std::move(gathered));
  }
}

Task execute_alltoall(Context context, const Request& request, const Plan& plan,
                      Workspace& workspace, Result& result) {
  const auto num_ranks = static_cast<std::size_t>(context.transport.size());
  const auto self = static_cast<std::size_t>(context.transport.rank());
  const TensorArg& tensor = request.tensors.front();
  const std::int64_t width = row_bytes(tensor);

  // Row r of the table: what rank r sends to each.
  std::vector<std::int64_t> splits(num_ranks * num_ranks);
  std::copy(request.splits.begin(), request.splits.end(),
            splits.begin() + static_cast<std::ptrdiff_t>(self * num_ranks));
  co_await allgather_numbers(context, kDataTag, splits, static_cast<std::int64_t>(num_ranks));

  GatheredTensor gathered{nullptr, tensor.shape, {}};
  for (std::size_t from = 0; from < num_ranks; ++from)
    gathered.rows_from.push_back(splits[from * num_ranks + self]);
  gathered.shape.front() =
      std::accumulate(gathered.rows_from.begin(), gathered.rows_from.end(), std::int64_t{0});
  gathered.memory =
      std::make_shared<Buffer>(static_cast<std::size_t>(gathered.shape.front() * width));

  pack(context.kernels, request, plan, workspace.data.data());
  std::vector<SendPart> sends;
  std::vector<RecvPart> receives;
  const char* from_here = static_cast<const char*>(workspace.data.data());
  char* to_here = static_cast<char*>(gathered.memory->data());
  for (std::size_t peer = 0; peer < num_ranks; ++peer) {
    const std::int64_t send_bytes = request.splits[peer] * width;
    const std::int64_t receive_bytes = gathered.rows_from[peer] * width;
    if (peer == self)
      copy(to_here, from_here, send_bytes);
    else {
      if (send_bytes > 0) sends.push_back({static_cast<Rank>(peer), from_here, send_bytes});
      if (receive_bytes > 0) receives.push_back({static_cast<Rank>(peer), to_here, receive_bytes});
    }
    from_here += send_bytes;
    to_here += receive_bytes;
  }
  co_await context.transport.start(kDataTag, sends, receives);
  result.gathered.push_back(std::move(gathered));
}

Task nothing() { co_return; }

}  // namespace

void Workspace::reserve(const Plan& plan) {
  data.reserve(static_cast<std::size_t>(plan.fused_bytes));
  scratch.reserve(static_cast<std::size_t>(plan.scratch_bytes));
  stats.reserve(static_cast<std::size_t>(plan.stats_numel) * sizeof(double));
}

std::int64_t Workspace::bytes() const {
  return static_cast<std::int64_t>(data.bytes() + scratch.bytes());
}

void Workspace::leak() {
  data.leak();
  scratch.leak();
  stats.leak();
}

Task execute(Context context, const Request& request, const Plan& plan, Workspace& workspace,
             Result& result) {
  switch (request.collective) {
    case Collective::allreduce:
      return execute_allreduce(context, request, plan, workspace, result);
    case Collective::reducescatter:
      return execute_reducescatter(context, request, plan, workspace);
    case Collective::broadcast:
      return execute_broadcast(context, request, plan, workspace);
    case Collective::allgather:
      return execute_allgather(context, request, result);
    case Collective::alltoall:
      return execute_alltoall(context, request, plan, workspace, result);
    case Collective::barrier:
    case Collective::add_process_set:
    case Collective::cuda_path:
    case Collective::empty_shared:
      break;
  }
  return nothing();
}

}  // namespace adareduce
