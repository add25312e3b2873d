#pragma once
#include <string>
#include <vector>

#include "collectives/context.h"
#include "collectives/task.h"
#include "engine/request.h"

namespace adareduce {

/// What travels before every request: enough to see that all ranks ask for the same thing.
struct Header {
  std::uint64_t sequence = 0;  ///< counts the requests of one channel
  Signature signature;
  std::uint32_t flags = kNormal;
  std::uint32_t choice = 0;     ///< SharedChoice; that of the first rank counts
  std::uint64_t placement = 0;  ///< where the tensors lie in shared memory; 0: not all do

  /// Whether some ranks were quicker than the agreement makes no difference to it, nor does how
  /// their tensors lie.
  bool is_agreed() const { return (flags & ~(kLaunched | kOverlaps)) == kNormal; }
};

/// Adds another rank's header: flags are united, and what differs is marked.
void merge(Header& into, const Header& other);

/// Merges every rank's `header` into it: flags are united, and kDiffers is set where a sequence
/// number or signature is not everyone's. The same result on all ranks. Collective on `transport`:
/// ceil(log2 P) exchanges; no rank ends before all have begun.
Task agree(Transport& transport, int tag, Header& header);

/// A request in words, for the ranks that did not agree.
struct Record {
  std::uint32_t flags = kNormal;
  std::string description;
  std::string reason;
  std::vector<std::pair<std::string, std::string>> fields;
};

Record make_record(const Request& request);

/// Fills `records` with every rank's. Collective on `transport`; only after a failed agreement.
Task exchange_records(Transport& transport, int tag, Record mine, std::vector<Record>& records);

/// "op: Sum on ranks 0 and 2, Average on rank 1" and both signatures. `ranks` are the global ranks
/// behind the records.
std::string explain_difference(const std::vector<Record>& records, const std::vector<Rank>& ranks);

/// "rank 1 rejected its call: ..." for every record that has one of `flags`; empty if none has.
std::string explain_flags(const std::vector<Record>& records, const std::vector<Rank>& ranks,
                          std::uint32_t flags);

/// "rank 3" or "ranks 0, 2 and 5".
std::string rank_list(const std::vector<Rank>& ranks);

}  // namespace adareduce
