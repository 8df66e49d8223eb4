// The loops of forward and grad_x on packed rows: tiles of output columns whose sums stay in registers.

#pragma once

#include <utility>

#include "packing.h"

namespace {

// Where the loops find things, the same for all rows of all tasks. Steps are in elements.
struct Layout {
  Index taps, stride, dilation;                      // of one line of the window, in columns
  Index y_column;                                   // from output to output
  Index tap_depth, tap_row, tap_column, tap_output;  // from tap to tap along each axis, and from output to output
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
// if outputs are read or written where they lie, too.
template <class Real, class Element>
bool taps_in_place(const Problem& p, bool y_in_place) {
  if (std::is_same_v<Element, BFloat16>) return y_in_place && p.kernel_stride[4] == 1;
  return std::is_same_v<Real, Element> && (taps_innermost(p) || p.kernel_stride[7] == 1);
}

// A tap, to multiply a vector V with.
template <class V, class Real>
inline Real factor(const Real* tap, bool /*last*/) {
  return *tap;
}
template <class V, int... I>
inline V splat(float value, std::integer_sequence<int, I...>) {
  return V{(static_cast<void>(I), value)...};
}
// A word holds two of bfloat16, each the upper half of a float. A tap is read with the one behind it, as the lower half of both, and
// shifted; the last of a line with the one before it, and masked, as nothing behind it need exist. The word is read as a float, since
// g++ would take integers apart before they reach the vector.
template <class V>
inline V factor(const BFloat16* tap, bool last) {
  constexpr int LANES = sizeof(V) / sizeof(float);
  using Bits = typename Vector<std::uint32_t, LANES>::type;
  float pair;
  std::memcpy(&pair, tap - (last ? 1 : 0), sizeof pair);
  V value = splat<V>(pair, std::make_integer_sequence<int, LANES>{});
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = last ? bits & 0xffff0000 : bits << 16;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
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
  TileTaps(const Tap* first, const Layout& layout) {
#pragma GCC unroll 16
    for (int i = 0; i < POINTERS; ++i)
      at[i] = first + i * (TAPS_INNERMOST ? layout.tap_output : layout.tap_column);
  }
  const Tap* operator()(Index line, int column, int tap) const {
    return TAPS_INNERMOST ? at[column] + line + tap : at[tap] + line + column;
  }
};

// COLUMNS outputs of a row, of WIDTH channels: the sums over all lines of the window stay in registers, and a tap that is read
// once serves all vectors of the channels. K, S = 0: known at run time only.
template <int COLUMNS, int WIDTH, int K, int S, bool TAPS_INNERMOST, class Real, class Tap, class Value, class Fetch>
inline void gather_tile(Value* y, const Real* x, const Tap* taps, Lines lines, const Layout& at, const Fetch& fetch) {
  constexpr int LANES = lanes_of<Real>(WIDTH), VECTORS = WIDTH / LANES;
  static_assert(VECTORS <= 2);
  constexpr Nan NAN_IS = sizeof(Tap) == 2 ? Nan::OF_HALVES : Nan::ANY;
  using V = typename Vector<Real, LANES>::type;
  V sums[COLUMNS][VECTORS] = {};
  const TileTaps<Tap, K, TAPS_INNERMOST, COLUMNS> taps_of_tile(taps, at);
  for (const Line* next = lines.begin; next < lines.end; ++next) {
    const Real* line = x + next->x;
    const Index offset = next->taps;
    fetch(offset);
    if constexpr (K > 0) {
#pragma GCC unroll 32
      for (int position = 0; position < (COLUMNS - 1) * S + K; ++position) {
        V values[VECTORS];
        for (int v = 0; v < VECTORS; ++v) values[v] = load<V>(line + position * WIDTH + v * LANES);
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const int t = position - column * S;
          if (t < 0 || t >= K) continue;
          const auto tap = factor<V>(taps_of_tile(offset, column, t), t == K - 1);
          for (int v = 0; v < VECTORS; ++v) sums[column][v] += tap * values[v];
        }
      }
    } else {
      for (Index t = 0; t < at.taps; ++t)
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const auto tap = factor<V>(taps + offset + column * at.tap_output + t * at.tap_column, t == at.taps - 1);
          const Real* position = line + (column * at.stride + t * at.dilation) * WIDTH;
          for (int v = 0; v < VECTORS; ++v) sums[column][v] += tap * load<V>(position + v * LANES);
        }
    }
  }
#pragma GCC unroll 8
  for (int column = 0; column < COLUMNS; ++column)
    if constexpr (VECTORS == 2) store_as<NAN_IS>(y + column * at.y_column, sums[column][0], sums[column][1]);
    else store_as<NAN_IS>(y + column * at.y_column, sums[column][0]);
}

