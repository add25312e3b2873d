#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "transports/shared_memory/epochs.h"

namespace adareduce {

/// Threads that share the work of whoever calls run(). They are made when they are needed first; a
/// short time after a run they sleep until the next.
class Workers {
 public:
  static constexpr int kMost = 64;

  /// `count` threads work, the caller's among them: 1 ... kMost, else UsageError. Those that are
  /// made may use the CPUs that the thread in here may use: a caller of run() may be bound to one.
  explicit Workers(int count);
  /// Ends the threads. Nobody may be in run().
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int count() const { return count_; }
  /// From now on they sleep at once: threads outnumber cores. Any thread.
  void stop_spinning() { may_spin_.store(false, std::memory_order_relaxed); }

  /// Calls body(i) for i = 0 ... items - 1, in any order and several at a time, and returns when
  /// all calls have. Bodies neither wait for each other nor call run(): while another thread is in
  /// it, this one does everything alone. Throws what a body threw, the first one; items may then be
  /// left out. Any thread.
  template <typename Body>
  void run(std::int64_t items, const Body& body) {
    run_spans(items, {&body, [](const void* of, std::int64_t begin, std::int64_t end) {
                        for (std::int64_t i = begin; i < end; ++i)
                          (*static_cast<const Body*>(of))(i);
                      }});
  }

 private:
  struct SpanBody {
    const void* of = nullptr;
    void (*call)(const void* of, std::int64_t begin, std::int64_t end) = nullptr;
  };

  void run_spans(std::int64_t items, SpanBody body);
  void start_threads();
  void serve(std::uint32_t seen);
  void take_spans();
  void do_span(std::int64_t span);
  Patience patience() const;

  const int count_;
  cpu_set_t cpus_;  // empty: unknown
  std::atomic<bool> may_spin_{true};
  std::atomic<bool> must_stop_{false};
  std::mutex in_use_;                 // held by the thread in run()
  bool has_started_ = false;          // guarded by in_use_
  std::vector<std::thread> threads_;  // guarded by in_use_

  // Of a run. Written by its caller before it opens unclaimed_; read by those who have claimed a
  // span and not yet reported it, without whom no run ends.
  SpanBody body_;
  std::int64_t items_ = 0;
  std::int64_t span_items_ = 0;
  std::int64_t num_spans_ = 0;
  std::uint32_t run_ = 0;

  alignas(128) std::atomic<std::int64_t> unclaimed_{0};   // spans; below 0: late ones have looked
  alignas(128) std::atomic<std::int64_t> unreported_{0};  // spans whose threads have not said so
  Epoch begun_;                                           // runs; the last one is the end
  Epoch ended_;                                           // runs
  std::atomic<bool> has_failed_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;  // guarded by error_mutex_ while spans are unreported
};

}  // namespace adareduce
