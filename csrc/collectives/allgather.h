#pragma once
#include <span>

#include "collectives/context.h"
#include "collectives/task.h"

namespace adareduce {

/// Gathers a block from every rank into `all`, blocks in rank order, every rank's by direct
/// messages. Collective. `bytes_of[r]` is known on every rank; this rank's own block already lies
/// in its place of `all`. The arguments stay until the task has ended.
Task allgather(Context context, int tag, void* all, std::span<const std::int64_t> bytes_of);

/// The same for blocks that lie anywhere in `data`: element range ranges[r] comes from rank r.
/// Collective, one exchange.
Task allgather_ranges(Context context, int tag, void* data, std::int64_t width,
                      std::span<const Range> ranges);

/// allgather of `count` numbers per rank; `all` has size * count entries, this rank's are filled
/// in.
Task allgather_numbers(Context context, int tag, std::span<std::int64_t> all, std::int64_t count);

}  // namespace adareduce
