// The loops of forward and grad_x on packed rows: tiles of output columns whose sums stay in registers.

#pragma once

#include "taps.h"

namespace {

// COLUMNS outputs of a row, of WIDTH channels: the sums over all lines of the window stay in registers, and a tap that is read
// once serves all vectors of the channels; or all lanes of one of GROUPS groups that share a vector. K, S = 0: known at run time only.
// Of the columns of x that the tile covers, BEFORE at one end and BEHIND at the other are outside the image, and left out. It is not
// inlined, as g++ then keeps in registers what the loop needs.
template <int COLUMNS, int WIDTH, int GROUPS, int K, int S, bool TAPS_INNERMOST, int BEFORE, int BEHIND, class Real, class Tap,
          class Value, class Fetch>
[[gnu::noinline]] void gather_tile(Value* y, const Real* x, const Tap* taps, Lines lines, const Layout& at, Fetch fetch) {
  constexpr int LANES = lanes_of<Real>(WIDTH), VECTORS = WIDTH / LANES, POSITIONS = (COLUMNS - 1) * S + K;
  static_assert(VECTORS <= 2 && (GROUPS == 1 || WIDTH == GROUPS * SHARED));
  constexpr Nan NAN_IS = sizeof(Tap) == 2 ? Nan::OF_HALVES : Nan::ANY;
  using V = typename Vector<Real, LANES>::type;
  V sums[COLUMNS][VECTORS] = {};
  const TileTaps<Tap, K, TAPS_INNERMOST, COLUMNS> tile_taps(taps, at);
  for (const Line* next = lines.begin; next < lines.end; ++next) {
    const Real* line = x + next->x;
    const Index offset = next->taps;
    fetch(offset);
    if constexpr (K > 0) {
      LineTaps<Real, LANES, GROUPS, Tap, K, TAPS_INNERMOST, COLUMNS> line_taps(tile_taps, offset);
#pragma GCC unroll 32
      for (int position = 0; position < POSITIONS; ++position) {
        const bool inside = BEFORE <= position && position < POSITIONS - BEHIND;
        V values[VECTORS];
        for (int v = 0; inside && v < VECTORS; ++v) values[v] = in_register(load<V>(line + position * WIDTH + v * LANES));
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const int t = position - column * S;
          if (t < 0 || t >= K) continue;
          const V tap = line_taps(column, t);
          for (int v = 0; inside && v < VECTORS; ++v) sums[column][v] += tap * values[v];
        }
      }
    } else {
      for (Index t = 0; t < at.taps; ++t)
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const Tap* from = taps + offset + column * at.tap_output + t * at.tap_column;
          const V tap = factor_of<GROUPS, V>(from, t == at.taps - 1, at.next_group);
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
template <int COLUMNS, int WIDTH, int GROUPS, int K, int S, bool TAPS_INNERMOST, int BEFORE, int BEHIND, class Real, class Tap,
          class Value, class Fetch>
[[gnu::noinline]] void scatter_tile(const Value* y, Real* x, const Tap* taps, Lines lines, const Layout& at, Fetch fetch) {
  constexpr int LANES = lanes_of<Real>(WIDTH), VECTORS = WIDTH / LANES, POSITIONS = (COLUMNS - 1) * S + K;
  using V = typename Vector<Real, LANES>::type;
  V grads[COLUMNS][VECTORS];
#pragma GCC unroll 8
  for (int column = 0; column < COLUMNS; ++column)
    for (int v = 0; v < VECTORS; ++v) grads[column][v] = load_as<V>(y + column * at.y_column + v * LANES);
  const TileTaps<Tap, K, TAPS_INNERMOST, COLUMNS> tile_taps(taps, at);
  for (const Line* next = lines.begin; next < lines.end; ++next) {
    Real* line = x + next->x;
    const Index offset = next->taps;
    fetch(offset);
    if constexpr (K > 0) {
      LineTaps<Real, LANES, GROUPS, Tap, K, TAPS_INNERMOST, COLUMNS> line_taps(tile_taps, offset);
#pragma GCC unroll 32
      for (int position = 0; position < POSITIONS; ++position) {
        const bool inside = BEFORE <= position && position < POSITIONS - BEHIND;
        V sums[VECTORS];
        for (int v = 0; inside && v < VECTORS; ++v) sums[v] = load<V>(line + position * WIDTH + v * LANES);
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const int t = position - column * S;
          if (t < 0 || t >= K) continue;
          const V tap = line_taps(column, t);
          for (int v = 0; inside && v < VECTORS; ++v) sums[v] += tap * grads[column][v];
        }
        for (int v = 0; inside && v < VECTORS; ++v) store<V>(line + position * WIDTH + v * LANES, sums[v]);
      }
    } else {
      for (Index t = 0; t < at.taps; ++t)
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const Tap* from = taps + offset + column * at.tap_output + t * at.tap_column;
          const V tap = factor_of<GROUPS, V>(from, t == at.taps - 1, at.next_group);
          Real* position = line + (column * at.stride + t * at.dilation) * WIDTH;
          for (int v = 0; v < VECTORS; ++v)
            store<V>(position + v * LANES, load<V>(position + v * LANES) + tap * grads[column][v]);
        }
    }
  }
}

// What a tile fetches of the taps to come, line by line of its window: `of_line` lines of the cache of a run of them, or (in planes)
// those of the same line and columns of the window. Tiles get a copy, which stays in registers.
template <class Tap, int GROUPS, int K, Taps TAPS>
struct Coming {
  const char* next;
  const Index of_line, column;
  const Layout& at;
  void run(Index count) {
    for (Index i = 0; i < count; ++i, next += CACHE_LINE) __builtin_prefetch(next, 0, 2);
  }
  void operator()([[maybe_unused]] Index line) {
    if constexpr (TAPS == Taps::IN_RUNS) run(of_line);
    if constexpr (TAPS == Taps::IN_PLANES) {
      const Tap* first = reinterpret_cast<const Tap*>(next) + line + column;
#pragma GCC unroll 16
      for (Index t = 0; t < (K ? K : at.taps); ++t)
        for (int group = 0; group < GROUPS; ++group) __builtin_prefetch(first + t * at.tap_column + group * at.next_group, 0, 2);
    }
  }
};

// A row of outputs, in tiles of 7 columns, which leave no rest on any map of a 224-pixel network. What of x is in the image is
// `inside`, counted from the first column that the first output reads; tiles that read half a window outside are compiled apart
// for narrow maps, as that is a quarter of the work on 7 columns with K = 7. Taps to come are fetched meanwhile, but for those in
// the scratch: `coming` is a run of them, or (in planes) those of the first line and column. A core waits for some twenty lines of
// the cache at once, and drops what it is asked for beyond that: so what a tile fetches is dealt out to the lines of its window,
// unless it is little; always the same numbers, so that the loops are foreseen.
template <bool FORWARD, class Real, class Value, class Tap, int WIDTH, int GROUPS, int K, int S, Taps TAPS>
void row_of_tiles(void* outputs, Real* x, const void* taps, Index columns, Lines lines, Range inside, const Layout& at,
                  const char* coming) {
  constexpr Index AT_ONCE = 8;
  constexpr int WIDEST = 7;
  constexpr bool INNERMOST = TAPS == Taps::IN_RUNS;
  auto* y = static_cast<std::conditional_t<FORWARD, Value, const Value>*>(outputs);
  Index column = 0;
  const auto run = [&](auto width) {
    if (column + width > columns) return;
    const Index all = ceil_div(at.fetched * width, CACHE_LINE), of_line = all > AT_ONCE ? all / most(1, lines.size()) : 0;
    const Index of_tile = all - of_line * lines.size();
    for (; column + width <= columns; column += width) {
      Coming<Tap, GROUPS, K, TAPS> fetch = {coming, of_line, column, at};
      if constexpr (TAPS == Taps::IN_RUNS) fetch.run(of_tile);
      auto* values = y + column * at.y_column;
      const auto* ahead = values + width * at.y_column;
      for (int i = 0; i < width; ++i, ahead += at.y_column) __builtin_prefetch(ahead, FORWARD);
      Real* positions = x + column * at.stride * WIDTH;
      const Tap* first = static_cast<const Tap*>(taps) + column * at.tap_output;
      const auto tile = [&](auto before, auto behind) {
        if constexpr (FORWARD)
          gather_tile<width, WIDTH, GROUPS, K, S, INNERMOST, before, behind>(values, positions, first, lines, at, fetch);
        else scatter_tile<width, WIDTH, GROUPS, K, S, INNERMOST, before, behind>(values, positions, first, lines, at, fetch);
      };
      constexpr std::integral_constant<int, 0> none;
      if constexpr (width == WIDEST && S == 1) {
        constexpr std::integral_constant<int, K / 2> half;
        const bool narrow = columns <= 2 * WIDEST;  // of more tiles, too few are at an end for it to be felt
        const bool before = narrow && inside.from - column == half, behind = narrow && column + width - 1 + K - inside.to == half;
        if (before && behind) tile(half, half);
        else if (before) tile(half, none);
        else if (behind) tile(none, half);
        else tile(none, none);
      } else tile(none, none);
      if constexpr (TAPS == Taps::IN_RUNS) coming += at.fetched * width;
    }
  };
  run(std::integral_constant<int, WIDEST>{});
  run(std::integral_constant<int, 3>{});
  run(std::integral_constant<int, 1>{});
}

template <class Real>
using Row = void (*)(void*, Real*, const void*, Index, Lines, Range, const Layout&, const char*);

// The variant for this window: unrolled for float32, the usual kernel sizes and strides; else the general one. Groups that share
// vectors read longer lines of taps only in runs (`share_vectors`).
template <bool FORWARD, class Real, class Value, class Tap, int WIDTH, int GROUPS, Taps TAPS>
Row<Real> choose_window(const Layout& at) {
  if constexpr (sizeof(Real) == 4) {
    const bool plain = at.dilation == 1 && at.stride == 1, halving = at.dilation == 1 && at.stride == 2;
    if (plain && at.taps == 3) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, GROUPS, 3, 1, TAPS>;
    if (halving && at.taps == 3) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, GROUPS, 3, 2, TAPS>;
    if constexpr (GROUPS == 1 || TAPS == Taps::IN_RUNS) {
      if (plain && at.taps == 5) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, GROUPS, 5, 1, TAPS>;
      if (plain && at.taps == 7) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, GROUPS, 7, 1, TAPS>;
      if (plain && at.taps == 9) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, GROUPS, 9, 1, TAPS>;
      if (halving && at.taps == 7) return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, GROUPS, 7, 2, TAPS>;
    }
  }
  return row_of_tiles<FORWARD, Real, Value, Tap, WIDTH, GROUPS, 0, 0, TAPS>;
}

// Elements of another type than that computed in are read and written where they lie, if they can, and else copied to the scratch:
// outputs, and taps, which are copied unless `taps_in_place`.
template <bool FORWARD, class Real, class Element, int WIDTH, int GROUPS>
Row<Real> choose_row(const Layout& at, Taps taps, bool y_in_place, bool copies_taps) {
  const auto choose = [&](auto value, auto tap) -> Row<Real> {
    using Value = decltype(value);
    if (taps == Taps::IN_RUNS) return choose_window<FORWARD, Real, Value, decltype(tap), WIDTH, GROUPS, Taps::IN_RUNS>(at);
    if constexpr (std::is_same_v<Real, Element>)
      if (taps == Taps::IN_PLANES) return choose_window<FORWARD, Real, Value, Real, WIDTH, GROUPS, Taps::IN_PLANES>(at);
    return choose_window<FORWARD, Real, Value, Real, WIDTH, GROUPS, Taps::IN_SCRATCH>(at);
  };
  if (!y_in_place) return choose(Real{}, Real{});
  if constexpr (std::is_same_v<Element, BFloat16>)
    if (!copies_taps) return choose(Element{}, Element{});
  return choose(Element{}, Real{});
}

}  // namespace
