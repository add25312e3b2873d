#include "engine/request.h"

#include <array>
#include <charconv>

#include "base/errors.h"
#include "kernels/kernels.h"

namespace adareduce {
namespace {

constexpr std::size_t kShapesInOneLine = 4;

constexpr std::array<std::string_view, kNumCollectives> kNames{
    "allreduce", "broadcast", "allgather", "barrier", "add_process_set"};

bool has_tensors(const Request& request) {
  return request.collective != Collective::barrier &&
         request.collective != Collective::add_process_set;
}

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

// Ranks may bring different numbers of rows to an allgather.
std::vector<std::int64_t> agreed_shape(const Request& request, const TensorArg& tensor) {
  std::vector<std::int64_t> shape = tensor.shape;
  if (request.collective == Collective::allgather && !shape.empty()) shape.front() = -1;
  return shape;
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
  if (request.device.kind != DeviceKind::cpu) refuse("device must be cpu, got cuda");
  const bool has_scale = request.prescale != 1.0 || request.postscale != 1.0;
  if (request.collective == Collective::broadcast &&
      (request.root < 0 || request.root >= num_ranks))
    refuse("root_rank must be a rank of the process set of ", num_ranks, " ranks, got place ",
           request.root);
  for (std::size_t i = 0; i < request.tensors.size(); ++i) {
    const TensorArg& tensor = request.tensors[i];
    const std::string_view dtype = name_of(tensor.dtype);
    if ((request.collective == Collective::allreduce || has_scale) && !has_arithmetic(tensor.dtype))
      refuse("dtype must be float32 or float64, got ", dtype);
    for (const std::int64_t extent : tensor.shape)
      if (extent < 0) refuse("tensor ", i, " must have a shape, got ", shape_text(tensor.shape));
    if (request.collective == Collective::allgather && tensor.shape.empty())
      refuse("tensor ", i, " must have at least one dimension, got a scalar");
    const bool has_memory =
        tensor.input != nullptr &&
        (tensor.output != nullptr || request.collective == Collective::allgather);
    if (tensor.numel() > 0 && !has_memory) refuse("tensor ", i, " has elements but no memory");
  }
}

Signature signature_of(const Request& request) {
  Hasher hasher;
  hasher.add(static_cast<std::uint64_t>(request.collective));
  for (const Rank rank : request.members) hasher.add(static_cast<std::uint64_t>(rank));
  if (!has_tensors(request)) return hasher.finish();
  hasher.add(request.name).add(static_cast<std::uint64_t>(request.device.kind));
  if (request.collective == Collective::allreduce)
    hasher.add(static_cast<std::uint64_t>(request.op)).add(request.prescale).add(request.postscale);
  if (request.collective == Collective::broadcast)
    hasher.add(static_cast<std::uint64_t>(request.root));
  hasher.add(static_cast<std::uint64_t>(request.tensors.size()));
  for (const TensorArg& tensor : request.tensors) {
    const std::vector<std::int64_t> shape = agreed_shape(request, tensor);
    hasher.add(static_cast<std::uint64_t>(tensor.dtype))
        .add(static_cast<std::uint64_t>(shape.size()));
    for (const std::int64_t extent : shape) hasher.add(static_cast<std::uint64_t>(extent));
  }
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
  if (!has_tensors(request)) return fields;
  add("name", "'" + request.name + "'");
  add("dtype", dtype_text(request.tensors));
  add("device", request.device.kind == DeviceKind::cpu ? "cpu" : "cuda");
  if (request.collective == Collective::allreduce) {
    add("op", std::string(name_of(request.op)));
    add("prescale_factor", number_text(request.prescale));
    add("postscale_factor", number_text(request.postscale));
  }
  if (request.collective == Collective::broadcast) add("root_rank", concat(request.root));
  const std::size_t count = request.tensors.size();
  if (count != 1) add("number of tensors", concat(count));
  for (std::size_t i = 0; i < count; ++i)
    add(count == 1 ? "shape" : concat("shape of tensor ", i),
        shape_text(agreed_shape(request, request.tensors[i])));
  return fields;
}

std::string describe(const Request& request) {
  if (request.flags & kLeaving) return "shutdown()";
  std::string text = concat(name_of(request.collective), "(");
  if (request.collective == Collective::add_process_set)
    text += concat("ranks=[", join_words(request.members), "]");
  if (!has_tensors(request)) return text + ")";
  text += concat("name='", request.name, "', dtype=", dtype_text(request.tensors));
  if (request.device.kind != DeviceKind::cpu) text += ", device=cuda";
  if (request.collective == Collective::allreduce) {
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
