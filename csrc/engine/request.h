#pragma once
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/hash.h"
#include "base/types.h"

namespace adareduce {

/// What a request asks for. The codes cross the Python border and the wire.
enum class Collective : std::uint8_t {
  allreduce = 0,
  broadcast = 1,
  allgather = 2,
  barrier = 3,
  add_process_set = 4,  ///< only the agreement on it
  reducescatter = 5,
  alltoall = 6,
  cuda_path = 7,     ///< only the agreement on making the CUDA side of a process set
  empty_shared = 8,  ///< only the agreement on making memory that the ranks share
};
inline constexpr int kNumCollectives = 9;

std::string_view name_of(Collective collective);

/// A dense tensor of the caller's, which keeps it alive until the request has ended.
struct TensorArg {
  std::vector<std::int64_t> shape;
  DType dtype = DType::u8;
  const void* input = nullptr;
  void* output = nullptr;  ///< may be `input`; null where the result's size is not known before
  /// Of a tensor that fills its memory without gaps in another order of dimensions; else empty.
  std::vector<std::int64_t> strides{};
  std::int32_t group = 0;  ///< of its statistics

  std::int64_t numel() const;
};

/// What a rank posts besides, or instead of, the wish to run a collective.
enum RequestFlags : std::uint32_t {
  kNormal = 0,
  kJoined = 1,     ///< this rank has no more data; it serves the others with zeros
  kLeaving = 2,    ///< this rank shuts down: there will be no further request from it
  kRejected = 4,   ///< this rank's caller made a mistake that it alone could see
  kFailed = 8,     ///< this rank could not prepare, for want of memory say
  kDiffers = 16,   ///< set by the agreement: not all ranks asked for the same
  kLaunched = 32,  ///< this rank has enqueued it on its GPU already: there is no way back
  kOverlaps = 64,  ///< an output of this rank is also another tensor's input
};

/// One call of one rank. A grouped call is one request.
struct Request {
  Collective collective = Collective::barrier;
  std::string name{};  ///< empty: numbered by the engine, the same on all ranks
  Device device{};
  ReduceOp op = ReduceOp::sum;
  Rank root = 0;  ///< of the process set
  double prescale = 1.0;
  double postscale = 1.0;
  std::vector<TensorArg> tensors{};  ///< their dtypes may differ
  std::vector<Rank> members{};       ///< of add_process_set
  std::int64_t bytes = 0;            ///< of empty_shared
  /// Of alltoall on the CPU: rows for each rank; may differ between ranks.
  std::vector<std::int64_t> splits{};
  bool has_statistics = false;  ///< of an all-reduce: they are wanted
  /// Per group: what this rank adds to the sum of |g_i|^2 in place of the squares of its tensors,
  /// which may be sums over several passes. Empty, on all ranks: those of the tensors.
  std::vector<double> local_squares{};
  // Of requests on CUDA tensors, which the calling thread enqueues; the worker compares them only.
  bool has_local_squares = false;  ///< they lie on the device
  /// Rows from every rank, see adareduce_cuda_request; of allgather and alltoall, else empty.
  std::vector<std::int64_t> rows{};
  std::int32_t wanted_path = 0;  ///< adareduce_cuda_path

  /// One more than the largest group; 0 without statistics.
  std::int64_t num_groups() const;

  std::uint32_t flags = kNormal;
  std::string reason{};    ///< why it is flagged, for people
  bool is_orderly = true;  ///< of kLeaving: not because of an error
};

/// Throws UsageError for what no collective of `num_ranks` ranks can do. Python checks with better
/// words; this keeps a mistake there from becoming a crash.
void check(const Request& request, int num_ranks);

/// Equal on two ranks if and only if (but for chance) their requests fit together. What may differ
/// between ranks, such as the first dimension of an allgather, is left out.
Signature signature_of(const Request& request);

/// The same as words: ("dtype", "float32"), ...
std::vector<std::pair<std::string, std::string>> fields_of(const Request& request);

/// One line for people: allreduce(name='x', dtype=float32, op=Sum, shape=(5, 8)).
std::string describe(const Request& request);

/// How many of `rows` belong to `rank`: equal parts, the first ranks get one more.
std::int64_t rows_of(std::int64_t rows, Rank rank, int size);

/// "(5, 8)", as Python writes it.
std::string shape_text(const std::vector<std::int64_t>& shape);

}  // namespace adareduce
