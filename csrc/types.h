// Fixed-width integers, the function marker and a choice of types, for code that host and device compilers both read.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FUSEDOPT_FN __device__ __forceinline__
#define FUSEDOPT_UNROLL _Pragma("unroll")
#define FUSEDOPT_UNROLL_SLOTS _Pragma("unroll")
#define FUSEDOPT_LOOP _Pragma("unroll 1")
#define FUSEDOPT_INLINE  // behind a lambda's parameters
#else
#define FUSEDOPT_FN inline __attribute__((always_inline))
#define FUSEDOPT_UNROLL _Pragma("GCC unroll 16")
#define FUSEDOPT_UNROLL_SLOTS _Pragma("GCC unroll 8")
#define FUSEDOPT_LOOP
#define FUSEDOPT_INLINE __attribute__((always_inline))
#endif

namespace fusedopt {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

// std::conditional, which device code has no header for.
template <bool kFirst, class A, class B>
struct EitherOf {
  using type = A;
};
template <class A, class B>
struct EitherOf<false, A, B> {
  using type = B;
};
template <bool kFirst, class A, class B>
using Either = typename EitherOf<kFirst, A, B>::type;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "fixed widths");

}  // namespace fusedopt
