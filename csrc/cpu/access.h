// How the CPU reaches memory: in vectors of its instruction set, straight from the pointer, aligned or not.
#pragma once

#include <type_traits>

#include "cpu/vector.h"
#include "sweep.h"

namespace fusedopt {

// Isa is a type with internal linkage, one per instruction set, so that the linker never merges the copies.
template <class Isa>
struct HostAccess {
  template <class C>
  static constexpr int kLanes = FUSEDOPT_VECTOR_BYTES / int(sizeof(C));
  // What N elements are computed in: vectors of this type.
  template <class C, int N>
  using Lanes = Vector<C, (N < kLanes<C> ? N : kLanes<C>)>;

  // Whether a rule reads and writes a slot: known to the compiler where the rule's branches are.
  template <class Rule>
  FUSEDOPT_FN static bool has(const ChunkView&, const Rule& rule, int slot) {
    return slot < kState0 + rule.states();
  }

  // The bits of what is computed in.
  template <class X>
  using Bits = Like<u32, X>;

  // Elements at a time. Where the storage is known, one AVX-512 vector per slot: values stay in registers from load to
  // store. Where the conversion is a call, a longer block pays for it.
  template <class V>
  static constexpr int kBlock = V::kFixed ? 16 : 64;
  static constexpr int kNarrow = 16;  // the rest of a tensor
  static constexpr int kShared = 16;  // elements that share their random words with as many others

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
  template <class W, class C, class X, int M>
  FUSEDOPT_FN static void decode(const Packet<C, W::value>& packet, int storage, X (&out)[M], int count) {
    if (__builtin_constant_p(storage))
      decode_as<W>(packet.address, storage, out, count);
    else
      decode_called<W>(packet.address, storage, out, count);
  }

  template <class W, class X, int M>
  FUSEDOPT_FN static void store(int storage, u64 address, i64 index, bool, const X (&in)[M], int count) {
    address += u64(index) * u64(storage_bytes(storage));
    if (__builtin_constant_p(storage))
      store_as<W>(storage, address, in, count);
    else
      store_called<W>(storage, address, in, count);
  }

  // 16 bits that are no number: sign-extended, in the bits of a float.
  template <class W, class X, int M>
  FUSEDOPT_FN static void decode_low(const Packet<float, W::value>& packet, X (&out)[M], int count) {
    read<u16, W>(packet.address, out, count, [](auto x) { return bit_cast<X>((widen(x) ^ 0x8000u) - 0x8000u); });
  }
  template <class W, class X, int M>
  FUSEDOPT_FN static void store_low(u64 address, i64 index, bool, const X (&in)[M], int count) {
    write<u16, W>(address + u64(index) * 2, in, count, [](X x) { return narrow(bit_cast<Bits<X>>(x) & 0xFFFFu); });
  }

  // Codes of 8 bits: storage/block.h.
  template <class W>
  FUSEDOPT_FN static void fetch_codes(Packet<float, W::value>& packet, u64 address, i64 index, bool) {
    packet.address = address + u64(index);
  }
  template <class W, class X, int M>
  FUSEDOPT_FN static void decode_codes(const Packet<float, W::value>& packet, int storage, float scale, X (&out)[M],
                                       int count) {
    read<u8, W>(packet.address, out, count,
                [&](auto code) { return float_from_code<X>(storage, widen8(code), scale); });
  }

  template <class U>
  FUSEDOPT_FN static U larger(U one, U other) {
    return one > other ? one : other;
  }
  // By halves: one after the other would keep the block waiting.
  template <class U>
  FUSEDOPT_FN static u32 largest_lane(const U& lanes) {
    constexpr int L = int(sizeof(U) / sizeof(u32));
    if constexpr (L == 1) {
      return lanes[0];
    } else {
      Vector<u32, L / 2> halves[2];
      __builtin_memcpy(halves, &lanes, sizeof(lanes));
      return largest_lane(larger(halves[0], halves[1]));
    }
  }

