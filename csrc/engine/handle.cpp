#include "engine/handle.h"

namespace adareduce {

bool Handle::is_finished() const {
  const std::lock_guard lock(mutex_);
  return is_finished_;
}

bool Handle::wait_for(Seconds timeout) const {
  std::unique_lock lock(mutex_);
  return finished_.wait_for(lock, timeout, [&] { return is_finished_; });
}

void Handle::rethrow() const {
  std::exception_ptr error;
  {
    const std::lock_guard lock(mutex_);
    error = error_;
  }
  if (error) std::rethrow_exception(error);
}

void Handle::finish(Result result) {
  {
    const std::lock_guard lock(mutex_);
    result_ = std::move(result);
    is_finished_ = true;
  }
  finished_.notify_all();
}

void Handle::fail(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    error_ = std::move(error);
    is_finished_ = true;
  }
  finished_.notify_all();
}

}  // namespace adareduce
