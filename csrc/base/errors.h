#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace adareduce {

/// Everything this library throws. The children say who must act.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller asked for something that is not allowed; the library works on.
class UsageError : public Error {
 public:
  using Error::Error;
};

/// The ranks asked for different things; every rank gets the same text and the library works on.
class DisagreementError : public Error {
 public:
  using Error::Error;
};

/// A rank is dead, silent or gone, or the network failed; the process set is unusable afterwards.
class TransportError : public Error {
 public:
  explicit TransportError(const std::string& text, int peer = -1) : Error(text), peer_(peer) {}
  /// The rank (of the transport's group) that the failed message belonged to; -1 if unknown.
  int peer() const { return peer_; }

 private:
  int peer_;
};

/// A GPU or its runtime failed.
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// The arguments, written one after the other.
template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

/// "0, 1 and 4"; at most `most` entries are spelled out.
template <typename Items>
std::string join_words(const Items& items, std::size_t most = 16) {
  std::ostringstream text;
  std::size_t index = 0;
  const std::size_t count = items.size();
  for (const auto& item : items) {
    if (index == most) {
      text << " and " << count - most << " more";
      break;
    }
    if (index > 0) text << (index + 1 == count ? " and " : ", ");
    text << item;
    ++index;
  }
  return text.str();
}

}  // namespace adareduce
