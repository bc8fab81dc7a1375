// Everything a kernel asks of the hardware: where it runs, memory access, barriers, fence, shuffle, atomics, shared
// memory.
//
// Two bodies for each function: the GPU's own here, and the host twin (cuda/emulator.h) under which g++ runs the same
// kernel source, sanitizers included. Device code includes no CUDA header and knows no other way to the hardware.
#pragma once

#include "types.h"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

namespace fusedopt {
namespace device {

FUSEDOPT_FN int thread_index() { return int(threadIdx.x); }
FUSEDOPT_FN int block_threads() { return int(blockDim.x); }
FUSEDOPT_FN u32 block_index() { return blockIdx.x; }
FUSEDOPT_FN u32 block_count() { return gridDim.x; }

constexpr int kWarpThreads = 32;

FUSEDOPT_FN void barrier() { __syncthreads(); }
FUSEDOPT_FN void warp_barrier() { __syncwarp(); }  // of all of its threads; what they wrote, all of them read after
FUSEDOPT_FN void fence() { __threadfence(); }
// Adds 1, or makes 0 of `last`, and returns what was there; all that the block has done before a barrier lies before it
// for whoever reads the count and then fences. Assembly, as atomicAdd() is added up for a warp first, which waits for
// it.
FUSEDOPT_FN u32 count_released(u32* counter, u32 last) {
  u32 before;
  asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
  return before;
}

// Waits for every thread of every block; what any of them wrote before, all can read after. Only in a cooperative
// launch, where all blocks run at once. Every thread of the grid calls it, with the same counter: a word of global
// memory that is 0 before its first use and serves any number of barriers and launches, one after another. Each
// barrier adds 2^31 to it, which flips the highest bit once all have come (as cooperative_groups::grid_group::sync).
constexpr u32 kGridBarrierFlag = 0x80000000u;
FUSEDOPT_FN void grid_barrier(u32* counter) {
  barrier();
  if (thread_index() == 0) {
    fence();
    const u32 before = atomicAdd(counter, block_index() == 0 ? kGridBarrierFlag - (block_count() - 1) : 1u);
    u32 now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (((before ^ now) & kGridBarrierFlag) == 0);
    fence();
  }
  barrier();
}

// The value of the lane whose number differs by this mask (1, 2, 4, 8 or 16); x is a float, a double or an integer of
// 4 or 8 bytes. Every lane of a whole warp of 32 takes part, with the same mask.
template <class T>
FUSEDOPT_FN T shuffle_xor(T x, int lane_mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, lane_mask);
}

// One object per block, uninitialised, shared by its threads.
template <class T>
FUSEDOPT_FN T& shared() {
  __shared__ __align__(16) unsigned char bytes[sizeof(T)];
  return *reinterpret_cast<T*>(bytes);
}

// Global memory, aligned to the width. Volatile assembly keeps the order of the source: all loads before their use.
FUSEDOPT_FN void load128(u32* to, u64 address) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(address)
               : "memory");
}
FUSEDOPT_FN void load64(u32* to, u64 address) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(address) : "memory");
}
FUSEDOPT_FN u32 load32(u64 address) { return *reinterpret_cast<const u32*>(address); }
FUSEDOPT_FN u16 load16(u64 address) { return *reinterpret_cast<const u16*>(address); }
FUSEDOPT_FN u8 load8(u64 address) { return *reinterpret_cast<const u8*>(address); }

FUSEDOPT_FN void store128(u64 address, const u32* from) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(from[0]), "r"(from[1]), "r"(from[2]),
               "r"(from[3])
               : "memory");
}
FUSEDOPT_FN void store64(u64 address, const u32* from) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(from[0]), "r"(from[1]) : "memory");
}
FUSEDOPT_FN void store32(u64 address, u32 bits) { *reinterpret_cast<u32*>(address) = bits; }
FUSEDOPT_FN void store16(u64 address, u16 bits) { *reinterpret_cast<u16*>(address) = bits; }
FUSEDOPT_FN void store8(u64 address, u8 bits) { *reinterpret_cast<u8*>(address) = bits; }

}  // namespace device
}  // namespace fusedopt

#else
#include "cuda/emulator.h"
#endif
