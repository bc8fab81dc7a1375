// What a test may do with the driver of host_driver.cpp beside what the launcher asks of it. Work is queued on streams
// and done whenever the driver likes, in the order of each stream, or when somebody waits for it; while a stream is
// captured, what CUDA forbids then is refused.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "cuda/driver.h"

namespace fusedopt {
namespace driver {
struct Work;
}
namespace host {

using Graph = std::vector<std::shared_ptr<driver::Work>>;  // the kernels that were captured, with their parameters

driver::Stream make_stream();
void begin_capture(driver::Stream stream);
Graph end_capture(driver::Stream stream);
void replay(const Graph& graph, driver::Stream stream);

// All streams have done what was queued.
void synchronize();

// From now on work is done only when somebody waits for it, or, as at first, some of it earlier.
void put_off(bool everything);

// From now on there is memory, on the device or pinned, for so many allocations; at first there is for all.
constexpr u64 kPlenty = ~u64(0);
void limit_memory(u64 allocations);

// From now on no cubin is for the GPU, or, as at first, all are. Modules that a device has loaded stay.
void refuse_cubins(bool refused);

// How many blocks of device memory there are.
std::size_t blocks_of_memory();

}  // namespace host
}  // namespace fusedopt
