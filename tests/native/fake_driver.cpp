// A CUDA driver with one GPU that can do nothing but say its compute capability, FAKE_CAPABILITY, 90 for 9.0, and what
// CUDA it knows, FAKE_VERSION, 12080 for 12.8.
#include <cstdlib>

#include "cuda/driver.h"

using fusedopt::driver::Device;
using fusedopt::driver::Result;

// Every function of the list succeeds and writes nothing; those that matter are renamed there and defined below.
#define cuDeviceGetCount unused_count
#define cuDriverGetVersion unused_version
#define cuDeviceGetAttribute unused_attribute
#define FUSEDOPT_FAKE(symbol, member, arguments) \
  extern "C" fusedopt::driver::Result symbol arguments { return 0; }
namespace fusedopt {
namespace driver {
FUSEDOPT_DRIVER(FUSEDOPT_FAKE)
}
}  // namespace fusedopt
#undef cuDeviceGetCount
#undef cuDeviceGetAttribute
#undef cuDriverGetVersion

extern "C" Result cuDriverGetVersion(int* version) {
  *version = std::atoi(std::getenv("FAKE_VERSION"));
  return 0;
}

extern "C" Result cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}

extern "C" Result cuDeviceGetAttribute(int* value, int which, Device) {
  const int capability = std::atoi(std::getenv("FAKE_CAPABILITY"));
  *value = which == fusedopt::driver::kCapabilityMajor ? capability / 10 : capability % 10;
  return 0;
}
