#include "engine/cuda/device_execution.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>

#include "base/errors.h"
#include "collectives/allreduce.h"
#include "collectives/reduce_scatter.h"
#include "engine/cuda/layout256.h"
#include "kernels/cuda/launch.h"

namespace adareduce::cuda {
namespace {

using Part = DevicePlan::Part;

// A table of the plan as kernels take it. Its parts point at each other: it stays where it is.
class TableView {
 public:
  TableView(const DevicePlan& plan, const DevicePlan::Table& table, double* slots) {
    const char* const tables = static_cast<const char*>(plan.tables);
    items_ = {table.items.items.data(),
              reinterpret_cast<const Item*>(tables + table.items_offset),
              table.items.first.data(),
              reinterpret_cast<const std::int64_t*>(tables + table.first_offset),
              static_cast<std::int64_t>(table.items.items.size()),
              slots};
    segments_ = {table.segments.data(),
                 reinterpret_cast<const TensorSegment*>(tables + table.segments_offset),
                 static_cast<std::int64_t>(table.segments.size()), &items_};
  }
  TableView(const TableView&) = delete;
  TableView& operator=(const TableView&) = delete;
  const SegmentTable* get() const { return &segments_; }

 private:
  ItemTable items_;
  SegmentTable segments_;
};

// One request on its way: everything that its steps share.
class Enqueue {
 public:
  Enqueue(const Machinery& machinery, const DevicePlan& plan, const LaunchArgs& args)
      : m_(machinery), plan_(plan), args_(args) {}

  void run() {
    switch (plan_.request.collective) {
      case Collective::allreduce:
        return allreduce_all();
      case Collective::reducescatter:
        for (const Part& part : plan_.parts) reducescatter(part);
        return;
      case Collective::broadcast:
        return broadcast();
      case Collective::allgather:
      case Collective::alltoall:
        return plan_.method == Method::peer ? move_over_peers() : move_over_nccl();
      case Collective::barrier:
      case Collective::add_process_set:
      case Collective::cuda_path:
      case Collective::empty_shared:
        break;
    }
    throw UsageError("this collective has no form on the device");
  }

 private:
  template <typename T>
  T* numbers(std::int64_t offset) const {
    return reinterpret_cast<T*>(m_.numbers + offset);
  }
  double* slots() const { return numbers<double>(plan_.slots_offset); }
  std::int64_t num_ranks() const { return m_.size; }
  bool has_squares() const { return args_.group_stats != nullptr; }
  bool has_local_squares() const { return !plan_.request.local_squares.empty(); }

  char* fused(const Part& part) const { return m_.data + part.data_offset; }
  // Where the result lies: peers push it into a window of its own.
  char* result(const Part& part) const {
    if (part.method != Method::peer) return fused(part);
    return m_.peers->out[static_cast<std::size_t>(m_.rank)] + part.data_offset;
  }

  void pack(const Part& part, double* squares = nullptr) {
    std::vector<const void*> tensors;
    for (const DevicePlan::Piece& piece : part.pieces)
      tensors.push_back(at(args_.inputs[piece.tensor], piece.begin, size_of(part.dtype)));
    const TableView table(plan_, part.packed, slots());
    m_.kernels->pack({.tensors = tensors.data(),
                      .fused = fused(part),
                      .numel = part.numel,
                      .dtype = part.dtype,
                      .segments = table.get(),
                      .scale = args_.prescale,
                      .squares = squares},
                     m_.stream);
  }

  void unpack(const Part& part, const void* from, const DevicePlan::Table& what,
              std::int64_t* nonfinite = nullptr, double* squares = nullptr) {
    std::vector<void*> tensors;
    for (const DevicePlan::Piece& piece : part.own_pieces)
      tensors.push_back(at(args_.outputs[piece.tensor], piece.begin, size_of(part.dtype)));
    const TableView table(plan_, what, slots());
    m_.kernels->unpack({.fused = from,
                        .tensors = tensors.data(),
                        .dtype = part.dtype,
                        .segments = table.get(),
                        .scale = args_.postscale,
                        .nonfinite = nonfinite,
                        .squares = squares},
                       m_.stream);
  }

