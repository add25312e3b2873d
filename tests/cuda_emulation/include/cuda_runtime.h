#pragma once
// A stand-in for the CUDA runtime's header: see tests/cuda_emulation/README.md.
#include <cuda_emulation/control.h>
#include <cuda_emulation/device_language.h>
#include <cuda_emulation/host_api.h>
#include <cuda_emulation/types.h>