  // A block of states in float: the elements of a block are updated, then coded, in vectors.
  using Floats = Vector<float, kLanes<float>>;
  using Words = Like<u32, Floats>;
  template <class V>
  struct Part {
    float scale[kStates];
    float value[kStates][kMostBlock];
    Words most[kStates] = {};  // the largest magnitudes so far, by lane: of whole vectors, while they come
    bool folds = false;
    i32 folded = 0;  // elements of which that is
    i32 at;          // where the next vector goes
    u64 place;       // of its first element in the whole tensor
    RandomStream rounding;

    FUSEDOPT_FN void move_to(const ChunkView& chunk, i32 first, i32 i) {
      at = i;
      place = chunk.place + u64(first + i);
    }
    template <class Y, int M>
    FUSEDOPT_FN void take(int state, const Y (&x)[M]) {
      __builtin_memcpy(value[state] + at, x, sizeof(x));
      if constexpr (sizeof(Y) == sizeof(Floats)) {
        if (!folds) return;
        FUSEDOPT_UNROLL
        for (int k = 0; k < M; ++k) most[state] = larger(most[state], magnitude_bits<Words>(x[k]));
      }
    }
  };

  // How far the elements of vector k are from that of the first.
  template <class Y>
  FUSEDOPT_FN static Bits<Y> places(int k) {
    constexpr int L = int(sizeof(Y) / sizeof(float));
    Bits<Y> places;
    for (int lane = 0; lane < L; ++lane) places[lane] = u32(k * L + lane);
    return places;
  }

  template <class V, class Visit>
  FUSEDOPT_FN static void walk_parts(const ChunkView& chunk, int, int, const Visit& visit) {
    const i32 block = 1 << chunk.block_bits;
    for (i32 i = 0; i < chunk.size; i += block) visit(i, chunk.size - i < block ? int(chunk.size - i) : int(block));
  }

  template <class V, class Visit>
  FUSEDOPT_FN static void walk_part(const ChunkView& chunk, Part<V>& part, i32 first, int count, const Visit& visit) {
    i32 i = 0;
    if (V::kStrided && chunk.layout) {
      for (; i < count; ++i) {
        part.move_to(chunk, first, i);
        visit(Width<1>{}, first + i, 1);
      }
      return;
    }
    part.folds = true;
    for (; i + kNarrow <= count; i += kNarrow) {
      part.move_to(chunk, first, i);
      visit(Width<kNarrow>{}, first + i, kNarrow);
    }
    part.folds = false;
    part.folded = i;
    part.move_to(chunk, first, i);
    if (i < count) visit(Width<kNarrow, true, true>{}, first + i, count - i);
  }

  // The largest magnitude of a block, as bits. What the last vector has beyond the block becomes 0.
  template <class V>
  FUSEDOPT_FN static u32 join_part(Part<V>& part, int state, int count, int) {
    constexpr int L = kLanes<float>;
    for (int k = count; k % L != 0; ++k) part.value[state][k] = 0.0f;
    Words most = part.most[state];
    for (int k = part.folded; k < count; k += L)
      most = larger(most, magnitude_bits<Words>(*reinterpret_cast<const Unaligned<Floats>*>(part.value[state] + k)));
    return largest_lane(most);
  }

  template <class V>
  FUSEDOPT_FN static void store_part(const ChunkView& chunk, const Part<V>& part, int state, int storage, float inverse,
                                     const RandomStream& random, i32 first, int count) {
    const u64 place = u64(chunk.begin + first);
    const u64 address = chunk.address[kState0 + state] + (chunk.layout ? place : u64(first));
    const float* const x = part.value[state];
    if (count % (2 * kShared) == 0)
      encode<true>(x, address, storage, inverse, random, place, count);
    else
      encode<false>(x, address, storage, inverse, random, place, count);
  }

  // The terms of N elements.
  template <int N>
  struct Terms {
    static constexpr int kLanesOf = N < kLanes<double> ? N : kLanes<double>;
    static constexpr int kPieces = N / kLanesOf;
    static constexpr int kEventLanes = N < kLanes<float> ? N : kLanes<float>;
    static constexpr int kEvents = N / kEventLanes;
    Vector<double, kLanesOf> squares[kReportSquares][kPieces];
    Vector<float, kEventLanes> events[kEvents];

