#pragma once
#include <cstdint>
#include <memory>
#include <optional>

#include "transports/shared_memory/shared_windows.h"

namespace adareduce {

/// The windows of one collective allocation, found by SharedRegions while this lives. A tensor in
/// such memory holds it by a shared_ptr and may outlive the process set and the registry.
class SharedRegion : public std::enable_shared_from_this<SharedRegion> {
 public:
  ~SharedRegion();
  SharedRegion(const SharedRegion&) = delete;
  SharedRegion& operator=(const SharedRegion&) = delete;

  const SharedWindows& windows() const { return *windows_; }
  /// How many were added before it: the same on all ranks.
  std::uint64_t id() const { return id_; }
  /// This rank's memory; null where it has no bytes.
  char* data() const { return windows_->of(windows_->rank()); }
  std::int64_t bytes() const { return windows_->bytes_of(windows_->rank()); }

 private:
  friend class SharedRegions;
  struct Table;
  SharedRegion(std::shared_ptr<SharedWindows> windows, std::uint64_t id,
               std::shared_ptr<Table> table)
      : windows_(std::move(windows)), id_(id), table_(std::move(table)) {}

  std::shared_ptr<SharedWindows> windows_;
  std::uint64_t id_;
  std::shared_ptr<Table> table_;
};

/// Which memory of this rank its peers can address, too. Keeps none of it alive. All calls may be
/// made by any thread; add() in the same order on all ranks, as the allocation itself.
class SharedRegions {
 public:
  SharedRegions();

  /// Registers windows until the last reference to what it returns has gone.
  std::shared_ptr<SharedRegion> add(std::shared_ptr<SharedWindows> windows);

  struct Place {
    SharedRegion* region = nullptr;  ///< lives as long as the memory that was looked up
    std::int64_t offset = 0;         ///< bytes from region->data()
  };
  /// Where this rank's [pointer, pointer + bytes) lies, if all of it is in one region. The caller
  /// keeps that memory alive. A few ns in the region that this thread has found last; else a lock
  /// and a binary search.
  std::optional<Place> find(const void* pointer, std::int64_t bytes) const;

 private:
  std::shared_ptr<SharedRegion::Table> table_;
};

}  // namespace adareduce
