#include "transports/nccl/nccl_library.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>
#include <utility>

#include "base/errors.h"

namespace adareduce::cuda {
namespace {

constexpr const char* kName = "libnccl.so.2";
constexpr const char* kVariable = "ADAREDUCE_NCCL_SO";

struct Library {
  NcclStatus status;
  nccl::NcclFunctions functions{};
};

// What a search that has failed says.
struct NotFound {
  std::string why;
};

std::mutex search_mutex;
std::vector<std::string> search_path;
bool has_searched = false;

// Closed again unless it is kept.
class Handle {
 public:
  explicit Handle(void* native) : native_(native) {}
  Handle(Handle&& other) noexcept : native_(std::exchange(other.native_, nullptr)) {}
  Handle& operator=(Handle&&) = delete;
  ~Handle() {
    if (native_ != nullptr) dlclose(native_);
  }
  explicit operator bool() const { return native_ != nullptr; }
  void* symbol(const char* name) const { return dlsym(native_, name); }
  void keep() { native_ = nullptr; }

 private:
  void* native_;
};

Handle open(const std::string& path, int flags = 0) {
  return Handle(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | flags));
}

std::string last_dl_error() {
  const char* text = dlerror();
  return text != nullptr ? text : "no reason is given";
}

std::vector<std::string> mapped_libraries() {
  std::ifstream file("/proc/self/maps");
  std::stringstream text;
  text << file.rdbuf();
  return nccl_libraries_in(text.str());
}

// Each keeps state of its own, so that streams, memory and environment of one are unknown to the
// other; which one a caller reaches depends on the order of loading.
void refuse_two(const std::vector<std::string>& mapped) {
  if (mapped.size() < 2) return;
  throw NotFound{
      concat("there are ", mapped.size(), " NCCL libraries in this process (", join_words(mapped),
             "), and using one of them beside another is not safe. Remove all but the one that "
             "torch loads, or name that one in ",
             kVariable)};
}

std::string resolved(const std::string& path) {
  std::error_code failed;
  const auto full = std::filesystem::canonical(path, failed);
  return failed ? path : full.string();
}

Handle find(const std::vector<std::string>& mapped) {
  const char* wanted = std::getenv(kVariable);
  if (wanted != nullptr && *wanted != '\0') {
    const std::string path = wanted;
    const bool is_path = path.find('/') != std::string::npos;
    if (is_path && !mapped.empty() && resolved(path) != resolved(mapped[0]))
      throw NotFound{concat(kVariable, " is ", path, ", but ", mapped[0],
                            " is in this process already, and two NCCL libraries in one process "
                            "are not safe. Unset it, or let torch load the same file")};
    Handle handle = open(path);
    if (!handle) throw NotFound{concat(kVariable, " is ", path, ": ", last_dl_error())};
    return handle;
  }
  if (Handle loaded = open(kName, RTLD_NOLOAD)) return loaded;
  // Under another soname.
  if (!mapped.empty())
    if (Handle loaded = open(mapped[0], RTLD_NOLOAD)) return loaded;
  std::string tried;
  for (const std::string& folder : search_path) {
    const std::string path = folder + "/" + kName;
    if (std::error_code failed; !std::filesystem::exists(path, failed)) continue;
    if (Handle handle = open(path)) return handle;
    tried += concat(path, ": ", last_dl_error(), "; ");
  }
  if (Handle handle = open(kName)) return handle;
  throw NotFound{concat("no NCCL was found (", tried, last_dl_error(),
                        "). Install the package nvidia-nccl-cu12 or nvidia-nccl-cu13, or set ",
                        kVariable, " to the path of ", kName)};
}

template <typename Function>
void look_up(const Handle& handle, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(handle.symbol(name));
  if (function == nullptr) throw NotFound{concat("it lacks ", name)};
}

std::string file_of(const void* symbol) {
  Dl_info info{};
  if (dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return "a library of unknown path";
  return resolved(info.dli_fname);
}

Library load() {
  Library library;
  try {
    const std::vector<std::string> before = mapped_libraries();
    refuse_two(before);
    Handle handle = find(before);
    refuse_two(mapped_libraries());
    nccl::NcclFunctions& f = library.functions;
    look_up(handle, "ncclGetVersion", f.ncclGetVersion);
    library.status.path = file_of(reinterpret_cast<const void*>(f.ncclGetVersion));
    int version = 0;
    if (const nccl::ncclResult_t result = f.ncclGetVersion(&version); result != nccl::ncclSuccess)
      throw NotFound{concat("ncclGetVersion returned ", static_cast<int>(result))};
    if (version < kOldestNccl)
      throw NotFound{concat("it is NCCL ", nccl_version_text(version), ", and ",
                            nccl_version_text(kOldestNccl), " or later is needed")};
#define LOOK_UP(name) look_up(handle, #name, f.name);
    ADAREDUCE_NCCL_FUNCTIONS(LOOK_UP)
#undef LOOK_UP
    library.status.version = version;
    handle.keep();  // for the life of the process
  } catch (const NotFound& failure) {
    library.status.why_not =
        library.status.path.empty() ? failure.why : concat(library.status.path, ": ", failure.why);
  }
  return library;
}

const Library& library() {
  static const Library found = [] {
    const std::lock_guard lock(search_mutex);
    has_searched = true;
    return load();
  }();
  return found;
}

}  // namespace

void set_nccl_search_path(std::vector<std::string> folders) {
  const std::lock_guard lock(search_mutex);
  if (has_searched)
    throw UsageError("set_nccl_search_path: must be called before NCCL is searched for");
  search_path = std::move(folders);
}

const NcclStatus& nccl_status() { return library().status; }

const nccl::NcclFunctions& nccl_functions() {
  if (library().status.version == 0)
    throw DeviceError(concat("NCCL cannot be used: ", library().status.why_not));
  return library().functions;
}

std::string nccl_version_text(int version) {
  // Up to 2.8 the code had one digit less for the minor version.
  const int major = version < 10000 ? version / 1000 : version / 10000;
  const int minor = version < 10000 ? version / 100 % 10 : version / 100 % 100;
  return concat(major, ".", minor, ".", version % 100);
}

std::vector<std::string> nccl_libraries_in(std::string_view maps) {
  std::vector<std::string> paths, identities;
  std::istringstream lines{std::string(maps)};
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    std::string addresses, access, offset, device, inode, path;
    if (!(fields >> addresses >> access >> offset >> device >> inode)) continue;
    std::getline(fields >> std::ws, path);
    // libnccl.so, libnccl.so.2, libnccl.so.2.28.9, but not the plugins libnccl-net.so.
    const auto name = path.substr(path.rfind('/') + 1);
    if (!name.starts_with("libnccl.so") || (name.size() > 10 && name[10] != '.')) continue;
    // The same file may be reached by several paths.
    const std::string identity = device + " " + inode;
    if (std::find(identities.begin(), identities.end(), identity) != identities.end()) continue;
    identities.push_back(identity);
    paths.push_back(path);
  }
  return paths;
}

}  // namespace adareduce::cuda
