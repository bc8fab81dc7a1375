// Launches on a GPU: keeps a copy of the table in device memory and sends what changed with the launch.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda/kernel.h"
#include "host_table.h"

namespace fusedopt {

// What a warp takes, in elements: two vectors of 4 for each of its threads.
constexpr i64 kSmallTensor = 256;

// Of how many elements, or a multiple, the chunks of blocks are.
i64 least_elements(HostTable& table);

// Says which chunks are for blocks and which for warps. A leaf that is reported is joined by a block.
void fill_teams(const HostTable& table, KernelParams& params);

// Copies groups and gradient addresses into the parameters where they fit.
void fill_inline_columns(const HostTable& table, KernelParams& params);

// Why no kernel can be launched on a device of this machine by this build; empty: it can. -1: on any device at all.
std::string cuda_unavailable(int device);

// The launches of one table on one device. Everything goes to the stream it is given, in order.
class CudaLaunch {
 public:
  explicit CudaLaunch(int device);  // throws std::runtime_error
  ~CudaLaunch();
  CudaLaunch(const CudaLaunch&) = delete;
  CudaLaunch& operator=(const CudaLaunch&) = delete;

  int architecture() const;  // compute capability, 90 for 9.0
  void launch(HostTable& table, u64 stream, u64 grad_scale, u64 found_inf);

  // How many of the launches were captured in a graph. What those point to stays as long as this object.
  size_t captures() const;

  // Gives the captured launches the hyperparameters that the table has now, in the order of the stream.
  void update_captures(const HostTable& table, u64 stream);

  // Rows of which no captured launch knows the tensors where they are now.
  std::vector<u64> moved_since_captures(const HostTable& table) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fusedopt
