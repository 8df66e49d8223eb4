// The loop of grad_kernel on packed rows. The gradient of a tap is a sum over channels: lanes are four channels at a few outputs, so
// that all but the last of the sum is vertical, and the four lanes that are left become the gradients of four taps next to one
// another, as they lie in channels-last memory.

#pragma once

#include "parts.h"

namespace {

// Sums of two lanes in four of `a` and `b` each: from (a0 a1 a2 a3), (b0 b1 b2 b3) to (a0+a2 b0+b2 a1+a3 b1+b3), in every four.
template <int N, class V, int... I>
inline V fold(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(I / 4 * 4 + I % 4 / 2 + I % 2 * N)...>(a, b) + shuffle<(I / 4 * 4 + I % 4 / 2 + 2 + I % 2 * N)...>(a, b);
}

// The sums over each SUMMED lanes of as many vectors, next to each other.
template <int LANES, class V>
inline V sums_of_lanes(const V* s) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
  if constexpr (LANES == 2) return shuffle<0, 2>(s[0], s[1]) + shuffle<1, 3>(s[0], s[1]);
  else return fold<LANES>(fold<LANES>(s[0], s[2], lanes), fold<LANES>(s[1], s[3], lanes), lanes);
}

// The gradients of COUNT taps of neighbouring positions, `step` from each other: of SUMMED of them, then of the others. CHUNKS: how
// many vectors the channels of a group fill, 0: known at run time only; `grads`: the outputs' own gradients.
template <class Real, int LANES, int COUNT, int CHUNKS, class V>
inline void dots(V* results, const V* grads, const Real* x, Index step, Index chunks) {
  constexpr int ALL = SUMMED<LANES>;
  V sums[2 * ALL] = {};
#pragma GCC unroll 4
  for (Index chunk = 0; chunk < (CHUNKS ? CHUNKS : chunks); ++chunk)
#pragma GCC unroll 8
    for (int t = 0; t < COUNT; ++t) sums[t] += grads[chunk] * load<V>(x + t * step + chunk * LANES);
  results[0] = sums_of_lanes<LANES>(sums);
  if (COUNT > ALL) results[1] = sums_of_lanes<LANES>(sums + ALL);
}

// The gradients of COUNT taps at each of the outputs OUTPUT of a vector, `at` places from `taps`. `exact`: no more is written.
template <int COUNT, class Bits, class V, int... OUTPUT>
inline void store_taps(Bits* const* taps, Index at, V dots, bool exact, std::integer_sequence<int, OUTPUT...>) {
  constexpr int ALL = 4 < LANES_OF<V> ? 4 : LANES_OF<V>;
  constexpr auto lanes = std::make_integer_sequence<int, ALL>{};
  if (COUNT == ALL || !exact) return (store_some<OUTPUT * ALL>(taps[OUTPUT] + at, dots, lanes), ...);
  constexpr auto some = std::make_integer_sequence<int, COUNT == 1 ? 1 : 2>{};
  (store_some<OUTPUT * ALL>(taps[OUTPUT] + at, dots, some), ...);
  if constexpr (COUNT == 3) (store_some<OUTPUT * ALL + 1>(taps[OUTPUT] + at + 1, dots, some), ...);
}
// The same of two times SUMMED taps.
template <class Bits, class V, int... OUTPUT>
inline void store_both(Bits* const* taps, Index at, V dots, std::integer_sequence<int, OUTPUT...>) {
  (store_some<OUTPUT * 8>(taps[OUTPUT] + at, dots, std::make_integer_sequence<int, 8>{}), ...);
}

// The gradients of the taps of a line, `offset` places from `taps`, which end at `end`; zeros where the line, `x`, is null.
// K = 0: it is known at run time only how many there are, `count`.
template <class Real, class Element, int LANES, int K, int CHUNKS, class V>
inline void line_of_dots(Stored<Element>* const* taps, Index offset, Index end, const V* grads, const Real* x, Index step, Index count,
                         Index chunks) {
  constexpr int ALL = SUMMED<LANES>, MOST = 2 * ALL;
  constexpr auto parts = std::make_integer_sequence<int, LANES / ALL>{};
  [[maybe_unused]] constexpr auto both = std::make_integer_sequence<int, 2 * LANES>{};
  const auto store_at = [&](Index at, V result, auto many) {
    const bool exact = at + ALL > end;  // what is written too much before that is overwritten by taps to come
    if constexpr (std::is_same_v<Real, Element>) store_taps<many>(taps, at, result, exact, parts);
    else store_taps<many>(taps, at, narrowed<Element, Nan::OF_HALVES>(result), exact, parts);
  };
  Index t = 0;
  const auto run = [&](auto many) {
    const Index at = offset + t;
    V results[2] = {};
    if (x) dots<Real, LANES, many, CHUNKS>(results, grads, x + t * step, step, chunks);
    t += many;
    if constexpr (!std::is_same_v<Real, Element> && many > ALL)
      if (at + MOST <= end)
        return store_both(taps, at, narrowed_in_turn<Element, Nan::OF_HALVES>(results[0], results[1], both), parts);
    store_at(at, results[0], std::integral_constant<int, (many < ALL ? int(many) : ALL)>{});
    if constexpr (many > ALL) store_at(at + ALL, results[1], std::integral_constant<int, many - ALL>{});
  };
  while (t + MOST <= (K ? K : count)) run(std::integral_constant<int, MOST>{});
  if constexpr (K > 0) {
    static_assert(K % MOST);
    run(std::integral_constant<int, K % MOST>{});
  } else {
    if (t + ALL <= count) run(std::integral_constant<int, ALL>{});
    while (t < count) run(std::integral_constant<int, 1>{});
  }
}

