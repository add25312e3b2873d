#include "transports/cuda_peer/device_facts.h"

#include <cstring>
#include <type_traits>

#include "base/errors.h"

namespace adareduce::cuda {
namespace {

class Writer {
 public:
  template <typename Number>
    requires std::is_arithmetic_v<Number>
  void put(const Number& value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void put(const std::string& text) {
    put(static_cast<std::uint64_t>(text.size()));
    bytes += text;
  }
  void put(const std::vector<std::string>& texts) {
    put(static_cast<std::uint64_t>(texts.size()));
    for (const std::string& text : texts) put(text);
  }
  std::string bytes;
};

class Reader {
 public:
  explicit Reader(const std::string& bytes) : bytes_(bytes) {}
  template <typename Number>
    requires std::is_arithmetic_v<Number>
  void put(Number& value) {
    std::memcpy(&value, take(sizeof value), sizeof value);
  }
  void put(std::string& text) {
    std::uint64_t size = 0;
    put(size);
    const char* const from = take(size);
    text.assign(from, size);
  }
  void put(std::vector<std::string>& texts) {
    std::uint64_t count = 0;
    put(count);
    for (; count > 0; --count) put(texts.emplace_back());
  }
  void finish() const {
    if (at_ != bytes_.size()) fail();
  }

 private:
  const char* take(std::size_t count) {
    if (count > bytes_.size() - at_) fail();
    at_ += count;
    return bytes_.data() + at_ - count;
  }
  [[noreturn]] void fail() const {
    throw UsageError(
        concat("DeviceFacts::from_bytes: bytes must come from to_bytes of this version, got ",
               bytes_.size(), " others"));
  }
  const std::string& bytes_;
  std::size_t at_ = 0;
};

template <typename Stream, typename Facts>
void visit(Stream& stream, Facts& facts) {
  stream.put(facts.host);
  stream.put(facts.pid);
  stream.put(facts.process);
  stream.put(facts.gpu);
  stream.put(facts.num_multiprocessors);
  stream.put(facts.driver_version);
  stream.put(facts.nccl_version);
  stream.put(facts.nccl_why_not);
  stream.put(facts.nccl_may_share_gpu);
  stream.put(facts.nccl_host);
  stream.put(facts.can_share_memory);
  stream.put(facts.unreachable);
  stream.put(facts.wanted_path);
}

}  // namespace

std::string DeviceFacts::to_bytes() const {
  Writer writer;
  visit(writer, *this);
  return std::move(writer.bytes);
}

DeviceFacts DeviceFacts::from_bytes(const std::string& bytes) {
  DeviceFacts facts;
  Reader reader(bytes);
  visit(reader, facts);
  reader.finish();
  return facts;
}

}  // namespace adareduce::cuda
