// Vectors of the instruction set, and conversion between their element types.
#pragma once

#include "storage/codec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FUSEDOPT_VECTOR_BYTES 64
#elif defined(__AVX__)
#define FUSEDOPT_VECTOR_BYTES 32
#else
#define FUSEDOPT_VECTOR_BYTES 16
#endif

namespace fusedopt {

// L elements of T in the vector extension of GCC and Clang: operators work on all of them at once.
template <class T, int L>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * L)));
};
template <class T, int L>
using Vector = typename VectorOf<T, L>::type;

// A vector in memory, at any address, whatever type it has there.
template <class X>
struct UnalignedOf {
  typedef X type __attribute__((aligned(1), may_alias));
};
template <class X>
using Unaligned = typename UnalignedOf<X>::type;

// As many elements of T as X has.
template <class T, class X>
using Like = Vector<T, int(sizeof(X) / sizeof(X{}[0]))>;

template <class T, class X>
FUSEDOPT_FN Like<T, X> convert(X x) {
  using Converted = Like<T, X>;
  return __builtin_convertvector(x, Converted);
}

// 16 bits to 32 and back: of the general form above, GCC 12 makes three to five instructions.
template <class Bits>
FUSEDOPT_FN Like<u32, Bits> widen(Bits bits) {
  return convert<u32>(bits);
}
template <class U>
FUSEDOPT_FN Like<u16, U> narrow(U bits) {
  return convert<u16>(bits);
}
#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xFFFF;  // the unmasked forms make GCC 12 warn about its own header
FUSEDOPT_FN Vector<u32, 16> widen(Vector<u16, 16> bits) {
  return (Vector<u32, 16>)_mm512_maskz_cvtepu16_epi32(kAll, (__m256i)bits);
}
FUSEDOPT_FN Vector<u16, 16> narrow(Vector<u32, 16> bits) {
  return (Vector<u16, 16>)_mm512_maskz_cvtepi32_epi16(kAll, (__m512i)bits);
}
#elif defined(__AVX2__)
FUSEDOPT_FN Vector<u32, 8> widen(Vector<u16, 8> bits) { return (Vector<u32, 8>)_mm256_cvtepu16_epi32((__m128i)bits); }
FUSEDOPT_FN Vector<u16, 8> narrow(Vector<u32, 8> bits) {
  const __m256i all = (__m256i)bits;
  return (Vector<u16, 8>)_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
#endif

// bfloat16 to float32 and back, as codec.h has it. With AVX-512 the shift is part of the one instruction that moves the
// halves of words: shifts share the pipes of additions, which are busy.
template <class Bits>
FUSEDOPT_FN Like<float, Bits> float_from_brain(Bits bits) {
  return float_from_bf16<Like<float, Bits>>(widen(bits));
}
template <class F>
FUSEDOPT_FN Like<u16, F> brain_from_float(F x) {
  return narrow(bf16_from_float<Like<u32, F>>(x));
}
// What a float becomes on its way to bfloat16 and back.
template <class F>
FUSEDOPT_FN F as_brain(F x) {
  return float_from_bf16<F>(bf16_from_float<Like<u32, F>>(x));
}
#if defined(__AVX512F__) && defined(__AVX512BW__)
FUSEDOPT_FN Vector<float, 16> float_from_brain(Vector<u16, 16> bits) {
  const Vector<u16, 32> place = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i twice = _mm512_maskz_broadcast_i64x4(__mmask8(0xFF), (__m256i)bits);  // of memory: it costs nothing
  return (Vector<float, 16>)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, (__m512i)place, twice);
}
FUSEDOPT_FN Vector<u16, 16> brain_from_float(Vector<float, 16> x) {
  const Vector<u16, 32> place = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const Vector<u32, 16> rounded = round_to_bf16((Vector<u32, 16>)x);
  const __m512i nan = _mm512_set1_epi16(0x7FC0);
  const __mmask32 numbers = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_EQ_OQ);
  const __m512i halves = _mm512_mask_permutexvar_epi16(nan, numbers, (__m512i)place, (__m512i)rounded);
  Vector<u16, 16> low;
  __builtin_memcpy(&low, &halves, sizeof(low));  // no instruction
  return low;
}
#endif

