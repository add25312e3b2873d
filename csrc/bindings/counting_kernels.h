#pragma once
#include <cstdint>
#include <map>
#include <string>

#include "kernels/kernels.h"

namespace adareduce {

/// What went through counting_kernels() since the last reset, by the name of the entry.
struct WorkCount {
  std::int64_t calls = 0;
  std::int64_t elements = 0;  ///< that were read
};
std::map<std::string, WorkCount> counted_work();
void reset_counted_work();

/// cpu_kernels(), counted for the whole process: tests see how often data are passed over.
const KernelTable& counting_kernels();

}  // namespace adareduce
