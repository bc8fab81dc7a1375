// Opening the CUDA driver, and its errors.
#include "cuda/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace fusedopt {
namespace driver {
namespace {

struct Opened {
  Api api;
  std::string error;  // empty: the driver is open
};

Opened open() {
  Opened opened;
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    opened.error = std::string("no CUDA driver: ") + dlerror();
    return opened;
  }
#define FUSEDOPT_LOAD(symbol, member, arguments)                                      \
  opened.api.member = reinterpret_cast<Result(*) arguments>(dlsym(library, #symbol)); \
  if (opened.api.member == nullptr) opened.error = "the CUDA driver has no " #symbol ": it is too old";
  FUSEDOPT_DRIVER(FUSEDOPT_LOAD)
#undef FUSEDOPT_LOAD
  if (!opened.error.empty()) return opened;
  const Result result = opened.api.init(0);
  const char* words = nullptr;
  if (result != 0) {
    opened.api.error_string(result, &words);
    opened.error = std::string("cuInit: ") + (words ? words : "unknown error");
  }
  return opened;
}

const Opened& opened() {
  static const Opened once = open();
  return once;
}

}  // namespace

const Api& api() {
  if (!opened().error.empty()) throw std::runtime_error(opened().error);
  return opened().api;
}

std::string why_unavailable() {
  if (!opened().error.empty()) return opened().error;
  int devices = 0;
  if (opened().api.device_count(&devices) != 0 || devices == 0) return "the CUDA driver sees no GPU";
  return "";
}

void check(Result result, const char* what) {
  if (result == 0) return;
  const char* words = nullptr;
  opened().api.error_string(result, &words);
  const std::string text =
      std::string(what) + " failed: " + (words ? words : "unknown error") + " (" + std::to_string(result) + ")";
  if (result == kOutOfMemory) throw OutOfMemory(text);
  throw std::runtime_error(text);
}

}  // namespace driver
}  // namespace fusedopt