// Where the loop finds things, the same for all rows of all tasks. Steps are in elements; all taps of an output lie in one run.
struct Dots {
  Index taps, stride, dilation;  // of a line of the window, in columns
  Index y_image, y_column;       // from image to image, from output to output
  Index tap_image, tap_output;
  Index chunks;                  // vectors of channels of a group
  Index fetched, fetched_image;  // bytes of taps to come that are prefetched with each output, and from image to image
};

// The gradients of all taps of a row of outputs of each image; zeros to those of lines that lie outside the image. Packed rows of x lie
// [column of a part][chunk][part][channel], outputs [column][channel]. Outputs and taps are elements of any type; taps at `coming` are
// fetched. K = 0: known at run time only.
template <class Real, class Element, int LANES, int K, int CHUNKS>
void row_of_dots(const void* y, const Real* x, void* taps, const Parts<LANES>& parts, Lines lines, const Dots& at, Real* room,
                 const char* coming) {
  constexpr int PARTS = Parts<LANES>::COUNT;
  using V = typename Vector<Real, LANES>::type;
  using Bits = Stored<Element>;
  const Index chunks = CHUNKS ? CHUNKS : at.chunks, column = chunks * LANES, step = (K ? 1 : at.dilation) * column;
  const Index count = K ? K : at.taps, end = lines.size() * count;
  Bits* of_part[PARTS];
  const Bits* y_of_part[PARTS];
  const char* coming_of_part[PARTS];
  for (int part = 0; part < PARTS; ++part) {
    const Index image = parts.image[part], first = parts.first[part];
    of_part[part] = static_cast<Bits*>(taps) + image * at.tap_image + first * at.tap_output;
    y_of_part[part] = static_cast<const Bits*>(y) + image * at.y_image + first * at.y_column;
    coming_of_part[part] = coming + image * at.fetched_image + first * at.fetched;
  }
  for (Index output = 0; output < parts.size; ++output, x += at.stride * column) {
    for (int part = 0; part < PARTS; coming_of_part[part++] += at.fetched)
      for (Index byte = 0; byte < at.fetched; byte += CACHE_LINE) __builtin_prefetch(coming_of_part[part] + byte, 0, 2);
    V few[CHUNKS + 1], *grads = CHUNKS ? few : reinterpret_cast<V*>(room);
#pragma GCC unroll 4
    for (Index chunk = 0; chunk < chunks; ++chunk) {
      const auto values = join_parts<LANES>(y_of_part, chunk * SUMMED<LANES>);
      if constexpr (std::is_same_v<Real, Element>) grads[chunk] = values;
      else grads[chunk] = widened<V, Element>(values);
    }
    for (const Line* line = lines.begin; line < lines.end; ++line)
      line_of_dots<Real, Element, LANES, K, CHUNKS>(of_part, line->taps, end, grads, line->x == OUTSIDE ? nullptr : x + line->x, step,
                                                    count, chunks);
    for (int part = 0; part < PARTS; ++part) of_part[part] += at.tap_output, y_of_part[part] += at.y_column;
  }
}

template <class Real, int LANES>
using RowOfDots = void (*)(const void*, const Real*, void*, const Parts<LANES>&, Lines, const Dots&, Real*, const char*);

template <class Real, class Element, int LANES, int K>
RowOfDots<Real, LANES> choose_chunks(Index chunks) {
  return chunks == 1   ? row_of_dots<Real, Element, LANES, K, 1>
         : chunks == 2 ? row_of_dots<Real, Element, LANES, K, 2>
         : chunks == 4 ? row_of_dots<Real, Element, LANES, K, 4>
                       : row_of_dots<Real, Element, LANES, K, 0>;
}
template <class Real, class Element, int LANES>
RowOfDots<Real, LANES> choose_row_of_dots(const Problem& p, Index chunks) {
  if (p.dilation[2] == 1) {
    if (p.kernel[2] == 3) return choose_chunks<Real, Element, LANES, 3>(chunks);
    if (p.kernel[2] == 5) return choose_chunks<Real, Element, LANES, 5>(chunks);
    if (p.kernel[2] == 7) return choose_chunks<Real, Element, LANES, 7>(chunks);
    if (p.kernel[2] == 9) return choose_chunks<Real, Element, LANES, 9>(chunks);
  }
  return choose_chunks<Real, Element, LANES, 0>(chunks);
}

}  // namespace
