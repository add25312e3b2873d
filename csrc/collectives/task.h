#pragma once
#include <concepts>
#include <coroutine>
#include <cstdint>
#include <exception>
#include <memory>
#include <utility>

#include "transports/transport.h"

namespace adareduce {

/// A collective under way: a coroutine that gives its thread back wherever it would wait for a
/// peer.
///
/// Inside one, `co_await transport.start(...)` goes on when the exchange is complete, `co_await
/// memory.wait(...)` when the ranks have come so far, and `co_await other_task(...)` when the other
/// one has ended. One thread at a time calls progress().
class Task {
 public:
  struct promise_type;

  Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Task& operator=(Task&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  /// Gives up whatever is under way.
  ~Task() {
    if (handle_) handle_.destroy();
  }

  /// Forgets the coroutine and all that it waits for, without giving any of it back.
  void leak() { handle_ = nullptr; }

  /// Runs until the end (true) or until an exchange is not complete (false). Never blocks.
  /// Throws what the coroutine threw, which is then at its end, or what an exchange threw. In that
  /// case the coroutine stays where it is: messages of the same exchange may still arrive in its
  /// memory, and whoever catches the error decides between destroying it and leak().
  bool progress();

  /// Counts the exchanges that have completed: a task whose count stands still is waiting.
  std::uint64_t completed_exchanges() const;

 private:
  using Handle = std::coroutine_handle<promise_type>;
  explicit Task(Handle handle) : handle_(handle) {}
  Handle handle_;
};

struct Task::promise_type {
  /// What the innermost running coroutine waits for. One per chain of nested tasks.
  struct Waiting {
    std::coroutine_handle<> innermost;
    Exchange* exchange = nullptr;
    std::uint64_t completed = 0;
  };

  struct ExchangeAwaiter {
    std::unique_ptr<Exchange> exchange;
    Waiting* waiting;

    bool await_ready() { return false; }  // progress() looks at once
    void await_suspend(std::coroutine_handle<> self) {
      waiting->innermost = self;
      waiting->exchange = exchange.get();
    }
    void await_resume() {}
  };

  /// An exchange that stands in the coroutine itself, and is looked at before anybody suspends.
  template <typename OwnExchange>
  struct OwnExchangeAwaiter {
    OwnExchange exchange;
    Waiting* waiting;

    bool await_ready() { return exchange.is_soon(); }
    void await_suspend(std::coroutine_handle<> self) {
      waiting->innermost = self;
      waiting->exchange = &exchange;
    }
    void await_resume() {}
  };

  struct TaskAwaiter {
    Task task;
    Waiting* waiting;

    bool await_ready() { return false; }
    std::coroutine_handle<> await_suspend(std::coroutine_handle<> self) {
      task.handle_.promise().waiting = waiting;
      task.handle_.promise().parent = self;
      return task.handle_;
    }
    void await_resume() {
      if (task.handle_.promise().error) std::rethrow_exception(task.handle_.promise().error);
    }
  };

  struct ReturnToParent {
    bool await_ready() noexcept { return false; }
    std::coroutine_handle<> await_suspend(Handle self) noexcept {
      const std::coroutine_handle<> parent = self.promise().parent;
      return parent ? parent : std::noop_coroutine();
    }
    void await_resume() noexcept {}
  };

  Waiting own;
  Waiting* waiting = &own;
  std::coroutine_handle<> parent;
  std::exception_ptr error;

  Task get_return_object() {
    const Handle handle = Handle::from_promise(*this);
    own.innermost = handle;
    return Task(handle);
  }
  std::suspend_always initial_suspend() noexcept { return {}; }
  ReturnToParent final_suspend() noexcept { return {}; }
  void return_void() {}
  void unhandled_exception() { error = std::current_exception(); }

  ExchangeAwaiter await_transform(std::unique_ptr<Exchange> exchange) {
    return {std::move(exchange), waiting};
  }
  template <std::derived_from<Exchange> OwnExchange>
  OwnExchangeAwaiter<OwnExchange> await_transform(OwnExchange exchange) {
    return {std::move(exchange), waiting};
  }
  TaskAwaiter await_transform(Task task) { return {std::move(task), waiting}; }
};

inline bool Task::progress() {
  promise_type::Waiting& waiting = handle_.promise().own;
  while (!handle_.done()) {
    if (waiting.exchange != nullptr) {
      if (!waiting.exchange->test()) return false;
      waiting.exchange = nullptr;
      ++waiting.completed;
    }
    waiting.innermost.resume();
  }
  if (handle_.promise().error)
    std::rethrow_exception(std::exchange(handle_.promise().error, nullptr));
  return true;
}

inline std::uint64_t Task::completed_exchanges() const { return handle_.promise().own.completed; }

}  // namespace adareduce
