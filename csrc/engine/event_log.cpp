#include "engine/event_log.h"

namespace adareduce {

void EventLog::add(Level level, std::string text) {
  {
    const std::lock_guard lock(mutex_);
    events_.push_back({level, std::move(text)});
  }
  changed_.notify_one();
}

std::optional<EventLog::Event> EventLog::next(Seconds timeout) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, timeout, [&] { return closed_ || !events_.empty(); });
  if (events_.empty()) return std::nullopt;
  Event event = std::move(events_.front());
  events_.pop_front();
  return event;
}

void EventLog::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
}

bool EventLog::is_closed() {
  const std::lock_guard lock(mutex_);
  return closed_;
}

}  // namespace adareduce
