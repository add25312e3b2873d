#include "transports/shared_memory/shared_regions.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

namespace adareduce {
namespace {

// Versions of all tables are different numbers, so that one number tells table and state.
std::uint64_t new_version() {
  static std::atomic<std::uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

struct Entry {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  SharedRegion* region = nullptr;

  bool holds(std::uintptr_t place, std::uint64_t bytes) const {
    return place >= begin && place < end && bytes <= end - place;
  }
};

// What this thread has found last, and in which version of which table.
struct Found {
  std::uint64_t version = 0;
  Entry entry;
};
thread_local Found last_found;

}  // namespace

struct SharedRegion::Table {
  std::mutex mutex;
  std::vector<Entry> entries;  // by address, which do not overlap; guarded by mutex
  std::uint64_t next_id = 0;   // guarded by mutex
  // Changes with the entries. Whoever gets memory at the address of a region that has gone sees the
  // version without that region, since it was removed before its memory was given back.
  std::atomic<std::uint64_t> version{new_version()};
  std::atomic<std::size_t> count{0};  // of entries

  void changed() {
    version.store(new_version(), std::memory_order_release);
    count.store(entries.size(), std::memory_order_release);
  }
};

SharedRegion::~SharedRegion() {
  const std::lock_guard lock(table_->mutex);
  const auto gone = [this](const Entry& entry) { return entry.region == this; };
  if (std::erase_if(table_->entries, gone) > 0) table_->changed();
}

SharedRegions::SharedRegions() : table_(std::make_shared<SharedRegion::Table>()) {}

std::shared_ptr<SharedRegion> SharedRegions::add(std::shared_ptr<SharedWindows> windows) {
  std::shared_ptr<SharedRegion> region;  // before the lock, which its destructor takes, too
  const std::lock_guard lock(table_->mutex);
  region.reset(new SharedRegion(std::move(windows), table_->next_id++, table_));
  if (region->bytes() == 0) return region;
  const auto begin = reinterpret_cast<std::uintptr_t>(region->data());
  const Entry entry{begin, begin + static_cast<std::uint64_t>(region->bytes()), region.get()};
  const auto after = [](std::uintptr_t place, const Entry& e) { return place < e.begin; };
  auto& entries = table_->entries;
  entries.insert(std::upper_bound(entries.begin(), entries.end(), begin, after), entry);
  table_->changed();
  return region;
}

std::optional<SharedRegions::Place> SharedRegions::find(const void* pointer,
                                                        std::int64_t bytes) const {
  const auto place = reinterpret_cast<std::uintptr_t>(pointer);
  const auto count = static_cast<std::uint64_t>(bytes);
  const auto in = [place](const Entry& entry) {
    return Place{entry.region, static_cast<std::int64_t>(place - entry.begin)};
  };
  SharedRegion::Table& table = *table_;
  Found& last = last_found;
  if (last.version == table.version.load(std::memory_order_acquire) &&
      last.entry.holds(place, count))
    return in(last.entry);
  if (table.count.load(std::memory_order_acquire) == 0) return std::nullopt;

  const std::lock_guard lock(table.mutex);
  const auto after = [](std::uintptr_t p, const Entry& entry) { return p < entry.begin; };
  auto entry = std::upper_bound(table.entries.begin(), table.entries.end(), place, after);
  if (entry == table.entries.begin() || !(--entry)->holds(place, count)) return std::nullopt;
  last = {table.version.load(std::memory_order_relaxed), *entry};
  return in(*entry);
}

}  // namespace adareduce
