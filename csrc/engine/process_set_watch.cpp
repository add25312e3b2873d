// How a process set looks after itself: waits that become long, peers that ask, the device.
#include <algorithm>
#include <cmath>

#include "base/errors.h"
#include "engine/process_set.h"

namespace adareduce {
namespace {

// A peer that is asked must have time to answer before anybody is blamed.
constexpr Seconds kAskEvery{1.0};
constexpr Seconds kAnswerWithin{5.0};
Seconds first_question(const Settings& settings) {
  return std::min(kAskEvery, std::min(settings.warn_after, settings.fail_after) / 4);
}

std::string seconds_text(Seconds seconds) {
  const double tenths = std::round(seconds.count() * 10);
  return concat(tenths / 10, " s");
}

// How long a call of a CUDA library may take to notice that its process set is broken.
constexpr Seconds kStuckAfter{10.0};
Seconds stuck_after(const Settings& settings) {
  return std::min(kStuckAfter, settings.fail_after / 4);
}

}  // namespace

void ProcessSet::watch(int index, Clock::time_point now) {
  Channel& channel = channels_[static_cast<std::size_t>(index)];
  const Seconds waited = now - channel.waiting_since;
  if (waited < first_question(settings_)) return;
  if (channel.asked_at < channel.waiting_since || now - channel.asked_at >= kAskEvery) {
    channel.asked_at = now;
    try {
      presence_.ask();
    } catch (const std::exception& error) {
      break_down(concat(describe(channel.current->request), ": ", explain(error)));
      return;
    }
  }
  serve_peers(now);
  if (!channel.task) return;  // a peer's failure has ended it

  const Seconds next_warning = channel.reported + settings_.warn_after;
  if (waited < std::min(next_warning, settings_.fail_after)) return;
  const Work& work = *channel.current;
  const Clock::time_point lately = now - std::chrono::duration_cast<Clock::duration>(kAnswerWithin);
  const Presence::Missing missing =
      presence_.find_missing(index, work.header.sequence, std::max(channel.waiting_since, lately));
  const std::string call =
      concat(describe(work.request), " (request ", work.header.sequence, " of ", name_, ")");
  // A rank that has finished may wait for as long as the others are alive: they may be evaluating.
  const bool may_fail =
      !(work.request.flags & kLeaving) || !work.request.is_orderly || !missing.silent.empty();
  if (waited >= settings_.fail_after && may_fail) {
    break_down(
        concat(call, ": gave up after ", seconds_text(settings_.fail_after), ": ", missing.text));
    return;
  }
  if (waited >= next_warning) {
    channel.reported = waited;
    if (index == kBarriers && work.request.flags & kLeaving) return;  // the other channel says it
    log_.add(EventLog::Level::warning,
             concat(call, ": waiting for ", seconds_text(waited), ": ", missing.text,
                    may_fail ? concat(". Gives up after ", seconds_text(settings_.fail_after)) : "",
                    "."));
  }
}

void ProcessSet::watch_share(const std::string& call, ShareWait& wait) {
  const Clock::time_point now = Clock::now();
  const Seconds waited = now - wait.since;
  if (waited < first_question(settings_)) return;
  const bool must_ask = wait.asked_at < wait.since || now - wait.asked_at >= kAskEvery;
  const Seconds next_warning = wait.reported + settings_.warn_after;
  const bool must_look = waited >= std::min(next_warning, settings_.fail_after);
  if (!must_ask && !must_look) return;
  const std::lock_guard driver(driving_);  // answers come to the worker
  if (is_broken()) return;
  if (must_ask) {
    wait.asked_at = now;
    presence_.ask();
  }
  if (!must_look) return;
  const Clock::time_point lately = now - std::chrono::duration_cast<Clock::duration>(kAnswerWithin);
  // All have made the call, but for later ones.
  const Presence::Missing missing =
      presence_.find_missing(kBarriers, 0, std::max(wait.since, lately));
  if (waited >= settings_.fail_after) {
    break_down(
        concat(call, ": gave up after ", seconds_text(settings_.fail_after), ": ", missing.text));
    return;
  }
  wait.reported = waited;
  log_.add(EventLog::Level::warning,
           concat(call, " of ", name_, ": waiting for ", seconds_text(waited), ": ", missing.text,
                  ". Gives up after ", seconds_text(settings_.fail_after), "."));
}

void ProcessSet::serve_peers(Clock::time_point now) {
  if (size() == 1 || is_over()) return;
  try {
    const std::optional<std::string> failure = presence_.serve(my_progress(), now);
    if (failure) break_down(*failure, false);
  } catch (const std::exception& error) {  // ULFM reports a death to whoever looks for messages
    break_down(explain(error));
  }
}

void ProcessSet::watch_device(Clock::time_point now) {
  if (const auto error = cuda_group_->check()) break_down(concat(name_, ": ", *error));
  const auto blocking = cuda_group_->blocking();
  if (!blocking) return;
  if (!is_broken()) {
    if (now - blocking->since >= settings_.fail_after)
      break_down(concat(name_, ": ", blocking->what, " on CUDA: gave up after ",
                        seconds_text(settings_.fail_after), ": not all ranks have come"));
    return;
  }
  // NCCL cannot be told to stop making a communicator: its caller never comes back.
  if (has_reported_stuck_ || now - std::max(blocking->since, broken_at_) < stuck_after(settings_))
    return;
  has_reported_stuck_ = true;
  log_.add(EventLog::Level::fatal,
           concat(*problem(), ". A thread of this rank is in ", blocking->what,
                  " on CUDA, which cannot be aborted: the process must end."));
}

Presence::Progress ProcessSet::my_progress() {
  const std::lock_guard lock(mutex_);
  if (last_call_.sequence && !last_call_.text) {
    const Request* request = find_request(last_call_.channel, *last_call_.sequence);
    last_call_.text = request == nullptr ? "" : describe(*request);
  }
  return {{channels_[kRequests].submitted, channels_[kBarriers].submitted},
          last_call_.text.value_or("")};
}

// A request that is queued, under way, or the last one that has ended.
const Request* ProcessSet::find_request(int index, std::uint64_t sequence) const {
  const Channel& channel = channels_[static_cast<std::size_t>(index)];
  for (auto work = channel.queue.rbegin(); work != channel.queue.rend(); ++work)
    if (work->header.sequence == sequence) return &work->request;
  if (channel.current && channel.current->header.sequence == sequence)
    return &channel.current->request;
  if (channel.ended && channel.ended->header.sequence == sequence) return &channel.ended->request;
  return nullptr;
}

}  // namespace adareduce
