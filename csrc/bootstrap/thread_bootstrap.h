#pragma once
#include <compare>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <span>

#include "bootstrap/bootstrap.h"

namespace adareduce {

/// Where messages of ranks that are threads of one process meet. Shared by all of them.
///
/// Messages above kEagerBytes stay in the sender's memory until the receiver takes them, as a
/// rendezvous of MPI does, so that a race detector sees memory that is reused too early.
class ThreadWorld {
 public:
  static constexpr std::int64_t kEagerBytes = 1024;

  /// Messages between two ranks on one (group, tag) are matched in order.
  struct Address {
    std::uint64_t group = 0;
    int tag = 0;
    Rank from = 0;
    Rank to = 0;
    friend auto operator<=>(const Address&, const Address&) = default;
  };
  struct Parcel;  ///< a message that has been sent and perhaps not yet taken
  using ParcelHandle = std::shared_ptr<Parcel>;

  explicit ThreadWorld(int size) : size_(size) {}

  int size() const { return size_; }

  ParcelHandle post(const Address& address, const void* data, std::int64_t bytes);
  bool is_taken(const ParcelHandle& parcel);
  /// The sender's memory is not read any more after this.
  void withdraw(const ParcelHandle& parcel);

  /// Reserves the next message of `address`.
  std::uint64_t expect(const Address& address);
  /// Copies the reserved message if it is there. Throws TransportError when its size is another.
  bool try_take(const Address& address, std::uint64_t ticket, void* data, std::int64_t bytes);
  /// The oldest message on (group, tag, to) that nobody has reserved; its sender, or -1.
  Rank try_take_any(std::uint64_t group, int tag, Rank to, std::span<std::byte> buffer,
                    std::int64_t& bytes);

  /// Messages and bytes that were posted so far.
  struct Traffic {
    std::uint64_t messages = 0;
    std::int64_t bytes = 0;
  };
  Traffic traffic();

  /// Blocks until something was posted since `seen`, or `until`. Returns the new count of posts.
  std::uint64_t wait_for_post(std::uint64_t seen, std::chrono::steady_clock::time_point until);

 private:
  struct Box {
    std::uint64_t expected = 0;        // tickets handed out
    std::uint64_t first = 0;           // ticket of parcels.front()
    std::deque<ParcelHandle> parcels;  // null: taken out of turn
  };
  ParcelHandle take(Box& box, std::uint64_t ticket);

  const int size_;
  std::mutex mutex_;
  std::condition_variable posted_;
  std::uint64_t posts_ = 0;
  std::int64_t posted_bytes_ = 0;
  std::map<Address, Box> boxes_;
};

/// A rank of a ThreadWorld. Used by one thread at a time.
class ThreadBootstrap final : public Bootstrap {
 public:
  ThreadBootstrap(std::shared_ptr<ThreadWorld> world, Rank rank);

  Rank rank() const override { return rank_; }
  int size() const override { return world_->size(); }
  std::vector<std::string> allgather(std::string_view mine, Seconds timeout) override;
  void barrier(Seconds timeout) override;
  std::string_view kind() const override { return "threads"; }

  const std::shared_ptr<ThreadWorld>& world() const { return world_; }

 private:
  std::shared_ptr<ThreadWorld> world_;
  Rank rank_;
};

}  // namespace adareduce
