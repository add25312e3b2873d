#pragma once
// Engines of ranks as threads, for the executables that sanitizers watch.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/errors.h"
#include "bootstrap/thread_bootstrap.h"
#include "engine/engine.h"
#include "transports/thread_transport.h"

namespace adareduce {

using Random = std::mt19937_64;
using HandlePtr = std::shared_ptr<Handle>;

constexpr Seconds kHangLimit{200.0};

#define CHECK(condition)                                                                           \
  do {                                                                                             \
    if (!(condition))                                                                              \
      throw std::logic_error(concat(__FILE__, ":", __LINE__, ": ", #condition, " does not hold")); \
  } while (false)

inline int below(Random& random, int limit) {
  return static_cast<int>(random() % static_cast<std::uint64_t>(limit));
}

inline Random random_of(std::initializer_list<int> key) {
  std::seed_seq sequence(key);
  return Random(sequence);
}

inline void await(const HandlePtr& handle) {
  if (!handle->wait_for(kHangLimit)) {
    std::fprintf(stderr, "a request hangs\n");
    std::abort();
  }
}

// The text of the E that the request ends with.
template <typename E>
std::string error_of(const HandlePtr& handle) {
  await(handle);
  try {
    handle->rethrow();
  } catch (const E& error) {
    return error.what();
  }
  throw std::logic_error("a request should have failed and has not");
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline void check_contains(const std::string& text, const std::string& part) {
  if (!contains(text, part)) throw std::logic_error(concat("'", part, "' is not in: ", text));
}

// The ranks of this run meet in shared memory.
inline bool uses_shared_memory = false;
// Some ranks have several workers.
inline bool uses_workers = false;

inline Settings patient() {
  Settings settings;
  settings.shared_memory = uses_shared_memory;
  settings.warn_after = Seconds{60};
  settings.fail_after = Seconds{120};
  settings.idle_tick = Seconds{0.02};  // news of a broken set travel at this pace
  return settings;
}

inline std::unique_ptr<Engine> make_engine(const std::shared_ptr<ThreadWorld>& world, Rank rank,
                                           Settings settings) {
  if (uses_workers) settings.workers = 3 - rank % 3;
  auto bootstrap = std::make_shared<ThreadBootstrap>(world, rank);
  auto transports = std::make_shared<ThreadTransportProvider>(*bootstrap);
  return std::make_unique<Engine>(std::move(bootstrap), std::move(transports), settings);
}

using Body = std::function<void(std::unique_ptr<Engine>& engine)>;

// Runs `body` on every rank; an engine that it leaves behind departs in good order.
inline void run_ranks(const char* scenario, int size, const Settings& settings, const Body& body) {
  const auto world = std::make_shared<ThreadWorld>(size);
  std::mutex mutex;
  std::string errors;
  std::vector<std::thread> threads;
  for (Rank rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      std::unique_ptr<Engine> engine;
      try {
        engine = make_engine(world, rank, settings);
        body(engine);
        if (engine != nullptr)
          for (const HandlePtr& handle : engine->leave("done", true)) await(handle);
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        errors += concat("rank ", rank, ": ", error.what(), "\n");
      }
    });
  for (std::thread& thread : threads) thread.join();
  if (errors.empty()) return;
  std::fprintf(stderr, "%s with %d ranks:\n%s", scenario, size, errors.c_str());
  std::exit(1);
}

}  // namespace adareduce
