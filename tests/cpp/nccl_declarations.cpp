// Compiled, never run: NCCL's own header beside the declarations by hand. What does not agree does
// not compile. tests/test_nccl_declarations.py compiles it with the headers of several versions.
#include <nccl.h>

#include <cstddef>
#include <type_traits>

#include "transports/nccl/nccl_api.h"

namespace ours = adareduce::cuda::nccl;

// Whether the same bits passed in the same registers mean the same.
template <typename Ours, typename Theirs>
struct Agree : std::is_same<Ours, Theirs> {};
template <>
struct Agree<ours::ncclComm*, ncclComm*> : std::true_type {};  // neither looks inside
template <>
struct Agree<ours::ncclResult_t, ncclResult_t> : std::true_type {};
template <>
struct Agree<ours::ncclDataType_t, ncclDataType_t> : std::true_type {};
template <>
struct Agree<ours::ncclRedOp_t, ncclRedOp_t> : std::true_type {};
template <>
struct Agree<ours::ncclUniqueId, ncclUniqueId> : std::true_type {};
template <>
struct Agree<ours::ncclConfig_t, ncclConfig_t> : std::true_type {};  // ours is where theirs begins
template <typename Ours, typename Theirs>
  requires(std::is_const_v<Ours> == std::is_const_v<Theirs> &&
           !std::is_same_v<Ours*, ours::ncclComm*>)
struct Agree<Ours*, Theirs*> : Agree<std::remove_const_t<Ours>, std::remove_const_t<Theirs>> {};
template <typename R1, typename... A1, typename R2, typename... A2>
  requires(sizeof...(A1) == sizeof...(A2))
struct Agree<R1 (*)(A1...), R2 (*)(A2...)>
    : std::bool_constant<Agree<R1, R2>::value && (Agree<A1, A2>::value && ...)> {};

#define FUNCTION(name)                                                                \
  static_assert(Agree<decltype(ours::NcclFunctions::name), decltype(&::name)>::value, \
                #name " has other arguments or another result");
ADAREDUCE_NCCL_FUNCTIONS(FUNCTION)
#define COUNT(name) +1
static_assert(sizeof(ours::NcclFunctions) ==
                  (0 ADAREDUCE_NCCL_FUNCTIONS(COUNT)) * sizeof(void (*)()),
              "ADAREDUCE_NCCL_FUNCTIONS does not list every function");

#define TYPE(name)                                                                              \
  static_assert(sizeof(ours::name) == sizeof(::name) && alignof(ours::name) == alignof(::name), \
                #name " has another size");
TYPE(ncclUniqueId)
TYPE(ncclResult_t)
TYPE(ncclDataType_t)
TYPE(ncclRedOp_t)
static_assert(std::is_trivially_copyable_v<ours::ncclUniqueId>, "it is passed by value");
static_assert(sizeof(ours::ncclUniqueId::internal) == NCCL_UNIQUE_ID_BYTES);

#define VALUE(name) \
  static_assert(static_cast<long>(ours::name) == static_cast<long>(::name), #name);
VALUE(ncclSuccess)
VALUE(ncclUnhandledCudaError)
VALUE(ncclSystemError)
VALUE(ncclInternalError)
VALUE(ncclInvalidArgument)
VALUE(ncclInvalidUsage)
VALUE(ncclRemoteError)
VALUE(ncclInProgress)
VALUE(ncclInt8)
VALUE(ncclUint8)
VALUE(ncclInt32)
VALUE(ncclUint32)
VALUE(ncclInt64)
VALUE(ncclUint64)
VALUE(ncclFloat16)
VALUE(ncclFloat32)
VALUE(ncclFloat64)
VALUE(ncclBfloat16)
VALUE(ncclSum)
VALUE(ncclProd)
VALUE(ncclMax)
VALUE(ncclMin)
VALUE(ncclAvg)

#define FIELD(name)                                                                           \
  static_assert(                                                                              \
      offsetof(ours::ncclConfig_t, name) == offsetof(::ncclConfig_t, name) &&                 \
          std::is_same_v<decltype(ours::ncclConfig_t::name), decltype(::ncclConfig_t::name)>, \
      "ncclConfig_t::" #name " lies elsewhere or has another type");
FIELD(size)
FIELD(magic)
FIELD(version)
FIELD(blocking)
FIELD(cgaClusterSize)
FIELD(minCTAs)
FIELD(maxCTAs)
FIELD(netName)
FIELD(splitShare)
constexpr ::ncclConfig_t kTheirs = NCCL_CONFIG_INITIALIZER;
constexpr ours::ncclConfig_t kOurs;
static_assert(kOurs.size == sizeof(ours::ncclConfig_t) && kOurs.size <= kTheirs.size);
static_assert(kOurs.magic == kTheirs.magic, "ncclConfig_t::magic");
static_assert(kOurs.version <= kTheirs.version, "older than the declarations");
static_assert(ours::kConfigUndefined == NCCL_CONFIG_UNDEF_INT, "the value of what is not set");
static_assert(kOurs.blocking == kTheirs.blocking && kOurs.netName == kTheirs.netName);
