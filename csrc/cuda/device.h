// Everything a kernel asks of the hardware: where it runs, memory access, barrier, fence, atomics, shared memory.
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

FUSEDOPT_FN void barrier() { __syncthreads(); }
FUSEDOPT_FN void fence() { __threadfence(); }
FUSEDOPT_FN u32 atomic_increment(u32* counter) { return atomicAdd(counter, 1u); }

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

}  // namespace device
}  // namespace fusedopt

#else
#include "cuda/emulator.h"
#endif
