#pragma once
#include <span>

#include "collectives/adasum_schedule.h"
#include "collectives/context.h"
#include "collectives/task.h"

namespace adareduce {

/// Doubles of statistics that a schedule needs for `num_segments` tensors.
std::int64_t adasum_stats_numel(std::span<const AdasumLevel> schedule, std::int64_t num_segments,
                                bool has_orthogonality);

/// Replaces every tensor of `buffer` by its Adasum over all ranks, with the same bits on each.
/// Collective. `buffer.scratch` is as large as `data`; `stats` lies on the device of `data`.
/// The arguments stay until the task has ended. Source: arXiv 2006.02924, algorithm 1.
///
/// `orthogonality`, where it is not null, receives |Adasum|^2 / sum |g_i|^2 per tensor, from the
/// same statistics: the messages become a little longer and not more. `buffer.data` then has room
/// for as many doubles behind its elements.
Task adasum_allreduce(Context context, FusedBuffer buffer, std::span<const AdasumLevel> schedule,
                      std::span<double> stats, double* orthogonality);

}  // namespace adareduce