  // From the order of a part's segments to that of the request's tensors.
  template <typename T>
  void deliver(const Part& part, const T* of_part, T* out) {
    if (out == nullptr) return;
    for (const DevicePlan::Run& run : part.runs)
      m_.kernels->copy(of_part + run.segment, run.count * static_cast<std::int64_t>(sizeof(T)),
                       out + run.tensor, m_.stream);
  }

  // ---- allreduce ------------------------------------------------------------------------------

  void allreduce_all() {
    double* const squares = has_squares() ? numbers<double>(plan_.squares_offset) : nullptr;
    // Row r of the squares is what rank r has packed; or of the groups, where they were given.
    double* const own_squares = squares == nullptr ? nullptr : squares + m_.rank * row_numel();
    for (const Part& part : plan_.parts)
      pack(part, squares == nullptr || has_local_squares() || part.method == Method::peer
                     ? nullptr
                     : own_squares + part.first_segment);
    if (squares != nullptr && has_local_squares()) bring_local_squares(own_squares);

    if (plan_.method == Method::nccl) {
      NcclGroup group(*m_.nccl);  // one launch
      for (const Part& part : plan_.parts)
        if (part.method == Method::nccl)
          m_.nccl->all_reduce(fused(part), fused(part), part.numel, part.dtype, plan_.request.op);
      if (squares != nullptr) m_.nccl->all_gather(own_squares, squares, row_numel(), DType::f64);
      group.end();
    }

    for (const Part& part : plan_.parts) {
      if (part.method == Method::exchanges) reduce_by_exchanges(part);
      if (part.method == Method::peer) reduce_over_peers(part);
      finish(part);
    }
    if (squares != nullptr) reduce_squares_of_groups(squares);
  }

  std::int64_t row_numel() const {
    return has_local_squares() ? plan_.num_groups : plan_.num_segments;
  }

  void bring_local_squares(double* own_row) {
    const std::int64_t bytes = plan_.num_groups * static_cast<std::int64_t>(sizeof(double));
    char* const to = plan_.method == Method::peer ? m_.data + plan_.locals_data_offset
                                                  : reinterpret_cast<char*>(own_row);
    m_.kernels->copy(args_.local_squares, bytes, to, m_.stream);
  }

  void finish(const Part& part) {
    auto* const nonfinite =
        args_.nonfinite == nullptr
            ? nullptr
            : numbers<std::int64_t>(plan_.nonfinite_offset) + part.first_segment;
    // Over peers the squares are those of the mean before it was rounded.
    double* const squares = has_squares() && part.method != Method::peer
                                ? numbers<double>(plan_.result_squares_offset) + part.first_segment
                                : nullptr;
    unpack(part, result(part), part.packed, nonfinite, squares);
    deliver(part, nonfinite, args_.nonfinite);
    if (plan_.request.op != ReduceOp::adasum) return;
    const double* orthogonality = numbers<double>(plan_.orthogonality_offset) + part.first_segment;
    if (part.method == Method::single && args_.orthogonality != nullptr) write_ones(part);
    deliver(part, orthogonality, args_.orthogonality);
    if (part.method == Method::peer)
      deliver(part, numbers<double>(plan_.cancellation_offset) + part.first_segment,
              args_.cancellation);
  }

  // The orthogonality of one rank: that of no pair at all.
  void write_ones(const Part& part) {
    const auto count = static_cast<std::int64_t>(part.packed.segments.size());
    double* const zeros = numbers<double>(plan_.zeros_offset);
    const std::int64_t numel = count * (kStatsPerSegment + 2);
    ADAREDUCE_CUDA(cudaMemsetAsync(zeros, 0, static_cast<std::size_t>(numel) * sizeof(double),
                                   native(m_.stream)));
    m_.kernels->collect_leaf_squares(
        {.num_segments = count,
         .of_node = zeros,
         .carried = zeros + count,
         .pair_stats = zeros + 2 * count,
         .lower_is_leaf = false,
         .upper_is_leaf = false,
         .orthogonality = numbers<double>(plan_.orthogonality_offset) + part.first_segment},
        m_.stream);
  }

