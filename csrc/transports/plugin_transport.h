#pragma once
#include <memory>

#include "base/mpi_plugin.h"
#include "bootstrap/mpi_bootstrap.h"
#include "transports/transport.h"

namespace adareduce {

/// MPI communicators as transports, through the function table of `_mpi`.
class MpiTransportProvider final : public TransportProvider {
 public:
  /// Keeps the bootstrap's communicator alive. `timeout`: how long `connect` waits for a rank.
  MpiTransportProvider(std::shared_ptr<MpiBootstrap> bootstrap, Seconds timeout);
  /// Throws TransportError that names the missing ranks after the time-out.
  TransportPair connect(std::span<const Rank> ranks, int id) override;

 private:
  std::shared_ptr<MpiBootstrap> bootstrap_;
  Seconds timeout_;
};

}  // namespace adareduce
