// Memory that is about to be written for the first time: asked of Linux in pages of 2 MB.
//
// A page of 4 KB is brought by an interrupt of its own, and a large state has thousands: more than half of the time in
// which an optimizer takes its first step. Many systems give large pages only where they are asked for ("madvise" in
// /sys/kernel/mm/transparent_hugepage/enabled). Where there are none, nothing changes.
#pragma once

#include <sys/mman.h>

#include "types.h"

namespace fusedopt {

constexpr u64 kHugePage = u64(2) << 20;

// For the whole pages within `bytes` of `address`: what lies around them may be anybody's.
inline void ask_for_huge_pages(u64 address, u64 bytes) {
  const u64 first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const u64 end = (address + bytes) / kHugePage * kHugePage;
#ifdef MADV_HUGEPAGE
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fusedopt
