#pragma once
#include "base/cuda_plugin.h"

/// The table that `_cuda` hands to `_core`.
adareduce_cuda_plugin* adareduce_cuda_plugin_table();
