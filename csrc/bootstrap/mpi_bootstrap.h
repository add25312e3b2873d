#pragma once
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/mpi_plugin.h"
#include "bootstrap/bootstrap.h"

namespace adareduce {

/// Throws TransportError with the plugin's text if `status` is not ADAREDUCE_OK.
void check_plugin(int status, const adareduce_error& error);

/// A communicator of MPI's, reached through the function table of `_mpi`. Owns it.
class MpiBootstrap final : public Bootstrap {
 public:
  /// A communicator of our own over all ranks of the one behind mpi4py's `handle`, or over `ranks`
  /// of it if any are given (increasing, the caller among them). Collective over those ranks only.
  /// Throws UsageError for a plugin of another version or an MPI without MPI_THREAD_MULTIPLE,
  /// TransportError that names the missing ranks after `timeout`.
  static std::shared_ptr<MpiBootstrap> make(const adareduce_mpi_plugin* plugin,
                                            std::uint64_t handle, const std::vector<Rank>& ranks,
                                            Seconds timeout);
  ~MpiBootstrap() override;

  Rank rank() const override;
  int size() const override;
  std::vector<std::string> allgather(std::string_view mine, Seconds timeout) override;
  void barrier(Seconds timeout) override;
  std::string_view kind() const override { return "mpi"; }

  /// Returns when each of `ranks` (the caller among them) has called with this `tag`, which no
  /// other call may use meanwhile. Throws TransportError that names the missing ranks after
  /// `timeout`.
  void barrier_among(std::span<const Rank> ranks, int tag, Seconds timeout);

  const adareduce_mpi_plugin& plugin() const { return *plugin_; }
  adareduce_comm* comm() const { return comm_; }
  /// After a failure: the destructor frees nothing that a dead rank would have to join.
  void abandon() override { abandoned_ = true; }

 private:
  MpiBootstrap(const adareduce_mpi_plugin* plugin, adareduce_comm* comm);
  /// Every one of `ranks` tells its `word` to the others; returns them in the order of `ranks`.
  std::vector<std::int64_t> gather_words(std::int64_t word, std::span<const Rank> ranks, int tag,
                                         const char* what, Seconds timeout);
  /// `bytes` from every rank, in rank order.
  std::string gather_blocks(std::string block, Seconds timeout);

  const adareduce_mpi_plugin* plugin_;
  adareduce_comm* comm_;
  bool abandoned_ = false;
};

}  // namespace adareduce
