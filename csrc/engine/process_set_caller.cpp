// What the callers of synchronous requests do themselves.
#include <sched.h>

#include "base/errors.h"
#include "engine/process_set.h"
#include "engine/shared_execution.h"

namespace adareduce {
namespace {

// A caller gives its work to the worker when nothing has moved for so long: it should notice
// Ctrl-C.
constexpr Seconds kLongestDrive{2e-3};

}  // namespace

void ProcessSet::drive(const Handle& handle) {
  const std::unique_lock driver(driving_, std::try_to_lock);
  if (!driver) return;
  set_waiter(settings_.longest_sleep, true);
  Clock::time_point last_move{};
  while (!handle.is_finished()) {
    try {
      // A large request moves for long before it waits for the first time.
      if (progress(Clock::now())) {
        last_move = Clock::now();
        continue;
      }
    } catch (const std::exception& error) {
      break_down(concat(name_, ": ", error.what()));
      return;
    }
    const Clock::time_point now = Clock::now();
    if (last_move == Clock::time_point{}) last_move = now;  // it has begun
    if (now - last_move > kLongestDrive) return;
    if (!has_slept()) sched_yield();
  }
}

std::shared_ptr<Handle> ProcessSet::run_at_once(const Request& request) {
  std::unique_lock driver(driving_, std::try_to_lock);
  const auto slowly = [&] {
    if (driver) driver.unlock();
    auto handle = submit(request);
    drive(*handle);
    return handle;
  };
  Channel& channel = channels_[kRequests];
  // The workspace belongs to the request under way, if there is one.
  if (shared_ == nullptr || has_failure_.load(std::memory_order_acquire) || !driver ||
      channel.current)
    return slowly();
  const std::shared_ptr<const Plan> plan = plans_.get(request);
  bool is_idle = false;
  Header header;
  if (plan->is_small && shared_->takes(request, *plan)) {
    workspace_.reserve(*plan);  // not much
    const std::lock_guard lock(mutex_);
    throw_if_unusable(request);
    is_idle = channel.queue.empty();
    if (is_idle) {
      header = {.sequence = channel.submitted++, .signature = signature_of(request)};
      last_call_ = {kRequests, header.sequence, std::nullopt};
    }
  }
  if (!is_idle) return slowly();
  try {
    return run_alone(request, plan, header);
  } catch (const std::exception& error) {
    // The request has its number: the others count on this rank.
    break_down(concat(describe(request), ": ", explain(error)));
    throw;
  }
}

// The only request of its channel, small, numbered; null: it has ended well.
std::shared_ptr<Handle> ProcessSet::run_alone(const Request& request,
                                              const std::shared_ptr<const Plan>& plan,
                                              const Header& header) {
  Channel& channel = channels_[kRequests];
  shared_->post_payload(request, *plan, header.sequence);
  shared_->post(kRequests, header);
  set_waiter(settings_.longest_sleep, true);
  auto posts = shared_->wait_for_posts(kRequests, header.sequence);
  bool have_all_come = posts.is_soon();
  if (!have_all_come) {
    const Clock::time_point begin = Clock::now();
    while (!have_all_come && Clock::now() - begin < kLongestDrive) have_all_come = posts.test();
    has_slept();
  }
  have_all_come = have_all_come && !shared_->has_lost_any();
  Header merged = header;
  if (have_all_come) shared_->merge_posts(kRequests, merged);
  if (have_all_come && merged.is_agreed()) {
    Result result;
    ++shared_->routes().on_boards;
    execute_small(*shared_, request, *plan, workspace_, header.sequence, result);
    if (!channel.ended) channel.ended.emplace();
    channel.ended->request = request;  // for peers that ask for the last call
    channel.ended->header = header;
    return nullptr;
  }
  // Somebody is late, or wants something else: from here on like any other request.
  Work work{.request = request,
            .handle = std::make_shared<Handle>(),
            .plan = plan,
            .header = header,
            .is_shared = true,
            .is_posted = true};
  name_if_nameless(work.request, header.sequence);
  const std::shared_ptr<Handle> handle = work.handle;
  {
    const std::lock_guard lock(mutex_);
    channel.current = std::move(work);
  }
  start(channel, Clock::now());
  return handle;
}

}  // namespace adareduce
