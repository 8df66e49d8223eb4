// The taps of the kernel, as the loops of forward and grad_x read them.

#pragma once

#include "parts.h"

namespace {

// Where the loops find things, the same for all rows of all tasks. Steps are in elements.
struct Layout {
  Index taps, stride, dilation;                      // of one line of the window, in columns
  Index y_column;                                   // from output to output
  Index tap_depth, tap_row, tap_column, tap_output;  // from tap to tap along each axis, and from output to output
  Index next_group;                                  // from the tap of a group to that of the next in the same vector
  Index fetched;                                    // bytes of taps to come that are prefetched with each output
};

// How the taps of a row of outputs lie: one output behind the other, or one tap behind the other, in memory or made in the scratch.
enum class Taps { IN_RUNS, IN_PLANES, IN_SCRATCH };

// Whether lines of bfloat16 taps are too short for `factor` below, which reads two. Then these are copied, and outputs, too.
template <class Element>
bool taps_alone(const Problem& p) {
  return std::is_same_v<Element, BFloat16> && p.kernel[2] == 1;
}

// Whether the loops run on the taps where they lie: those of the type computed in, and bfloat16 taps that lie next to each other
// if outputs are read or written where they lie, too. Registers of AVX-512 are shifted where they are multiplied, so that a tap which
// serves one of them only is copied.
template <class Real, class Element, int WIDTH>
bool taps_in_place(const Problem& p, bool y_in_place) {
  if (std::is_same_v<Element, BFloat16>)
    return y_in_place && p.kernel_stride[4] == 1 && (WIDTH * sizeof(Real) != 64 || VECTOR_BYTES < 64 || p.sharing > 1);
  return std::is_same_v<Real, Element> && (taps_innermost(p) || p.kernel_stride[7] == 1);
}

// A tap in all lanes of a vector V, `last` of a line or not.
template <class V, class Real, int... I>
inline V splat(Real value, std::integer_sequence<int, I...>) {
  return V{(static_cast<void>(I), value)...};
}
template <class V, class Real>
inline V factor(const Real* tap, bool /*last*/) {
  return splat<V>(*tap, std::make_integer_sequence<int, LANES_OF<V>>{});
}
// A word holds two of bfloat16, each the upper half of a float. A tap is read with the one behind it, as the lower half of both, and
// shifted; the last of a line with the one before it, and masked, as nothing behind it need exist. The word is read as a float, since
// g++ would take integers apart before they reach the vector.
template <class V>
inline V factor(const BFloat16* tap, bool last) {
  using Bits = typename Vector<std::uint32_t, LANES_OF<V>>::type;
  float pair;
  std::memcpy(&pair, tap - (last ? 1 : 0), sizeof pair);
  V value = splat<V>(pair, std::make_integer_sequence<int, LANES_OF<V>>{});
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = last ? bits & 0xffff0000 : bits << 16;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// Groups of so many channels share vectors, GROUPS of them each: every SHARED lanes have a tap of their own. Where taps lie in planes,
// a load for each group and the blends between them cost more than they save, unless lines are short.
constexpr int SHARED = 4;
inline bool share_vectors(const Problem& p, Index lanes) {
  return p.channels == SHARED && p.groups % (lanes / SHARED) == 0 && (taps_innermost(p) || p.kernel[2] <= 3);
}

// The lanes of `lower` for the lower half of the groups, of `upper` for the others.
template <int GROUPS, class V, int... I>
inline V by_group(V lower, V upper, std::integer_sequence<int, I...>) {
  return shuffle<(I / SHARED % GROUPS < GROUPS / 2 ? I : I + LANES_OF<V>)...>(lower, upper);
}
template <int GROUPS, class V, class Tap>
inline V factor_of(const Tap* tap, bool last, Index next_group) {
  if constexpr (GROUPS == 1) return factor<V>(tap, last);
  else
    return by_group<GROUPS>(factor_of<GROUPS / 2, V>(tap, last, next_group),
                            factor_of<GROUPS / 2, V>(tap + GROUPS / 2 * next_group, last, next_group),
                            std::make_integer_sequence<int, LANES_OF<V>>{});
}

// Four taps next to each other, of each of the groups: one for each of their lanes.
template <int GROUPS, class V, class Tap>
inline V fours(const Tap* taps, Index next_group) {
  static_assert(LANES_OF<V> == 4 * GROUPS);
  const Stored<Tap>* of_group[GROUPS];
  for (int group = 0; group < GROUPS; ++group) of_group[group] = reinterpret_cast<const Stored<Tap>*>(taps + group * next_group);
  const auto values = join_parts<LANES_OF<V>>(of_group, 0);
  if constexpr (std::is_same_v<LaneOf<V>, Tap>) return values;
  else return widened<V, Tap>(values);
}
template <int LANE, class V, int... I>
inline V lane_of_fours(V fours, std::integer_sequence<int, I...>) {
  return shuffle<(I / 4 * 4 + LANE)...>(fours, fours);
}

// The kernel of one group and row of outputs: a dense copy of the taps at `depths`. Where they lie in planes, those at `coming`
// are fetched meanwhile.
template <class Real, class Element>
void copy_taps(Real* to, const Layout& at, const Problem& p, const Element* from, const Element* coming, Range depths, Index outputs) {
  const Index* step = p.kernel_stride + 2;
  if (taps_in_one_run(p)) {
    const Index first = depths.from * at.tap_depth, count = depths.size() * at.tap_depth;
    for (Index output = 0; output < outputs; ++output)
      copy_run(to + output * at.tap_output + first, from + output * step[5] + first, count);
    return;
  }
  for (Index depth = depths.from; depth < depths.to; ++depth)
    for (Index row = 0; row < p.kernel[1]; ++row)
      for (Index tap = 0; tap < p.kernel[2]; ++tap) {
        const Element* source = from + depth * step[0] + row * step[1] + tap * step[2];
        Real* target = to + depth * at.tap_depth + row * at.tap_row + tap * at.tap_column;
        if (at.tap_output == 1 && step[5] == 1) {
          copy_run(target, source, outputs);
          for (Index output = 0; output < outputs; output += CACHE_LINE / Index(sizeof(Element)))
            __builtin_prefetch(coming + (source - from) + output, 0, 2);
          continue;
        }
        for (Index output = 0; output < outputs; ++output) target[output * at.tap_output] = widen(source[output * step[5]]);
      }
}

// The taps of a tile: a pointer for each output (taps innermost) or each tap, the same for all lines.
template <class Tap, int K, bool TAPS_INNERMOST, int COLUMNS>
struct TileTaps {
  static constexpr int POINTERS = TAPS_INNERMOST ? COLUMNS : K > 0 ? K : 1;
  const Tap* at[POINTERS];
  Index next_group;
  TileTaps(const Tap* first, const Layout& layout) : next_group(layout.next_group) {
#pragma GCC unroll 16
    for (int i = 0; i < POINTERS; ++i)
      at[i] = first + i * (TAPS_INNERMOST ? layout.tap_output : layout.tap_column);
  }
};

// Those of one of its lines, as factors of vectors V; for each column they are asked for in their order. Groups that share vectors
// read four at a time where they lie next to each other, the last four of the line overlapping those before: one register for each
// column instead of as many loads as there are groups for each tap.
template <class Real, int LANES, int GROUPS, class Tap, int K, bool TAPS_INNERMOST, int COLUMNS>
struct LineTaps {
  using V = typename Vector<Real, LANES>::type;
  static constexpr bool IN_FOURS = GROUPS > 1 && TAPS_INNERMOST && K >= 4;
  const TileTaps<Tap, K, TAPS_INNERMOST, COLUMNS>& tile;
  const Index line;
  V four[COLUMNS];

  LineTaps(const TileTaps<Tap, K, TAPS_INNERMOST, COLUMNS>& of_tile, Index of_line) : tile(of_tile), line(of_line) {}

  V operator()(int column, int tap) {
    const Tap* at = TAPS_INNERMOST ? tile.at[column] + line + tap : tile.at[tap] + line + column;
    if constexpr (IN_FOURS) {
      constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
      const int lane = tap < K / 4 * 4 ? tap % 4 : tap - (K - 4);
      if (tap % 4 == 0) four[column] = fours<GROUPS, V>(at - lane, tile.next_group);
      return lane == 0   ? lane_of_fours<0>(four[column], lanes)
             : lane == 1 ? lane_of_fours<1>(four[column], lanes)
             : lane == 2 ? lane_of_fours<2>(four[column], lanes)
                         : lane_of_fours<3>(four[column], lanes);
    } else {
      return factor_of<GROUPS, V>(at, tap == K - 1, tile.next_group);
    }
  }
};

}  // namespace