// The transpose: COLUMNS output gradients add their share to the positions each line of the window read.
template <int COLUMNS, int WIDTH, int K, int S, bool TAPS_INNERMOST, class Real, class Tap, class Value, class Fetch>
inline void scatter_tile(const Value* y, Real* x, const Tap* taps, Lines lines, const Layout& at, const Fetch& fetch) {
  constexpr int LANES = lanes_of<Real>(WIDTH), VECTORS = WIDTH / LANES;
  using V = typename Vector<Real, LANES>::type;
  V grads[COLUMNS][VECTORS];
#pragma GCC unroll 8
  for (int column = 0; column < COLUMNS; ++column)
    for (int v = 0; v < VECTORS; ++v) grads[column][v] = load_as<V>(y + column * at.y_column + v * LANES);
  const TileTaps<Tap, K, TAPS_INNERMOST, COLUMNS> taps_of_tile(taps, at);
  for (const Line* next = lines.begin; next < lines.end; ++next) {
    Real* line = x + next->x;
    const Index offset = next->taps;
    fetch(offset);
    if constexpr (K > 0) {
#pragma GCC unroll 32
      for (int position = 0; position < (COLUMNS - 1) * S + K; ++position) {
        V sums[VECTORS];
        for (int v = 0; v < VECTORS; ++v) sums[v] = load<V>(line + position * WIDTH + v * LANES);
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const int t = position - column * S;
          if (t < 0 || t >= K) continue;
          const auto tap = factor<V>(taps_of_tile(offset, column, t), t == K - 1);
          for (int v = 0; v < VECTORS; ++v) sums[v] += tap * grads[column][v];
        }
        for (int v = 0; v < VECTORS; ++v) store<V>(line + position * WIDTH + v * LANES, sums[v]);
      }
    } else {
      for (Index t = 0; t < at.taps; ++t)
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const auto tap = factor<V>(taps + offset + column * at.tap_output + t * at.tap_column, t == at.taps - 1);
          Real* position = line + (column * at.stride + t * at.dilation) * WIDTH;
          for (int v = 0; v < VECTORS; ++v)
            store<V>(position + v * LANES, load<V>(position + v * LANES) + tap * grads[column][v]);
        }
    }
  }
}

