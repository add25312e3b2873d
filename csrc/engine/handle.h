#pragma once
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "bootstrap/bootstrap.h"
#include "engine/buffer.h"

namespace adareduce {

/// A result whose size only the reduction knows.
struct GatheredTensor {
  std::shared_ptr<Buffer> memory;
  std::vector<std::int64_t> shape;
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
  /// Results of an allgather, in the order of the tensors. Only after the end.
  const std::vector<GatheredTensor>& gathered() const { return gathered_; }

  void finish(std::vector<GatheredTensor> gathered = {});
  void fail(std::exception_ptr error);

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable finished_;
  bool is_finished_ = false;
  std::exception_ptr error_;
  std::vector<GatheredTensor> gathered_;
};

}  // namespace adareduce
