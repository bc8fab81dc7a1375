// How the CPU reaches memory: in vectors of its instruction set, straight from the pointer, aligned or not.
#pragma once

#include <type_traits>

#include "cpu/processor.h"
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

  // Whether a vector is finished when the next has begun, so that less of what the processor has in hand waits for a
  // root and a division: where it takes many instructions, and there are registers for it.
  template <class V>
  static constexpr bool kInTurns = FUSEDOPT_VECTOR_BYTES == 64 && V::kFixed && V::kParamStorage != kFloat32;
  // Elements at a time. Where the storage is known, one AVX-512 vector per slot, or two in turns: values stay in
  // registers from load to store. Where the conversion is a call, a longer block pays for it.
  template <class V>
  static constexpr int kBlock = kInTurns<V>                ? 32
                                : V::kFixed || V::kReports ? 16
                                                           : 64;
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

  // Makes of x what a storage would.
  template <class W, class X, int M>
  FUSEDOPT_FN static void round_as_stored(int storage, X (&x)[M]) {
    if (__builtin_constant_p(storage))
      round_as(storage, x);
    else
      round_called(storage, x);
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
  // What all lanes of a vector join to. By halves, as reduce.h has it; one after the other would wait for each other.
  template <int kLeft = 1, class X, class Join>
  FUSEDOPT_FN static auto join_lanes(const X& lanes, const Join& join) {
    using T = std::remove_cv_t<std::remove_reference_t<decltype(lanes[0])>>;
    constexpr int L = int(sizeof(X) / sizeof(T));
    if constexpr (L == 1) {
      return T(lanes[0]);
    } else if constexpr (L == kLeft) {
      return lanes;
    } else {
      Vector<T, L / 2> halves[2];
      __builtin_memcpy(halves, &lanes, sizeof(lanes));
      return join_lanes<kLeft>(join(halves[0], halves[1]), join);
    }
  }

  // A block of states in float: the elements of a block are updated, then coded, in vectors.
  using Floats = Vector<float, kLanes<float>>;
  using Words = Like<u32, Floats>;
  using Quad = Vector<float, 4>;  // a lane for each state
  template <class V>
  struct Part {
    float (*value)[kMostBlock];  // of each state, then of the parameter
    i32 first;                   // element of the chunk
    int count;
    float scale[kStates];
    Quad inverse = {};
    Words most[kStates] = {};  // the largest magnitudes so far, by lane
    RandomStream rounding;

    FUSEDOPT_FN Part(float (*value)[kMostBlock], i32 first, int count) : value(value), first(first), count(count) {}

    template <class W, class Y, int M>
    FUSEDOPT_FN void take(int state, i32 i, const Y (&x)[M], int count) {
      float* const to = value[state] + (i - first);
      __builtin_memcpy(to, x, sizeof(x));
      if constexpr (sizeof(Y) == sizeof(Floats)) {
        FUSEDOPT_UNROLL
        for (int k = 0; k < M; ++k) {
          constexpr int L = kLanes<float>;
          const Floats few = W::kPartial ? first_few(x[k], count - k * L) : x[k];
          most[state] = larger(most[state], magnitude_bits<Words>(few));
        }
      } else {
        most[state][0] = larger(most[state][0], magnitude_bits<u32>(*to));
      }
    }
    template <class Y, int M>
    FUSEDOPT_FN void keep(i32 i, const Y (&param)[M]) {
      __builtin_memcpy(value[kStates] + (i - first), param, sizeof(param));
    }
    // The scales of all states from their largest magnitudes: at once, because everything waits for them.
    FUSEDOPT_FN void find_scales(const int (&storage)[kStates], int) {
      static_assert(kStates == 3, "a lane each, and one to spare");
      using Bits = Like<u32, Quad>;
      const auto join = [](auto one, auto other) FUSEDOPT_INLINE { return larger(one, other); };
      const Bits a = join_lanes<4>(most[0], join), b = join_lanes<4>(most[1], join), c = join_lanes<4>(most[2], join);
      const Bits ab = larger(Bits{a[0], b[0], a[1], b[1]}, Bits{a[2], b[2], a[3], b[3]});
      const Bits cc = larger(Bits{c[0], c[0], c[1], c[1]}, Bits{c[2], c[2], c[3], c[3]});
      const Bits abc = larger(Bits{ab[0], ab[1], cc[0], cc[1]}, Bits{ab[2], ab[3], cc[2], cc[3]});
      Quad code = {}, coded = {};
      FUSEDOPT_UNROLL
      for (int s = 0; s < kStates; ++s) {
        code[s] = most_code(storage[s]);
        coded[s] = most_coded(storage[s]);
      }
      const BlockScale<Quad> found(code, coded, abc);
      inverse = found.inverse;
      FUSEDOPT_UNROLL
      for (int s = 0; s < kStates; ++s) scale[s] = found.scale[s];
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

  // Elements of a block that are updated at a time.
  template <class V>
  static constexpr int kPart = V::kFixed ? 32 : 64;

  // Whether a block's parameter is kept as a float until its states are coded: the shorter what waits for the division,
  // the more elements the processor sees at once.
  template <class V>
  static constexpr bool kKeepsParam = V::kFixed && V::kBlocks && !V::kSide && V::kParamStorage != kFloat32;

  // Whether the loop over blocks asks for memory ahead: it was slower by it where any slot is float32.
  template <class V>
  static constexpr bool kAsksAhead = kKeepsParam<V> && V::kStateStorage != kFloat32;

  // Updates block by block, and codes each when the next one has been updated.
  template <class V, class Update, class Scale, class Code>
  FUSEDOPT_FN static void walk_parts(const ChunkView& chunk, int, int, const Update& update, const Scale& scale,
                                     const Code& code) {
    alignas(FUSEDOPT_VECTOR_BYTES) float values[2][kStates + 1][kMostBlock];
    const i32 block = 1 << chunk.block_bits;
    Part<V> last(values[1], 0, 0);
    for (i32 i = 0; last.count > 0 || i < chunk.size; i += block) {
      const i32 rest = i < chunk.size ? chunk.size - i : 0;
      Part<V> part(values[i >> chunk.block_bits & 1], i, int(rest < block ? rest : block));
      if (part.count > 0) update(part);
      if (last.count > 0) code(last);
      if (part.count > 0) scale(part);
      last = part;
    }
  }

  template <class V, class Visit>
  FUSEDOPT_FN static void walk_part(const ChunkView& chunk, Part<V>& part, const Visit& visit) {
    const i32 end = part.first + part.count;
    if (V::kStrided && (chunk.layout || !chunk.in_one_run(part.first, part.count)))
      return walk_part<1>(part.first, end, visit);
    walk_part<kPart<V>>(part.first, end, [&](auto width, i32 i, int count) FUSEDOPT_INLINE {
      if (kAsksAhead<V>) prefetch<V, kFirstCache, decltype(width)::value>(chunk, i + kAheadCoded);
      visit(width, i, count);
    });
  }

  // The parameter of a block, where it is kept until then.
  template <class V>
  FUSEDOPT_FN static void store_param(const ChunkView& chunk, const Part<V>& part) {
    walk_part<kNarrow>(0, part.count, [&](auto width, i32 k, int count) FUSEDOPT_INLINE {
      using X = Lanes<float, kNarrow>;
      X x[kNarrow * sizeof(float) / sizeof(X)];
      __builtin_memcpy(x, part.value[kStates] + k, sizeof(x));
      store<decltype(width)>(V::storage(kParam, chunk.storage), chunk.address[kParam], part.first + k, false, x, count);
    });
  }

  template <class V>
  FUSEDOPT_FN static void store_part(const ChunkView& chunk, const Part<V>& part, int state, int storage, float inverse,
                                     const RandomStream& random) {
    const u64 place = u64(chunk.begin + part.first);
    const u64 address = chunk.address[kState0 + state] + (V::kStrided && chunk.layout ? place : u64(part.first));
    const float* const x = part.value[state];
    if (inverse == 0.0f)
      __builtin_memset(reinterpret_cast<void*>(address), 0, u64(part.count));
    else if (part.count % (2 * kShared) == 0)
      encode<true>(x, address, storage, inverse, random, place, part.count);
    else
      encode<false>(x, address, storage, inverse, random, place, part.count);
  }

  // A number for each chain of a row of a leaf (reduce.h).
  template <class T>
  struct Row {
    static constexpr int kWide = kLanes<T> < kRow ? kLanes<T> : kRow;
    Vector<T, kWide> lanes[kRow / kWide];

    // Has join(chain, element) for the elements of a vector, each with its chain; those it lacks count as 0.
    template <class W, class X, int M, class Join>
    FUSEDOPT_FN void take(i32 place, const X (&x)[M], int count, const Join& join) {
      if constexpr (W::value == 1) {
        auto& lane = lanes[place % kRow / kWide];
        lane[place % kWide] = join(T(lane[place % kWide]), T(x[0][0]));
      } else {
        FUSEDOPT_UNROLL
        for (int e = 0; e < W::value; e += kWide) {
          auto values = of_type<T, kWide>(x, e);
          if (W::kPartial) values = first_few(values, count - e);
          lanes[e % kRow / kWide] = join(lanes[e % kRow / kWide], values);
        }
      }
    }
    // The same with the squares, or magnitudes, of elements.
    template <bool kLargest, class W, class X, int M>
    FUSEDOPT_FN void take_terms(i32 place, const X (&x)[M], int count) {
      constexpr bool kExact = !kLargest && sizeof(X{}[0]) == sizeof(float);
      take<W>(place, x, count, [](auto joined, auto values) FUSEDOPT_INLINE {
        if constexpr (kExact)
          return add_exact_square(joined, values);
        else
          return join<kLargest>(joined, term<kLargest>(values));
      });
    }
    template <bool kLargest>
    FUSEDOPT_FN void take(const Row& other) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < kRow / kWide; ++k) lanes[k] = join<kLargest>(lanes[k], other.lanes[k]);
    }
    template <bool kLargest>
    FUSEDOPT_FN T joined() const {
      Vector<T, kRow> whole;
      __builtin_memcpy(&whole, lanes, sizeof(whole));
      return join_lanes(whole, [](auto one, auto other) FUSEDOPT_INLINE { return join<kLargest>(one, other); });
    }
    FUSEDOPT_FN Row<double> in_double() const {
      constexpr int kDoubles = Row<double>::kWide;
      Row<double> found;
      FUSEDOPT_UNROLL
      for (int k = 0; k < kRow / kDoubles; ++k) found.lanes[k] = doubles<kDoubles>(lanes, k * kDoubles);
      return found;
    }
    // Which lanes of each vector hold sums that were added in T.
    FUSEDOPT_FN auto lanes_that_hold() const {
      auto found = holds<T>(lanes[0]);
      FUSEDOPT_UNROLL
      for (int k = 1; k < kRow / kWide; ++k) found &= holds<T>(lanes[k]);
      return found;
    }
    // Puts others in the place of sums that were added in C and do not hold.
    template <class C>
    FUSEDOPT_FN void replace_others(const Row& exact) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < kRow / kWide; ++k) lanes[k] = holds<C>(lanes[k]) ? lanes[k] : exact.lanes[k];
    }
  };

  // The chains of a leaf, one row of them a quarter, joined in a tree of halves: the first is left.
  template <class Rows, class Join>
  FUSEDOPT_FN static void join_quarters(Rows (&quarters)[kQuarters], const Join& join) {
    FUSEDOPT_UNROLL
    for (int half = kQuarters / 2; half > 0; half /= 2) {
      FUSEDOPT_UNROLL
      for (int q = 0; q < half; ++q) join(quarters[q], quarters[q + half]);
    }
  }

  // Calls visit for all elements of quarter q of the leaf that begins at element `first` of a chunk.
  template <class V, class Visit>
  FUSEDOPT_FN static void walk_quarter(const ChunkView& chunk, i32 first, int q, const Visit& visit) {
    const i32 begin = first + q * kQuarter;
    const i32 end = begin + kQuarter < chunk.size ? begin + kQuarter : chunk.size;
    if (V::kStrided && chunk.layout)
      walk_part<1>(begin, end, visit);
    else
      walk_part<kBlock<V>>(begin, end, visit);
  }

  // Marks a report as wanted: the elements of a leaf are gathered where its quarter is.
  struct Tally {};

  // What is gathered of a quarter of a leaf while it is swept: sums in registers, where the storages are known, and its
  // elements, row by row, for those sums that do not hold.
  template <class C>
  struct Quarter {
    Row<C> sums[kReportSquares] = {};
    Row<float> lost = {};
    C (*const elements)[kReportSquares][kRow];

    FUSEDOPT_FN explicit Quarter(C (*elements)[kReportSquares][kRow]) : elements(elements) {}

    template <class W, class X, int M>
    FUSEDOPT_FN void take(int column, i32 place, const X (&x)[M], int count) {
      sums[column].template take<W>(place, x, count, [](auto sum, auto x) FUSEDOPT_INLINE { return sum + x * x; });
      FUSEDOPT_UNROLL
      for (int k = 0; k < M; ++k) {
        const u32 at = u32(place + k * (W::value / M));
        __builtin_memcpy(elements[at / u32(kRow)][column] + at % u32(kRow), &x[k], sizeof(x[k]));
      }
    }
  };

  template <class W, class X, int M>
  FUSEDOPT_FN static void tally(const LeafReport& report, i32 place, const X (&grad)[M], const X (&param)[M],
                                const X (&update)[M], const X (&lost)[M], int count) {
    using C = std::remove_reference_t<decltype(X{}[0])>;
    auto& quarter = *static_cast<Quarter<C>*>(report.tally);
    quarter.template take<W>(kGradSquares, place, grad, count);
    quarter.template take<W>(kParamSquares, place, param, count);
    quarter.template take<W>(kUpdateSquares, place, update, count);
    quarter.lost.template take<W>(place, lost, count, [](auto sum, auto x) FUSEDOPT_INLINE { return sum + x; });
  }

  // What the chains of a quarter have come to.
  struct Chains {
    Row<double> squares[kReportSquares] = {};
    Row<float> lost = {};
    double nonfinite = 0.0;

    Chains() = default;
    template <class C>
    FUSEDOPT_FN Chains(const Quarter<C>& quarter, int size) : lost(quarter.lost) {
      auto held = quarter.sums[0].lanes_that_hold();
      FUSEDOPT_UNROLL
      for (int s = 0; s < kReportSquares; ++s) {
        squares[s] = quarter.sums[s].in_double();
        held &= quarter.sums[s].lanes_that_hold();
      }
      if (are_all(held)) return;
      Row<C> sums[kReportSquares];  // for the call: one that has the quarter's own would keep these in memory
      __builtin_memcpy(sums, quarter.sums, sizeof(sums));
      nonfinite = add_exactly(sums, quarter.elements, size, squares);
    }
    FUSEDOPT_FN void take(const Chains& other) {
      FUSEDOPT_UNROLL
      for (int s = 0; s < kReportSquares; ++s) squares[s].template take<false>(other.squares[s]);
      lost.template take<false>(other.lost);
      nonfinite += other.nonfinite;
    }
  };

  // A chunk of which leaves may be reported: quarter by quarter.
  template <class V, class C, class Sweep>
  FUSEDOPT_FN static void report_chunk(const ChunkView& chunk, LeafReport& report, int, int, const Sweep& sweep) {
    if (!report.is_wanted()) return sweep(chunk);
    alignas(FUSEDOPT_VECTOR_BYTES) C elements[kChain][kReportSquares][kRow];
    for (i32 first = 0; first < chunk.size; first += i32(kLeaf)) {
      Chains quarters[kQuarters];
      for (int q = 0; q < kQuarters; ++q) {
        const ChunkView part = chunk.part(first + q * kQuarter, kQuarter);
        if (part.size == 0) break;
        Quarter<C> quarter(elements);
        report.tally = &quarter;
        sweep(part);
        quarters[q] = Chains(quarter, part.size);
      }
      join_quarters(quarters, [](Chains& one, const Chains& other) FUSEDOPT_INLINE { one.take(other); });
      write_joined(quarters[0], report, u64((chunk.begin + first) / kLeaf));
    }
  }

  // What the terms of a leaf join to, in C; fetch(width, i, x, count) gets elements from i on.
  template <class V, class C, bool kLargest, class Fetch>
  FUSEDOPT_FN static double join_leaf(const ChunkView& leaf, const Fetch& fetch) {
    Row<double> quarters[kQuarters];
    for (int q = 0; q < kQuarters; ++q) {
      Row<double> row = {};
      walk_quarter<V>(leaf, 0, q, [&](auto width, i32 i, int count) FUSEDOPT_INLINE {
        using W = decltype(width);
        using X = Lanes<C, W::value>;
        X x[W::value * int(sizeof(C)) / int(sizeof(X))];
        fetch(width, i, x, count);
        row.template take_terms<kLargest, W>(i, x, count);
      });
      quarters[q] = row;
    }
    join_quarters(quarters, [](Row<double>& one, const Row<double>& other)
                                FUSEDOPT_INLINE { one.template take<kLargest>(other); });
    return quarters[0].template joined<kLargest>();
  }

  template <class V, class C, class Update, class Finish>
  FUSEDOPT_FN static void walk(const ChunkView& chunk, int, int, const Update& update, const Finish& finish) {
    const bool asks_for_reports = V::kFixed && V::kReports && !is_zen4();
    const auto begin = [&](auto width, i32 i, int count) FUSEDOPT_INLINE {
      constexpr int N = decltype(width)::value;
      if (asks_for_reports)
        prefetch<V, kFirstCache, N>(chunk, i + kAheadReported);
      else if (V::kFixed && !V::kSide)
        prefetch<V, kSecondCache, N>(chunk, i + kAheadBytes / storage_bytes(V::storage(kState0, 0)));
      return update(width, i, count);
    };
    const auto visit = [&](auto width, i32 i, int count)
                           FUSEDOPT_INLINE { finish(width, i, count, begin(width, i, count)); };
    if (V::kStrided && chunk.layout)
      walk_part<1>(0, chunk.size, visit);
    else if constexpr (kInTurns<V>)
      walk_part<kNarrow>(walk_in_turns<kBlock<V>>(chunk.size, begin, finish), chunk.size, visit);
    else
      walk_part<kBlock<V>>(0, chunk.size, visit);
  }

 private:
  // Elements i to end − 1 in vectors of N.
  template <int N, class Visit>
  FUSEDOPT_FN static void walk_part(i32 i, i32 end, const Visit& visit) {
    for (; i + N <= end; i += N) visit(Width<N>{}, i, N);
    if constexpr (N > 1) {
      for (; i + kNarrow <= end; i += kNarrow) visit(Width<kNarrow>{}, i, kNarrow);
      if (i < end) visit(Width<kNarrow, true, true>{}, i, end - i);
    }
  }

  // Elements 0 to end − 1 in vectors of N, as far as these go: where that is. Each is finished when the next has begun.
  template <int N, class Begin, class Finish>
  FUSEDOPT_FN static i32 walk_in_turns(i32 end, const Begin& begin, const Finish& finish) {
    const Width<N> width;
    if (end < N) return 0;
    auto last = begin(width, 0, N);
    i32 i = N;
    for (; i + N <= end; i += N) {
      const auto next = begin(width, i, N);
      finish(width, i - N, N, last);
      last = next;
    }
    finish(width, i - N, N, last);
    return i;
  }

  template <class T, int L, class X, int M>
  FUSEDOPT_FN static Vector<T, L> of_type(const X (&x)[M], int e) {
    if constexpr (sizeof(T) == sizeof(double))
      return doubles<L>(x, e);
    else
      return piece<T, L>(x, e);
  }

  template <class T>
  FUSEDOPT_FN static T first_few(T x, int count) {
    T found = {};
    for (int k = 0; k < int(sizeof(T) / sizeof(x[0])); ++k) found[k] = k < count ? x[k] : 0;
    return found;
  }

  // Whether a comparison of vectors holds in all lanes.
  template <class X>
  FUSEDOPT_FN static bool are_all(X lanes) {
    return join_lanes(lanes, [](auto one, auto other) FUSEDOPT_INLINE { return one & other; }) != 0;
  }

  // Puts the exact sums of a quarter of some size where others do not hold: how many gradients are not finite. Not
  // inlined, so that the loops of the sweep need not keep registers for it.
  template <class C>
  __attribute__((noinline)) static double add_exactly(const Row<C> (&sums)[kReportSquares],
                                                      C (*elements)[kReportSquares][kRow], int size,
                                                      Row<double> (&squares)[kReportSquares]) {
    const int rows = (size + kRow - 1) / kRow;
    double nonfinite = 0.0;
    for (int s = 0; s < kReportSquares; ++s) {
      if (are_all(sums[s].lanes_that_hold())) continue;
      for (int k = size; k < rows * kRow; ++k) elements[k / kRow][s][k % kRow] = C(0);
      Row<double> exact = {};
      for (int r = 0; r < rows; ++r) {
        Lanes<C, kRow> x[kRow * int(sizeof(C)) / int(sizeof(Lanes<C, kRow>))];
        __builtin_memcpy(x, elements[r][s], sizeof(x));
        exact.template take_terms<false, Width<kRow>>(0, x, kRow);
      }
      squares[s].template replace_others<C>(exact);
      const bool finite = is_finite(exact.template joined<false>());
      for (int k = 0; k < size && s == kGradSquares && !finite; ++k)
        nonfinite += is_finite(elements[k / kRow][s][k % kRow]) ? 0.0 : 1.0;
    }
    return nonfinite;
  }

  // Writes down the leaf whose chains have come to this.
  FUSEDOPT_FN static void write_joined(const Chains& chains, const LeafReport& report, u64 index) {
    const double squares[kReportSquares] = {chains.squares[kGradSquares].template joined<false>(),
                                            chains.squares[kParamSquares].template joined<false>(),
                                            chains.squares[kUpdateSquares].template joined<false>()};
    write_leaf(report, index, squares, chains.nonfinite, double(chains.lost.template joined<false>()));
  }

  // The processor asks for what lies far ahead too late by itself: more so for elements that are reported or coded,
  // which take so many instructions that it sees few loads ahead. Where they take few, the first cache has no room for
  // it: asked for there, it made a Zen 4 a sixth slower, and its reports a fifth.
  static constexpr i32 kAheadBytes = 1024;
  static constexpr i32 kAheadReported = 768;  // elements
  static constexpr i32 kAheadCoded = 1536;    // elements
  static constexpr int kFirstCache = 3, kSecondCache = 2;
  static constexpr u64 kLine = 64;  // bytes of a line of the cache
  template <class V, int kCache, int N>
  FUSEDOPT_FN static void prefetch(const ChunkView& chunk, i32 i) {
    FUSEDOPT_UNROLL_SLOTS
    for (int s = 0; s < kState0 + 2; ++s) {
      const u64 size = u64(storage_bytes(V::storage(s, 0))), at = u64(i) * size;
      if (at % kLine != 0 || !chunk.has(s)) continue;
      FUSEDOPT_UNROLL
      for (u64 line = 0; line < N * size; line += kLine)
        __builtin_prefetch(reinterpret_cast<const void*>(chunk.address[s] + at + line), 0, kCache);
    }
  }

  // Codes of the elements of a block; kWhole: none is missing of those that share words.
  template <bool kWhole>
  FUSEDOPT_FN static void encode(const float* from, u64 address, int storage, float inverse, const RandomStream& random,
                                 u64 place, int count) {
    constexpr int L = kLanes<float>;
    const auto put = [&](int k, const Words& bits) FUSEDOPT_INLINE {
      if (!kWhole && k >= count) return;
      const Floats x = *reinterpret_cast<const Unaligned<Floats>*>(from + k);
      const Like<u8, Floats> codes = narrow8(code_from_float<Words>(storage, x, x * inverse, bits));
      const int bytes = kWhole || count - k > L ? L : count - k;
      __builtin_memcpy(reinterpret_cast<void*>(address + u64(k)), &codes, kWhole ? u64(L) : u64(bytes));
    };
    // Their place is a multiple of those that share: so is that of their words.
    const u64 word = RandomStream::word_of(place);
    for (int k = 0; k < count; k += 2 * kShared)
      for (int j = 0; j < kShared; j += L) {
        const Words words = random.bits(word, places<Floats>(0) + u32(k / 2 + j));
        put(k + j, words & 0xFFFFu);
        put(k + j + kShared, words >> 16);
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
    return storage == kFloat16 ? float_from_half(bits) : float_from_brain(bits);
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
    return storage == kFloat16 ? half_from_float(x) : brain_from_float(x);
  }

  template <class X, int M>
  FUSEDOPT_FN static void round_as(int storage, X (&x)[M]) {
    using C = std::remove_reference_t<decltype(X{}[0])>;
    if (storage == (sizeof(C) == 8 ? kFloat64 : kFloat32)) return;
    FUSEDOPT_UNROLL
    for (int k = 0; k < M; ++k) {
      const auto narrow = convert<float>(x[k]);
      x[k] = convert<C>(storage == kFloat32 ? narrow : as_16(storage, narrow));
    }
  }
  template <class X, int M>
  __attribute__((noinline)) static void round_called(int storage, X (&x)[M]) {
    round_as(storage, x);
  }
  template <class F>
  FUSEDOPT_FN static F as_16(int storage, F x) {
    return storage == kFloat16 ? float_from_half(half_from_float(x)) : as_brain(x);
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