// float16 to float32 and back, as codec.h has it: the instructions give the same bits, but for NaN, made canonical.
template <class Bits>
FUSEDOPT_FN Like<float, Bits> float_from_half(Bits bits) {
  return float_from_f16<Like<float, Bits>>(widen(bits));
}
template <class F>
FUSEDOPT_FN Like<u16, F> half_from_float(F x) {
  return narrow(f16_from_float<Like<u32, F>>(x));
}
#if defined(__AVX512F__) || defined(__F16C__)
template <class F>
FUSEDOPT_FN F with_canonical_nan(F x) {
  using U = Like<u32, F>;
  const U bits = bit_cast<U>(x);
  return bit_cast<F>(x != x ? (bits & 0x80000000u) | 0x7FC00000u : bits);
}
#endif
#if defined(__AVX512F__)
FUSEDOPT_FN Vector<float, 16> float_from_half(Vector<u16, 16> bits) {
  return (Vector<float, 16>)_mm512_maskz_cvtph_ps(kAll, (__m256i)bits);
}
FUSEDOPT_FN Vector<u16, 16> half_from_float(Vector<float, 16> x) {
  return (Vector<u16, 16>)_mm512_maskz_cvtps_ph(kAll, (__m512)with_canonical_nan(x), _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
FUSEDOPT_FN Vector<float, 8> float_from_half(Vector<u16, 8> bits) {
  return (Vector<float, 8>)_mm256_cvtph_ps((__m128i)bits);
}
FUSEDOPT_FN Vector<u16, 8> half_from_float(Vector<float, 8> x) {
  return (Vector<u16, 8>)_mm256_cvtps_ph((__m256)with_canonical_nan(x), _MM_FROUND_TO_NEAREST_INT);
}
#endif

// 8 bits to 32, and back the low 8.
template <class Bytes>
FUSEDOPT_FN Like<u32, Bytes> widen8(Bytes bytes) {
  return convert<u32>(bytes);
}
template <class U>
FUSEDOPT_FN Like<u8, U> narrow8(U bits) {
  return convert<u8>(bits);
}
#if defined(__AVX512F__)
FUSEDOPT_FN Vector<u32, 16> widen8(Vector<u8, 16> bytes) {
  return (Vector<u32, 16>)_mm512_maskz_cvtepu8_epi32(kAll, (__m128i)bytes);
}
FUSEDOPT_FN Vector<u8, 16> narrow8(Vector<u32, 16> bits) {
  return (Vector<u8, 16>)_mm512_maskz_cvtepi32_epi8(kAll, (__m512i)bits);
}
#elif defined(__AVX2__)
FUSEDOPT_FN Vector<u32, 8> widen8(Vector<u8, 8> bytes) {
  return (Vector<u32, 8>)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
}
FUSEDOPT_FN Vector<u8, 8> narrow8(Vector<u32, 8> bits) {
  const __m128i words = (__m128i)narrow(bits & 0xFFu);
  return (Vector<u8, 8>)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
}
#endif

// Elements e to e + L − 1 of some vectors, in T.
template <class T, int L, class X, int M>
FUSEDOPT_FN Vector<T, L> piece(const X (&x)[M], int e) {
  constexpr int kSize = int(sizeof(X) / sizeof(X{}[0]));
  if constexpr (kSize < L) {
    Vector<T, L> found = {};
    for (int k = 0; k < L; ++k) found[k] = T(x[(e + k) / kSize][(e + k) % kSize]);
    return found;
  } else {
    const Like<T, X> converted = convert<T>(x[e / kSize]);
    Vector<T, L> found = {};
    __builtin_memcpy(&found, reinterpret_cast<const T*>(&converted) + e % kSize, sizeof(found));
    return found;
  }
}
// The same in double.
template <int L, class X, int M>
FUSEDOPT_FN Vector<double, L> doubles(const X (&x)[M], int e) {
  return piece<double, L>(x, e);
}
#if defined(__AVX512F__) && defined(__AVX512DQ__)
template <int L, int M>
FUSEDOPT_FN Vector<double, 8> doubles(const Vector<float, 16> (&x)[M], int e) {
  static_assert(L == 8, "half a vector of float");
  const __m512 whole = (__m512)x[e / 16];
  __m256 half;
  __builtin_memcpy(&half, &whole, sizeof(half));  // no instruction; that of the other half would be one here too
  if (e % 16 != 0) half = _mm512_maskz_extractf32x8_ps(__mmask8(0xFF), whole, 1);
  return (Vector<double, 8>)_mm512_maskz_cvtps_pd(__mmask8(0xFF), half);
}
#elif defined(__AVX2__)
template <int L, int M>
FUSEDOPT_FN Vector<double, 4> doubles(const Vector<float, 8> (&x)[M], int e) {
  static_assert(L == 4, "half a vector of float");
  const __m256 whole = (__m256)x[e / 8];
  return (Vector<double, 4>)_mm256_cvtps_pd(e % 8 == 0 ? _mm256_castps256_ps128(whole)
                                                       : _mm256_extractf128_ps(whole, 1));
}
#endif

// sum + x·x where the square is exact, so that it is the same whether it is rounded before it is added.
template <class X>
FUSEDOPT_FN X add_exact_square(X sum, X x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(X) == 64) return (X)_mm512_fmadd_pd((__m512d)x, (__m512d)x, (__m512d)sum);
#endif
  return sum + x * x;
}

}  // namespace fusedopt
