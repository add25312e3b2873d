#include "engine/device_calls.h"

#include <algorithm>
#include <cstring>

#include "base/errors.h"
#include "bootstrap/backoff.h"

namespace adareduce {
namespace {

constexpr std::chrono::milliseconds kBetweenPolls{200};

void wait_for(const Handle& handle, const DeviceCalls::Poll& poll) {
  while (!handle.wait_for(kBetweenPolls))
    if (poll) poll();
}

// Short, because every launch makes one.
std::string call_text(const Request& request) {
  std::string text(name_of(request.collective));
  if (request.name.empty()) return text + "(device=cuda)";
  return text.append("(name='").append(request.name).append("', device=cuda)");
}

}  // namespace

DeviceCalls::DeviceCalls(const adareduce_cuda_plugin& plugin, int wanted_path,
                         std::shared_ptr<ProcessSet> set, const Settings& settings,
                         std::string host, Wakeup& wakeup)
    : plugin_(plugin),
      wanted_path_(wanted_path),
      set_(std::move(set)),
      group_(set_->cuda_group()),
      settings_(settings),
      host_(std::move(host)),
      wakeup_(wakeup) {
  exchange_.calls = this;
}

// ---- calls --------------------------------------------------------------------------------------

std::pair<int, std::string> DeviceCalls::path(int device, const Poll& poll) {
  const Turn turn(turns_, poll);
  check_device(device, "cuda_path");
  if (!group_->exists()) {
    Request request;
    request.collective = Collective::cuda_path;
    request.device = {DeviceKind::cuda, device};
    request.wanted_path = wanted_path_;
    agree(request, poll);
    or_fail(describe(request), [&] { make_group(device, poll); });
  }
  return group_->path();
}

std::shared_ptr<DeviceHandle> DeviceCalls::launch(Request request, const DeviceArguments& arguments,
                                                  const Poll& poll) {
  request.has_local_squares = arguments.local_squares != nullptr;
  check(request, set_->size());
  check_on_device(request, set_->rank(), set_->size());
  const Turn turn(turns_, poll);
  check_device(request.device.index, name_of(request.collective));
  if (arguments.is_capturing && !group_->exists())
    throw UsageError(concat(name_of(request.collective),
                            ": the first call on CUDA tensors of a process set must not be "
                            "captured; call it once before capturing"));

  request.wanted_path = wanted_path_;
  pointers_.inputs.clear();
  pointers_.outputs.clear();
  for (const TensorArg& tensor : request.tensors) {
    pointers_.inputs.push_back(tensor.input);
    pointers_.outputs.push_back(tensor.output);
  }
  const adareduce_cuda_launch_args args{.inputs = pointers_.inputs.data(),
                                        .outputs = pointers_.outputs.data(),
                                        .prescale = request.prescale,
                                        .postscale = request.postscale,
                                        .local_squares = arguments.local_squares,
                                        .group_stats = arguments.group_stats,
                                        .orthogonality = arguments.orthogonality,
                                        .cancellation = arguments.cancellation,
                                        .nonfinite = arguments.nonfinite,
                                        .stream = arguments.stream};
  auto handle = std::make_shared<DeviceHandle>(group_, call_text(request));

  const Signature key = device_key(request);
  const auto known = plans_.find(key);
  adareduce_cuda_plan* plan = nullptr;
  if (known != plans_.end() && !arguments.is_capturing) {
    plan = known->second;
    make_room(poll);
    request.flags = kLaunched;
    launched_.push_back(set_->submit(std::move(request)));  // the worker is woken at the end
  } else {
    plan = agree_and_prepare(request, key, poll);
  }
  or_fail(handle->call_,
          [&] { handle->ticket_ = group_->launch(plan, args, arguments.is_capturing); });
  wakeup_.wake();
  return handle;
}

void DeviceCalls::wait_for_gpu(const Poll& poll) {
  const Clock::time_point begin = Clock::now();
  Clock::time_point last_poll = begin;
  Backoff backoff;
  while (!group_->is_idle()) {
    const Clock::time_point now = Clock::now();
    if (poll && now - last_poll >= kBetweenPolls) {
      last_poll = now;
      poll();
    }
    if (now - begin > settings_.fail_after) {
      const std::string text = concat("the GPU has not finished what was launched within ",
                                      settings_.fail_after.count(), " s");
      fail(text);
      group_->abort(text);  // the worker may be about to end
      return;
    }
    backoff.pause();
  }
}

// ---- their parts --------------------------------------------------------------------------------

DeviceCalls::Turn::Turn(Turns& turns, const Poll& poll) : turns_(turns) {
  std::unique_lock lock(turns.mutex);
  while (!turns.changed.wait_for(lock, kBetweenPolls, [&] { return !turns.is_taken; })) {
    lock.unlock();
    if (poll) poll();
    lock.lock();
  }
  turns.is_taken = true;
}

DeviceCalls::Turn::~Turn() {
  {
    const std::lock_guard lock(turns_.mutex);
    turns_.is_taken = false;
  }
  turns_.changed.notify_one();
}

void DeviceCalls::check_device(int device, std::string_view function) const {
  if (group_->exists() && group_->device() != device)
    throw UsageError(concat(function, ": device must be cuda:", group_->device(),
                            ", that of earlier calls on this process set, got cuda:", device));
}

std::shared_ptr<Handle> DeviceCalls::submit(Request request) {
  auto handle = set_->submit(std::move(request));
  wakeup_.wake();
  return handle;
}

// Returns when all ranks have made this call. Whoever is interrupted here does not know whether the
// others go on to launch it and wait for this rank on their GPUs.
void DeviceCalls::agree(Request request, const Poll& poll) {
  const std::string call = describe(request);
  const auto handle = submit(std::move(request));
  try {
    wait_for(*handle, poll);
  } catch (...) {
    fail(concat(call, ": interrupted while waiting for the other ranks"));
    throw;
  }
  handle->rethrow();
}

// A GPU that runs far ahead of the comparison hears late that it waits in vain.
void DeviceCalls::make_room(const Poll& poll) {
  while (!launched_.empty() && launched_.front()->is_finished()) launched_.pop_front();
  if (launched_.size() < settings_.max_launched) return;
  wait_for(*launched_.front(), poll);
  launched_.pop_front();
}

adareduce_cuda_plan* DeviceCalls::agree_and_prepare(const Request& request, const Signature& key,
                                                    const Poll& poll) {
  agree(request, poll);
  const auto known = plans_.find(key);
  if (known != plans_.end()) return known->second;
  const std::vector<adareduce_cuda_tensor> tensors = tensors_on_device(request);
  const adareduce_cuda_request wanted{.collective = static_cast<std::int32_t>(request.collective),
                                      .op = static_cast<std::int32_t>(request.op),
                                      .root = request.root,
                                      .has_statistics = request.has_statistics,
                                      .has_local_squares = request.has_local_squares,
                                      .tensors = tensors.data(),
                                      .num_tensors = static_cast<std::int64_t>(tensors.size()),
                                      .rows = request.rows.empty() ? nullptr : request.rows.data()};
  adareduce_cuda_plan* plan = nullptr;
  or_fail(describe(request), [&] {
    if (!group_->exists()) make_group(request.device.index, poll);
    exchange_.poll = &poll;
    plan = group_->prepare(wanted);
  });
  plans_.emplace(key, plan);
  return plan;
}

void DeviceCalls::make_group(int device, const Poll& poll) {
  exchange_.poll = &poll;
  group_->make(plugin_, {.rank = set_->rank(),
                         .size = set_->size(),
                         .device = device,
                         .path = wanted_path_,
                         .deadline_seconds = settings_.fail_after.count(),
                         .host = host_.c_str(),
                         .exchange = {&exchange_, &DeviceCalls::allgather}});
}

// ---- failures -----------------------------------------------------------------------------------

// From here on nothing can be enqueued on this process set, on any rank: GPUs may be waiting.
void DeviceCalls::fail(const std::string& text) {
  set_->fail(text);
  wakeup_.wake();
}

template <typename Step>
void DeviceCalls::or_fail(const std::string& call, Step step) {
  const auto text_of = [&](const std::exception& error) {
    const std::string text = error.what();
    return text.starts_with(call) ? text : concat(call, ": ", text);
  };
  exchange_.error = nullptr;
  try {
    try {
      step();
    } catch (const Error&) {
      // What went wrong in the plugin's exchange is nearer to the cause than what it made of it.
      if (exchange_.error) std::rethrow_exception(std::exchange(exchange_.error, nullptr));
      throw;
    }
  } catch (const DeviceError& error) {
    fail(text_of(error));
    throw DeviceError(text_of(error));
  } catch (const Error& error) {
    fail(text_of(error));
    throw TransportError(text_of(error));
  } catch (...) {
    fail(concat(call, ": interrupted"));
    throw;
  }
}

// ---- what a plugin may ask for ------------------------------------------------------------------

int32_t DeviceCalls::allgather(void* context, const void* mine, int64_t bytes, void* all,
                               adareduce_error* error) {
  auto& exchange = *static_cast<Exchange*>(context);
  CudaGroup& group = *exchange.calls->group_;
  group.suspend_blocking();
  int32_t status = ADAREDUCE_OK;
  try {
    exchange.calls->gather(mine, bytes, all, *exchange.poll);
  } catch (const std::exception& failure) {  // no exception crosses the border
    exchange.error = std::current_exception();
    std::strncpy(error->text, failure.what(), sizeof error->text - 1);
    error->peer = -1;
    error->status = status = ADAREDUCE_PEER_DEAD;
  }
  group.resume_blocking();
  return status;
}

void DeviceCalls::gather(const void* mine, std::int64_t bytes, void* all, const Poll& poll) {
  Request request;
  request.collective = Collective::allgather;
  request.name = "cuda.exchange";
  // One row each, so that the ranks agree on the number of bytes.
  request.tensors.push_back({.shape = {1, bytes}, .dtype = DType::u8, .input = mine});
  const auto handle = submit(std::move(request));
  wait_for(*handle, poll);
  handle->rethrow();
  const GatheredTensor& gathered = handle->result().gathered.front();
  if (bytes > 0)
    std::memcpy(all, gathered.memory->data(), static_cast<std::size_t>(bytes * set_->size()));
}

}  // namespace adareduce
