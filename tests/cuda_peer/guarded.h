#pragma once
#include <exception>
#include <string>

#define EXPORT __attribute__((visibility("default")))

namespace adareduce::cuda {

/// What the functions of these C libraries return: null, or an error's text, which stays until the
/// thread's next call.
template <typename Body>
const char* guarded(Body&& body) {
  thread_local std::string last_error;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

}  // namespace adareduce::cuda
