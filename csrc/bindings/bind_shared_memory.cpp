#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>

#include "base/errors.h"
#include "bindings/bindings.h"
#include "collectives/workers.h"
#include "transports/shared_memory/epochs.h"
#include "transports/shared_memory/memory_room.h"
#include "transports/shared_memory/shared_regions.h"
#include "transports/shared_memory/shared_windows.h"

namespace py = pybind11;
using namespace py::literals;

namespace adareduce {
namespace {

using Windows = SharedWindows;

// `gather` is a function of Python: bytes to a list of bytes.
GatherStrings strings_of(const py::function& gather) {
  return [&gather](const std::string& mine) {
    const py::gil_scoped_acquire lock;
    return gather(py::bytes(mine)).cast<std::vector<std::string>>();
  };
}

std::shared_ptr<Windows> make_windows(Rank rank, int size, std::int64_t bytes,
                                      const py::function& gather, double patience) {
  const GatherStrings strings = strings_of(gather);
  const py::gil_scoped_release release;
  return Windows::make(rank, size, bytes, strings, Seconds{patience});
}

char* place_of(const Windows& windows, Rank rank, std::int64_t offset, std::int64_t bytes) {
  if (offset < 0 || offset + bytes > windows.bytes_of(rank))
    throw UsageError(
        concat("offset and bytes must lie in the window, got ", offset, " and ", bytes));
  return windows.of(rank) + offset;
}

void bind_windows(py::module_& module) {
  py::class_<Windows, std::shared_ptr<Windows>>(module, "SharedWindows")
      .def(py::init(&make_windows), "rank"_a, "size"_a, "bytes"_a, "gather"_a, "patience"_a = 60.0)
      .def_property_readonly("rank", &Windows::rank)
      .def_property_readonly("size", &Windows::size)
      .def("bytes_of", &Windows::bytes_of)
      .def("address_of",
           [](const Windows& w, Rank r) { return reinterpret_cast<std::uintptr_t>(w.of(r)); })
      .def("read",
           [](const Windows& windows, Rank rank, std::int64_t offset, std::int64_t bytes) {
             return py::bytes(place_of(windows, rank, offset, bytes),
                              static_cast<std::size_t>(bytes));
           })
      .def("write",
           [](const Windows& windows, Rank rank, std::int64_t offset, const std::string& bytes) {
             const auto count = static_cast<std::int64_t>(bytes.size());
             bytes.copy(place_of(windows, rank, offset, count), bytes.size());
           });
}

// An Epoch at this offset of every rank's window, or of some ranks'.
std::vector<Epoch*> epochs_of(const Windows& windows, std::int64_t offset,
                              std::vector<Rank> ranks = {}) {
  if (ranks.empty()) {
    ranks.resize(static_cast<std::size_t>(windows.size()));
    std::iota(ranks.begin(), ranks.end(), 0);
  }
  std::vector<Epoch*> epochs;
  for (const Rank rank : ranks)
    epochs.push_back(reinterpret_cast<Epoch*>(place_of(windows, rank, offset, sizeof(Epoch))));
  return epochs;
}

// Keeps what an EpochWait only refers to.
struct Waiter {
  std::shared_ptr<Windows> windows;
  std::vector<Epoch*> epochs;
  EpochWait wait;

