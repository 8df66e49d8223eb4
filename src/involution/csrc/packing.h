// Copies between tensors of any strides and the scratch that the loops run on.

#pragma once

#include <utility>

#include "elements.h"

namespace {

// One half of the elements of `a` and `b`, in turn.
template <int N, bool UPPER, class V, int... I>
inline V interleave(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(I % 2 * N + I / 2 + (UPPER ? N / 2 : 0))...>(a, b);
}

// to[j * to_step + i] = from[i * from_step + j], in blocks of N x N; the last block of a row or column overlaps the one before.
template <int N, class To, class From>
void transpose_blocks(To* to, Index to_step, const From* from, Index from_step, Index i_size, Index j_size) {
  using Real = std::common_type_t<decltype(widen(To{})), decltype(widen(From{}))>;
  using V = typename Vector<Real, N>::type;
  constexpr auto lanes = std::make_integer_sequence<int, N>{};
  for (Index i = 0; i < i_size; i += N) {
    for (Index j = 0; j < j_size; j += N) {
      const Index i_from = least(i, i_size - N), j_from = least(j, j_size - N);
      Real lane[N];
      V rows[N], mixed[N];
      for (int row = 0; row < N; ++row) {
        copy_lanes<N>(lane, from + (i_from + row) * from_step + j_from);
        rows[row] = load<V>(lane);
      }
      for (int stage = 1; stage < N; stage *= 2) {
        for (int row = 0; row < N / 2; ++row) {
          mixed[2 * row] = interleave<N, false>(rows[row], rows[row + N / 2], lanes);
          mixed[2 * row + 1] = interleave<N, true>(rows[row], rows[row + N / 2], lanes);
        }
        for (int row = 0; row < N; ++row) rows[row] = mixed[row];
      }
      for (int row = 0; row < N; ++row) {
        store<V>(lane, rows[row]);
        copy_lanes<N>(to + (j_from + row) * to_step + i_from, lane);
      }
    }
  }
}

// to[j * to_step + i] = from[i * from_step + j].
template <class To, class From>
void transpose(To* to, Index to_step, const From* from, Index from_step, Index i_size, Index j_size) {
  constexpr int LANES = VECTOR_BYTES / int(sizeof(widen(*from)));
  const Index smaller = least(i_size, j_size);
  if constexpr (LANES >= 16) {
    if (smaller >= 16) return transpose_blocks<16>(to, to_step, from, from_step, i_size, j_size);
  }
  if constexpr (LANES >= 8) {
    if (smaller >= 8) return transpose_blocks<8>(to, to_step, from, from_step, i_size, j_size);
  }
  if (smaller >= 4) return transpose_blocks<4>(to, to_step, from, from_step, i_size, j_size);
  for (Index i = 0; i < i_size; ++i)
    for (Index j = 0; j < j_size; ++j) copy_lanes<1>(to + j * to_step + i, from + i * from_step + j);
}

// Channels at columns `wanted` of one row -> [chunk][column][WIDTH], zero outside the image and beyond the last channel.
template <class Real, int WIDTH, class Element>
void pack_columns(Real* to, Index chunk_step, const Element* from, Index channel_step, Index column_step, Range wanted,
                  Index width, Index channels) {
  const Range inside = {least(most(wanted.from, 0), wanted.to), most(least(wanted.to, width), wanted.from)};
  const Index whole = channels / WIDTH, chunks = ceil_div(channels, WIDTH);
  for (Index chunk = 0; chunk < chunks; ++chunk) {
    Real* row = to + chunk * chunk_step;
    const Index before = chunk < whole ? inside.from - wanted.from : wanted.size();
    std::memset(row, 0, sizeof(Real) * WIDTH * before);
    std::memset(row + (inside.to - wanted.from) * WIDTH, 0, sizeof(Real) * WIDTH * (wanted.to - inside.to));
  }
  to -= wanted.from * WIDTH;
  const bool by_column = channel_step == 1;
  if (by_column) {  // in the order of memory
    for (Index column = inside.from; column < inside.to; ++column)
      for (Index chunk = 0; chunk < whole; ++chunk)
        copy_lanes<WIDTH>(to + chunk * chunk_step + column * WIDTH, from + column * column_step + chunk * WIDTH);
  }
  for (Index chunk = by_column ? whole : 0; chunk < chunks; ++chunk) {
    const Element* source = from + chunk * WIDTH * channel_step;
    Real* target = to + chunk * chunk_step;
    const Index lanes = least(WIDTH, channels - chunk * WIDTH);
    if (column_step == 1) {
      transpose(target + inside.from * WIDTH, WIDTH, source + inside.from, channel_step, lanes, inside.size());
    } else {
      for (Index lane = 0; lane < lanes; ++lane)
        for (Index column = inside.from; column < inside.to; ++column)
          target[column * WIDTH + lane] = widen(source[column * column_step + lane * channel_step]);
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
