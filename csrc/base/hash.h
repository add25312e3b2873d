#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace adareduce {

/// 128 bits that stand for a request. Not cryptographic: it guards against mistakes, not attacks.
struct Signature {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  friend bool operator==(const Signature&, const Signature&) = default;
};

struct SignatureHash {
  std::size_t operator()(const Signature& s) const { return static_cast<std::size_t>(s.low); }
};

/// Builds a Signature from integers and strings, in order. Equal on every platform.
class Hasher {
 public:
  Hasher& add(std::uint64_t word);
  Hasher& add(std::string_view text);
  Hasher& add(double value);  ///< its bits, so 0.0 and -0.0 differ
  Signature finish() const;

 private:
  std::uint64_t a_ = 0x9e3779b97f4a7c15u;
  std::uint64_t b_ = 0xc2b2ae3d27d4eb4fu;
  std::uint64_t words_ = 0;
};

}  // namespace adareduce
