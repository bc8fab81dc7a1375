// The CUDA driver, opened with dlopen when first needed: no CUDA header, no runtime library, no GPU at import.
//
// Declarations follow the CUDA driver API reference (versions of the entry points since CUDA 4; driver ≥ 525).
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "types.h"

namespace fusedopt {
namespace driver {

using Result = int;  // 0 is success
using Device = int;
using Pointer = u64;
struct ContextTag;
struct ModuleTag;
struct FunctionTag;
struct StreamTag;
struct EventTag;
using Context = ContextTag*;
using Module = ModuleTag*;
using Function = FunctionTag*;
using Stream = StreamTag*;
using Event = EventTag*;

constexpr Result kOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY
constexpr Result kNoBinary = 209;   // CUDA_ERROR_NO_BINARY_FOR_GPU

constexpr int kMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_*
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kStreamNonBlocking = 1;
constexpr int kCaptureRelaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED

// name in the library, member, arguments
#define FUSEDOPT_DRIVER(X)                                                                                    \
  X(cuInit, init, (unsigned))                                                                                 \
  X(cuGetErrorString, error_string, (Result, const char**))                                                   \
  X(cuDriverGetVersion, version, (int*))                                                                      \
  X(cuDeviceGetCount, device_count, (int*))                                                                   \
  X(cuDeviceGet, device_get, (Device*, int))                                                                  \
  X(cuDeviceGetAttribute, device_attribute, (int*, int, Device))                                              \
  X(cuDevicePrimaryCtxRetain, primary_context, (Context*, Device))                                            \
  X(cuCtxPushCurrent_v2, push_context, (Context))                                                             \
  X(cuCtxPopCurrent_v2, pop_context, (Context*))                                                              \
  X(cuModuleLoadData, load_module, (Module*, const void*))                                                    \
  X(cuModuleGetFunction, get_function, (Function*, Module, const char*))                                      \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor, occupancy, (int*, Function, int, std::size_t))               \
  X(cuLaunchKernel, launch,                                                                                   \
    (Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**)) \
  X(cuLaunchCooperativeKernel, launch_cooperative,                                                            \
    (Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**))         \
  X(cuMemAlloc_v2, allocate, (Pointer*, std::size_t))                                                         \
  X(cuMemFree_v2, release, (Pointer))                                                                         \
  X(cuMemHostAlloc, allocate_host, (void**, std::size_t, unsigned))                                           \
  X(cuMemFreeHost, release_host, (void*))                                                                     \
  X(cuMemcpyHtoDAsync_v2, copy_to_device, (Pointer, const void*, std::size_t, Stream))                        \
  X(cuEventCreate, create_event, (Event*, unsigned))                                                          \
  X(cuEventDestroy_v2, destroy_event, (Event))                                                                \
  X(cuEventRecord, record_event, (Event, Stream))                                                             \
  X(cuEventSynchronize, wait_event, (Event))                                                                  \
  X(cuStreamCreate, create_stream, (Stream*, unsigned))                                                       \
  X(cuStreamDestroy_v2, destroy_stream, (Stream))                                                             \
  X(cuStreamSynchronize, wait_stream, (Stream))                                                               \
  X(cuStreamWaitEvent, stream_wait_event, (Stream, Event, unsigned))                                          \
  X(cuStreamIsCapturing, is_capturing, (Stream, int*))                                                        \
  X(cuThreadExchangeStreamCaptureMode, exchange_capture_mode, (int*))

struct Api {
#define FUSEDOPT_MEMBER(symbol, member, arguments) Result(*member) arguments = nullptr;
  FUSEDOPT_DRIVER(FUSEDOPT_MEMBER)
#undef FUSEDOPT_MEMBER
};

// The driver's functions. Throws std::runtime_error that says what is missing.
const Api& api();

// Empty where the driver is there and sees a GPU, else why not.
std::string why_unavailable();

// There was not enough memory for what a launch needs; nothing was launched.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws std::runtime_error with the driver's words where `result` is not success, OutOfMemory where it is that.
void check(Result result, const char* what);

// Makes a context current for a scope.
class CurrentContext {
 public:
  explicit CurrentContext(Context context) { check(api().push_context(context), "cuCtxPushCurrent"); }
  ~CurrentContext() {
    Context popped;
    api().pop_context(&popped);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;
};

}  // namespace driver
}  // namespace fusedopt
