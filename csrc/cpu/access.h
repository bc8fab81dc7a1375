// How the CPU reaches memory: straight from the pointer, unaligned, in blocks long enough to vectorise.
#pragma once

#include "sweep.h"

namespace fusedopt {

// Isa is a type with internal linkage, one per instruction set, so that the linker never merges the copies.
template <class Isa>
struct HostAccess {
  static constexpr int kBlock = 64;   // elements: the arrays of a block stay in L1
  static constexpr int kNarrow = 16;  // the rest of a tensor, padded to one AVX-512 vector

  template <class T>
  struct Unaligned {
    typedef T type __attribute__((aligned(1), may_alias));
  };

  // Nothing is fetched ahead: the hardware does that.
  template <class C, int N>
  struct Packet {
    u64 address;
  };

  template <class W, class C>
  FUSEDOPT_FN static void fetch(Packet<C, W::value>& packet, int storage, u64 address, i64 index, bool) {
    packet.address = address + u64(index) * u64(storage_bytes(storage));
  }

  // A fixed variant converts in place. Where the storage is known at run time only, the conversion is a function of its
  // own: a call for a block of elements costs nothing, five slots of inlined branches would cost minutes to compile.
  template <class W, class C>
  FUSEDOPT_FN static void decode(const Packet<C, W::value>& packet, int storage, C (&out)[W::value], int count) {
    if (__builtin_constant_p(storage))
      decode_as<W>(packet.address, storage, out, count);
    else
      decode_called<W>(packet.address, storage, out, count);
  }

  template <class W, class C>
  FUSEDOPT_FN static void store(int storage, u64 address, i64 index, bool, const C (&in)[W::value], int count) {
    address += u64(index) * u64(storage_bytes(storage));
    if (__builtin_constant_p(storage))
      store_as<W>(storage, address, in, count);
    else
      store_called<W>(storage, address, in, count);
  }

  template <class V, class C, class Visit>
  FUSEDOPT_FN static void walk(const ChunkView& chunk, int, int, const Visit& visit) {
    i32 i = 0;
    for (; i + kBlock <= chunk.size; i += kBlock) visit(Width<kBlock>{}, i, kBlock);
    for (; i + kNarrow <= chunk.size; i += kNarrow) visit(Width<kNarrow>{}, i, kNarrow);
    if (i < chunk.size) visit(Width<kNarrow, true, true>{}, i, chunk.size - i);
  }

 private:
  template <class W, class C>
  FUSEDOPT_FN static void decode_as(u64 address, int storage, C (&out)[W::value], int count) {
    if (storage == kFloat32)
      read<float, W>(address, out, count, [](float x) { return C(x); });
    else if (storage == kFloat64)
      read<double, W>(address, out, count, [](double x) { return C(x); });
    else if (storage == kBFloat16)
      read<u16, W>(address, out, count, [](u16 bits) { return decode16<C>(kBFloat16, bits); });
    else
      read<u16, W>(address, out, count, [](u16 bits) { return decode16<C>(kFloat16, bits); });
  }
  template <class W, class C>
  __attribute__((noinline)) static void decode_called(u64 address, int storage, C (&out)[W::value], int count) {
    decode_as<W>(address, storage, out, count);
  }

  template <class W, class C>
  FUSEDOPT_FN static void store_as(int storage, u64 address, const C (&in)[W::value], int count) {
    if (storage == kFloat32)
      write<float, W>(address, in, count, [](C x) { return float(x); });
    else if (storage == kFloat64)
      write<double, W>(address, in, count, [](C x) { return double(x); });
    else if (storage == kBFloat16)
      write<u16, W>(address, in, count, [](C x) { return encode16(kBFloat16, x); });
    else
      write<u16, W>(address, in, count, [](C x) { return encode16(kFloat16, x); });
  }
  template <class W, class C>
  __attribute__((noinline)) static void store_called(int storage, u64 address, const C (&in)[W::value], int count) {
    store_as<W>(storage, address, in, count);
  }

  template <class T, class W, class C, class Convert>
  FUSEDOPT_FN static void read(u64 address, C (&out)[W::value], int count, const Convert& convert) {
    const auto* from = reinterpret_cast<const typename Unaligned<T>::type*>(address);
    if (!W::kPartial)
      for (int k = 0; k < W::value; ++k) out[k] = convert(from[k]);
    else
      for (int k = 0; k < W::value; ++k) out[k] = k < count ? convert(from[k]) : C(0);
  }
  template <class T, class W, class C, class Convert>
  FUSEDOPT_FN static void write(u64 address, const C (&in)[W::value], int count, const Convert& convert) {
    auto* to = reinterpret_cast<typename Unaligned<T>::type*>(address);
    const int n = W::kPartial ? count : W::value;
    for (int k = 0; k < n; ++k) to[k] = convert(in[k]);
  }
};

}  // namespace fusedopt
