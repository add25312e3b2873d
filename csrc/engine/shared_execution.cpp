#include "engine/shared_execution.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/errors.h"
#include "collectives/adasum_tree.h"
#include "collectives/reduce_scatter.h"
#include "collectives/shared_adasum.h"
#include "collectives/shared_reduce.h"
#include "engine/packing.h"

namespace adareduce {
namespace {

// There are no slots to choose for; chunks should stay in a second-level cache.
constexpr std::uint32_t kResidentChoice = 4;

std::size_t index_of(std::int64_t index) { return static_cast<std::size_t>(index); }

SharedGeometry geometry_of(const SharedMemory& memory, std::int64_t width,
                           std::int64_t chunk_bytes) {
  return {.size = memory.size(),
          .width = width,
          .chunk_bytes = chunk_bytes,
          .ring_bytes = SharedMemory::kRingBytes,
          .max_segments = SharedMemory::kGramNumel / gram_numel(memory.size()),
          .gram_places = SharedMemory::kGramPlaces};
}

std::vector<std::int64_t> numels_of(const Plan::Part& part, const Request& request) {
  std::vector<std::int64_t> numels;
  for (const std::size_t t : part.tensors) numels.push_back(request.tensors[t].numel());
  return numels;
}

// ---- small requests: their data came with the headers -------------------------------------------

class Payloads {
 public:
  Payloads(const SharedMemory& memory, std::uint64_t sequence)
      : memory_(memory), sequence_(sequence) {}
  const char* of(Rank rank) const { return memory_.payload(sequence_, rank); }
  std::vector<const void*> at_offset(std::int64_t offset) const {
    std::vector<const void*> places;
    for (Rank rank = 0; rank < memory_.size(); ++rank) places.push_back(of(rank) + offset);
    return places;
  }

 private:
  const SharedMemory& memory_;
  const std::uint64_t sequence_;
};

void reduce_small(SharedNode& node, const Request& request, const Plan& plan, Workspace& workspace,
                  const Payloads& payloads, Result& result) {
  const SharedContext context = node.context({});
  const int size = node.memory().size();
  ReductionStatistics& statistics = result.statistics;
  std::vector<double> squares(index_of(request.num_groups() * kSquaresPerGroup));
  if (request.has_statistics) statistics.nonfinite.resize(request.tensors.size());
  const bool has_orthogonality = request.has_statistics && request.op == ReduceOp::adasum;
  if (has_orthogonality) statistics.orthogonality.resize(request.tensors.size());
  for (const Plan::Part& part : plan.parts) {
    const std::vector<const void*> inputs = payloads.at_offset(part.offset);
    char* const out = at(workspace.data.data(), part.offset, 1);
    if (request.op == ReduceOp::adasum) {
      std::vector<double> orthogonality(part.tensors.size());
      local_gram_adasum(context.peer_kernels, node.tree(), inputs.data(), part.segments, part.dtype,
                        out, orthogonality.data());
      for (std::size_t t = 0; has_orthogonality && t < part.tensors.size(); ++t)
        statistics.orthogonality[part.tensors[t]] = orthogonality[t];
      continue;
    }
    const Reduction reduction = reduction_of(request.op, size);
    const ReduceArgs args{.op = reduction.op,
                          .inputs = inputs.data(),
                          .num_inputs = size,
                          .out = out,
                          .numel = part.numel,
                          .dtype = part.dtype,
                          .divisor = reduction.divisor};
    const SegmentTable table = part.table();
    if (squares.empty())
      context.kernels.reduce(args, {});
    else
      context.kernels.reduce_squares({.reduce = args,
                                      .begin = 0,
                                      .segments = &table,
                                      .group_of = part.reduction.group_of.data(),
                                      .squares = squares.data()},
                                     {});
  }
  if (!request.local_squares.empty())
    for (std::size_t g = 0; g < request.local_squares.size(); ++g) {
      double& sum = squares[g * kSquaresPerGroup];
      sum = 0;
      for (Rank rank = 0; rank < size; ++rank) {
        double share = 0;
        std::memcpy(&share, payloads.of(rank) + plan.fused_bytes + g * sizeof share, sizeof share);
        sum += share;
      }
    }
  statistics.groups = group_statistics(squares, size, !request.local_squares.empty());
  unpack(context.kernels, request, plan, workspace.data.data(),
         request.has_statistics ? statistics.nonfinite.data() : nullptr);
}

// ---- large ones ---------------------------------------------------------------------------------

// The tensors of a part as the collectives take them.
struct Addresses {
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  std::vector<void*> resident;
  std::vector<std::int64_t> nonfinite;