  Waiter(std::shared_ptr<Windows> of, std::int64_t offset, std::uint32_t target,
         const std::vector<Rank>& ranks)
      : windows(std::move(of)), epochs(epochs_of(*windows, offset, ranks)), wait(epochs, target) {}
};

// A barrier of epochs, `rounds` times. Before each a rank writes a number that tells rank and
// round, and afterwards reads everybody's. Returns how many of them were wrong.
std::int64_t walk_epochs(const Windows& windows, std::uint32_t first, std::uint32_t rounds,
                         const Patience& patience) {
  const std::vector<Epoch*> epochs = epochs_of(windows, 0);
  const auto words = [&](Rank rank, std::uint32_t round) {  // nobody is ahead by two rounds
    char* const place = place_of(windows, rank, sizeof(Epoch) * (1 + round % 2), sizeof(Epoch));
    return reinterpret_cast<std::uint64_t*>(place);
  };
  const auto number = [](Rank rank, std::uint32_t round) {
    return (std::uint64_t{round} << 32) + static_cast<std::uint64_t>(rank) + 1;
  };
  std::int64_t wrong = 0;
  for (std::uint32_t i = 1; i <= rounds; ++i) {
    const std::uint32_t round = first + i;
    *words(windows.rank(), round) = number(windows.rank(), round);
    advance(*epochs[static_cast<std::size_t>(windows.rank())], round);
    EpochWait wait(epochs, round);
    while (!wait.wait(patience)) {
    }
    for (Rank rank = 0; rank < windows.size(); ++rank)
      wrong += *words(rank, round) != number(rank, round);
  }
  return wrong;
}

void bind_epochs(py::module_& module) {
  module.attr("EPOCH_BYTES") = sizeof(Epoch);
  py::class_<Patience>(module, "Patience")
      .def(py::init([](int pauses, int yields, double longest_sleep) {
             return Patience{pauses, yields, Seconds{longest_sleep}};
           }),
           "pauses"_a, "yields"_a, "longest_sleep"_a);
  module.def("has_reached", &has_reached);
  module.def("advance_epoch", [](const Windows& windows, std::int64_t offset, std::uint32_t to) {
    advance(*epochs_of(windows, offset)[static_cast<std::size_t>(windows.rank())], to);
  });
  module.def("epoch_of", [](const Windows& windows, Rank rank, std::int64_t offset) {
    const Epoch& epoch = *epochs_of(windows, offset)[static_cast<std::size_t>(rank)];
    return std::pair(epoch.value.load(), epoch.sleepers.load());
  });
  py::class_<Waiter>(module, "EpochWait")
      .def(py::init<std::shared_ptr<Windows>, std::int64_t, std::uint32_t,
                    const std::vector<Rank>&>(),
           "windows"_a, "offset"_a, "target"_a, "ranks"_a = std::vector<Rank>())
      .def("poll", [](Waiter& waiter) { return waiter.wait.poll(); })
      .def("wait",
           [](Waiter& waiter, const Patience& patience) {
             const py::gil_scoped_release release;
             return waiter.wait.wait(patience);
           })
      .def_property_readonly("first_lagging",
                             [](const Waiter& waiter) { return waiter.wait.first_lagging(); });
  module.def("walk_epochs", &walk_epochs, "windows"_a, "first"_a, "rounds"_a, "patience"_a,
             py::call_guard<py::gil_scoped_release>());
}

void bind_regions(py::module_& module) {
  // Its memory goes when the last array or tensor that looks at it has gone.
  py::class_<SharedRegion, std::shared_ptr<SharedRegion>>(module, "SharedRegion",
                                                          py::buffer_protocol())
      .def_buffer([](SharedRegion& region) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(region.data()),
                               static_cast<py::ssize_t>(region.bytes()));
      })
      .def_property_readonly("id", &SharedRegion::id)
      .def_property_readonly("bytes", &SharedRegion::bytes)
      .def_property_readonly("address", [](const SharedRegion& region) {
        return reinterpret_cast<std::uintptr_t>(region.data());
      });
  py::class_<SharedRegions>(module, "SharedRegions")
      .def(py::init<>())
      .def("add", &SharedRegions::add)
      .def("find",
           [](const SharedRegions& regions, std::uintptr_t address,
              std::int64_t bytes) -> std::optional<std::pair<std::uint64_t, std::int64_t>> {
             const auto place = regions.find(reinterpret_cast<const void*>(address), bytes);
             if (!place) return std::nullopt;
             return std::pair(place->region->id(), place->offset);
           });
}

// How often each item was called, and how many threads took part. The first `meeting` items wait
// for each other, so that as many threads are at work at the same time. What fails: an item, or all
// that are not called by the caller's thread.
std::pair<std::vector<int>, std::size_t> run_workers(Workers& workers, std::int64_t items,
                                                     int meeting, std::int64_t failing,
                                                     bool fails_elsewhere) {
  const auto count = static_cast<std::size_t>(items);
  std::vector<std::atomic<int>> calls(count);
  std::vector<std::thread::id> threads(count);
  std::atomic<int> present{0};
  const std::thread::id caller = std::this_thread::get_id();
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  workers.run(items, [&](std::int64_t item) {
    const auto place = static_cast<std::size_t>(item);
    ++calls[place];
    threads[place] = std::this_thread::get_id();
    if (item < meeting) ++present;
    while (item < meeting && present < meeting) {
      if (std::chrono::steady_clock::now() > deadline)
        throw UsageError(concat("only ", present.load(), " of ", meeting, " have come"));
      std::this_thread::yield();
    }
    if (item == failing || (fails_elsewhere && threads[place] != caller))
      throw UsageError(concat("item ", item));
  });
  std::sort(threads.begin(), threads.end());
  const auto end = std::unique(threads.begin(), threads.end());
  return {{calls.begin(), calls.end()}, static_cast<std::size_t>(end - threads.begin())};
}

void bind_workers(py::module_& module) {
  py::class_<Workers>(module, "Workers")
      .def(py::init<int>(), "count"_a)
      .def_property_readonly("count", &Workers::count)
      .def("stop_spinning", &Workers::stop_spinning)
      .def("run", &run_workers, "items"_a, "meeting"_a = 0, "failing"_a = -1,
           "fails_elsewhere"_a = false, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_shared_memory(py::module_& module) {
  module.def("room_for_shared_memory", &room_for_shared_memory, "root"_a = "");
  bind_windows(module);
  bind_epochs(module);
  bind_regions(module);
  bind_workers(module);
}

}  // namespace adareduce
