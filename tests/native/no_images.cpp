// A build without device code, for the programs of this folder.
#include "cuda/images.h"

namespace fusedopt {

extern const DeviceImage kDeviceImages[] = {{"", 0, false, nullptr, 0}};
extern const std::size_t kDeviceImageCount = 0;
extern const char kDeviceCompiler[] = "none: a test program";
extern const char kHostCompiler[] = "";
extern const char kBuildArchs[] = "";

}  // namespace fusedopt
