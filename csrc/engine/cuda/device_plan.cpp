#include "engine/cuda/device_plan.h"

#include <algorithm>
#include <cstring>

#include "base/errors.h"
#include "collectives/adasum_tree.h"
#include "collectives/reduce_scatter.h"
#include "engine/cuda/layout256.h"
#include "engine/plan.h"
#include "transports/nccl/nccl_communicator.h"

namespace adareduce::cuda {
namespace {

// Long copies are cut, so that all blocks of a kernel have work.
constexpr std::int64_t kPeerPieceBytes = std::int64_t{1} << 18;

bool is_reduction(const Request& request) {
  return request.collective == Collective::allreduce ||
         request.collective == Collective::reducescatter;
}

std::int64_t row_numel(const TensorArg& tensor) {
  std::int64_t numel = 1;
  for (std::size_t d = 1; d < tensor.shape.size(); ++d) numel *= tensor.shape[d];
  return numel;
}

std::int64_t numel_in(const DevicePlan::Part& part, const Request& request, std::size_t t) {
  return request.tensors[part.tensors[t]].numel();
}

// One tensor after the other.
void lay_out_whole(DevicePlan::Part& part, const Request& request) {
  std::vector<std::int64_t> numels;
  for (std::size_t t = 0; t < part.tensors.size(); ++t) {
    numels.push_back(numel_in(part, request, t));
    part.pieces.push_back({part.tensors[t], 0});
  }
  std::tie(part.packed.segments, part.numel) = lay_out(numels);
  part.own_pieces = part.pieces;
  for (std::size_t t = 0; t < part.tensors.size(); ++t) {
    const auto tensor = static_cast<std::int64_t>(part.tensors[t]);
    if (!part.runs.empty() && part.runs.back().tensor + part.runs.back().count == tensor)
      ++part.runs.back().count;
    else
      part.runs.push_back({tensor, static_cast<std::int64_t>(t), 1});
  }
}

// By rank, its rows of every tensor, in blocks of one length, as NCCL wants them.
void lay_out_by_rows(DevicePlan::Part& part, const Request& request, Rank self, int size) {
  const auto block_numel = [&](Rank rank) {
    std::int64_t numel = 0;
    for (const std::size_t i : part.tensors) {
      const TensorArg& tensor = request.tensors[i];
      numel += align_up(rows_of(tensor.shape.front(), rank, size) * row_numel(tensor));
    }
    return numel;
  };
  for (Rank rank = 0; rank < size; ++rank)
    part.block_numel = std::max(part.block_numel, block_numel(rank));
  part.numel = size * part.block_numel;

  std::vector<std::int64_t> first_row(part.tensors.size(), 0);
  for (Rank rank = 0; rank < size; ++rank) {
    std::int64_t end = 0;  // of what this rank's block holds so far
    for (std::size_t t = 0; t < part.tensors.size(); ++t) {
      const TensorArg& tensor = request.tensors[part.tensors[t]];
      const std::int64_t rows = rows_of(tensor.shape.front(), rank, size);
      const std::int64_t numel = rows * row_numel(tensor);
      part.pieces.push_back({part.tensors[t], first_row[t] * row_numel(tensor)});
      part.packed.segments.push_back({rank * part.block_numel + end, numel});
      if (rank == self) {
        part.own_pieces.push_back({part.tensors[t], 0});
        part.own.segments.push_back({end, numel});
      }
      first_row[t] += rows;
      end += align_up(numel);
    }
  }
}

Shards shards_of(const DevicePlan::Part& part, const Request& request, int size) {
  Shards shards;
  for (Rank rank = 0; rank < size; ++rank)
    shards.of.push_back(request.collective == Collective::reducescatter
                            ? Range{rank * part.block_numel, (rank + 1) * part.block_numel}
                            : shard_of(part.numel, rank, size));
  return shards;
}

Method method_of(const Request& request, DType dtype, int size, const Abilities& abilities) {
  if (size == 1) return Method::single;
  const bool is_adasum = is_reduction(request) && request.op == ReduceOp::adasum;
  if (abilities.has_peers && (!abilities.has_nccl || abilities.prefers_peers || is_adasum))
    return Method::peer;
  if (!abilities.has_nccl)
    throw UsageError(concat(name_of(request.collective), ": this group has no path on the device"));
  if (is_reduction(request) && !nccl_can_reduce(request.op, dtype)) return Method::exchanges;
  return Method::nccl;
}

void plan_reduction(DevicePlan::Part& part, const Request& request, Rank rank, int size) {
  if (part.method != Method::exchanges) return;
  if (request.op == ReduceOp::adasum)
    part.reduction = make_adasum_plan(rank, size, part.numel,
                                      static_cast<std::int64_t>(part.packed.segments.size()),
                                      part.dtype, request.has_statistics);
  else
    part.reduction = make_sharded_plan(request.op, rank, shards_of(part, request, size), {}, 0);
}

// Pieces of `bytes` from one place to another.
void add_pieces(std::vector<PeerPiece>& pieces, Rank rank, std::int64_t from, std::int64_t to,
                std::int64_t bytes) {
  for (std::int64_t done = 0; done < bytes; done += kPeerPieceBytes)
    pieces.push_back({from + done, to + done, std::min(kPeerPieceBytes, bytes - done), rank, 0});
}

// What this rank reads of the others' windows: inputs lie one after the other in `in`, results in
// `out`, each on 256 bytes.
void plan_peer_copies(DevicePlan& plan, Rank self, int size) {
  const Request& request = plan.request;
  const auto ranks = static_cast<std::size_t>(size);
  Layout256 in_layout, out_layout;
  std::int64_t in_bytes = 0;
  if (request.collective == Collective::broadcast) {
    for (const DevicePlan::Part& part : plan.parts)
      add_pieces(plan.peer_pieces, request.root, part.data_offset, part.data_offset,
                 part.numel * size_of(part.dtype));
    return;
  }
  for (std::size_t t = 0; t < request.tensors.size(); ++t) {
    const TensorArg& tensor = request.tensors[t];
    const std::int64_t width = row_numel(tensor) * size_of(tensor.dtype);
    const auto rows = [&](std::size_t from, std::size_t to) {
      return request.collective == Collective::allgather ? plan.rows[t * ranks + from]
                                                         : plan.rows[from * ranks + to];
    };
    std::int64_t most = 0, total = 0;
    for (std::size_t from = 0; from < ranks; ++from) {
      std::int64_t sent = 0;
      for (std::size_t to = 0; to < ranks; ++to)
        sent = request.collective == Collective::allgather ? rows(from, 0) : sent + rows(from, to);
      most = std::max(most, sent);
      total += rows(from, static_cast<std::size_t>(self));
    }
    const std::int64_t in = in_layout.add(most * width);
    std::int64_t to = out_layout.add(total * width);
    for (std::size_t from = 0; from < ranks; ++from) {
      std::int64_t begin = in;
      if (request.collective == Collective::alltoall)
        for (std::size_t before = 0; before < static_cast<std::size_t>(self); ++before)
          begin += rows(from, before) * width;
      const std::int64_t bytes = rows(from, static_cast<std::size_t>(self)) * width;
      add_pieces(plan.peer_pieces, static_cast<Rank>(from), begin, to, bytes);
      to += bytes;
    }
    in_bytes = in_layout.bytes();
  }
  // Windows are as large on every rank: results of an alltoall differ.
  std::int64_t out_bytes = out_layout.bytes();
  if (request.collective == Collective::alltoall) {
    const TensorArg& tensor = request.tensors.front();
    for (std::size_t to = 0; to < ranks; ++to) {
      std::int64_t total = 0;
      for (std::size_t from = 0; from < ranks; ++from) total += plan.rows[from * ranks + to];
      out_bytes = std::max(out_bytes, total * row_numel(tensor) * size_of(tensor.dtype));
    }
  }
  plan.data_bytes = std::max(in_bytes, out_bytes);
}

void make_parts(DevicePlan& plan, Rank rank, int size, const Abilities& abilities) {
  const Request& request = plan.request;
  for (std::size_t i = 0; i < request.tensors.size(); ++i) {
    const DType dtype = request.tensors[i].dtype;
    auto part = std::find_if(plan.parts.begin(), plan.parts.end(),
                             [&](const DevicePlan::Part& p) { return p.dtype == dtype; });
    if (part == plan.parts.end()) {
      part = plan.parts.emplace(part);
      part->dtype = dtype;
    }
    part->tensors.push_back(i);
  }
  Layout256 data;
  for (DevicePlan::Part& part : plan.parts) {
    if (request.collective == Collective::reducescatter)
      lay_out_by_rows(part, request, rank, size);
    else
      lay_out_whole(part, request);
    part.method = method_of(request, part.dtype, size, abilities);
    plan_reduction(part, request, rank, size);
    const std::int64_t width = size_of(part.dtype);
    part.data_offset = data.add((part.numel + part.reduction.tail_numel) * width);
    part.first_segment = plan.num_segments;
    plan.num_segments += static_cast<std::int64_t>(part.packed.segments.size());
    for (const DevicePlan::Piece& piece : part.pieces)
      plan.group_of.push_back(request.tensors[piece.tensor].group);
    part.packed.items = make_items(part.packed.segments.data(),
                                   static_cast<std::int64_t>(part.packed.segments.size()));
    part.own.items =
        make_items(part.own.segments.data(), static_cast<std::int64_t>(part.own.segments.size()));
  }
  plan.num_groups = request.num_groups();
  if (plan.num_groups > 0 && !request.local_squares.empty()) {
    plan.locals.segments = {{0, plan.num_groups}};
    plan.locals.items = make_items(plan.locals.segments.data(), 1);
    plan.locals_data_offset =
        data.add(align_up(plan.num_groups) * static_cast<std::int64_t>(sizeof(double)));
  }
  plan.data_bytes = data.bytes();
}

void place_tables(DevicePlan& plan) {
  Layout256 tables;
  const auto place = [&](DevicePlan::Table& table) {
    const auto bytes = [](const auto& vector) {
      return static_cast<std::int64_t>(vector.size() * sizeof vector[0]);
    };
    table.segments_offset = tables.add(bytes(table.segments));
    table.items_offset = tables.add(bytes(table.items.items));
    table.first_offset = tables.add(bytes(table.items.first));
  };
  for (DevicePlan::Part& part : plan.parts) {
    place(part.packed);
    place(part.own);
  }
  place(plan.locals);
  plan.group_of_offset =
      tables.add(static_cast<std::int64_t>(plan.group_of.size() * sizeof plan.group_of[0]));
  plan.peer_pieces_offset =
      tables.add(static_cast<std::int64_t>(plan.peer_pieces.size() * sizeof(PeerPiece)));
  plan.table_bytes = tables.bytes();
}

void place_numbers(DevicePlan& plan, int size) {
  constexpr std::int64_t kDouble = sizeof(double);
  const std::int64_t segments = std::max<std::int64_t>(plan.num_segments, 1);
  const std::int64_t groups = std::max<std::int64_t>(plan.num_groups, 1);
  std::int64_t items = 1, work = 0;
  std::int64_t stats = 2 * segments;  // squares of a part, over peers
  const auto see = [&](const DevicePlan::Table& table) {
    const auto num_items = static_cast<std::int64_t>(table.items.items.size());
    const auto num_segments = static_cast<std::int64_t>(table.segments.size());
    items = std::max(items, num_items);
    if (!plan.uses_peers()) return;
    work = std::max(work, peer_work_numel(num_segments, num_items, size));
    plan.scalars_numel = std::max(plan.scalars_numel, peer_scalars_numel(num_segments, size));
  };
  for (const DevicePlan::Part& part : plan.parts) {
    see(part.packed);
    see(part.own);
    stats = std::max(stats, part.reduction.stats_numel);
    std::int64_t scratch = part.reduction.scratch_numel * size_of(part.dtype);
    if (part.method == Method::nccl && plan.request.collective == Collective::reducescatter)
      scratch = part.block_numel * size_of(part.dtype);
    if (part.method == Method::peer && plan.request.op == ReduceOp::adasum)
      scratch = peer_stage_bytes(part.numel, part.dtype, size);
    plan.scratch_bytes = std::max(plan.scratch_bytes, scratch);
  }
  see(plan.locals);
  Layout256 numbers;
  plan.slots_offset = numbers.add(items * kSlotsPerItem * kDouble);
  plan.stats_offset = numbers.add(stats * kDouble);
  plan.squares_offset = numbers.add(std::max(size, 2) * std::max(segments, groups) * kDouble);
  plan.result_squares_offset = numbers.add(segments * kDouble);
  plan.orthogonality_offset = numbers.add(segments * kDouble);
  plan.cancellation_offset = numbers.add(segments * kDouble);
  plan.nonfinite_offset = numbers.add(segments * kDouble);
  plan.work_offset = numbers.add(work * kDouble);
  plan.zeros_offset = numbers.add(segments * (kStatsPerSegment + 2) * kDouble);
  plan.number_bytes = numbers.bytes();
}

template <typename T>
void put(std::vector<char>& image, std::int64_t offset, const std::vector<T>& values) {
  if (!values.empty()) std::memcpy(image.data() + offset, values.data(), values.size() * sizeof(T));
}

}  // namespace

bool DevicePlan::uses_peers() const {
  return method == Method::peer || std::any_of(parts.begin(), parts.end(), [](const Part& part) {
           return part.method == Method::peer;
         });
}

DevicePlan make_device_plan(Request request, std::vector<std::int64_t> rows, Rank rank, int size,
                            const Abilities& abilities) {
  DevicePlan plan;
  plan.request = std::move(request);
  plan.rows = std::move(rows);
  plan.method = method_of(plan.request, DType::u8, size, abilities);
  const bool has_rows = plan.request.collective == Collective::allgather ||
                        plan.request.collective == Collective::alltoall;
  if (!has_rows) make_parts(plan, rank, size, abilities);
  // Statistics are of float types, whose parts have one method.
  for (const DevicePlan::Part& part : plan.parts)
    if (&part == &plan.parts.front() || part.method == Method::nccl) plan.method = part.method;
  if (plan.method == Method::peer && !is_reduction(plan.request))
    plan_peer_copies(plan, rank, size);
  if (is_reduction(plan.request) && plan.request.op == ReduceOp::adasum && size <= kMaxPeers)
    plan.tree = gram_tree(make_adasum_tree(size));
  place_tables(plan);
  place_numbers(plan, size);
  return plan;
}

std::vector<char> table_image(const DevicePlan& plan) {
  std::vector<char> image(static_cast<std::size_t>(plan.table_bytes));
  const auto put_table = [&](const DevicePlan::Table& table) {
    put(image, table.segments_offset, table.segments);
    put(image, table.items_offset, table.items.items);
    put(image, table.first_offset, table.items.first);
  };
  for (const DevicePlan::Part& part : plan.parts) {
    put_table(part.packed);
    put_table(part.own);
  }
  put_table(plan.locals);
  put(image, plan.group_of_offset, plan.group_of);
  put(image, plan.peer_pieces_offset, plan.peer_pieces);
  return image;
}

}  // namespace adareduce::cuda
