// Copies between tensors of any strides and the scratch that the loops run on.

#pragma once

#include <utility>

#include "vectors.h"

namespace {

// A line of the window: its offsets in the packed rows of x, or OUTSIDE the image, and from the first tap of an output.
struct Line {
  Index x, taps;
};
struct Lines {
  const Line *begin, *end;
  Index size() const { return end - begin; }
};
constexpr Index OUTSIDE = -1;

// In every `2 * STEP` lanes, STEP of `a` and then STEP of `b`: the lower ones of both, or the upper ones.
template <int N, int STEP, bool UPPER, class V, int... I>
inline V halves(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(I / (2 * STEP) * (2 * STEP) + I % STEP + (UPPER ? STEP : 0) + (I / STEP % 2 ? N : 0))...>(a, b);
}
// In every four lanes two of `a` and of `b` in turn: the lower ones, or the upper ones.
template <int N, bool UPPER, class V, int... I>
inline V interleave(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(I / 4 * 4 + I % 4 / 2 + (UPPER ? 2 : 0) + I % 2 * N)...>(a, b);
}

// A step of a transposition: of ROWS rows, those APART exchange blocks of STEP lanes.
template <int N, int STEP, int ROWS = N, int APART = STEP, class V>
inline void exchange(V* rows) {
  constexpr auto lanes = std::make_integer_sequence<int, N>{};
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
    if (row / APART % 2) continue;
    const V a = rows[row], b = rows[row + APART];
    rows[row] = halves<N, STEP, false>(a, b, lanes);
    rows[row + APART] = halves<N, STEP, true>(a, b, lanes);
  }
}

// N rows of N lanes become the columns. Four rows at a time, as one instruction can that moves within 128 bits, then blocks of four.
template <int N, class V>
inline void transpose_rows(V* rows) {
  constexpr auto lanes = std::make_integer_sequence<int, N>{};
#pragma GCC unroll 4
  for (int row = 0; row < N; row += 4) {
    const V low = interleave<N, false>(rows[row], rows[row + 1], lanes), high = interleave<N, true>(rows[row], rows[row + 1], lanes);
    const V low2 = interleave<N, false>(rows[row + 2], rows[row + 3], lanes);
    const V high2 = interleave<N, true>(rows[row + 2], rows[row + 3], lanes);
    rows[row] = halves<N, 2, false>(low, low2, lanes);
    rows[row + 1] = halves<N, 2, true>(low, low2, lanes);
    rows[row + 2] = halves<N, 2, false>(high, high2, lanes);
    rows[row + 3] = halves<N, 2, true>(high, high2, lanes);
  }
  if constexpr (N >= 8) exchange<N, 4>(rows);
  if constexpr (N >= 16) exchange<N, 8>(rows);
}

// to[j * to_step + i] = from[i * from_step + j] for i and j < N; zero for i >= i_size.
template <int N, class To, class From>
inline void transpose_block(To* to, Index to_step, const From* from, Index from_step, Index i_size = N) {
  using Real = std::common_type_t<decltype(widen(To{})), decltype(widen(From{}))>;
  using V = typename Vector<Real, N>::type;
  V rows[N];
#pragma GCC unroll 16
  for (int row = 0; row < N; ++row) rows[row] = row < i_size ? load_as<V>(from + row * from_step) : V{};
  transpose_rows<N>(rows);
#pragma GCC unroll 16
  for (int row = 0; row < N; ++row) store_as(to + row * to_step, rows[row]);
}

// to[j * to_step + i] = from[i * from_step + j], in blocks of N x N; the last block of a row or column overlaps the one before.
template <int N, class To, class From>
void transpose_blocks(To* to, Index to_step, const From* from, Index from_step, Index i_size, Index j_size) {
  for (Index i = 0; i < i_size; i += N)
    for (Index j = 0; j < j_size; j += N) {
      const Index i_from = least(i, i_size - N), j_from = least(j, j_size - N);
      transpose_block<N>(to + j_from * to_step + i_from, to_step, from + i_from * from_step + j_from, from_step);
    }
}

// to[j * to_step + i] = from[i * from_step + j].
template <class To, class From>
void transpose(To* to, Index to_step, const From* from, Index from_step, Index i_size, Index j_size) {
  constexpr int LANES = VECTOR_BYTES / int(sizeof(widen(*from)));
  const Index smaller = least(i_size, j_size);
  if constexpr (LANES >= 16) {
    // Where no block overlaps another. Rows of `to` are pages apart as a rule, of which a core knows few to write to: rather eight.
    if (smaller >= 16 && i_size % 16 == 0 && j_size % 16 == 0)
      return transpose_blocks<16>(to, to_step, from, from_step, i_size, j_size);
  }
  if constexpr (LANES >= 8) {
    if (smaller >= 8) return transpose_blocks<8>(to, to_step, from, from_step, i_size, j_size);
  }
  if (smaller >= 4) return transpose_blocks<4>(to, to_step, from, from_step, i_size, j_size);
  for (Index i = 0; i < i_size; ++i)
    for (Index j = 0; j < j_size; ++j) copy_lanes<1>(to + j * to_step + i, from + i * from_step + j);
}

