#include "transports/shared_memory/descriptor_socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <iomanip>
#include <sstream>

#include "transports/shared_memory/shared_segment.h"

namespace adareduce {
namespace {

struct Address {
  sockaddr_un address{};
  socklen_t length = 0;

  explicit Address(const std::string& name) {
    address.sun_family = AF_UNIX;
    // A first byte of zero makes it a name outside all file systems.
    const std::size_t count = std::min(name.size(), sizeof address.sun_path - 1);
    std::memcpy(address.sun_path + 1, name.data(), count);
    length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + count);
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }
};

Descriptor make_socket() {
  const int number = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (number < 0) throw_shared_memory_error("making a socket for descriptors", errno);
  return Descriptor(number);
}

std::string random_name() {
  std::uint64_t words[2];
  fill_with_random(words);
  std::ostringstream text;
  text << "adareduce-" << std::hex << std::setfill('0');
  for (const std::uint64_t word : words) text << std::setw(16) << word;
  return text.str();
}

// Room for one descriptor, aligned as the kernel wants it.
struct Control {
  alignas(cmsghdr) char bytes[CMSG_SPACE(sizeof(int))] = {};
};

}  // namespace

DescriptorSocket::DescriptorSocket() : socket_(make_socket()), name_(random_name()) {
  const Address address(name_);
  if (bind(socket_.number(), address.get(), address.length) != 0)
    throw_shared_memory_error("naming a socket for descriptors", errno);
}

DescriptorSocket::Sent DescriptorSocket::send(const std::string& to, const std::string& bytes,
                                              int descriptor) const {
  Address address(to);
  iovec data{const_cast<char*>(bytes.data()), bytes.size()};
  msghdr message{};
  message.msg_name = &address.address;
  message.msg_namelen = address.length;
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  Control control;
  if (descriptor >= 0) {
    message.msg_control = control.bytes;
    message.msg_controllen = sizeof control.bytes;
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
  }
  if (sendmsg(socket_.number(), &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return Sent::yes;
  switch (errno) {
    case ECONNREFUSED:
    case ECONNRESET:
    case ENOENT:
      return Sent::nobody_there;
    case EAGAIN:  // the peer's queue is full; it holds about ten
    case EINTR:
    case ENOBUFS:
    case ENOMEM:
    case ETOOMANYREFS:  // too many descriptors under way
      return Sent::not_yet;
    default:
      throw_shared_memory_error("sending a descriptor", errno);
  }
}

std::optional<DescriptorSocket::Letter> DescriptorSocket::receive(std::size_t most) const {
  Letter letter;
  letter.bytes.resize(most);
  iovec data{letter.bytes.data(), letter.bytes.size()};
  Control control;
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.bytes;
  message.msg_controllen = sizeof control.bytes;
  const ssize_t count = recvmsg(socket_.number(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (count < 0) {
    if (errno == EAGAIN || errno == EINTR) return std::nullopt;
    throw_shared_memory_error("receiving a descriptor", errno);
  }
  letter.bytes.resize(static_cast<std::size_t>(count));
  letter.is_cut = (message.msg_flags & MSG_CTRUNC) != 0;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    if (header->cmsg_len < CMSG_LEN(sizeof(int))) continue;
    int number = -1;
    std::memcpy(&number, CMSG_DATA(header), sizeof number);
    letter.descriptor = Descriptor(number);
  }
  return letter;
}

void DescriptorSocket::wait(std::chrono::milliseconds limit) const {
  pollfd watched{socket_.number(), POLLIN, 0};
  (void)poll(&watched, 1, static_cast<int>(limit.count()));
}

bool DescriptorSocket::exists(const std::string& name) {
  const Descriptor probe = make_socket();
  const Address address(name);
  return connect(probe.number(), address.get(), address.length) == 0 || errno != ECONNREFUSED;
}

}  // namespace adareduce