  // The loops of collectives/, which run to their end: exchanges on a stream are complete at once.
  void run_to_the_end(Task task) {
    if (!task.progress()) throw DeviceError("an exchange on a stream was not complete at once");
  }

  FusedBuffer buffer_of(const Part& part, const TableView& table) const {
    return {fused(part), m_.scratch, part.numel, part.dtype, *table.get()};
  }

  void reduce_by_exchanges(const Part& part) {
    const TableView table(plan_, part.packed, slots());
    StatisticsOutput output;
    if (args_.orthogonality != nullptr)
      output.orthogonality = numbers<double>(plan_.orthogonality_offset) + part.first_segment;
    run_to_the_end(allreduce(
        {*m_.nccl, *m_.kernels, m_.stream}, part.reduction, buffer_of(part, table),
        {numbers<double>(plan_.stats_offset), static_cast<std::size_t>(part.reduction.stats_numel)},
        output));
  }

  void reduce_squares_of_groups(const double* squares) {
    const bool over_peers = plan_.method == Method::peer;
    const double size = static_cast<double>(m_.size);
    const char* const tables = static_cast<const char*>(plan_.tables);
    group_stats({.num_segments = plan_.num_segments,
                 .group_of = reinterpret_cast<const std::int32_t*>(tables + plan_.group_of_offset),
                 .num_groups = plan_.num_groups,
                 .num_ranks = m_.size,
                 .num_rows = over_peers ? 1 : m_.size,
                 .squares = squares,
                 .squares_are_of_groups = has_local_squares(),
                 .result_squares = numbers<double>(plan_.result_squares_offset),
                 .result_is_mean_times = plan_.request.op == ReduceOp::sum ? size : 1.0,
                 .has_estimates = !has_local_squares(),
                 .out = args_.group_stats},
                m_.stream);
  }

  // ---- peers ----------------------------------------------------------------------------------

  // Kernels get the places of one part in all windows.
  struct View {
    std::array<const void*, kMaxPeers> in;
    std::array<void*, kMaxPeers> out;
    PeerView view;
  };
  void set_view(View& v, std::int64_t offset) const {
    for (std::size_t r = 0; r < static_cast<std::size_t>(m_.size); ++r) {
      v.in[r] = m_.peers->in[r] + offset;
      v.out[r] = m_.peers->out[r] + offset;
    }
    v.view = {m_.rank,
              m_.size,
              v.in.data(),
              v.out.data(),
              m_.peers->scalars.data(),
              m_.peers->flags.data()};
  }

  void reduce_over_peers(const Part& part) {
    View view;
    set_view(view, part.data_offset);
    const TableView table(plan_, part.packed, slots());
    const PeerContext context{&view.view, &m_.peers->sync, part.dtype, part.numel, table.get()};
    if (plan_.request.op == ReduceOp::adasum) {
      double* const cancellation = numbers<double>(plan_.cancellation_offset) + part.first_segment;
      peer_adasum(
          {.peers = context,
           .tree = plan_.tree,
           .stage = m_.scratch,
           .work = numbers<double>(plan_.work_offset),
           .orthogonality = numbers<double>(plan_.orthogonality_offset) + part.first_segment,
           .cancellation = cancellation},
          m_.stream);
      return;
    }
    const Reduction reduction = reduction_of(plan_.request.op, m_.size);
    // [2][segments of the part]; then rows of all parts.
    double* const squares = has_squares() ? numbers<double>(plan_.stats_offset) : nullptr;
    peer_reduce({.peers = context,
                 .op = reduction.op,
                 .divisor = reduction.divisor,
                 .squares = squares,
                 .work = numbers<double>(plan_.work_offset)},
                m_.stream);
    if (squares == nullptr) return;
    const auto count = static_cast<std::int64_t>(part.packed.segments.size());
    const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(double));
    if (!has_local_squares())
      m_.kernels->copy(squares, bytes, numbers<double>(plan_.squares_offset) + part.first_segment,
                       m_.stream);
    m_.kernels->copy(squares + count, bytes,
                     numbers<double>(plan_.result_squares_offset) + part.first_segment, m_.stream);
    if (has_local_squares() && &part == &plan_.parts.back()) add_local_squares_over_peers();
  }

