// How a GPU thread reaches memory: 16 bytes at a time at every storage, all loads of a vector issued before the first
// is used; element by element at a tensor's head and tail and in slots that do not share the parameter's alignment.
#pragma once

#include "cuda/device.h"
#include "sweep.h"

namespace fusedopt {

struct DeviceAccess {
  // What N elements are computed in: one by one.
  template <class C, int N>
  using Lanes = C;

  // Whether a rule reads and writes a slot. For its last state, which often is optional, the address says it too: that
  // keeps fewer values alive through the loop than the rule's branches (8 registers fewer in 16 bits).
  template <class Rule>
  FUSEDOPT_FN static bool has(const ChunkView& chunk, const Rule& rule, int slot) {
    return slot == kState0 + Rule::kRuleStates - 1 ? chunk.has(slot) : slot < kState0 + rule.states();
  }

  template <class X>
  using Bits = u32;

  // The bits of N elements as they lie in memory: room for the widest storage of the compute type.
  template <class C, int N>
  struct Packet {
    static constexpr int kWords = (N * int(sizeof(C)) + 3) / 4;
    u32 words[kWords];
  };

  template <class W, class C>
  FUSEDOPT_FN static void fetch(Packet<C, W::value>& packet, int storage, u64 address, i64 index, bool aligned) {
    const int size = storage_bytes(storage);
    address += u64(index) * u64(size);
    if (size == 2)
      fetch_bytes<W, 2>(packet.words, address, aligned);
    else if (size == 4 || sizeof(C) == 4)
      fetch_bytes<W, 4>(packet.words, address, aligned);
    else
      fetch_bytes<W, int(sizeof(C))>(packet.words, address, aligned);
  }

  template <class W, class C>
  FUSEDOPT_FN static void decode(const Packet<C, W::value>& packet, int storage, C (&out)[W::value], int) {
    FUSEDOPT_UNROLL
    for (int k = 0; k < W::value; ++k) {
      if (storage == kFloat32)
        out[k] = C(bit_cast<float>(packet.words[k]));
      else if (storage == kFloat64)
        out[k] = decode64<C>(packet.words, k);
      else
        out[k] = decode16<C>(storage, u16(packet.words[k / 2] >> (16 * (k % 2))));
    }
  }

