// Matrix products of what is in cache: the span that generates a kernel, and its derivatives.

#pragma once

#include <utility>

#include "vectors.h"

namespace {

// A part of a matrix product: to[m][n] = start + sum over k of a[m * a_row + k * a_term] * b[k][n], ROWS by VECTORS vectors of it.
// `start` is a number for each row; null: what `to` holds.
template <class Real, int LANES, int ROWS, int VECTORS>
inline void product_tile(Real* to, Index to_row, const Real* start, const Real* a, Index a_row, Index a_term, const Real* b,
                         Index b_row, Index terms) {
  using V = typename Vector<Real, LANES>::type;
  V sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[m][v] = start ? V{} + start[m] : load<V>(to + m * to_row + v * LANES);
  for (Index k = 0; k < terms; ++k) {
    V values[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) values[v] = load<V>(b + k * b_row + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[m][v] += a[m * a_row + k * a_term] * values[v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store<V>(to + m * to_row + v * LANES, sums[m][v]);
}

// The whole product, of `rows` rows and `vectors` vectors in each: strips of vectors, each in tiles of at most ROWS rows, which
// with their operands fill the registers. Rows that are no multiple of that are dealt to tiles of one row less first, since
// small tiles wait for their own sums.
template <class Real, int LANES>
void product(Real* to, Index to_row, const Real* start, const Real* a, Index a_row, Index a_term, const Real* b, Index b_row,
             Index rows, Index vectors, Index terms) {
  constexpr bool MANY_REGISTERS = sizeof(Real) * LANES == 64;
  Index vector = 0;
  const auto strip = [&](auto width, auto height) {
    Index row = 0;
    const auto tile = [&](auto tall) {
      product_tile<Real, LANES, tall, width>(to + row * to_row + vector * LANES, to_row, start ? start + row : nullptr,
                                             a + row * a_row, a_row, a_term, b + vector * LANES, b_row, terms);
      row += tall;
    };
    while (row < rows) {
      const Index left = rows - row;
      if (left % height == 0) tile(height);
      else if (left >= height - 1) tile(std::integral_constant<int, height - 1>{});
      else if (left >= 2) tile(std::integral_constant<int, 2>{});
      else tile(std::integral_constant<int, 1>{});
    }
    vector += width;
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  constexpr std::integral_constant<int, 4> four;
  constexpr std::integral_constant<int, MANY_REGISTERS ? 7 : 6> rows_of_two;
  constexpr std::integral_constant<int, MANY_REGISTERS ? 7 : 4> rows_of_three;
  if constexpr (MANY_REGISTERS)
    while (vectors - vector >= 4 && vectors - vector != 5) strip(four, rows_of_two);
  if (vectors - vector >= 3 && (vectors - vector) % 2 == 1) strip(three, rows_of_three);
  while (vectors - vector >= 2) strip(two, rows_of_two);
  if (vectors > vector) strip(one, rows_of_two);
}

// The part `which` of the taps of one group, at `vectors` vectors of pixels: [tap][pixels], from features [channel][pixels].
template <class Real, int LANES>
void span(Real* taps, const Problem& p, Index group, Range which, const Real* features, Index vectors, Index pixels) {
  const Index first = group * taps_of(p) + which.from;
  product<Real, LANES>(taps + which.from * pixels, pixels, static_cast<const Real*>(p.bias) + first,
                       static_cast<const Real*>(p.weight) + first * p.reduced, p.reduced, 1, features, pixels, which.size(), vectors,
                       p.reduced);
}

}  // namespace
