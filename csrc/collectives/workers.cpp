#include "collectives/workers.h"

#include <pthread.h>

#include <algorithm>
#include <limits>
#include <system_error>
#include <utility>

#include "base/errors.h"

namespace adareduce {
namespace {

// So many of each thread: one that comes late, or whose core is taken away, leaves the rest to the
// others.
constexpr std::int64_t kSpansPerThread = 4;

// Between two steps of a collective: some 80 us of looking, so that most runs wake nobody.
constexpr int kPauses = 2000;
constexpr int kYields = 20;

}  // namespace

Workers::Workers(int count) : count_(count) {
  if (count < 1 || count > kMost)
    throw UsageError(concat("Workers: count must be 1 ... ", kMost, ", got ", count));
  if (sched_getaffinity(0, sizeof cpus_, &cpus_) != 0) CPU_ZERO(&cpus_);
}

Workers::~Workers() {
  must_stop_.store(true, std::memory_order_release);
  advance(begun_, run_ + 1);
  for (std::thread& thread : threads_) thread.join();
}

void Workers::run_spans(std::int64_t items, SpanBody body) {
  if (items <= 0) return;
  const std::unique_lock use(in_use_, std::try_to_lock);
  if (!use || count_ == 1 || items == 1) return body.call(body.of, 0, items);
  start_threads();
  body_ = body;
  items_ = items;
  span_items_ = std::max<std::int64_t>(1, items / (kSpansPerThread * count_));
  num_spans_ = (items + span_items_ - 1) / span_items_;
  ++run_;
  has_failed_.store(false, std::memory_order_relaxed);
  unreported_.store(num_spans_, std::memory_order_relaxed);
  unclaimed_.store(num_spans_, std::memory_order_release);
  advance(begun_, run_);
  take_spans();
  Epoch* const ended[] = {&ended_};
  EpochWait wait(ended, run_);
  while (!wait.wait(patience())) continue;
  // The last reference: no two threads share an exception.
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Workers::start_threads() {
  if (std::exchange(has_started_, true)) return;
  threads_.reserve(static_cast<std::size_t>(count_ - 1));
  for (int i = 1; i < count_; ++i) {
    try {
      threads_.emplace_back([this, seen = run_] { serve(seen); });
    } catch (const std::system_error&) {
      return;  // the system has no more: those that there are do the work
    }
    const pthread_t thread = threads_.back().native_handle();
    pthread_setname_np(thread, concat("adareduce-", i).c_str());
    if (CPU_COUNT(&cpus_) > 0) pthread_setaffinity_np(thread, sizeof cpus_, &cpus_);
  }
}

void Workers::serve(std::uint32_t seen) {
  while (true) {
    Epoch* const begun[] = {&begun_};
    EpochWait wait(begun, seen + 1);
    while (!wait.wait(patience())) continue;
    seen = begun_.value.load(std::memory_order_acquire);
    if (must_stop_.load(std::memory_order_acquire)) return;
    take_spans();
  }
}

// A thread that comes late finds nothing to claim, or helps with the run that has begun meanwhile:
// both are right. Only a claim lets it look at the run, which cannot end before it has reported.
void Workers::take_spans() {
  std::int64_t taken = 0;
  for (std::int64_t left = 0; (left = unclaimed_.fetch_sub(1, std::memory_order_acq_rel)) > 0;) {
    ++taken;
    do_span(num_spans_ - left);
  }
  if (taken == 0) return;
  const std::uint32_t run = run_;  // after the report another one may begin
  if (unreported_.fetch_sub(taken, std::memory_order_acq_rel) == taken) advance(ended_, run);
}

void Workers::do_span(std::int64_t span) {
  if (has_failed_.load(std::memory_order_relaxed)) return;
  const std::int64_t begin = span * span_items_;
  std::exception_ptr error;
  try {
    body_.call(body_.of, begin, std::min(begin + span_items_, items_));
  } catch (...) {
    error = std::current_exception();
  }
  if (!error) return;
  has_failed_.store(true, std::memory_order_relaxed);
  const std::lock_guard lock(error_mutex_);
  if (!error_) error_ = std::move(error);
}

Patience Workers::patience() const {
  const bool may_spin = may_spin_.load(std::memory_order_relaxed);
  return {.pauses = may_spin ? kPauses : 0,
          .yields = may_spin ? kYields : 0,
          .longest_sleep = Seconds{std::numeric_limits<double>::infinity()}};
}

}  // namespace adareduce
