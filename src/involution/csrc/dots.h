// The loop of grad_kernel on packed rows: lanes are channels, whose products are added up for a line of taps at a time, so that
// the gradients of the taps of an output come out next to one another, as they lie in channels-last memory.

#pragma once

#include <utility>

#include "tiles.h"

namespace {

// Sums of two lanes in four of `a` and `b` each: from (a0 a1 a2 a3), (b0 b1 b2 b3) to (a0+a2 b0+b2 a1+a3 b1+b3), in every four.
template <int N, class V, int... I>
inline V fold(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(I / 4 * 4 + I % 4 / 2 + I % 2 * N)...>(a, b) + shuffle<(I / 4 * 4 + I % 4 / 2 + 2 + I % 2 * N)...>(a, b);
}

// The sums over the lanes of each of N vectors.
template <int N, class V>
inline V sums_of_lanes(const V* s) {
  if constexpr (N == 2) {
    return shuffle<0, 2>(s[0], s[1]) + shuffle<1, 3>(s[0], s[1]);
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, N>{};
    const auto fours = [&](const V* from) {
      return fold<N>(fold<N>(from[0], from[2], lanes), fold<N>(from[1], from[3], lanes), lanes);
    };
    if constexpr (N == 4) {
      return fours(s);
    } else {
      static_assert(N == 8);
      const V first = fours(s), second = fours(s + 4);
      return shuffle<0, 1, 2, 3, 8, 9, 10, 11>(first, second) + shuffle<4, 5, 6, 7, 12, 13, 14, 15>(first, second);
    }
  }
}

// Wider vectors than of eight lanes would cost more to add up than they save.
template <class Real, int WIDTH>
constexpr int DOT_LANES = lanes_of<Real>(WIDTH) < 8 ? lanes_of<Real>(WIDTH) : 8;

// The gradients of COUNT taps of one output, of neighbouring positions. ALONE: the output's own gradient, of all channels of the
// group, is `grads`, else it is at `y`. `exact`: nothing is written behind the taps.
template <class Real, int WIDTH, int COUNT, bool ALONE, class V>
inline void dots(Real* taps, const V* grads, const Real* y, const Real* x, bool exact, const Layout& at) {
  constexpr int LANES = DOT_LANES<Real, WIDTH>;
  V sums[LANES] = {};
  const auto add = [&](const V* grads, const Real* x) {
#pragma GCC unroll 8
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < WIDTH / LANES; ++v) sums[t] += grads[v] * load<V>(x + t * WIDTH + v * LANES);
  };
  if (ALONE) add(grads, x);
  for (Index chunk = 0; !ALONE && chunk < at.chunks; ++chunk) {
    V part[WIDTH / LANES];
    for (int v = 0; v < WIDTH / LANES; ++v) part[v] = load<V>(y + chunk * at.y_chunk + v * LANES);
    add(part, x + chunk * at.x_chunk);
  }
  const V result = sums_of_lanes<LANES>(sums);
  if (COUNT == LANES || !exact) return store<V>(taps, result);
  store_first<COUNT>(taps, result, std::make_integer_sequence<int, COUNT >= 4 ? 4 : COUNT >= 2 ? 2 : 1>{});
}

// The gradients of all taps of a row of outputs on lines (`depths` x `rows`) of their window; K = 0: known at run time only.
template <class Real, int WIDTH, int K, bool ALONE>
void row_of_dots(Real* y, Real* x, Index slot, Real* taps, Index columns, Index depths, Index rows, const Layout& at,
                 const char* coming) {
  constexpr int LANES = DOT_LANES<Real, WIDTH>, DONE = K / LANES * LANES;
  using V = typename Vector<Real, LANES>::type;
  const Index end = (depths - 1) * at.tap_depth + (rows - 1) * at.tap_row + at.taps;
  for (Index column = 0; column < columns; ++column, y += at.y_column, taps += at.tap_output, x += at.stride * WIDTH) {
    for (const char* fetched = coming + at.fetched; coming < fetched; coming += CACHE_LINE) __builtin_prefetch(coming, 1);
    V grads[WIDTH / LANES] = {};
#pragma GCC unroll 4
    for (int v = 0; ALONE && v < WIDTH / LANES; ++v) grads[v] = load<V>(y + v * LANES);
    for_each_line(x, slot, depths, rows, at, [&](const Real* line, Index offset) {
      const auto run = [&](Index t, auto count) {
        const bool exact = offset + t + LANES > end;  // what is written too much before that is overwritten by taps to come
        dots<Real, WIDTH, count, ALONE>(taps + offset + t, grads, y, line + t * at.dilation * WIDTH, exact, at);
      };
      if constexpr (K > 0) {
#pragma GCC unroll 4
        for (int t = 0; t < DONE; t += LANES) run(t, std::integral_constant<int, LANES>{});
        if constexpr (K > DONE) run(DONE, std::integral_constant<int, K - DONE>{});
      } else {
        for (Index t = 0; t < at.taps; ++t) run(t, std::integral_constant<int, 1>{});
      }
    });
  }
}

// A dense copy of the gradients of all taps of a row of outputs to where they belong.
template <class Real, class Element>
void write_taps(Element* to, const Problem& p, const Real* from, Index outputs) {
  const Index *step = p.kernel_stride + 2, taps = taps_of(p);
  if (taps_in_one_run(p)) {
    for (Index output = 0; output < outputs; ++output) copy_run(to + output * step[5], from + output * taps, taps);
    return;
  }
  const bool even = step[1] == p.kernel[2] * step[2] && step[0] == p.kernel[1] * step[1];  // from tap to tap, over lines
  const Index length = even ? taps : p.kernel[2];
  for (Index first = 0; first < taps; first += length) {
    const Index line = first / p.kernel[2];
    Element* target = to + line / p.kernel[1] * step[0] + line % p.kernel[1] * step[1];
    if (step[5] == 1) {
      transpose(target, step[2], from + first, taps, outputs, length);
      continue;
    }
    for (Index output = 0; output < outputs; ++output)
      for (Index t = 0; t < length; ++t) narrow(from[output * taps + first + t], target[output * step[5] + t * step[2]]);
  }
}

template <class Real, int WIDTH>
Row<Real> choose_row_of_dots(const Layout& at) {
#define VARIANT(K) (at.chunks == 1 ? row_of_dots<Real, WIDTH, K, true> : row_of_dots<Real, WIDTH, K, false>)
  if (at.dilation == 1) {
    if (at.taps == 3) return VARIANT(3);
    if (at.taps == 5) return VARIANT(5);
    if (at.taps == 7) return VARIANT(7);
    if (at.taps == 9) return VARIANT(9);
  }
  return VARIANT(0);
#undef VARIANT
}

}  // namespace
