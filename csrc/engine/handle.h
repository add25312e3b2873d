#pragma once
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "bootstrap/bootstrap.h"
#include "engine/buffer.h"

namespace adareduce {

/// A result whose size only the collective knows.
struct GatheredTensor {
  std::shared_ptr<Buffer> memory;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> rows_from;  ///< by rank
};

/// What a reduction found out on the way.
struct ReductionStatistics {
  /// Per group: sum over the ranks of |g_i|^2, |mean|^2, sigma^2, mu^2; empty for Adasum.
  std::vector<double> groups;
  std::vector<double> orthogonality;    ///< per tensor, for Adasum; else empty
  std::vector<std::int64_t> nonfinite;  ///< per tensor: elements of the result that are inf or NaN
};

/// What a request gives its caller besides the outputs.
struct Result {
  std::vector<GatheredTensor> gathered;  ///< in the order of the tensors
  ReductionStatistics statistics;
};

/// The caller's end of a request. Any thread may ask; the worker answers once.
class Handle {
 public:
  /// The request has ended, well or not.
  bool is_finished() const;
  /// Waits at most `timeout`; the same answer as is_finished().
  bool wait_for(Seconds timeout) const;
  /// Throws the request's error, if it has one. Only after the end.
  void rethrow() const;
  /// Only after the end.
  const Result& result() const { return result_; }

  void finish(Result result = {});
  void fail(std::exception_ptr error);

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable finished_;
  bool is_finished_ = false;
  std::exception_ptr error_;
  Result result_;
};

}  // namespace adareduce
