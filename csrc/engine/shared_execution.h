#pragma once
#include "engine/execution.h"
#include "engine/shared_node.h"

namespace adareduce {

/// As execute(), through shared memory. Small requests come with the header: `sequence`. Large ones
/// write outputs as they go: after an error some are written and some are not. Collective.
Task execute_shared(SharedNode& node, const Request& request, const Plan& plan,
                    Workspace& workspace, const Header& header, Result& result);

/// The part of it for requests whose plan is_small, after the agreement `sequence`: local.
void execute_small(SharedNode& node, const Request& request, const Plan& plan, Workspace& workspace,
                   std::uint64_t sequence, Result& result);

}  // namespace adareduce