  template <class W, class C>
  FUSEDOPT_FN static void store(int storage, u64 address, i64 index, bool aligned, const C (&in)[W::value], int) {
    const int size = storage_bytes(storage);
    address += u64(index) * u64(size);
    Packet<C, W::value> packet = {};
    if (storage == kFloat32) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < W::value; ++k) packet.words[k] = bit_cast<u32>(float(in[k]));
      store_bytes<W, 4>(address, packet.words, aligned);
    } else if (storage == kFloat64) {
      encode64(packet.words, in);
      store_bytes<W, int(sizeof(C))>(address, packet.words, aligned);
    } else {
      FUSEDOPT_UNROLL
      for (int k = 0; k < W::value; k += 2) {
        const u32 low = encode16(storage, in[k]);
        const u32 high = k + 1 < W::value ? encode16(storage, in[(k + 1) % W::value]) : 0;
        packet.words[k / 2] = low | high << 16;
      }
      store_bytes<W, 2>(address, packet.words, aligned);
    }
  }

  // Makes of x what a storage would.
  template <class W, class C>
  FUSEDOPT_FN static void round_as_stored(int storage, C (&x)[W::value]) {
    if (storage == (sizeof(C) == 8 ? kFloat64 : kFloat32)) return;
    FUSEDOPT_UNROLL
    for (int k = 0; k < W::value; ++k)
      x[k] = storage == kFloat32 ? C(float(x[k])) : decode16<C>(storage, u16(encode16(storage, x[k])));
  }

  // 16 bits that are no number: sign-extended, in the bits of a float.
  template <class W>
  FUSEDOPT_FN static void decode_low(const Packet<float, W::value>& packet, float (&out)[W::value], int) {
    FUSEDOPT_UNROLL
    for (int k = 0; k < W::value; ++k) {
      const u32 bits = packet.words[k / 2] >> (16 * (k % 2)) & 0xFFFFu;
      out[k] = bit_cast<float>((bits ^ 0x8000u) - 0x8000u);
    }
  }
  template <class W>
  FUSEDOPT_FN static void store_low(u64 address, i64 index, bool aligned, const float (&in)[W::value], int) {
    Packet<float, W::value> packet = {};
    FUSEDOPT_UNROLL
    for (int k = 0; k < W::value; ++k) packet.words[k / 2] |= (bit_cast<u32>(in[k]) & 0xFFFFu) << (16 * (k % 2));
    store_bytes<W, 2>(address + u64(index) * 2, packet.words, aligned);
  }

  // Codes of 8 bits: storage/block.h.
  template <class W>
  FUSEDOPT_FN static void fetch_codes(Packet<float, W::value>& packet, u64 address, i64 index, bool aligned) {
    address += u64(index);
    if (W::value == 8 && aligned) return device::load64(packet.words, address);
    FUSEDOPT_UNROLL
    for (int k = 0; k < W::value; ++k) packet.words[k / 4] |= u32(device::load8(address + u64(k))) << (8 * (k % 4));
  }
  template <class W>
  FUSEDOPT_FN static void decode_codes(const Packet<float, W::value>& packet, int storage, float scale,
                                       float (&out)[W::value], int) {
    FUSEDOPT_UNROLL
    for (int k = 0; k < W::value; ++k)
      out[k] = float_from_code<float>(storage, packet.words[k / 4] >> (8 * (k % 4)) & 0xFFu, scale);
  }

  // What a thread has of a block: consecutive elements, in registers. The threads of a block are of one warp.
  static constexpr int kPart = 8;
  template <class V>
  static constexpr bool kKeepsParam = false;
  template <class V>
  struct Part {
    i32 first;  // element of the chunk
    int count;  // kPart; fewer where the chunk ends, not above 0 behind it
    float scale[kStates] = {}, inverse[kStates] = {};
    float value[kStates][kPart] = {};
    RandomStream rounding;

    // Not clamped from below: where ptxas 13.0 makes one instruction of max(0, min(left, 8)) == 8 (VIMNMX.RELU with a
    // predicate, on sm_90 and sm_100), it compares the wrong way round, and lanes with less go where whole parts are.
    FUSEDOPT_FN Part(i32 first, i32 left) : first(first), count(left < kPart ? left : kPart) {}

    template <class W>
    FUSEDOPT_FN void take(int state, i32 i, const float (&x)[W::value], int) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < kPart; ++k)
        value[state][k] = W::value == kPart ? x[k % W::value] : k == i - first ? x[0] : value[state][k];
    }
    // The scales of those states that are in codes.
    FUSEDOPT_FN void find_scales(const int (&storage)[kStates], int block_bits) {
      FUSEDOPT_UNROLL
      for (int s = 0; s < kStates; ++s) {
        if (storage[s] == kAnyStorage) continue;
        const BlockScale<float> found(most_code(storage[s]), most_coded(storage[s]), join(s, block_bits));
        scale[s] = found.scale;
        inverse[s] = found.inverse;
      }
    }
    // The largest magnitude of the block, as bits.
    FUSEDOPT_FN u32 join(int state, int block_bits) const {
      u32 largest = 0;
      FUSEDOPT_UNROLL
      for (int k = 0; k < kPart; ++k) {
        const u32 bits = magnitude_bits<u32>(value[state][k]);
        largest = bits > largest ? bits : largest;
      }
      FUSEDOPT_LOOP
      for (int distance = (1 << block_bits) / kPart / 2; distance > 0; distance /= 2) {
        const u32 other = device::shuffle_xor(largest, distance);
        largest = other > largest ? other : largest;
      }
      return largest;
    }
  };

  template <class X>
  FUSEDOPT_FN static u32 places(int k) {
    return u32(k);
  }

  // All lanes of a warp make as many visits, the last of which may find nothing: they shuffle.
  template <class V, class Update, class Scale, class Code>
  FUSEDOPT_FN static void walk_parts(const ChunkView& chunk, int lane, int lanes, const Update& update,
                                     const Scale& scale, const Code& code) {
    const i32 last = (chunk.size + kMostBlock - 1) / kMostBlock * kMostBlock;
    FUSEDOPT_LOOP
    for (i32 i = lane * kPart; i < last; i += lanes * kPart) {
      Part<V> part(i, chunk.size - i);
      update(part);
      scale(part);
      code(part);
    }
  }

  template <class V, class Visit>
  FUSEDOPT_FN static void walk_part(const ChunkView& chunk, const Part<V>& part, const Visit& visit) {
    const i32 first = part.first;
    const bool apart = V::kStrided && (chunk.layout || !chunk.in_one_run(first, kPart));
    if (part.count == kPart && !apart) return visit(Width<kPart, false>{}, first, kPart);
    FUSEDOPT_LOOP
    for (i32 i = first; i < first + part.count; ++i) visit(Width<1>{}, i, 1);
  }

  template <class V>
  FUSEDOPT_FN static void store_part(const ChunkView& chunk, const Part<V>& part, int state, int storage, float inverse,
                                     const RandomStream& random) {
    const u64 place = u64(chunk.begin + part.first);
    const u32 shift = RandomStream::has_high_half(place) ? 16u : 0u;
    u32 words[kPart / 4] = {};
    FUSEDOPT_UNROLL
    for (int k = 0; k < kPart; ++k) {
      const u32 bits = random.bits(RandomStream::word_of(place), u32(k)) >> shift & 0xFFFFu;
      const float x = part.value[state][k];
      const u32 code = inverse == 0.0f ? 0u : code_from_float<u32>(storage, x, x * inverse, bits) & 0xFFu;
      words[k / 4] |= code << (8 * (k % 4));
    }
    const u64 address = chunk.address[kState0 + state] + (V::kStrided && chunk.layout ? place : u64(part.first));
    if (part.count == kPart && chunk.is_aligned(kState0 + state)) return device::store64(address, words);
    FUSEDOPT_UNROLL
    for (int k = 0; k < kPart; ++k)
      if (k < part.count) device::store8(address + u64(k), u8(words[k / 4] >> (8 * (k % 4))));
  }

  FUSEDOPT_FN static void barrier() { device::barrier(); }

  // What is reported of a leaf, in shared memory: its elements as they are computed in, and what their chains join to
  // (reduce.h), the columns of a chain next to each other. In double there is room for half of it at a time.
  static constexpr int kTallied = kReportSquares + 1;  // columns: the squares, and the events
  static constexpr int kMostThreads = 256;
  static constexpr u32 kLostEvent = 4096;  // elements that are lost are counted in this, gradients not finite in 1
  static_assert(kLostEvent > kJoined, "as many gradients can be not finite");
  struct Tally {
    double joined[kChains][kTallied];
    double elements[kReportSquares * kJoined / 2];
    u32 events[kMostThreads];  // of each thread
  };
  template <class C>
  static constexpr int kPiece = kJoined / 2 * int(sizeof(double) / sizeof(C));
  template <class C>
  FUSEDOPT_FN static C* column_of(const LeafReport& report, int column) {
    return reinterpret_cast<C*>(static_cast<Tally*>(report.tally)->elements) + column * kPiece<C>;
  }

  template <class W, class C>
  FUSEDOPT_FN static void tally(const LeafReport& report, i32 place, const C (&grad)[W::value],
                                const C (&param)[W::value], const C (&update)[W::value], const C (&lost)[W::value],
                                int) {
    keep_elements(column_of<C>(report, kGradSquares) + place, grad);
    keep_elements(column_of<C>(report, kParamSquares) + place, param);
    keep_elements(column_of<C>(report, kUpdateSquares) + place, update);
    FUSEDOPT_UNROLL
    for (int k = 0; k < W::value; ++k)
      *report.events += (is_finite(grad[k]) ? 0u : 1u) + (lost[k] == C(0) ? 0u : kLostEvent);
  }

  // A chunk of which leaves may be reported: piece by piece, each with what its chains join to; else all of it at once.
  template <class V, class C, class Sweep>
  FUSEDOPT_FN static void report_chunk(const ChunkView& chunk, LeafReport& report, int lane, int lanes,
                                       const Sweep& sweep) {
    const bool wanted = report.is_wanted();
    const i32 piece = wanted ? i32(kPiece<C>) : chunk.size;
    u32 events = 0;
    report.events = &events;
    FUSEDOPT_LOOP
    for (i32 at = 0; at < chunk.size; at += piece) {
      const ChunkView part = chunk.part(at, piece);
      if (wanted) barrier();  // the last piece is joined
      sweep(part);
      if (!wanted) continue;
      const int quarter = int(at % i32(kLeaf)) / kQuarter;
      static_cast<Tally*>(report.tally)->events[lane] = events;
      barrier();
      join_chains<C>(report, quarter * kRow, part.size, lane, lanes);
      if (quarter + kPiece<C> / kQuarter < kQuarters && at + piece < chunk.size) continue;
      write_joined(report, u64((chunk.begin + at) / kLeaf), quarter * kRow + kPiece<C> / kChain, lane, lanes);
      events = 0;
    }
    report.events = nullptr;
  }

  // What the walk needs to know of a chunk's alignment: one thread finds it out for its block.
  template <class V, class C>
  FUSEDOPT_FN static void prepare(ChunkView& chunk) {
    chunk.boundary = choose_boundary<V, width<V, C>()>(chunk);
    chunk.aligned = aligned_slots<V, width<V, C>()>(chunk, chunk.boundary);
  }

  // Elements up to a 16-byte boundary and behind the last vector one by one, the rest in vectors; lanes take turns. A
  // strided chunk has no vectors. The general variants have one loop for aligned and misaligned chunks: two of them
  // would double what takes longest to compile.
  template <class V, class C, class Update, class Finish>
  FUSEDOPT_FN static void walk(const ChunkView& chunk, int lane, int lanes, const Update& update,
                               const Finish& finish) {
    const auto visit = [&](auto width, i32 i, int count)
                           FUSEDOPT_INLINE { finish(width, i, count, update(width, i, count)); };
    constexpr int N = width<V, C>();
    constexpr bool kAlignedLoop = V::kFixed || V::kFeatures == 0;
    const bool dense = !(V::kStrided && chunk.layout);
    const i32 head = dense && chunk.boundary < chunk.size ? chunk.boundary : chunk.size;
    const i32 last = head + (chunk.size - head) / N * N;
    if (kAlignedLoop && chunk.aligned == kAllSlots) {
      FUSEDOPT_LOOP
      for (i32 i = head + lane * N; i < last; i += lanes * N) visit(Width<N, kAlignedLoop>{}, i, N);
    } else {
      FUSEDOPT_LOOP
      for (i32 i = head + lane * N; i < last; i += lanes * N) visit(Width<N, false>{}, i, N);
    }
    const i32 singles = head + chunk.size - last;
    FUSEDOPT_LOOP
    for (i32 k = lane; k < singles; k += lanes) {
      visit(Width<1>{}, k < head ? k : last + k - head, 1);
      if (!V::kStrided) break;  // fewer than there are lanes
    }
  }

 private:
  template <class V, class C>
  FUSEDOPT_FN static constexpr int width() {
    return sizeof(C) == 8 ? 2 : V::kWidth;
  }
  static constexpr u32 kAllSlots = (1u << kElementSlots) - 1;

  template <class C, int N>
  FUSEDOPT_FN static void keep_elements(C* to, const C (&x)[N]) {
    FUSEDOPT_UNROLL
    for (int k = 0; k < N; ++k) to[k] = x[k];
  }

  // What the chains of a piece of some size join to, from chain `first` of its leaf on.
  template <class C>
  FUSEDOPT_FN static void join_chains(const LeafReport& report, int first, int size, int lane, int lanes) {
    constexpr int kPieceChains = kPiece<C> / kChain;
    Tally& tally = *static_cast<Tally*>(report.tally);
    FUSEDOPT_LOOP
    for (int k = lane; k < kPieceChains * kReportSquares; k += lanes) {
      const int chain = k % kPieceChains, column = k / kPieceChains;
      tally.joined[first + chain][column] = add_chain(chain, size, column_of<C>(report, column));
    }
  }

  // Joins the chains of a leaf, of which there are `chains`, by all lanes, and writes it down.
  FUSEDOPT_FN static void write_joined(const LeafReport& report, u64 index, int chains, int lane, int lanes) {
    Tally& tally = *static_cast<Tally*>(report.tally);
    FUSEDOPT_LOOP
    for (int c = lane; c < kChains; c += lanes) {
      u32 events = 0;
      for (int k = c; k < lanes; k += kChains) events += tally.events[k];
      tally.joined[c][kReportSquares] = double(events);
      for (int s = 0; s < kReportSquares && c >= chains; ++s) tally.joined[c][s] = 0.0;
    }
    barrier();
    double* const joined = tally.joined[0];
    join_halves<false>(joined, kChains * kTallied, lane, lanes, [] { barrier(); }, kTallied);
    if (lane != 0) return;
    const double squares[kReportSquares] = {joined[kGradSquares], joined[kParamSquares], joined[kUpdateSquares]};
    const u32 events = u32(joined[kReportSquares]);
    write_leaf(report, index, squares, events % kLostEvent, events / kLostEvent);
  }

  // The slots of which N elements, counted from element `boundary`, start on a boundary of their own size (at most
  // 16 bytes). A slot that is absent is never accessed and counts as aligned.
  template <class V, int N>
  FUSEDOPT_FN static u32 aligned_slots(const ChunkView& chunk, i32 boundary) {
    u32 aligned = 0;
    FUSEDOPT_UNROLL
    for (int s = 0; s < kElementSlots; ++s) {
      const u64 size = u64(storage_bytes(V::storage(s, chunk.storage)));
      const u64 width = size * N < 16 ? size * N : 16;
      if (!chunk.has(s) || (chunk.address[s] + u64(boundary) * size) % width == 0) aligned |= 1u << s;
    }
    return aligned;
  }

  // The boundary of the parameter or that of element 0, whichever leaves more slots aligned: a parameter may be a
  // misaligned view into a larger buffer while its states are not.
  template <class V, int N>
  FUSEDOPT_FN static i32 choose_boundary(const ChunkView& chunk) {
    const int misalignment = int(chunk.address[kParam] % 16u);
    if (V::kBlocks || misalignment == 0) return 0;  // blocks are counted from element 0
    const i32 boundary = (16 - misalignment) / storage_bytes(V::storage(kParam, chunk.storage));
    return count_bits(aligned_slots<V, N>(chunk, boundary)) > count_bits(aligned_slots<V, N>(chunk, 0)) ? boundary : 0;
  }
  FUSEDOPT_FN static int count_bits(u32 bits) {
    int count = 0;
    for (; bits != 0; bits &= bits - 1) ++count;
    return count;
  }

  template <class W, int kSize>
  FUSEDOPT_FN static void fetch_bytes(u32* words, u64 address, bool aligned) {
    constexpr int kBytes = W::value * kSize;
    if (W::value > 1 && (W::kAligned || aligned)) {
      FUSEDOPT_UNROLL
      for (int b = 0; b + 16 <= kBytes; b += 16) device::load128(words + b / 4, address + u64(b));
      if (kBytes % 16 == 8) device::load64(words, address);
      if (kBytes % 16 == 4) words[0] = device::load32(address);
    } else {
      FUSEDOPT_UNROLL
      for (int k = 0; k < W::value; ++k) fetch_element<kSize>(words, k, address + u64(k * kSize));
    }
  }
  template <int kSize>
  FUSEDOPT_FN static void fetch_element(u32* words, int k, u64 address) {
    if (kSize == 2) {
      const u32 bits = u32(device::load16(address)) << (16 * (k % 2));
      words[k / 2] = k % 2 ? words[k / 2] | bits : bits;
    } else {
      FUSEDOPT_UNROLL
      for (int w = 0; w < kSize / 4; ++w) words[k * (kSize / 4) + w] = device::load32(address + u64(4 * w));
    }
  }

  template <class W, int kSize>
  FUSEDOPT_FN static void store_bytes(u64 address, const u32* words, bool aligned) {
    constexpr int kBytes = W::value * kSize;
    if (W::value > 1 && (W::kAligned || aligned)) {
      FUSEDOPT_UNROLL
      for (int b = 0; b + 16 <= kBytes; b += 16) device::store128(address + u64(b), words + b / 4);
      if (kBytes % 16 == 8) device::store64(address, words);
      if (kBytes % 16 == 4) device::store32(address, words[0]);
    } else {
      FUSEDOPT_UNROLL
      for (int k = 0; k < W::value; ++k) store_element<kSize>(words, k, address + u64(k * kSize));
    }
  }
  template <int kSize>
  FUSEDOPT_FN static void store_element(const u32* words, int k, u64 address) {
    if (kSize == 2) {
      device::store16(address, u16(words[k / 2] >> (16 * (k % 2))));
    } else {
      FUSEDOPT_UNROLL
      for (int w = 0; w < kSize / 4; ++w) device::store32(address + u64(4 * w), words[k * (kSize / 4) + w]);
    }
  }

  // float64 slots exist only where the compute type is double; the float overloads are never reached.
  template <class C>
  FUSEDOPT_FN static C decode64(const u32* words, int k) {
    if constexpr (sizeof(C) == 8)
      return bit_cast<double>(u64(words[2 * k]) | u64(words[2 * k + 1]) << 32);
    else
      return C(0);
  }
  template <class C, int N>
  FUSEDOPT_FN static void encode64(u32* words, const C (&in)[N]) {
    if constexpr (sizeof(C) == 8) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < N; ++k) {
        const u64 bits = bit_cast<u64>(double(in[k]));
        words[2 * k] = u32(bits);
        words[2 * k + 1] = u32(bits >> 32);
      }
    }
  }
};

}  // namespace fusedopt
