#include "transports/plugin_transport.h"

#include <algorithm>
#include <utility>

#include "base/errors.h"

namespace adareduce {
namespace {

// MPI promises tags up to 32767. Two tags per pair for the creation, one for the meeting before it;
// 0 is the bootstrap's own. Pairs 8192 apart are never connected at the same time.
constexpr int kPairs = 8192;
int meeting_tag(int id) { return 1 + id % kPairs; }
int creation_tag(int id) { return 2 * (id % kPairs); }

class PluginExchange final : public Exchange {
 public:
  PluginExchange(const adareduce_mpi_plugin& plugin, adareduce_op* op) : plugin_(plugin), op_(op) {}
  ~PluginExchange() override { plugin_.release(op_); }

  bool test() override {
    if (error_.status == ADAREDUCE_OK && !done_) {
      std::int32_t done = 0;
      // The status is kept, because the operation may not be tested again after an error.
      error_.status = plugin_.test(op_, &done, &error_);
      done_ = done != 0;
    }
    check_plugin(error_.status, error_);
    return done_;
  }

 private:
  const adareduce_mpi_plugin& plugin_;
  adareduce_op* op_;
  adareduce_error error_{};
  bool done_ = false;
};

// The plugin itself refuses, or skips, what may not be called after MPI_Finalize.
class PluginTransport final : public Transport {
 public:
  PluginTransport(const adareduce_mpi_plugin& plugin, adareduce_comm* comm)
      : plugin_(plugin), comm_(comm) {}
  ~PluginTransport() override {
    adareduce_error error{};
    plugin_.free(comm_, abandoned_, &error);
  }

  Rank rank() const override { return plugin_.rank(comm_); }
  int size() const override { return plugin_.size(comm_); }

  std::unique_ptr<Exchange> start(int tag, std::span<const SendPart> sends,
                                  std::span<const RecvPart> receives) override {
    std::vector<adareduce_message> messages;
    messages.reserve(sends.size() + receives.size());
    for (const SendPart& part : sends)
      messages.push_back({const_cast<void*>(part.data), part.bytes, part.peer});
    for (const RecvPart& part : receives) messages.push_back({part.data, part.bytes, part.peer});
    adareduce_op* op = nullptr;
    adareduce_error error{};
    check_plugin(plugin_.start(comm_, tag, messages.data(), static_cast<std::int32_t>(sends.size()),
                               messages.data() + sends.size(),
                               static_cast<std::int32_t>(receives.size()), &op, &error),
                 error);
    return std::make_unique<PluginExchange>(plugin_, op);
  }

  Rank try_receive(int tag, std::span<std::byte> buffer, std::int64_t& bytes) override {
    Rank source = -1;
    adareduce_error error{};
    check_plugin(
        plugin_.try_receive(comm_, tag, buffer.data(), static_cast<std::int64_t>(buffer.size()),
                            &source, &bytes, &error),
        error);
    return source;
  }

  void abandon() override { abandoned_ = true; }
  std::string_view kind() const override { return "mpi"; }

 private:
  const adareduce_mpi_plugin& plugin_;
  adareduce_comm* comm_;
  bool abandoned_ = false;
};

}  // namespace

MpiTransportProvider::MpiTransportProvider(std::shared_ptr<MpiBootstrap> bootstrap, Seconds timeout)
    : bootstrap_(std::move(bootstrap)), timeout_(timeout) {}

TransportPair MpiTransportProvider::connect(std::span<const Rank> ranks, int id) {
  // MPI's creation of a communicator cannot be timed out, so everyone is awaited first.
  bootstrap_->barrier_among(ranks, meeting_tag(id), timeout_);
  const adareduce_mpi_plugin& plugin = bootstrap_->plugin();
  const std::vector<std::int32_t> members(ranks.begin(), ranks.end());
  auto make = [&](int tag) -> std::unique_ptr<Transport> {
    adareduce_comm* comm = nullptr;
    adareduce_error error{};
    check_plugin(plugin.create(bootstrap_->comm(), members.data(),
                               static_cast<std::int32_t>(members.size()), tag, &comm, &error),
                 error);
    return std::make_unique<PluginTransport>(plugin, comm);
  };
  TransportPair pair;
  pair.control = make(creation_tag(id));
  pair.data = make(creation_tag(id) + 1);
  return pair;
}

}  // namespace adareduce
