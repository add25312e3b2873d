#include "bootstrap/thread_bootstrap.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "base/errors.h"

namespace adareduce {
namespace {

constexpr std::uint64_t kBootstrapGroup = 0;  // transports use other groups
constexpr int kLengthTag = 0;
constexpr int kBytesTag = 1;

}  // namespace

struct ThreadWorld::Parcel {
  const void* data = nullptr;
  std::int64_t bytes = 0;
  std::vector<std::byte> copy;  // of a small message
  bool is_taken = false;
  bool is_withdrawn = false;  // never arrives, like a message of a process that died
};

ThreadWorld::ParcelHandle ThreadWorld::post(const Address& address, const void* data,
                                            std::int64_t bytes) {
  auto parcel = std::make_shared<Parcel>();
  parcel->data = data;
  parcel->bytes = bytes;
  if (bytes <= kEagerBytes) {
    const auto* first = static_cast<const std::byte*>(data);
    parcel->copy.assign(first, first + bytes);
    parcel->data = parcel->copy.data();
  }
  {
    const std::lock_guard lock(mutex_);
    boxes_[address].parcels.push_back(parcel);
    ++posts_;
    posted_bytes_ += bytes;
  }
  posted_.notify_all();
  return parcel;
}

ThreadWorld::Traffic ThreadWorld::traffic() {
  const std::lock_guard lock(mutex_);
  return {posts_, posted_bytes_};
}

bool ThreadWorld::is_taken(const ParcelHandle& parcel) {
  const std::lock_guard lock(mutex_);
  return parcel->is_taken || !parcel->copy.empty() || parcel->bytes == 0;
}

void ThreadWorld::withdraw(const ParcelHandle& parcel) {
  const std::lock_guard lock(mutex_);
  parcel->is_withdrawn = !parcel->is_taken && parcel->copy.empty();
}

std::uint64_t ThreadWorld::expect(const Address& address) {
  const std::lock_guard lock(mutex_);
  return boxes_[address].expected++;
}

ThreadWorld::ParcelHandle ThreadWorld::take(Box& box, std::uint64_t ticket) {
  if (ticket < box.first || ticket - box.first >= box.parcels.size()) return nullptr;
  ParcelHandle& place = box.parcels[ticket - box.first];
  if (place == nullptr || place->is_withdrawn) return nullptr;
  const ParcelHandle parcel = std::move(place);
  while (!box.parcels.empty() && box.parcels.front() == nullptr) {
    box.parcels.pop_front();
    ++box.first;
  }
  return parcel;
}

bool ThreadWorld::try_take(const Address& address, std::uint64_t ticket, void* data,
                           std::int64_t bytes) {
  const std::lock_guard lock(mutex_);
  const ParcelHandle parcel = take(boxes_[address], ticket);
  if (parcel == nullptr) return false;
  if (parcel->bytes != bytes)
    throw TransportError(concat("rank ", address.from, " sent ", parcel->bytes, " bytes where ",
                                bytes, " were expected (tag ", address.tag, ")"),
                         address.from);
  if (bytes > 0) std::memcpy(data, parcel->data, static_cast<std::size_t>(bytes));
  parcel->is_taken = true;
  return true;
}

Rank ThreadWorld::try_take_any(std::uint64_t group, int tag, Rank to, std::span<std::byte> buffer,
                               std::int64_t& bytes) {
  const std::lock_guard lock(mutex_);
  for (Rank from = 0; from < size_; ++from) {
    const auto found = boxes_.find({group, tag, from, to});
    if (found == boxes_.end()) continue;
    Box& box = found->second;
    const ParcelHandle parcel = take(box, box.expected);
    if (parcel == nullptr) continue;
    ++box.expected;
    parcel->is_taken = true;
    bytes = parcel->bytes;
    if (bytes > static_cast<std::int64_t>(buffer.size()))
      throw TransportError(concat("a message of ", bytes, " bytes on tag ", tag, " exceeds the ",
                                  buffer.size(), " bytes that are allowed"),
                           from);
    if (bytes > 0) std::memcpy(buffer.data(), parcel->data, static_cast<std::size_t>(bytes));
    return from;
  }
  return -1;
}

std::uint64_t ThreadWorld::wait_for_post(std::uint64_t seen,
                                         std::chrono::steady_clock::time_point until) {
  std::unique_lock lock(mutex_);
  posted_.wait_until(lock, until, [&] { return posts_ != seen; });
  return posts_;
}

ThreadBootstrap::ThreadBootstrap(std::shared_ptr<ThreadWorld> world, Rank rank)
    : world_(std::move(world)), rank_(rank) {
  if (rank < 0 || rank >= world_->size())
    throw UsageError(
        concat("ThreadBootstrap: rank must be in [0, ", world_->size(), "), got ", rank));
}

std::vector<std::string> ThreadBootstrap::allgather(std::string_view mine, Seconds timeout) {
  const auto until = std::chrono::steady_clock::now() +
                     std::chrono::duration_cast<std::chrono::steady_clock::duration>(timeout);
  // Takes the next message of `address`, waiting for it if need be.
  const auto receive = [&](const ThreadWorld::Address& address, void* data, std::int64_t bytes) {
    const std::uint64_t ticket = world_->expect(address);
    std::uint64_t seen = 0;
    while (!world_->try_take(address, ticket, data, bytes)) {
      if (std::chrono::steady_clock::now() >= until)
        throw TransportError(concat("bootstrap: rank ", address.from, " did not answer within ",
                                    timeout.count(), " s"),
                             address.from);
      seen = world_->wait_for_post(seen, until);
    }
  };

  std::vector<std::string> all(static_cast<std::size_t>(size()));
  std::vector<ThreadWorld::ParcelHandle> sent;
  const auto length = static_cast<std::int64_t>(mine.size());
  for (Rank peer = 0; peer < size(); ++peer) {
    if (peer == rank_) continue;
    world_->post({kBootstrapGroup, kLengthTag, rank_, peer}, &length, sizeof length);
    sent.push_back(world_->post({kBootstrapGroup, kBytesTag, rank_, peer}, mine.data(), length));
  }
  all[static_cast<std::size_t>(rank_)] = mine;
  for (Rank peer = 0; peer < size(); ++peer) {
    if (peer == rank_) continue;
    std::int64_t bytes = 0;
    receive({kBootstrapGroup, kLengthTag, peer, rank_}, &bytes, sizeof bytes);
    std::string& text = all[static_cast<std::size_t>(peer)];
    text.resize(static_cast<std::size_t>(bytes));
    receive({kBootstrapGroup, kBytesTag, peer, rank_}, text.data(), bytes);
  }
  // Large texts are read in place by the others: they must all have done so before this returns.
  while (!std::all_of(sent.begin(), sent.end(), [&](auto& p) { return world_->is_taken(p); })) {
    if (std::chrono::steady_clock::now() >= until)
      throw TransportError(
          concat("bootstrap: a rank did not answer within ", timeout.count(), " s"));
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return all;
}

void ThreadBootstrap::barrier(Seconds timeout) { allgather("", timeout); }

}  // namespace adareduce