// A row of outputs, in tiles of 7 columns, which leave no rest on any map of a 224-pixel network. Taps to come are fetched
// meanwhile, but for those in the scratch: `coming` is a run of them, or (in planes) those of the first line and column. A core
// waits for some twenty lines of the cache at once, and drops what it is asked for beyond that: so what a tile fetches is dealt
// out to the lines of its window, unless it is little; always the same numbers, so that the loops are foreseen.
template <bool FORWARD, class Real, class Value, class Tap, int WIDTH, int K, int S, Taps TAPS>
void row_of_tiles(void* outputs, Real* x, const void* taps, Index columns, Lines lines, const Layout& at, const char* coming) {
  constexpr Index AT_ONCE = 8;
  constexpr bool INNERMOST = TAPS == Taps::IN_RUNS;
  auto* y = static_cast<std::conditional_t<FORWARD, Value, const Value>*>(outputs);
  Index column = 0;
  const auto run = [&](auto width) {
    if (column + width > columns) return;
    const Index all = ceil_div(at.fetched * width, CACHE_LINE), of_line = all > AT_ONCE ? all / most(1, lines.size()) : 0;
    const Index of_tile = all - of_line * lines.size();
    const char* next = coming;
    const auto fetch_run = [&](Index count) {
      for (Index i = 0; i < count; ++i, next += CACHE_LINE) __builtin_prefetch(next, 0, 2);
    };
    const auto fetch = [&]([[maybe_unused]] Index line) {
      if constexpr (TAPS == Taps::IN_RUNS) fetch_run(of_line);
      if constexpr (TAPS == Taps::IN_PLANES) {
        const Tap* first = reinterpret_cast<const Tap*>(coming) + line + column;
#pragma GCC unroll 16
        for (Index t = 0; t < (K ? K : at.taps); ++t) __builtin_prefetch(first + t * at.tap_column, 0, 2);
      }
    };
    for (; column + width <= columns; column += width) {
      if constexpr (TAPS == Taps::IN_RUNS) fetch_run(of_tile);
      auto* values = y + column * at.y_column;
      const auto* ahead = values + width * at.y_column;
      for (int i = 0; i < width; ++i, ahead += at.y_column) __builtin_prefetch(ahead, FORWARD);
      Real* positions = x + column * at.stride * WIDTH;
      const Tap* first = static_cast<const Tap*>(taps) + column * at.tap_output;
      if constexpr (FORWARD) gather_tile<width, WIDTH, K, S, INNERMOST>(values, positions, first, lines, at, fetch);
      else scatter_tile<width, WIDTH, K, S, INNERMOST>(values, positions, first, lines, at, fetch);
      if constexpr (TAPS == Taps::IN_RUNS) next = coming += at.fetched * width;
    }
  };
  run(std::integral_constant<int, 7>{});
  run(std::integral_constant<int, 3>{});
  run(std::integral_constant<int, 1>{});
}

template <class Real>
using Row = void (*)(void*, Real*, const void*, Index, Lines, const Layout&, const char*);

// The variant for this window: unrolled for float32, the usual kernel sizes and strides; else the general one.
template <bool FORWARD, class Real, class Value, class Tap, int WIDTH, Taps TAPS>
Row<Real> choose_window(const Layout& at) {
  if constexpr (sizeof(Real) == 4) {
    if (at.dilation == 1 && at.stride == 1) {
      if (at.taps == 3) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, 3, 1, TAPS>;
      if (at.taps == 5) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, 5, 1, TAPS>;
      if (at.taps == 7) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, 7, 1, TAPS>;
      if (at.taps == 9) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, 9, 1, TAPS>;
    }
    if (at.dilation == 1 && at.stride == 2) {
      if (at.taps == 3) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, 3, 2, TAPS>;
      if (at.taps == 7) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, 7, 2, TAPS>;
    }
  }
  return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, 0, 0, TAPS>;
}

// Elements of another type than that computed in are read and written where they lie, if they can, and else copied to the scratch:
// outputs, and taps, which are copied unless `taps_in_place`.
template <bool FORWARD, class Real, class Element, int WIDTH>
Row<Real> choose_row(const Layout& at, Taps taps, bool y_in_place) {
  const auto choose = [&](auto value, auto tap) -> Row<Real> {
    using Value = decltype(value);
    if (taps == Taps::IN_RUNS) return choose_window<FORWARD, Real, Value, decltype(tap), WIDTH, Taps::IN_RUNS>(at);
    if constexpr (std::is_same_v<Real, Element>)
      if (taps == Taps::IN_PLANES) return choose_window<FORWARD, Real, Value, Real, WIDTH, Taps::IN_PLANES>(at);
    return choose_window<FORWARD, Real, Value, Real, WIDTH, Taps::IN_SCRATCH>(at);
  };
  if (!y_in_place) return choose(Real{}, Real{});
  if constexpr (std::is_same_v<Element, BFloat16>) return choose(Element{}, Element{});
  else return choose(Element{}, Real{});
}

}  // namespace
