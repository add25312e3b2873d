#pragma once
#include <cstdint>
#include <optional>

#include "bootstrap/bootstrap.h"

namespace adareduce {

/// How long the engine waits. Read from the environment by Python, never here.
struct Settings {
  Seconds warn_after{60};   ///< a wait this long is reported, and again after as long
  Seconds fail_after{600};  ///< a wait this long breaks the process set
  Seconds idle_tick{0.5};   ///< how often an idle engine looks for questions of its peers
  Seconds spin_for{50e-6};  ///< busy polling before the first sleep while ranks gather
  Seconds longest_sleep{200e-6};
  /// Fused buffers above this size are given back to the system after each request.
  std::int64_t keep_buffer_bytes = std::int64_t{256} << 20;
  /// Ranks of one node meet in shared memory.
  bool shared_memory = false;
  /// Which of SharedTuning::choices() every large request takes; none: the quickest at present.
  std::optional<std::uint32_t> shared_choice;
  /// Threads of this rank that share the work of a large request in shared memory, the driver's
  /// among them: 1 ... Workers::kMost. Ranks may differ; no bit of a result depends on it.
  int workers = 1;
  /// Requests of a process set that may be on the GPU before the other ranks' are known.
  std::size_t max_launched = 1024;
};

}  // namespace adareduce
