#include "base/types.h"

#include <array>

#include "base/errors.h"

namespace adareduce {
namespace {

struct DTypeFacts {
  std::int64_t bytes;
  std::string_view name;
};

constexpr std::array<DTypeFacts, kNumDTypes> kDTypes{{
    {1, "uint8"},
    {1, "int8"},
    {2, "int16"},
    {4, "int32"},
    {8, "int64"},
    {2, "float16"},
    {2, "bfloat16"},
    {4, "float32"},
    {8, "float64"},
    {1, "bool"},
}};
constexpr std::array<std::string_view, kNumReduceOps> kReduceOps{"Average", "Sum", "Adasum",
                                                                 "Min",     "Max", "Product"};

template <typename Table, typename Code>
const auto& look_up(const Table& table, Code code, const char* what) {
  const auto index = static_cast<std::size_t>(code);
  if (index >= table.size()) throw UsageError(concat(what, " code ", index, " is unknown"));
  return table[index];
}

}  // namespace

std::int64_t size_of(DType dtype) { return look_up(kDTypes, dtype, "dtype").bytes; }
std::string_view name_of(DType dtype) { return look_up(kDTypes, dtype, "dtype").name; }
std::string_view name_of(ReduceOp op) { return look_up(kReduceOps, op, "reduction"); }

}  // namespace adareduce