    FUSEDOPT_FN void add(const Terms& other) {
      FUSEDOPT_UNROLL
      for (int s = 0; s < kReportSquares; ++s) {
        FUSEDOPT_UNROLL
        for (int k = 0; k < kPieces; ++k) squares[s][k] = squares[s][k] + other.squares[s][k];
      }
      FUSEDOPT_UNROLL
      for (int k = 0; k < kEvents; ++k) events[k] = events[k] + other.events[k];
    }
  };

  // The terms of a leaf. Its vectors come in the order in which the tree of reduce.h joins them, so that at most one
  // result of each level waits for its like, as the bits of a counter: at level k that of 2^k vectors, where bit k of
  // `count` is set. All of it stays in the first cache; the terms of a whole leaf would not.
  struct Tally {
    static constexpr int kLevels = 6;  // as many as there are with vectors of 64; more, and smaller, with others
    alignas(64) unsigned char bytes[kLevels * sizeof(Terms<64>)];
    u32 count;
  };
  static_assert(12 * sizeof(Terms<1>) <= sizeof(Tally::bytes) && 8 * sizeof(Terms<16>) <= sizeof(Tally::bytes),
                "room for every level");

  template <class W, class X, int M>
  FUSEDOPT_FN static void tally(const LeafReport& report, i32, const X (&grad)[M], const X (&param)[M],
                                const X (&update)[M], const X (&events)[M], int count) {
    Tally& tally = *static_cast<Tally*>(report.tally);
    Terms<W::value> terms;
    square<W>(terms.squares[kGradSquares], grad, count);
    square<W>(terms.squares[kParamSquares], param, count);
    square<W>(terms.squares[kUpdateSquares], update, count);
    FUSEDOPT_UNROLL
    for (int k = 0; k < Terms<W::value>::kEvents; ++k) {
      constexpr int L = Terms<W::value>::kEventLanes;
      terms.events[k] = piece<float, L>(events, k * L);
      if (W::kPartial) terms.events[k] = first_few(terms.events[k], count - k * L);
    }
    auto* const at = reinterpret_cast<Terms<W::value>*>(tally.bytes);
    u32 level = 0;
    for (; (tally.count >> level & 1u) != 0; ++level) terms.add(at[level]);
    at[level] = terms;
    ++tally.count;
  }

  // A chunk of which leaves may be reported.
  template <class V, class C, class Visit>
  FUSEDOPT_FN static void report_chunk(const ChunkView& chunk, LeafReport& report, int lane, int lanes,
                                       const Visit& visit) {
    if (!report.is_wanted())
      return walk<V, C>(chunk, lane, lanes, [&](auto width, i32 i, int count) { visit(chunk, width, i, count); });
    for (i32 at = 0; at < chunk.size; at += i32(kLeaf)) {
      const ChunkView leaf = chunk.part(at, i32(kLeaf));
      if (V::kStrided && leaf.layout)
        report_vectors<1>(leaf, report, visit);
      else if (leaf.size == kLeaf)
        report_vectors<kBlock<V>>(leaf, report, visit);
      else
        report_vectors<kNarrow>(leaf, report, visit);
    }
  }

  template <class V, class C, class Visit>
  FUSEDOPT_FN static void walk(const ChunkView& chunk, int, int, const Visit& visit) {
    i32 i = 0;
    if (V::kStrided && chunk.layout) {
      for (; i < chunk.size; ++i) visit(Width<1>{}, i, 1);
      return;
    }
    constexpr int N = kBlock<V>;
    for (; i + N <= chunk.size; i += N) visit(Width<N>{}, i, N);
    for (; i + kNarrow <= chunk.size; i += kNarrow) visit(Width<kNarrow>{}, i, kNarrow);
    if (i < chunk.size) visit(Width<kNarrow, true, true>{}, i, chunk.size - i);
  }

