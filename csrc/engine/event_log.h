#pragma once
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <string>

#include "bootstrap/bootstrap.h"

namespace adareduce {

/// What the worker has to say to people. The engine never prints; Python takes these and logs them.
class EventLog {
 public:
  /// fatal: a thread of this process is stuck for good. The engine does not exit; the reader does.
  enum class Level { debug, info, warning, error, fatal };
  struct Event {
    Level level;
    std::string text;
  };

  void add(Level level, std::string text);
  /// The oldest event, waiting for one at most `timeout`; nothing after that or once closed.
  std::optional<Event> next(Seconds timeout);
  /// Wakes all waiters; events that are still there can be taken.
  void close();
  bool is_closed();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Event> events_;
  bool closed_ = false;
};

}  // namespace adareduce
