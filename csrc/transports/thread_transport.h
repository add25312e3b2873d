#pragma once
#include <memory>

#include "bootstrap/thread_bootstrap.h"
#include "transports/transport.h"

namespace adareduce {

/// Transports between ranks that are threads of one process. For tests and for a single rank.
class ThreadTransportProvider final : public TransportProvider {
 public:
  explicit ThreadTransportProvider(const ThreadBootstrap& bootstrap)
      : world_(bootstrap.world()), rank_(bootstrap.rank()) {}
  TransportPair connect(std::span<const Rank> ranks, int id) override;

 private:
  std::shared_ptr<ThreadWorld> world_;
  Rank rank_;
};

}  // namespace adareduce
