#pragma once
#include "base/errors.h"
#include "base/types.h"

namespace adareduce {

/// Calls `body` with a value of the element type of `dtype`, for the types that have arithmetic.
template <typename Body>
void for_arithmetic_type(DType dtype, const char* kernel, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f64:
      return body(double{});
    default:
      throw UsageError(concat(kernel, ": dtype must be float32 or float64, got ", name_of(dtype)));
  }
}

}  // namespace adareduce