  void add_local_squares_over_peers() {
    View view;
    set_view(view, plan_.locals_data_offset);
    const TableView table(plan_, plan_.locals, slots());
    peer_reduce({.peers = {&view.view, &m_.peers->sync, DType::f64, align_up(plan_.num_groups),
                           table.get()},
                 .op = Elementwise::sum,
                 .work = numbers<double>(plan_.work_offset)},
                m_.stream);
    m_.kernels->copy(view.out[static_cast<std::size_t>(m_.rank)],
                     plan_.num_groups * static_cast<std::int64_t>(sizeof(double)),
                     numbers<double>(plan_.squares_offset), m_.stream);
  }

  void copy_from_peers() {
    View view;
    set_view(view, 0);
    const char* const tables = static_cast<const char*>(plan_.tables);
    peer_copy({.view = &view.view,
               .sync = &m_.peers->sync,
               .pieces = reinterpret_cast<const PeerPiece*>(tables + plan_.peer_pieces_offset),
               .num_pieces = static_cast<std::int64_t>(plan_.peer_pieces.size())},
              m_.stream);
  }

  // ---- the other collectives ------------------------------------------------------------------

  void reducescatter(const Part& part) {
    pack(part);
    const std::int64_t width = size_of(part.dtype);
    const std::int64_t block = m_.rank * part.block_numel;
    switch (part.method) {
      case Method::single:
        return unpack(part, fused(part), part.own);
      case Method::nccl:
        m_.nccl->reduce_scatter(fused(part), m_.scratch, part.block_numel, part.dtype,
                                plan_.request.op);
        return unpack(part, m_.scratch, part.own);
      case Method::exchanges: {
        const TableView table(plan_, part.packed, slots());
        run_to_the_end(reduce_scatter({*m_.nccl, *m_.kernels, m_.stream}, buffer_of(part, table),
                                      part.reduction.shards,
                                      reduction_of(plan_.request.op, m_.size), {}));
        return unpack(part, at(fused(part), block, width), part.own);
      }
      case Method::peer: {
        View view;
        set_view(view, part.data_offset);
        const TableView table(plan_, part.packed, slots());
        const Reduction reduction = reduction_of(plan_.request.op, m_.size);
        peer_reduce({.peers = {&view.view, &m_.peers->sync, part.dtype, part.numel, table.get()},
                     .op = reduction.op,
                     .divisor = reduction.divisor,
                     .scatters = true,
                     .keeps = {block, block + part.block_numel},
                     .work = numbers<double>(plan_.work_offset)},
                    m_.stream);
        return unpack(part, at(result(part), block, width), part.own);
      }
    }
  }

  void broadcast() {
    const bool is_root = m_.rank == plan_.request.root;
    if (is_root)
      for (const Part& part : plan_.parts) pack(part);
    if (plan_.method == Method::peer) copy_from_peers();
    if (plan_.method == Method::nccl)
      m_.nccl->broadcast(m_.data, m_.data, plan_.data_bytes, plan_.request.root);
    for (const Part& part : plan_.parts) unpack(part, result(part), part.packed);
  }

  std::int64_t row_bytes(std::size_t t) const {
    const TensorArg& tensor = plan_.request.tensors[t];
    std::int64_t bytes = size_of(tensor.dtype);
    for (std::size_t d = 1; d < tensor.shape.size(); ++d) bytes *= tensor.shape[d];
    return bytes;
  }
  // Rows of tensor t that go from one rank to another.
  std::int64_t rows(std::size_t t, Rank from, Rank to) const {
    const std::int64_t place = plan_.request.collective == Collective::allgather
                                   ? static_cast<std::int64_t>(t) * num_ranks() + from
                                   : from * num_ranks() + to;
    return plan_.rows[static_cast<std::size_t>(place)];
  }

