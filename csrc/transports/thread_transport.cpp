#include "transports/thread_transport.h"

#include <algorithm>

#include "base/errors.h"

namespace adareduce {
namespace {

using Address = ThreadWorld::Address;

class ThreadExchange final : public Exchange {
 public:
  explicit ThreadExchange(ThreadWorld& world) : world_(world) {}
  ~ThreadExchange() override {
    for (const auto& parcel : sends_) world_.withdraw(parcel);
  }

  void send(const Address& address, const SendPart& part) {
    sends_.push_back(world_.post(address, part.data, part.bytes));
  }
  void receive(const Address& address, const RecvPart& part) {
    receives_.push_back({address, world_.expect(address), part});
  }

  bool test() override {
    std::erase_if(receives_, [&](const Receive& r) {
      return world_.try_take(r.address, r.ticket, r.part.data, r.part.bytes);
    });
    std::erase_if(sends_, [&](const auto& parcel) { return world_.is_taken(parcel); });
    return receives_.empty() && sends_.empty();
  }

 private:
  struct Receive {
    Address address;
    std::uint64_t ticket;
    RecvPart part;
  };
  ThreadWorld& world_;
  std::vector<ThreadWorld::ParcelHandle> sends_;
  std::vector<Receive> receives_;
};

class ThreadTransport final : public Transport {
 public:
  ThreadTransport(std::shared_ptr<ThreadWorld> world, std::uint64_t group, Rank rank, int size)
      : world_(std::move(world)), group_(group), rank_(rank), size_(size) {}

  Rank rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string_view kind() const override { return "threads"; }
  void abandon() override {}
  bool may_write_late() const override { return false; }  // a withdrawn parcel is never copied

  std::unique_ptr<Exchange> start(int tag, std::span<const SendPart> sends,
                                  std::span<const RecvPart> receives) override {
    auto exchange = std::make_unique<ThreadExchange>(*world_);
    for (const RecvPart& part : receives) exchange->receive({group_, tag, part.peer, rank_}, part);
    for (const SendPart& part : sends) exchange->send({group_, tag, rank_, part.peer}, part);
    return exchange;
  }

  Rank try_receive(int tag, std::span<std::byte> buffer, std::int64_t& bytes) override {
    return world_->try_take_any(group_, tag, rank_, buffer, bytes);
  }

 private:
  std::shared_ptr<ThreadWorld> world_;
  std::uint64_t group_;
  Rank rank_;  // in the group; addresses use group ranks, since each group has its own boxes
  int size_;
};

}  // namespace

TransportPair ThreadTransportProvider::connect(std::span<const Rank> ranks, int id) {
  const auto self = std::find(ranks.begin(), ranks.end(), rank_);
  if (self == ranks.end())
    throw UsageError(concat("connect: ranks must contain the caller's rank ", rank_));
  const auto group_rank = static_cast<Rank>(self - ranks.begin());
  const auto size = static_cast<int>(ranks.size());
  // Odd and even groups; 0 belongs to the bootstrap.
  const auto first = 2 * static_cast<std::uint64_t>(id) + 2;
  return {std::make_unique<ThreadTransport>(world_, first, group_rank, size),
          std::make_unique<ThreadTransport>(world_, first + 1, group_rank, size)};
}

}  // namespace adareduce
