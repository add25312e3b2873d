#include <algorithm>
#include <cstring>
#include <deque>

#include "base/errors.h"
#include "engine/cuda/cuda_plugin_table.h"
#include "engine/cuda/device_group.h"

using adareduce::cuda::DeviceGroup;
using adareduce::cuda::DevicePlan;

struct adareduce_cuda_plan {
  const DevicePlan* plan;
};
struct adareduce_cuda_group {
  DeviceGroup group;
  std::deque<adareduce_cuda_plan> plans{};  // their addresses stay
};

namespace {

using namespace adareduce;

// No exception crosses the border.
template <typename Body>
int32_t guarded(adareduce_error* error, Body&& body) {
  const auto fail = [&](const char* text) {
    if (error != nullptr) {
      error->status = ADAREDUCE_ERROR;
      error->peer = -1;
      std::strncpy(error->text, text, sizeof error->text - 1);
      error->text[sizeof error->text - 1] = 0;
    }
    return static_cast<int32_t>(ADAREDUCE_ERROR);
  };
  try {
    body();
  } catch (const std::exception& problem) {
    return fail(problem.what());
  } catch (...) {
    return fail("an unknown exception");
  }
  return ADAREDUCE_OK;
}

// The plugin's exchange has blocks of one length: lengths go first.
cuda::Allgather allgather_through(adareduce_cuda_exchange exchange, int32_t size) {
  return [exchange, size](const std::string& mine) {
    const auto gather = [&](const void* data, std::int64_t bytes, void* all) {
      adareduce_error error{};
      if (exchange.allgather(exchange.context, data, bytes, all, &error) != ADAREDUCE_OK)
        throw TransportError(error.text, error.peer);
    };
    const auto ranks = static_cast<std::size_t>(size);
    const auto length = static_cast<std::int64_t>(mine.size());
    std::vector<std::int64_t> lengths(ranks);
    gather(&length, sizeof length, lengths.data());
    const std::int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    std::string padded = mine;
    padded.resize(static_cast<std::size_t>(longest));
    std::string all(ranks * static_cast<std::size_t>(longest), '\0');
    if (longest > 0) gather(padded.data(), longest, all.data());
    std::vector<std::string> result;
    for (std::size_t rank = 0; rank < ranks; ++rank)
      result.push_back(all.substr(rank * static_cast<std::size_t>(longest),
                                  static_cast<std::size_t>(lengths[rank])));
    return result;
  };
}

int32_t create_group(const adareduce_cuda_group_args* args, adareduce_cuda_group** out,
                     adareduce_error* error) {
  return guarded(error, [&] {
    *out = new adareduce_cuda_group{
        DeviceGroup({.rank = args->rank,
                     .size = args->size,
                     .device = args->device,
                     .path = args->path,
                     .deadline = Seconds{args->deadline_seconds},
                     .host = args->host,
                     .allgather = allgather_through(args->exchange, args->size)})};
  });
}

void destroy_group(adareduce_cuda_group* group) { delete group; }

int32_t path(adareduce_cuda_group* group, const char** why) {
  *why = group->group.why().c_str();
  return group->group.path();
}

void* stream(adareduce_cuda_group* group) { return group->group.stream().native; }

Request request_of(const adareduce_cuda_request& from) {
  Request request;
  request.collective = static_cast<Collective>(from.collective);
  request.device.kind = DeviceKind::cuda;
  request.op = static_cast<ReduceOp>(from.op);
  request.root = from.root;
  request.has_statistics = from.has_statistics != 0;
  for (std::int64_t t = 0; t < from.num_tensors; ++t) {
    const adareduce_cuda_tensor& tensor = from.tensors[t];
    TensorArg arg;
    arg.shape = {tensor.rows, tensor.row_numel};  // nothing else matters from here on
    arg.dtype = static_cast<DType>(tensor.dtype);
    arg.group = tensor.group;
    request.tensors.push_back(std::move(arg));
  }
  if (from.has_local_squares != 0)
    request.local_squares.resize(static_cast<std::size_t>(request.num_groups()));
  return request;
}

int32_t prepare(adareduce_cuda_group* group, const adareduce_cuda_request* request,
                adareduce_cuda_plan** out, adareduce_error* error) {
  return guarded(error, [&] {
    Request wanted = request_of(*request);
    std::int64_t rows = 0;
    if (wanted.collective == Collective::allgather)
      rows = request->num_tensors * group->group.size();
    if (wanted.collective == Collective::alltoall)
      rows = std::int64_t{group->group.size()} * group->group.size();
    std::vector<std::int64_t> table(request->rows, request->rows + rows);
    group->plans.push_back({&group->group.prepare(std::move(wanted), std::move(table))});
    *out = &group->plans.back();
  });
}

int32_t launch(adareduce_cuda_group* group, adareduce_cuda_plan* plan,
               const adareduce_cuda_launch_args* args, adareduce_cuda_ticket** out,
               adareduce_error* error) {
  return guarded(error, [&] {
    *out = group->group
               .launch(*plan->plan,
                       {.inputs = args->inputs,
                        .outputs = args->outputs,
                        .prescale = args->prescale,
                        .postscale = args->postscale,
                        .local_squares = args->local_squares,
                        .group_stats = args->group_stats,
                        .orthogonality = args->orthogonality,
                        .cancellation = args->cancellation,
                        .nonfinite = args->nonfinite},
                       static_cast<cudaStream_t>(args->stream))
               .release();
  });
}

int32_t order(adareduce_cuda_ticket* ticket, void* stream, adareduce_error* error) {
  return guarded(error, [&] {
    const cuda::DeviceGuard guard(ticket->end->device());
    ADAREDUCE_CUDA(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), ticket->end->get(), 0));
  });
}

int32_t is_done(adareduce_cuda_ticket* ticket) {
  if (ticket->was_captured) return 1;  // nobody may ask such an event
  const cuda::RelaxedCapture relaxed;
  return cudaEventQuery(ticket->end->get()) == cudaErrorNotReady ? 0 : 1;
}

void release(adareduce_cuda_ticket* ticket) { delete ticket; }

int32_t check(adareduce_cuda_group* group, adareduce_error* error) {
  return guarded(error, [&] {
    if (const auto problem = group->group.problem()) throw DeviceError(*problem);
  });
}

void abort_group(adareduce_cuda_group* group, const char* text) {
  adareduce_error error{};
  (void)guarded(&error, [&] { group->group.abort(text); });
}

}  // namespace

adareduce_cuda_plugin* adareduce_cuda_plugin_table() {
  static adareduce_cuda_plugin table{
      .version = ADAREDUCE_CUDA_PLUGIN_VERSION,
      .bytes = sizeof(adareduce_cuda_plugin),
      .create_group = create_group,
      .destroy_group = destroy_group,
      .path = path,
      .stream = stream,
      .prepare = prepare,
      .launch = launch,
      .order = order,
      .is_done = is_done,
      .release = release,
      .check = check,
      .abort = abort_group,
  };
  return &table;
}