  // Whether every rank brings as many rows, so that NCCL's own all-gather serves.
  bool is_even(std::size_t t) const {
    for (Rank from = 1; from < m_.size; ++from)
      if (rows(t, from, from) != rows(t, 0, 0)) return false;
    return m_.nccl != nullptr && plan_.request.collective == Collective::allgather;
  }

  // Straight from inputs into outputs; all tensors are one launch, or two.
  void move_over_nccl() {
    std::vector<std::size_t> even;
    std::vector<SendPart> sends;
    std::vector<RecvPart> receives;
    for (std::size_t t = 0; t < plan_.request.tensors.size(); ++t) {
      if (is_even(t)) {
        even.push_back(t);
        continue;
      }
      const std::int64_t width = row_bytes(t);
      const bool gathers = plan_.request.collective == Collective::allgather;
      std::int64_t from_here = 0, to_here = 0;
      for (Rank peer = 0; peer < m_.size; ++peer) {
        const std::int64_t sent = rows(t, m_.rank, peer) * width;
        const std::int64_t received = rows(t, peer, m_.rank) * width;
        const void* const from = at(args_.inputs[t], gathers ? 0 : from_here, 1);
        void* const to = at(args_.outputs[t], to_here, 1);
        if (peer == m_.rank) {
          m_.kernels->copy(from, sent, to, m_.stream);
        } else {
          if (sent > 0) sends.push_back({peer, from, sent});
          if (received > 0) receives.push_back({peer, to, received});
        }
        from_here += sent;
        to_here += received;
      }
    }
    if (!even.empty()) {
      NcclGroup group(*m_.nccl);
      for (const std::size_t t : even)
        m_.nccl->all_gather(args_.inputs[t], args_.outputs[t],
                            rows(t, m_.rank, m_.rank) * row_bytes(t), DType::u8);
      group.end();
    }
    if (m_.nccl != nullptr && !(sends.empty() && receives.empty()))
      (void)m_.nccl->start(kDataTag, sends, receives);
  }

  // The places of inputs and results in the windows: those of plan_peer_copies.
  void move_over_peers() {
    Layout256 in_layout, out_layout;
    for (std::size_t t = 0; t < plan_.request.tensors.size(); ++t) {
      std::int64_t most = 0;
      for (Rank from = 0; from < m_.size; ++from) most = std::max(most, sent_bytes(t, from));
      m_.kernels->copy(args_.inputs[t], sent_bytes(t, m_.rank), m_.data + in_layout.add(most),
                       m_.stream);
    }
    copy_from_peers();
    for (std::size_t t = 0; t < plan_.request.tensors.size(); ++t) {
      std::int64_t bytes = 0;
      for (Rank from = 0; from < m_.size; ++from) bytes += rows(t, from, m_.rank) * row_bytes(t);
      const char* const from = m_.peers->out[static_cast<std::size_t>(m_.rank)];
      m_.kernels->copy(from + out_layout.add(bytes), bytes, args_.outputs[t], m_.stream);
    }
  }

  std::int64_t sent_bytes(std::size_t t, Rank from) const {
    if (plan_.request.collective == Collective::allgather)
      return rows(t, from, from) * row_bytes(t);
    std::int64_t sent = 0;
    for (Rank to = 0; to < m_.size; ++to) sent += rows(t, from, to);
    return sent * row_bytes(t);
  }

  const Machinery& m_;
  const DevicePlan& plan_;
  const LaunchArgs& args_;
};

}  // namespace

void enqueue(const Machinery& machinery, const DevicePlan& plan, const LaunchArgs& args) {
  Enqueue(machinery, plan, args).run();
}

}  // namespace adareduce::cuda