// Channels at columns `wanted` of one row -> chunks of WIDTH of them, `to_chunk` from each other, and `to_column` from column to
// column; zero outside the image and beyond the last channel.
template <class Real, int WIDTH, class Element>
void pack_columns(Real* to, Index to_chunk, Index to_column, const Element* from, Index channel_step, Index column_step, Range wanted,
                  Index width, Index channels) {
  constexpr int LANES = lanes_of<Real>(WIDTH);
  using V = typename Vector<Real, LANES>::type;
  const Range inside = {least(most(wanted.from, 0), wanted.to), most(least(wanted.to, width), wanted.from)};
  const Index whole = channels / WIDTH, chunks = ceil_div(channels, WIDTH);
  to -= wanted.from * to_column;
  const auto clear = [&](Index chunk, Range columns) {
    for (Index column = columns.from; column < columns.to; ++column)
#pragma GCC unroll 4
      for (int lane = 0; lane < WIDTH; lane += LANES) store<V>(to + chunk * to_chunk + column * to_column + lane, V{});
  };
  for (Index chunk = 0; chunk < chunks; ++chunk) {
    clear(chunk, {wanted.from, chunk < whole ? inside.from : inside.to});
    clear(chunk, {inside.to, wanted.to});
  }
  const bool by_column = channel_step == 1;
  if (by_column) {  // in the order of memory
    for (Index column = inside.from; column < inside.to; ++column)
      for (Index chunk = 0; chunk < whole; ++chunk)
        copy_lanes<WIDTH>(to + chunk * to_chunk + column * to_column, from + column * column_step + chunk * WIDTH);
  }
  for (Index chunk = by_column ? whole : 0; chunk < chunks; ++chunk) {
    const Element* source = from + chunk * WIDTH * channel_step;
    Real* target = to + chunk * to_chunk;
    const Index lanes = least(WIDTH, channels - chunk * WIDTH);
    if (column_step == 1) {
      transpose(target + inside.from * to_column, to_column, source + inside.from, channel_step, lanes, inside.size());
    } else {
      for (Index lane = 0; lane < lanes; ++lane)
        for (Index column = inside.from; column < inside.to; ++column)
          target[column * to_column + lane] = widen(source[column * column_step + lane * channel_step]);
    }
  }
}

// The reverse, for columns that all lie inside.
template <class Real, int WIDTH, class Element>
void unpack_columns(Element* to, Index channel_step, Index column_step, const Real* from, Index chunk_step, Index columns,
                    Index channels) {
  const Index whole = channels / WIDTH, chunks = ceil_div(channels, WIDTH);
  const bool by_column = channel_step == 1;
  if (by_column) {
    for (Index column = 0; column < columns; ++column)
      for (Index chunk = 0; chunk < whole; ++chunk)
        copy_lanes<WIDTH>(to + column * column_step + chunk * WIDTH, from + chunk * chunk_step + column * WIDTH);
  }
  for (Index chunk = by_column ? whole : 0; chunk < chunks; ++chunk) {
    const Real* source = from + chunk * chunk_step;
    Element* target = to + chunk * WIDTH * channel_step;
    const Index lanes = least(WIDTH, channels - chunk * WIDTH);
    if (column_step == 1) {
      transpose(target, channel_step, source, WIDTH, columns, lanes);
    } else {
      for (Index lane = 0; lane < lanes; ++lane)
        for (Index column = 0; column < columns; ++column)
          narrow(source[column * WIDTH + lane], target[column * column_step + lane * channel_step]);
    }
  }
}

// Channels at all columns of one row -> [channel][to_step].
template <class Real, class Element>
void pack_planes(Real* to, Index to_step, const Element* from, Index channel_step, Index column_step, Index columns,
                 Index channels) {
  if (channel_step == 1) return transpose(to, to_step, from, column_step, columns, channels);
  for (Index channel = 0; channel < channels; ++channel) {
    Real* target = to + channel * to_step;
    const Element* row = from + channel * channel_step;
    if (column_step == 1) {
      copy_run(target, row, columns);
    } else {
      for (Index column = 0; column < columns; ++column) target[column] = widen(row[column * column_step]);
    }
  }
}

}  // namespace
