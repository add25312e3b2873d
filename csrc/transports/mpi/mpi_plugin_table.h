#pragma once
#include "base/mpi_plugin.h"

/// The function table of this build's MPI. Lives as long as the module that holds it.
const adareduce_mpi_plugin* adareduce_mpi_plugin_table();