  SharedTensors tensors(const Request& request, DType dtype) {
    return {.inputs = inputs.data(),
            .outputs = outputs.data(),
            .dtype = dtype,
            .prescale = request.prescale,
            .postscale = request.postscale,
            .nonfinite = nonfinite.empty() ? nullptr : nonfinite.data(),
            .resident = resident.empty() ? nullptr : resident.data()};
  }
};

const SharedSchedule& schedule_of(SharedNode& node, const Request& request, const Plan& plan,
                                  std::size_t index, std::uint32_t choice, bool is_resident) {
  const Plan::Part& part = plan.parts[index];
  const std::uint32_t key =
      static_cast<std::uint32_t>(index) << 8 | (is_resident ? 0x80u : 0u) | choice;
  const auto found = plan.shared->find(key);
  if (found != plan.shared->end()) return found->second;
  const SharedGeometry geometry =
      geometry_of(node.memory(), size_of(part.dtype), SharedTuning::choices()[choice].chunk_bytes);
  const auto make = [&]() -> SharedSchedule {
    if (request.collective == Collective::reducescatter) {
      std::vector<OwnedSegment> segments;
      for (const std::size_t t : part.tensors) {
        const TensorArg& tensor = request.tensors[t];
        const std::int64_t rows = tensor.shape.front();
        for (Rank rank = 0; rank < node.memory().size(); ++rank)
          segments.push_back({rank, rows == 0 ? 0
                                              : rows_of(rows, rank, node.memory().size()) *
                                                    (tensor.numel() / rows)});
      }
      return make_shared_scatter(segments, geometry);
    }
    const auto segments = lay_out(numels_of(part, request)).first;
    const bool is_adasum = request.op == ReduceOp::adasum;
    if (is_resident)
      return is_adasum ? make_resident_adasum(segments, geometry)
                       : make_resident_reduction(segments, geometry);
    return is_adasum ? make_shared_adasum(segments, geometry)
                     : make_shared_reduction(segments, geometry);
  };
  return plan.shared->emplace(key, make()).first->second;
}

Task reduce_large(SharedNode& node, const Request& request, const Plan& plan, const Header& header,
                  Result& result) {
  const bool is_resident = header.placement != 0;
  const std::uint32_t choice = is_resident ? kResidentChoice : header.choice;
  const SharedContext context = node.context(SharedTuning::choices()[choice]);
  const auto size = static_cast<std::size_t>(node.memory().size());
  const bool is_adasum = request.op == ReduceOp::adasum;
  const std::vector<void*> places = is_resident ? node.addresses_of(request) : std::vector<void*>();
  ReductionStatistics& statistics = result.statistics;
  const bool has_orthogonality = request.has_statistics && is_adasum;
  statistics.orthogonality.resize(has_orthogonality ? request.tensors.size() : 0);
  statistics.nonfinite.resize(request.has_statistics ? request.tensors.size() : 0);
  const std::int64_t num_groups = request.num_groups();
  std::vector<double> totals(index_of(num_groups * kSquaresPerGroup));
  // Their squares tell who reduces them whether to count. Scaled ones may overflow afterwards.
  const bool owners_count = request.op == ReduceOp::average && num_groups > 0 &&
                            request.has_statistics && request.postscale == 1.0;

  for (std::size_t p = 0; p < plan.parts.size(); ++p) {
    const Plan::Part& part = plan.parts[p];
    Addresses addresses;
    std::vector<std::int32_t> group_of;
    for (const std::size_t t : part.tensors) {
      addresses.inputs.push_back(request.tensors[t].input);
      addresses.outputs.push_back(request.tensors[t].output);
      group_of.push_back(request.tensors[t].group);
      for (std::size_t r = 0; is_resident && r < size; ++r)
        addresses.resident.push_back(places[t * size + r]);
    }
    if (request.has_statistics) addresses.nonfinite.resize(part.tensors.size());
    const SharedSchedule& schedule = schedule_of(node, request, plan, p, choice, is_resident);
    SharedTensors tensors = addresses.tensors(request, part.dtype);
    tensors.owners_count = owners_count;
    std::vector<double> orthogonality(has_orthogonality ? part.tensors.size() : 0);
    if (is_adasum)
      co_await shared_adasum(context, schedule, tensors, node.tree(),
                             has_orthogonality ? orthogonality.data() : nullptr);
    else
      co_await shared_reduce(context, schedule, tensors,
                             reduction_of(request.op, static_cast<int>(size)),
                             {group_of.data(), num_groups, totals.data()});
    for (std::size_t t = 0; t < orthogonality.size(); ++t)
      statistics.orthogonality[part.tensors[t]] = orthogonality[t];
    for (std::size_t t = 0; t < addresses.nonfinite.size(); ++t)
      statistics.nonfinite[part.tensors[t]] = addresses.nonfinite[t];
  }
  for (std::size_t g = 0; g < request.local_squares.size(); ++g)
    totals[g * kSquaresPerGroup] = request.local_squares[g];
  // Where tensors are resident, too, each rank has seen the results of its own pieces only.
  const std::size_t num_squares = totals.size();
  if (is_resident || owners_count)
    totals.insert(totals.end(), statistics.nonfinite.begin(), statistics.nonfinite.end());
  co_await add_totals(context, totals);
  for (std::size_t t = num_squares; t < totals.size(); ++t)
    statistics.nonfinite[t - num_squares] = static_cast<std::int64_t>(totals[t]);
  statistics.groups = group_statistics(std::span(totals).first(num_squares), static_cast<int>(size),
                                       !request.local_squares.empty());
}

Task scatter_large(SharedNode& node, const Request& request, const Plan& plan,
                   const Header& header) {
  const SharedContext context = node.context(SharedTuning::choices()[header.choice]);
  const int size = node.memory().size();
  for (std::size_t p = 0; p < plan.parts.size(); ++p) {
    Addresses addresses;
    for (const std::size_t t : plan.parts[p].tensors) {
      const TensorArg& tensor = request.tensors[t];
      const std::int64_t rows = tensor.shape.front();
      const std::int64_t bytes = rows == 0 ? 0 : row_bytes(tensor);
      std::int64_t begin = 0;
      for (Rank rank = 0; rank < size; ++rank) {
        addresses.inputs.push_back(at(tensor.input, begin, bytes));
        addresses.outputs.push_back(rank == node.memory().rank() ? tensor.output : nullptr);
        begin += rows_of(rows, rank, size);
      }
    }
    const SharedSchedule& schedule = schedule_of(node, request, plan, p, header.choice, false);
    co_await shared_scatter(context, schedule, addresses.tensors(request, plan.parts[p].dtype),
                            reduction_of(request.op, size));
  }
}

// Segments of bytes: what each rank has for the others.
Task gather_bytes(SharedNode& node, const Request& request, std::uint32_t choice,
                  const std::vector<OwnedSegment>& segments, Addresses& addresses) {
  const SharedSchedule schedule = make_shared_gather(
      segments, geometry_of(node.memory(), 1, SharedTuning::choices()[choice].chunk_bytes));
  co_await shared_gather(node.context(SharedTuning::choices()[choice]), schedule,
                         addresses.tensors(request, DType::u8));
}

Task broadcast_large(SharedNode& node, const Request& request, const Header& header) {
  std::vector<OwnedSegment> segments;
  Addresses addresses;
  for (const TensorArg& tensor : request.tensors) {
    const std::int64_t bytes = tensor.numel() * size_of(tensor.dtype);
    segments.push_back({request.root, bytes});
    addresses.inputs.push_back(tensor.input);
    addresses.outputs.push_back(tensor.output);
    if (node.memory().rank() == request.root && tensor.input != tensor.output && bytes > 0)
      std::memcpy(tensor.output, tensor.input, index_of(bytes));
  }
  co_await gather_bytes(node, request, header.choice, segments, addresses);
}

Task gather_all(SharedNode& node, const Request& request, Payloads payloads, const Header& header,
                Result& result) {
  const int size = node.memory().size();
  const std::size_t num_tensors = request.tensors.size();
  std::vector<OwnedSegment> segments;
  Addresses addresses;
  for (std::size_t t = 0; t < num_tensors; ++t) {
    const TensorArg& tensor = request.tensors[t];
    GatheredTensor gathered{nullptr, tensor.shape, {}};
    for (Rank rank = 0; rank < size; ++rank) {
      std::int64_t rows = 0;
      std::memcpy(&rows, payloads.of(rank) + t * sizeof rows, sizeof rows);
      gathered.rows_from.push_back(rows);
    }
    gathered.shape.front() =
        std::accumulate(gathered.rows_from.begin(), gathered.rows_from.end(), std::int64_t{0});
    const std::int64_t width = row_bytes(tensor);
    gathered.memory = std::make_shared<Buffer>(index_of(gathered.shape.front() * width));
    std::int64_t begin = 0;
    for (Rank rank = 0; rank < size; ++rank) {
      const std::int64_t rows = gathered.rows_from[index_of(rank)];
      void* const place = at(gathered.memory->data(), begin, width);
      segments.push_back({rank, rows * width});
      addresses.inputs.push_back(tensor.input);  // only this rank's are read
      addresses.outputs.push_back(place);
      if (rank == node.memory().rank() && rows * width > 0)
        std::memcpy(place, tensor.input, index_of(rows * width));
      begin += rows;
    }
    result.gathered.push_back(std::move(gathered));
  }
  co_await gather_bytes(node, request, header.choice, segments, addresses);
}

}  // namespace

void execute_small(SharedNode& node, const Request& request, const Plan& plan, Workspace& workspace,
                   std::uint64_t sequence, Result& result) {
  const Payloads payloads(node.memory(), sequence);
  if (request.collective == Collective::broadcast)
    unpack(node.context({}).kernels, request, plan, payloads.of(request.root));
  else
    reduce_small(node, request, plan, workspace, payloads, result);
}

Task execute_shared(SharedNode& node, const Request& request, const Plan& plan,
                    Workspace& workspace, const Header& header, Result& result) {
  if (plan.is_small) {
    execute_small(node, request, plan, workspace, header.sequence, result);
    co_return;
  }
  switch (request.collective) {
    case Collective::allgather:
      co_await gather_all(node, request, Payloads(node.memory(), header.sequence), header, result);
      break;
    case Collective::allreduce:
      co_await reduce_large(node, request, plan, header, result);
      break;
    case Collective::reducescatter:
      co_await scatter_large(node, request, plan, header);
      break;
    case Collective::broadcast:
      co_await broadcast_large(node, request, header);
      break;
    default:
      throw UsageError(concat("shared memory has no ", name_of(request.collective)));
  }
}

}  // namespace adareduce
