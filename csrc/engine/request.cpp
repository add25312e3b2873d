#include "engine/request.h"

#include <algorithm>
#include <array>
#include <charconv>

#include "base/errors.h"
#include "kernels/kernels.h"

namespace adareduce {
namespace {

constexpr std::size_t kShapesInOneLine = 4;

constexpr std::array<std::string_view, kNumCollectives> kNames{
    "allreduce",     "broadcast", "allgather", "barrier",     "add_process_set",
    "reducescatter", "alltoall",  "cuda_path", "empty_shared"};

bool has_tensors(const Request& request) {
  return request.collective != Collective::barrier &&
         request.collective != Collective::add_process_set &&
         request.collective != Collective::cuda_path &&
         request.collective != Collective::empty_shared;
}

bool is_reduction(const Request& request) {
  return request.collective == Collective::allreduce ||
         request.collective == Collective::reducescatter;
}

// Ranks bring rows of their own number, or the result is made of rows.
bool works_on_rows(const Request& request) {
  return request.collective == Collective::allgather ||
         request.collective == Collective::reducescatter ||
         request.collective == Collective::alltoall;
}

bool is_float(DType dtype) { return has_arithmetic(ReduceOp::adasum, dtype); }

// "float32", or in the order of the tensors "float32 x 2, float64".
std::string dtype_text(const std::vector<TensorArg>& tensors) {
  std::string text;
  bool is_uniform = true;
  for (std::size_t i = 0; i < tensors.size();) {
    std::size_t end = i;
    while (end < tensors.size() && tensors[end].dtype == tensors[i].dtype) ++end;
    is_uniform = end - i == tensors.size();
    text += concat(text.empty() ? "" : ", ", name_of(tensors[i].dtype));
    if (!is_uniform && end - i > 1) text += concat(" x ", end - i);
    i = end;
  }
  return tensors.empty() ? "none" : is_uniform ? text : "(" + text + ")";
}

// Ranks may bring different numbers of rows to an allgather or alltoall.
bool has_free_rows(const Request& request) {
  return request.collective == Collective::allgather || request.collective == Collective::alltoall;
}
std::vector<std::int64_t> agreed_shape(const Request& request, const TensorArg& tensor) {
  std::vector<std::int64_t> shape = tensor.shape;
  if (has_free_rows(request) && !shape.empty()) shape.front() = -1;
  return shape;
}

std::string_view path_name(std::int32_t path) {
  constexpr std::array<std::string_view, 5> kPaths{"auto", "nccl", "peer", "staged", "single"};
  const auto code = static_cast<std::size_t>(path);
  return code < kPaths.size() ? kPaths[code] : "unknown";
}

// The shortest digits that give back the same bits.
std::string number_text(double value) {
  std::array<char, 32> digits;
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;
  return {digits.data(), end};
}

}  // namespace

std::string_view name_of(Collective collective) {
  const auto code = static_cast<std::size_t>(collective);
  if (code >= kNames.size()) throw UsageError(concat("collective code ", code, " is unknown"));
  return kNames[code];
}

std::int64_t Request::num_groups() const {
  std::int64_t groups = 0;
  if (has_statistics && op != ReduceOp::adasum)
    for (const TensorArg& tensor : tensors)
      groups = std::max<std::int64_t>(groups, tensor.group + 1);
  return groups;
}

std::int64_t rows_of(std::int64_t rows, Rank rank, int size) {
  return rows / size + (rank < rows % size ? 1 : 0);
}

std::int64_t TensorArg::numel() const {
  std::int64_t numel = 1;
  for (const std::int64_t extent : shape) numel *= extent;
  return numel;
}

void check(const Request& request, int num_ranks) {
  const std::string_view function = name_of(request.collective);
  if (!has_tensors(request)) return;
  const auto refuse = [&](const auto&... words) {
    throw UsageError(concat(function, ": ", words...));
  };
  (void)name_of(request.op);  // throws for a code that is unknown
  const bool has_scale = request.prescale != 1.0 || request.postscale != 1.0;
  if (request.collective == Collective::broadcast &&
      (request.root < 0 || request.root >= num_ranks))
    refuse("root_rank must be a rank of the process set of ", num_ranks, " ranks, got place ",
           request.root);
  for (std::size_t i = 0; i < request.tensors.size(); ++i) {
    const TensorArg& tensor = request.tensors[i];
    const std::string_view dtype = name_of(tensor.dtype);
    if (is_reduction(request) && !has_arithmetic(request.op, tensor.dtype))
      refuse("dtype must be one that ", name_of(request.op), " is defined for, got ", dtype);
    if (has_scale && !can_scale(tensor.dtype))
      refuse("prescale_factor and postscale_factor must be 1 for ", dtype);
    if (request.has_statistics && !is_float(tensor.dtype))
      refuse("dtype must be a float type where statistics are wanted, got ", dtype);
    if (tensor.group < 0 || static_cast<std::size_t>(tensor.group) >= request.tensors.size())
      refuse("the group of tensor ", i, " must be in [0, ", request.tensors.size(), "), got ",
             tensor.group);
    for (const std::int64_t extent : tensor.shape)
      if (extent < 0) refuse("tensor ", i, " must have a shape, got ", shape_text(tensor.shape));
    if (works_on_rows(request) && tensor.shape.empty())
      refuse("tensor ", i, " must have at least one dimension, got a scalar");
    // On the CPU the engine allocates what ranks with other numbers of rows contribute to; for CUDA
    // see check_on_device.
    const bool has_memory =
        tensor.input != nullptr && (tensor.output != nullptr || works_on_rows(request));
    if (tensor.numel() > 0 && !has_memory) refuse("tensor ", i, " has elements but no memory");
  }
  if (request.collective == Collective::reducescatter && request.op == ReduceOp::adasum)
    refuse("op must not be Adasum, which is not computed element by element");
  if (request.has_statistics && (request.collective != Collective::allreduce ||
                                 (request.op != ReduceOp::average && request.op != ReduceOp::sum &&
                                  request.op != ReduceOp::adasum)))
    refuse("op must be Average, Sum or Adasum where statistics are wanted, got ",
           name_of(request.op));
  if (!request.local_squares.empty() &&
      static_cast<std::int64_t>(request.local_squares.size()) != request.num_groups())
    refuse("local_squares must have one entry for each of ", request.num_groups(), " groups, got ",
           request.local_squares.size());
  if (request.has_local_squares && request.num_groups() == 0)
    refuse("local_squares must be given with statistics of Average or Sum only");
  if (request.collective == Collective::alltoall) {
    if (request.tensors.size() != 1) refuse("one tensor is needed, got ", request.tensors.size());
    if (request.device.kind == DeviceKind::cuda) return;  // its rows are those of all ranks
    std::int64_t rows = 0;
    for (const std::int64_t split : request.splits) {
      if (split < 0) refuse("splits must not be negative, got ", split);
      rows += split;
    }
    if (request.splits.size() != static_cast<std::size_t>(num_ranks) ||
        rows != request.tensors.front().shape.front())
      refuse("splits must have one entry for each of ", num_ranks, " ranks and add up to ",
             request.tensors.front().shape.front(), " rows, got [", join_words(request.splits),
             "]");
  }
}

Signature signature_of(const Request& request) {
  Hasher hasher;
  hasher.add(static_cast<std::uint64_t>(request.collective));
  for (const Rank rank : request.members) hasher.add(static_cast<std::uint64_t>(rank));
  if (request.device.kind == DeviceKind::cuda)
    hasher.add(static_cast<std::uint64_t>(request.wanted_path));
  if (request.collective == Collective::empty_shared)
    hasher.add(static_cast<std::uint64_t>(request.bytes));
  if (!has_tensors(request)) return hasher.finish();
  hasher.add(request.name).add(static_cast<std::uint64_t>(request.device.kind));
  if (is_reduction(request))
    hasher.add(static_cast<std::uint64_t>(request.op))
        .add(request.prescale)
        .add(request.postscale)
        .add(static_cast<std::uint64_t>(request.has_statistics))
        .add(static_cast<std::uint64_t>(request.local_squares.size() +
                                        (request.has_local_squares ? 1 : 0)));
  if (request.collective == Collective::broadcast)
    hasher.add(static_cast<std::uint64_t>(request.root));
  hasher.add(static_cast<std::uint64_t>(request.tensors.size()));
  for (const TensorArg& tensor : request.tensors) {
    hasher.add(static_cast<std::uint64_t>(tensor.dtype))
        .add(static_cast<std::uint64_t>(tensor.shape.size()));
    // No copy of the shape: a rank that launches at once should not wait for its signature.
    for (std::size_t i = has_free_rows(request) ? 1 : 0; i < tensor.shape.size(); ++i)
      hasher.add(static_cast<std::uint64_t>(tensor.shape[i]));
    hasher.add(static_cast<std::uint64_t>(tensor.strides.size()));
    for (const std::int64_t stride : tensor.strides) hasher.add(static_cast<std::uint64_t>(stride));
    if (request.has_statistics) hasher.add(static_cast<std::uint64_t>(tensor.group));
  }
  for (const std::int64_t rows : request.rows) hasher.add(static_cast<std::uint64_t>(rows));
  return hasher.finish();
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += concat(i == 0 ? "" : ", ", shape[i] < 0 ? std::string("*") : std::to_string(shape[i]));
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::vector<std::pair<std::string, std::string>> fields_of(const Request& request) {
  std::vector<std::pair<std::string, std::string>> fields;
  const auto add = [&](std::string key, std::string value) {
    fields.emplace_back(std::move(key), std::move(value));
  };
  add("collective", std::string(name_of(request.collective)));
  if (request.collective == Collective::add_process_set)
    add("ranks", concat("[", join_words(request.members), "]"));
  if (request.collective == Collective::empty_shared) add("bytes", concat(request.bytes));
  if (request.device.kind == DeviceKind::cuda)
    add("wanted CUDA path", std::string(path_name(request.wanted_path)));
  if (!has_tensors(request)) return fields;
  add("name", "'" + request.name + "'");
  add("dtype", dtype_text(request.tensors));
  add("device", request.device.kind == DeviceKind::cpu ? "cpu" : "cuda");
  if (is_reduction(request)) {
    add("op", std::string(name_of(request.op)));
    add("prescale_factor", number_text(request.prescale));
    add("postscale_factor", number_text(request.postscale));
    if (request.has_statistics) {
      const bool has_squares = request.has_local_squares || !request.local_squares.empty();
      add("statistics", has_squares ? "wanted with local_squares" : "wanted");
      std::vector<std::int64_t> groups;
      for (const TensorArg& tensor : request.tensors) groups.push_back(tensor.group);
      add("groups", concat("[", join_words(groups), "]"));
    }
  }
  if (request.collective == Collective::broadcast) add("root_rank", concat(request.root));
  const std::size_t count = request.tensors.size();
  add("number of tensors", concat(count));
  for (std::size_t i = 0; i < count; ++i) {
    const std::string of_tensor = count == 1 ? "" : concat(" of tensor ", i);
    add("shape" + of_tensor, shape_text(agreed_shape(request, request.tensors[i])));
    const std::vector<std::int64_t>& strides = request.tensors[i].strides;
    add("strides" + of_tensor, strides.empty() ? "contiguous" : shape_text(strides));
  }
  if (!request.rows.empty()) add("rows", concat("[", join_words(request.rows), "]"));
  return fields;
}

std::string describe(const Request& request) {
  if (request.flags & kLeaving) return "shutdown()";
  if (request.flags & kRejected) return "a call that this rank has rejected";
  std::string text = concat(name_of(request.collective), "(");
  if (request.collective == Collective::add_process_set)
    text += concat("ranks=[", join_words(request.members), "]");
  if (request.collective == Collective::empty_shared) text += concat(request.bytes, " bytes");
  if (!has_tensors(request)) return text + ")";
  text += concat("name='", request.name, "', dtype=", dtype_text(request.tensors));
  if (request.device.kind != DeviceKind::cpu) text += ", device=cuda";
  if (is_reduction(request)) {
    text += concat(", op=", name_of(request.op));
    if (request.prescale != 1.0)
      text += concat(", prescale_factor=", number_text(request.prescale));
    if (request.postscale != 1.0)
      text += concat(", postscale_factor=", number_text(request.postscale));
  }
  if (request.collective == Collective::broadcast) text += concat(", root_rank=", request.root);
  const std::size_t count = request.tensors.size();
  text += count == 1 ? ", shape=" : concat(", ", count, " tensors of shapes ");
  for (std::size_t i = 0; i < count && i < kShapesInOneLine; ++i)
    text += concat(i == 0 ? "" : ", ", shape_text(agreed_shape(request, request.tensors[i])));
  if (count > kShapesInOneLine) text += ", ...";
  return text + ")";
}

}  // namespace adareduce