 private:
  // A leaf in vectors of N elements; those it lacks count as 0.
  template <int N, class Visit>
  FUSEDOPT_FN static void report_vectors(const ChunkView& leaf, LeafReport& report, const Visit& visit) {
    constexpr int kVectors = int(kLeaf) / N;
    Tally& tally = *static_cast<Tally*>(report.tally);
    tally.count = 0;
    for (u32 c = 0, i = 0; c < u32(kVectors); ++c, i = next_reversed(i, kVectors)) {
      const i32 first = i32(i) * N;
      if (N > 1) prefetch_next(leaf, i64(c) * N);
      if (first + N <= leaf.size)
        visit(leaf, Width<N>{}, first, N);
      else if (first < leaf.size)
        visit(leaf, Width<N, true, true>{}, first, leaf.size - first);
      else
        tally_nothing<N>(tally);
    }
    write_joined<N>(leaf, report, tally);
  }

  // The next of `count` numbers, a power of two, whose reversed bits count up.
  FUSEDOPT_FN static u32 next_reversed(u32 i, u32 count) {
    u32 bit = count >> 1;
    for (; (i & bit) != 0; bit >>= 1) i ^= bit;
    return i | bit;
  }

  // Vectors of a leaf come in no order that the hardware would foresee: the next leaf is asked for line by line.
  FUSEDOPT_FN static void prefetch_next(const ChunkView& leaf, i64 i) {
    FUSEDOPT_UNROLL_SLOTS
    for (int s = 0; s < kState0 + 2; ++s) {
      const void* const ahead = reinterpret_cast<const void*>(leaf.address[s] + u64(kLeaf + i) * 4);
      if (!leaf.has(s)) continue;
      if (s == kGrad)
        __builtin_prefetch(ahead);
      else
        __builtin_prefetch(ahead, 1);
    }
  }

  template <class W, class T, class X, int M, int kPieces>
  FUSEDOPT_FN static void square(T (&to)[kPieces], const X (&x)[M], int count) {
    constexpr int L = W::value / kPieces;
    FUSEDOPT_UNROLL
    for (int k = 0; k < kPieces; ++k) {
      const T values = doubles<L>(x, k * L);
      to[k] = W::kPartial ? first_few<T>(values * values, count - k * L) : values * values;
    }
  }

  template <class T>
  FUSEDOPT_FN static T first_few(T x, int count) {
    T found = {};
    for (int k = 0; k < int(sizeof(T) / sizeof(x[0])); ++k) found[k] = k < count ? x[k] : 0;
    return found;
  }

  template <int N>
  FUSEDOPT_FN static void tally_nothing(Tally& tally) {
    using X = Lanes<float, N>;
    const X zero[N * int(sizeof(float)) / int(sizeof(X))] = {};
    LeafReport report;
    report.tally = &tally;
    HostAccess::template tally<Width<N>>(report, 0, zero, zero, zero, zero, N);
  }

  // Joins the elements of the one vector that is left, and writes down the leaf.
  template <int N>
  FUSEDOPT_FN static void write_joined(const ChunkView& leaf, const LeafReport& report, Tally& tally) {
    u32 level = 0;
    while ((tally.count >> level & 1u) == 0) ++level;
    auto& last = reinterpret_cast<Terms<N>*>(tally.bytes)[level];
    double squares[kReportSquares];
    for (int s = 0; s < kReportSquares; ++s) {
      double values[N];
      __builtin_memcpy(values, last.squares[s], sizeof(values));
      join_halves<false>(values, N, 0, 1, [] {});
      squares[s] = values[0];
    }
    float events[N];
    __builtin_memcpy(events, last.events, sizeof(events));
    join_halves<false>(events, N, 0, 1, [] {});
    write_leaf(report, u64(leaf.begin / kLeaf), squares, events[0]);
  }

  // Codes of the elements of a block; kWhole: none is missing of those that share words.
  template <bool kWhole>
  FUSEDOPT_FN static void encode(const float* from, u64 address, int storage, float inverse, const RandomStream& random,
                                 u64 place, int count) {
    constexpr int L = kLanes<float>;
    const auto put = [&](int k, const Words& bits) FUSEDOPT_INLINE {
      if (!kWhole && k >= count) return;
      const Floats x = *reinterpret_cast<const Unaligned<Floats>*>(from + k);
      const Like<u8, Floats> codes = narrow8(code_from_float<Words>(storage, x, inverse, bits));
      const int bytes = kWhole || count - k > L ? L : count - k;
      __builtin_memcpy(reinterpret_cast<void*>(address + u64(k)), &codes, kWhole ? u64(L) : u64(bytes));
    };
    for (int k = 0; k < count; k += 2 * kShared)
      for (int j = k; j < k + kShared; j += L) {
        const Words words = random.bits(RandomStream::word_of(place + u64(j)), places<Floats>(0));
        put(j, words & 0xFFFFu);
        put(j + kShared, words >> 16);
      }
  }

