// Memory that ranks share, its epochs and its regions, with ranks as threads that wait in every
// way there is. Sanitizers watch it: ranks of one process have one address for one memory, so a
// read that no epoch orders is a race that ThreadSanitizer sees.
#include <array>
#include <cstring>
#include <limits>

#include "stress_ranks.h"
#include "transports/shared_memory/epochs.h"
#include "transports/shared_memory/shared_regions.h"
#include "transports/shared_memory/shared_windows.h"

using namespace adareduce;

namespace {

using Clock = std::chrono::steady_clock;

// A rank as a thread, without an engine.
struct Member {
  Rank rank;
  int size;
  GatherStrings gather;
  Random random;
};

// Ends the program at once: the other threads may wait for the one that has failed.
void run_threads(const std::string& scenario, int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int index = 0; index < count; ++index)
    threads.emplace_back([&, index] {
      try {
        body(index);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "shared_memory_stress: %s, thread %d: %s\n", scenario.c_str(), index,
                     error.what());
        std::_Exit(1);
      }
    });
  for (std::thread& thread : threads) thread.join();
}

void run_members(const char* scenario, int size, int seed,
                 const std::function<void(Member&)>& body) {
  const auto world = std::make_shared<ThreadWorld>(size);
  run_threads(concat(scenario, " with ", size, " ranks, seed ", seed), size, [&](Rank rank) {
    ThreadBootstrap bootstrap(world, rank);
    Member member{rank, size,
                  [&](const std::string& mine) { return bootstrap.allgather(mine, kHangLimit); },
                  random_of({seed, size, rank})};
    body(member);
  });
}

Patience some_patience(Random& random) {
  constexpr std::array kSleeps{0.0, 1e-5, 1e-3, 10.0};
  return {below(random, 3) == 0 ? below(random, 200) : 0, below(random, 3),
          Seconds{kSleeps[static_cast<std::size_t>(below(random, 4))]}};
}

void await_epochs(std::span<Epoch* const> epochs, std::uint32_t target, Random& random) {
  const auto until = Clock::now() + kHangLimit;
  EpochWait wait(epochs, target);
  while (!(below(random, 4) == 0 ? wait.poll() : wait.wait(some_patience(random))))
    if (Clock::now() > until) {
      std::fprintf(stderr, "epoch %zu does not reach %u\n", wait.first_lagging(), target);
      std::abort();
    }
}

std::shared_ptr<SharedWindows> make_windows(const Member& member, std::int64_t bytes) {
  return SharedWindows::make(member.rank, member.size, bytes, member.gather);
}

// --- data in slots: written, read by all, written again

constexpr std::uint32_t kSlots = 3;
constexpr std::uint32_t kChunks = 100;
constexpr std::int64_t kSlotNumel = 500;
constexpr std::int64_t kSlotsAt = 2 * sizeof(Epoch);
constexpr std::int64_t kSlotWindow = kSlotsAt + kSlots * kSlotNumel * 8;

double* slot(const SharedWindows& windows, Rank rank, std::uint32_t chunk) {
  char* const slots = windows.of(rank) + kSlotsAt;
  return reinterpret_cast<double*>(slots) + chunk % kSlots * kSlotNumel;
}

double number(Rank rank, std::uint32_t chunk, std::int64_t element) {
  return static_cast<double>(chunk) * 1000 + static_cast<double>(element) + rank * 1e12;
}

// Epoch 0: chunks that this rank has written; epoch 1: chunks of all ranks that it has read.
void slots(int size, int seed) {
  run_members("slots", size, seed, [&](Member& member) {
    const auto windows = make_windows(member, kSlotWindow);
    std::array<std::vector<Epoch*>, 2> epochs;
    for (Rank rank = 0; rank < size; ++rank)
      for (std::size_t kind = 0; kind < 2; ++kind)
        epochs[kind].push_back(reinterpret_cast<Epoch*>(windows->of(rank)) + kind);
    const auto self = static_cast<std::size_t>(member.rank);
    const std::uint32_t first = 0u - 30;  // soon it wraps around
    for (auto& kind : epochs) advance(*kind[self], first);
    (void)member.gather("");
    const auto epoch_of = [=](std::uint32_t chunk) { return first + chunk + 1; };
    // A rank writes as far ahead as there are slots before it reads, so that only the second epoch
    // keeps it from what others still read.
    constexpr std::uint32_t kLag = kSlots - 1;
    for (std::uint32_t step = 0; step < kChunks + kLag; ++step) {
      if (step < kChunks) {
        if (step >= kSlots) await_epochs(epochs[1], epoch_of(step - kSlots), member.random);
        double* const mine = slot(*windows, member.rank, step);
        for (std::int64_t i = 0; i < kSlotNumel; ++i) mine[i] = number(member.rank, step, i);
        advance(*epochs[0][self], epoch_of(step));
      }
      if (step < kLag) continue;
      const std::uint32_t chunk = step - kLag;
      await_epochs(epochs[0], epoch_of(chunk), member.random);
      for (Rank rank = 0; rank < size; ++rank)
        for (std::int64_t i = 0; i < kSlotNumel; ++i)
          CHECK(slot(*windows, rank, chunk)[i] == number(rank, chunk, i));
      advance(*epochs[1][self], epoch_of(chunk));
    }
  });
}

