// The host twin of cuda/device.h: the same functions for a kernel that g++ compiled, threads being fibers.
//
// A random number of blocks runs at once, in a random order; of a cooperative grid, all. Threads of a block take turns
// in a random order between barriers. Misaligned access, a barrier or shuffle that not every thread reaches, a grid
// barrier that not every block reaches and a missing arrival are errors, not luck.
#pragma once

#include "types.h"

namespace fusedopt {
struct KernelParams;

namespace device {

int thread_index();
int block_threads();
u32 block_index();
u32 block_count();
constexpr int kWarpThreads = 32;

void barrier();
inline void fence() {}
inline u32 count_released(u32* counter, u32 last) {
  const u32 before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

constexpr u32 kGridBarrierFlag = 0x80000000u;
void grid_barrier(u32* counter);

u64 shuffle_bits(u64 bits, int lane_mask);
template <class T>
T shuffle_xor(T x, int lane_mask) {
  u64 bits = 0;
  __builtin_memcpy(&bits, &x, sizeof(T));
  bits = shuffle_bits(bits, lane_mask);
  __builtin_memcpy(&x, &bits, sizeof(T));
  return x;
}

inline void warp_barrier() { shuffle_bits(0, 1); }

// Shared memory of the running block, exactly sized, filled with a pattern before the block starts; by its address,
// `what` tells apart the objects of a kernel.
void* shared_bytes(const void* what, u64 size);
template <class T>
T& shared() {
  static char what;
  return *static_cast<T*>(shared_bytes(&what, sizeof(T)));
}

// Counts an access of `width` bytes; throws where the address is not a multiple of that.
void check_access(u64 address, u64 width);

FUSEDOPT_FN void load128(u32* to, u64 address) {
  check_access(address, 16);
  __builtin_memcpy(to, reinterpret_cast<const void*>(address), 16);
}
FUSEDOPT_FN void load64(u32* to, u64 address) {
  check_access(address, 8);
  __builtin_memcpy(to, reinterpret_cast<const void*>(address), 8);
}
FUSEDOPT_FN u32 load32(u64 address) {
  check_access(address, 4);
  u32 bits;
  __builtin_memcpy(&bits, reinterpret_cast<const void*>(address), 4);
  return bits;
}
FUSEDOPT_FN u16 load16(u64 address) {
  check_access(address, 2);
  u16 bits;
  __builtin_memcpy(&bits, reinterpret_cast<const void*>(address), 2);
  return bits;
}
FUSEDOPT_FN u8 load8(u64 address) {
  check_access(address, 1);
  u8 bits;
  __builtin_memcpy(&bits, reinterpret_cast<const void*>(address), 1);
  return bits;
}
FUSEDOPT_FN void store128(u64 address, const u32* from) {
  check_access(address, 16);
  __builtin_memcpy(reinterpret_cast<void*>(address), from, 16);
}
FUSEDOPT_FN void store64(u64 address, const u32* from) {
  check_access(address, 8);
  __builtin_memcpy(reinterpret_cast<void*>(address), from, 8);
}
FUSEDOPT_FN void store32(u64 address, u32 bits) {
  check_access(address, 4);
  __builtin_memcpy(reinterpret_cast<void*>(address), &bits, 4);
}
FUSEDOPT_FN void store16(u64 address, u16 bits) {
  check_access(address, 2);
  __builtin_memcpy(reinterpret_cast<void*>(address), &bits, 2);
}

FUSEDOPT_FN void store8(u64 address, u8 bits) {
  check_access(address, 1);
  __builtin_memcpy(reinterpret_cast<void*>(address), &bits, 1);
}

}  // namespace device

// A grid to run a kernel on: any number of blocks and threads, in an order that the seed decides.
struct EmulatedGrid {
  u32 blocks;
  int threads;
  u64 seed;
  bool cooperative = false;  // all blocks at once: what a kernel with a grid barrier needs
};

using EmulatedKernel = void (*)(const KernelParams& params);

// What a kernel loaded and stored of tensors' elements. The table is not counted.
struct EmulatedTraffic {
  u64 accesses = 0;
  u64 bytes = 0;
};

// Runs a kernel to its end. Throws std::runtime_error where the kernel breaks a rule of the hardware.
EmulatedTraffic run_emulated(EmulatedKernel kernel, const KernelParams& params, const EmulatedGrid& grid);

}  // namespace fusedopt