  template <class W, class X, int M>
  FUSEDOPT_FN static void decode_as(u64 address, int storage, X (&out)[M], int count) {
    using C = std::remove_reference_t<decltype(X{}[0])>;
    if (storage == kFloat32)
      read<float, W>(address, out, count, [](auto x) { return convert<C>(x); });
    else if (storage == kFloat64)
      read<double, W>(address, out, count, [](auto x) { return convert<C>(x); });
    else if (storage == kBFloat16)
      read<u16, W>(address, out, count, [](auto x) { return convert<C>(decode_16(kBFloat16, x)); });
    else
      read<u16, W>(address, out, count, [](auto x) { return convert<C>(decode_16(kFloat16, x)); });
  }
  template <class W, class X, int M>
  __attribute__((noinline)) static void decode_called(u64 address, int storage, X (&out)[M], int count) {
    decode_as<W>(address, storage, out, count);
  }
  template <class Bits>
  FUSEDOPT_FN static Like<float, Bits> decode_16(int storage, Bits bits) {
    return storage == kFloat16 ? float_from_half(bits) : float_from_bf16<Like<float, Bits>>(widen(bits));
  }

  template <class W, class X, int M>
  FUSEDOPT_FN static void store_as(int storage, u64 address, const X (&in)[M], int count) {
    if (storage == kFloat32)
      write<float, W>(address, in, count, [](X x) { return convert<float>(x); });
    else if (storage == kFloat64)
      write<double, W>(address, in, count, [](X x) { return convert<double>(x); });
    else if (storage == kBFloat16)
      write<u16, W>(address, in, count, [](X x) { return encode_16(kBFloat16, convert<float>(x)); });
    else
      write<u16, W>(address, in, count, [](X x) { return encode_16(kFloat16, convert<float>(x)); });
  }
  template <class W, class X, int M>
  __attribute__((noinline)) static void store_called(int storage, u64 address, const X (&in)[M], int count) {
    store_as<W>(storage, address, in, count);
  }
  template <class F>
  FUSEDOPT_FN static Like<u16, F> encode_16(int storage, F x) {
    return storage == kFloat16 ? half_from_float(x) : narrow(bf16_from_float<Like<u32, F>>(x));
  }

  // M vectors of T, each converted. A partial one goes through a buffer, so that nothing beyond the tensor is touched.
  template <class T, class W, class X, int M, class Convert>
  FUSEDOPT_FN static void read(u64 address, X (&out)[M], int count, const Convert& convert) {
    Like<T, X> buffer[M] = {};
    if (W::kPartial) {
      __builtin_memcpy(buffer, reinterpret_cast<const void*>(address), u64(count) * sizeof(T));
      address = reinterpret_cast<u64>(buffer);
    }
    const auto* const from = reinterpret_cast<const Unaligned<Like<T, X>>*>(address);
    FUSEDOPT_UNROLL
    for (int k = 0; k < M; ++k) out[k] = convert(from[k]);
  }
  template <class T, class W, class X, int M, class Convert>
  FUSEDOPT_FN static void write(u64 address, const X (&in)[M], int count, const Convert& convert) {
    Like<T, X> buffer[M];
    auto* const to = reinterpret_cast<Unaligned<Like<T, X>>*>(W::kPartial ? reinterpret_cast<u64>(buffer) : address);
    FUSEDOPT_UNROLL
    for (int k = 0; k < M; ++k) to[k] = convert(in[k]);
    if (W::kPartial) __builtin_memcpy(reinterpret_cast<void*>(address), buffer, u64(count) * sizeof(T));
  }
};

}  // namespace fusedopt
