#include "engine/cuda_group.h"

#include "base/errors.h"

namespace adareduce {

// ---- callers ------------------------------------------------------------------------------------

void CudaGroup::make(const adareduce_cuda_plugin& plugin, const adareduce_cuda_group_args& args) {
  const std::lock_guard calls(calls_);
  throw_if_aborted();
  adareduce_error error{};
  adareduce_cuda_group* group = nullptr;
  set_blocking("create_group");
  const int32_t status = plugin.create_group(&args, &group, &error);
  {
    const std::lock_guard life(life_);
    blocking_.reset();
    if (status == ADAREDUCE_OK) {
      plugin_ = &plugin;
      group_ = group;
      device_ = args.device;
      if (is_aborted_) plugin.abort(group, abort_text_.c_str());  // it came too early
      exists_.store(true, std::memory_order_release);
    }
  }
  if (status != ADAREDUCE_OK) raise(status, error);
  throw_if_aborted();
}

std::pair<int, std::string> CudaGroup::path() {
  const std::lock_guard calls(calls_);
  throw_if_aborted();
  const char* why = "";
  const int32_t path = plugin_->path(group_, &why);
  return {path, why};
}

void* CudaGroup::stream() {
  const std::lock_guard life(life_);
  return group_ == nullptr ? nullptr : plugin_->stream(group_);
}

adareduce_cuda_plan* CudaGroup::prepare(const adareduce_cuda_request& request) {
  const std::lock_guard calls(calls_);
  throw_if_aborted();
  adareduce_error error{};
  adareduce_cuda_plan* plan = nullptr;
  set_blocking("prepare");
  const int32_t status = plugin_->prepare(group_, &request, &plan, &error);
  reset_blocking();
  if (status != ADAREDUCE_OK) raise(status, error);
  return plan;
}

adareduce_cuda_ticket* CudaGroup::launch(adareduce_cuda_plan* plan,
                                         const adareduce_cuda_launch_args& args, bool is_captured) {
  const std::lock_guard calls(calls_);
  throw_if_aborted();
  release_retired();
  adareduce_error error{};
  adareduce_cuda_ticket* ticket = nullptr;
  set_blocking("launch");  // NCCL may connect ranks only now
  const int32_t status = plugin_->launch(group_, plan, &args, &ticket, &error);
  reset_blocking();
  if (status != ADAREDUCE_OK) raise(status, error);
  tickets_.insert(ticket);
  if (!is_captured) last_ = ticket;
  return ticket;
}

void CudaGroup::order(adareduce_cuda_ticket* ticket, void* stream) {
  const std::lock_guard calls(calls_);
  throw_if_aborted();
  if (!exists()) return;
  adareduce_error error{};
  const int32_t status = plugin_->order(ticket, stream, &error);
  if (status != ADAREDUCE_OK) raise(status, error);
}

bool CudaGroup::is_done(adareduce_cuda_ticket* ticket) {
  if (is_aborted_) return true;
  const std::lock_guard calls(calls_);
  return !exists() || plugin_->is_done(ticket) != 0;
}

void CudaGroup::retire(adareduce_cuda_ticket* ticket) {
  const std::lock_guard lock(retired_mutex_);
  retired_.push_back(ticket);
}

// All launches of a group are on one stream, so that the last one is done when all are: its ticket
// stays until there is a later one.
void CudaGroup::release_retired() {
  const std::lock_guard lock(retired_mutex_);
  std::erase_if(retired_, [&](adareduce_cuda_ticket* ticket) {
    if (ticket == last_) return false;
    if (tickets_.erase(ticket) > 0) plugin_->release(ticket);
    return true;
  });
}

bool CudaGroup::is_idle() {
  if (is_aborted_) return true;
  const std::lock_guard calls(calls_);
  return !exists() || last_ == nullptr || plugin_->is_done(last_) != 0;
}

void CudaGroup::destroy() {
  const std::lock_guard calls(calls_);
  adareduce_cuda_group* group = nullptr;
  {
    const std::lock_guard life(life_);
    std::swap(group, group_);
    exists_.store(false, std::memory_order_release);
  }
  if (group == nullptr) return;
  for (adareduce_cuda_ticket* ticket : tickets_) plugin_->release(ticket);
  tickets_.clear();
  last_ = nullptr;
  plugin_->destroy_group(group);
}

void CudaGroup::set_blocking(const char* what) {
  const std::lock_guard life(life_);
  blocking_ = {what, Clock::now()};
}

void CudaGroup::reset_blocking() {
  const std::lock_guard life(life_);
  blocking_.reset();
}

void CudaGroup::suspend_blocking() {
  const std::lock_guard life(life_);
  if (blocking_) blocking_->since = Clock::time_point::max();
}

void CudaGroup::resume_blocking() {
  const std::lock_guard life(life_);
  if (blocking_) blocking_->since = Clock::now();
}

void CudaGroup::throw_if_aborted() {
  if (!is_aborted_) return;
  const std::lock_guard life(life_);
  throw TransportError(abort_text_);
}

void CudaGroup::raise(int32_t status, const adareduce_error& error) {
  throw_if_aborted();  // what the plugin says then is only the consequence
  if (status == ADAREDUCE_PEER_DEAD) throw TransportError(error.text, error.peer);
  throw DeviceError(error.text);
}

// ---- the worker ---------------------------------------------------------------------------------

std::optional<std::string> CudaGroup::check() {
  const std::lock_guard life(life_);
  if (group_ == nullptr || is_aborted_) return std::nullopt;
  adareduce_error error{};
  if (plugin_->check(group_, &error) == ADAREDUCE_OK) return std::nullopt;
  return error.text;
}

void CudaGroup::abort(const std::string& text) {
  const std::lock_guard life(life_);
  if (is_aborted_) return;
  abort_text_ = text;
  is_aborted_ = true;
  if (group_ != nullptr) plugin_->abort(group_, text.c_str());
}

std::optional<CudaGroup::Blocking> CudaGroup::blocking() {
  const std::lock_guard life(life_);
  if (!blocking_ || blocking_->since == Clock::time_point::max()) return std::nullopt;
  return blocking_;
}

// ---- handles ------------------------------------------------------------------------------------

DeviceHandle::~DeviceHandle() {
  if (ticket_ != nullptr) group_->retire(ticket_);
}

bool DeviceHandle::is_finished() const { return group_->is_done(ticket_); }

void DeviceHandle::order(void* stream) const {
  try {
    group_->order(ticket_, stream);
  } catch (const TransportError& error) {
    throw TransportError(concat(call_, ": ", error.what()), error.peer());
  } catch (const DeviceError& error) {
    throw DeviceError(concat(call_, ": ", error.what()));
  }
}

}  // namespace adareduce