// --- windows that come and go, of sets that know nothing of each other

void windows_come_and_go(int size, int seed) {
  run_members("windows", size, seed, [&](Member& member) {
    Random shared = random_of({seed});  // equal on all ranks
    std::vector<std::shared_ptr<SharedWindows>> held;
    for (int round = 0; round < 15; ++round) {
      std::vector<std::int64_t> bytes(static_cast<std::size_t>(size));
      for (std::int64_t& count : bytes)
        count = below(shared, 4) == 0 ? 0 : 1 + below(shared, 100'000);
      const bool fails = below(shared, 4) == 0;
      const Rank greedy = below(shared, size);
      const auto own = static_cast<std::size_t>(member.rank);
      if (fails) {
        const std::int64_t wanted =
            greedy != member.rank ? bytes[own] : std::numeric_limits<std::int64_t>::max();
        try {
          (void)make_windows(member, wanted);
          CHECK(!"there is no such memory");
        } catch (const SharedMemoryError& error) {
          check_contains(error.what(), "bytes for all ranks");
        }
        continue;
      }
      const auto windows = make_windows(member, bytes[own]);
      for (Rank rank = 0; rank < size; ++rank) {
        CHECK(windows->bytes_of(rank) == bytes[static_cast<std::size_t>(rank)]);
        CHECK((windows->of(rank) == nullptr) == (windows->bytes_of(rank) == 0));
      }
      char* const mine = windows->of(member.rank);
      for (std::int64_t i = 0; i < bytes[own]; ++i) CHECK(mine[i] == 0);
      if (mine != nullptr) std::memset(mine, member.rank + 1, static_cast<std::size_t>(bytes[own]));
      (void)member.gather("");
      for (Rank rank = 0; rank < size; ++rank)
        for (std::int64_t i = 0; i < windows->bytes_of(rank); i += 97)
          CHECK(windows->of(rank)[i] == rank + 1);
      // Ranks let go at different times; the memory of the others stays.
      held.push_back(windows);
      if (below(member.random, 2) == 0)
        held.erase(held.begin() + below(member.random, static_cast<int>(held.size())));
    }
  });
}

// --- regions that threads find, add and lose

void regions(int seed) {
  SharedRegions registry;
  const GatherStrings alone = [](const std::string& mine) { return std::vector{mine}; };
  run_threads(concat("regions, seed ", seed), 4, [&](int index) {
    Random random = random_of({seed, index});
    std::vector<std::shared_ptr<SharedRegion>> held;
    for (int step = 0; step < 400; ++step) {
      if (held.size() < 2 || below(random, 8) == 0)
        held.push_back(registry.add(SharedWindows::make(0, 1, 100 + index, alone)));
      const auto at = below(random, static_cast<int>(held.size()));
      SharedRegion& region = *held[static_cast<std::size_t>(at)];
      for (int look = 0; look < 5; ++look) {
        const int offset = below(random, 100);
        const auto place = registry.find(region.data() + offset, 100 + index - offset);
        CHECK(place && place->region == &region && place->offset == offset);
        CHECK(place->region->id() == region.id());
        CHECK(!registry.find(region.data() + offset, 101 + index - offset));
      }
      CHECK(!registry.find(&random, 1));
      if (held.size() > 5) held.erase(held.begin() + at);
    }
  });
}

}  // namespace

int main() {
  for (const int size : {1, 2, 3, 4, 5, 8})
    for (int seed = 0; seed < 2; ++seed) slots(size, seed);
  for (const int size : {1, 2, 3, 5})
    for (int seed = 0; seed < 2; ++seed) {
      std::thread other([=] { windows_come_and_go(size, 100 + seed); });
      windows_come_and_go(size, seed);
      other.join();
    }
  for (int seed = 0; seed < 3; ++seed) regions(seed);
  std::puts("shared_memory_stress: all is well");
  return 0;
}
