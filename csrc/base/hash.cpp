#include "base/hash.h"

#include <bit>

namespace adareduce {
namespace {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection in which every input bit
// changes about half of the output bits.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

Hasher& Hasher::add(std::uint64_t word) {
  ++words_;
  a_ = mix(a_ ^ word);
  b_ = mix(std::rotl(b_, 29) + word * 0x9fb21c651e98df25u + words_);
  return *this;
}

Hasher& Hasher::add(std::string_view text) {
  add(static_cast<std::uint64_t>(text.size()));
  for (std::size_t i = 0; i < text.size(); i += 8) {
    std::uint64_t word = 0;
    for (std::size_t j = 0; j < 8 && i + j < text.size(); ++j)
      word |= static_cast<std::uint64_t>(static_cast<unsigned char>(text[i + j])) << (8 * j);
    add(word);
  }
  return *this;
}

Hasher& Hasher::add(double value) { return add(std::bit_cast<std::uint64_t>(value)); }

Signature Hasher::finish() const { return {mix(a_ + words_), mix(b_ ^ a_)}; }

}  // namespace adareduce
