#pragma once
#include <vector>

#include "collectives/allreduce.h"
#include "engine/request.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/peer_kernels.h"

namespace adareduce::cuda {

/// Who does the work of a request.
enum class Method {
  single,     ///< one rank: only scaling and statistics
  nccl,       ///< NCCL's own collective
  exchanges,  ///< the CPU's schedules, over sends and receives of NCCL
  peer,       ///< kernels on the memory of all ranks
};

/// What a group can do, as far as plans depend on it.
struct Abilities {
  bool has_nccl = false;
  bool has_peers = false;
  bool prefers_peers = false;  ///< also where NCCL could
};

/// Everything about a request that does not depend on its data. Pure: a function of the rank, the
/// number of ranks, the group's abilities and the request's shapes. Offsets are in bytes.
struct DevicePlan {
  /// Some consecutive elements of a tensor.
  struct Piece {
    std::size_t tensor = 0;
    std::int64_t begin = 0;  ///< its first element
  };
  /// Consecutive tensors of a request whose results lie together in a part's.
  struct Run {
    std::int64_t tensor = 0;   ///< first one, in the request
    std::int64_t segment = 0;  ///< first one, in the part
    std::int64_t count = 0;
  };
  /// Some segments and how kernels see them.
  struct Table {
    std::vector<TensorSegment> segments;
    Items items;
    std::int64_t segments_offset = 0;  ///< into the plan's tables on the device
    std::int64_t items_offset = 0;
    std::int64_t first_offset = 0;
  };
  /// The tensors of one dtype and their fused buffer.
  struct Part {
    DType dtype = DType::f32;
    std::vector<std::size_t> tensors;  ///< indices into the request, increasing
    std::vector<Piece> pieces;         ///< of these, parallel to what is packed
    Table packed;
    std::vector<Piece> own_pieces;  ///< what this rank's outputs are made of
    Table own;                      ///< only where that differs: reducescatter
    std::vector<Run> runs;
    std::int64_t numel = 0;          ///< of the fused buffer, padding included
    std::int64_t block_numel = 0;    ///< reducescatter: elements of each rank's block
    std::int64_t data_offset = 0;    ///< of the fused buffer among those of all parts
    std::int64_t first_segment = 0;  ///< among those of all parts
    Method method = Method::single;
    AllreducePlan reduction;  ///< of Method::exchanges
  };

  Request request;                     ///< without pointers
  std::vector<std::int64_t> rows;      ///< of allgather and alltoall
  std::vector<Part> parts;             ///< by first appearance of their dtypes
  Method method = Method::single;      ///< of statistics, and of what has no parts
  std::int64_t num_segments = 0;       ///< of all parts
  std::vector<std::int32_t> group_of;  ///< per segment of all parts
  std::int64_t num_groups = 0;
  GramTree tree;
  Table locals;  ///< of local_squares, which travel as one more part over peers
  std::int64_t locals_data_offset = 0;
  std::vector<PeerPiece> peer_pieces;  ///< of broadcast, allgather and alltoall over peers

  // Tables on the device.
  std::int64_t table_bytes = 0;
  std::int64_t group_of_offset = 0;
  std::int64_t peer_pieces_offset = 0;
  void* tables = nullptr;  ///< set once they lie there

  // Memory that requests use one after the other.
  std::int64_t data_bytes = 0;  ///< fused buffers; with peers their windows, in and out each
  std::int64_t scratch_bytes = 0;
  std::int64_t scalars_numel = 0;  ///< doubles of a peer's window
  std::int64_t number_bytes = 0;   ///< doubles and counts:
  std::int64_t slots_offset = 0;
  std::int64_t stats_offset = 0;
  std::int64_t squares_offset = 0;         ///< [ranks][segments or groups]
  std::int64_t result_squares_offset = 0;  ///< [segments]
  std::int64_t orthogonality_offset = 0;
  std::int64_t cancellation_offset = 0;
  std::int64_t nonfinite_offset = 0;
  std::int64_t work_offset = 0;
  std::int64_t zeros_offset = 0;

  bool uses_peers() const;
};

/// Throws UsageError for what the group cannot do.
DevicePlan make_device_plan(Request request, std::vector<std::int64_t> rows, Rank rank, int size,
                            const Abilities& abilities);

/// The tables as they lie on the device.
std::vector<char> table_image(const DevicePlan& plan);

}  // namespace adareduce::cuda
