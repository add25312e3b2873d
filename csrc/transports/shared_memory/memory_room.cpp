#include "transports/shared_memory/memory_room.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string_view>
#include <vector>

namespace adareduce {
namespace {

constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();

// Left free below every limit: page tables, sockets, and what is allocated at the same time.
std::int64_t margin_of(std::int64_t limit) { return std::min(limit / 16, std::int64_t{1} << 30); }

std::optional<std::int64_t> number_in(const std::string& path) {
  std::int64_t number = 0;
  if (std::ifstream(path) >> number) return number;
  return std::nullopt;  // "max", or no such file
}

// Sum of the lines "NAME NUMBER" (or "NAME: NUMBER") of a file.
std::int64_t sum_of_lines(const std::string& path, const std::vector<std::string_view>& names) {
  std::int64_t sum = 0;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    std::int64_t number = 0;
    if (words >> name >> number && std::find(names.begin(), names.end(), name) != names.end())
      sum += number;
  }
  return sum;
}

std::int64_t room_of_machine(const std::string& root) {
  const std::string path = root + "/proc/meminfo";
  const std::int64_t total = sum_of_lines(path, {"MemTotal:"}) * 1024;
  if (total > 0) return sum_of_lines(path, {"MemAvailable:"}) * 1024 - margin_of(total);
  const std::int64_t page = sysconf(_SC_PAGESIZE);  // a machine without /proc
  return sysconf(_SC_AVPHYS_PAGES) * page - margin_of(sysconf(_SC_PHYS_PAGES) * page);
}

// What the files of the two versions of cgroups are called.
struct Version {
  std::vector<std::string_view> limits;
  std::string_view usage;
  std::vector<std::string_view> reclaimable;  // of memory.stat: page cache is no obstacle
};
const Version kVersion1{{"memory.limit_in_bytes"},
                        "memory.usage_in_bytes",
                        {"total_inactive_file", "total_active_file"}};
const Version kVersion2{
    {"memory.max", "memory.high"}, "memory.current", {"inactive_file", "active_file"}};

std::int64_t room_of_cgroup(const std::string& folder, const Version& version) {
  std::int64_t limit = kUnlimited;
  for (const std::string_view name : version.limits)
    limit = std::min(limit, number_in(folder + "/" + std::string(name)).value_or(kUnlimited));
  const auto usage = number_in(folder + "/" + std::string(version.usage));
  // Version 1 writes "no limit" as the largest multiple of a page.
  if (limit > kUnlimited / 2 || !usage) return kUnlimited;
  const std::int64_t cache = sum_of_lines(folder + "/memory.stat", version.reclaimable);
  return limit - std::max(*usage - cache, std::int64_t{0}) - margin_of(limit);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// mountinfo writes blanks and the like as three octal digits.
std::string unescape(const std::string& text) {
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 3 < text.size()) {
      plain += static_cast<char>(std::stoi(text.substr(i + 1, 3), nullptr, 8));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

struct Mount {
  std::string root;  // the cgroup that is seen at `point`: a container sees its own only
  std::string point;
};

// Where the cgroups that limit memory are mounted: "36 35 98:0 ROOT POINT options [optional...] -
// TYPE source options".
std::optional<Mount> find_mount(const std::string& root, bool is_version_2) {
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const std::vector<std::string> words = split(line, ' ');
    const auto dash = std::find(words.begin(), words.end(), "-");
    if (words.size() < 6 || words.end() - dash < 4) continue;
    const std::vector<std::string> options = split(dash[3], ',');
    const bool has_memory = std::find(options.begin(), options.end(), "memory") != options.end();
    if (is_version_2 ? dash[1] == "cgroup2" : dash[1] == "cgroup" && has_memory)
      return Mount{unescape(words[3]), unescape(words[4])};
  }
  return std::nullopt;
}

std::int64_t room_of_cgroups(const std::string& root, const std::string& cgroup,
                             bool is_version_2) {
  const std::optional<Mount> mount = find_mount(root, is_version_2);
  if (!mount) return kUnlimited;
  const Version& version = is_version_2 ? kVersion2 : kVersion1;
  // Below the mount point lies what follows the mount's root; of a cgroup that lies elsewhere
  // ("/../x" in a namespace) only the mount point can be read.
  std::string below = cgroup;
  if (mount->root != "/" && below.starts_with(mount->root)) below.erase(0, mount->root.size());
  if (below.find("..") != std::string::npos || !below.starts_with('/')) below.clear();
  std::int64_t room = kUnlimited;
  while (!below.empty() && below != "/") {
    room = std::min(room, room_of_cgroup(root + mount->point + below, version));
    below.erase(below.rfind('/'));
  }
  return std::min(room, room_of_cgroup(root + mount->point, version));
}

}  // namespace

std::int64_t room_for_shared_memory(const std::string& root) {
  std::int64_t room = room_of_machine(root);
  std::ifstream file(root + "/proc/self/cgroup");  // lines "number:controllers:path"
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string path = line.substr(second + 1);
    const auto controllers = split(line.substr(first + 1, second - first - 1), ',');
    if (controllers.empty())
      room = std::min(room, room_of_cgroups(root, path, true));
    else if (std::find(controllers.begin(), controllers.end(), "memory") != controllers.end())
      room = std::min(room, room_of_cgroups(root, path, false));
  }
  return std::max(room, std::int64_t{0});
}

}  // namespace adareduce
