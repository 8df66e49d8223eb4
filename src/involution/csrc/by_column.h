// What grad_span and grad_planes share: the gradient of the kernel where lanes are neighbouring columns of outputs.

#pragma once

#include "packing.h"
#include "tasks.h"

namespace {

// The gradients of TAPS taps of a line at ROWS rows of outputs and LANES columns: sums over the channels of a group. An input is
// read once for all rows, of which each sees it as a tap of the line before: `taps_next` is from a row's taps to the next row's.
// UNIT: taps lie next to each other, else at `offsets`. Of the columns, the first `stored` are.
template <class Real, int LANES, int ROWS, int TAPS, bool UNIT>
inline void tile_of_taps(Real* taps, Index tap_step, Index taps_next, const Real* y, Index y_channel, Index y_row, const Real* x,
                         Index x_channel, const Index* offsets, Index channels, Index stored) {
  using V = typename Vector<Real, LANES>::type;
  V sums[ROWS][TAPS] = {};
#pragma GCC unroll 4
  for (Index channel = 0; channel < channels; ++channel) {
    V grads[ROWS];
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) grads[row] = load<V>(y + channel * y_channel + row * y_row);
#pragma GCC unroll 8
    for (int t = 0; t < TAPS; ++t) {
      const V value = load<V>(x + channel * x_channel + (UNIT ? t : offsets[t]));
#pragma GCC unroll 4
      for (int row = 0; row < ROWS; ++row) sums[row][t] += grads[row] * value;
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
    for (int t = 0; t < TAPS; ++t) {
      Real* to = taps + row * taps_next + t * tap_step;
      if (stored >= LANES) store<V>(to, sums[row][t]);
      else store_first<LANES>(to, sums[row][t], stored);
    }
}

// Packed rows of x lie [channel][phase][column / stride], phase = column mod stride, so that the inputs of neighbouring outputs
// are neighbours for any stride; rows of the output's gradient [channel][column]. Both are zero outside the image; those of x are
// a ring.
template <class Real, int LANES, class Element>
struct ByColumn {
  static constexpr bool LANES_ARE_CHANNELS = false, MANY_REGISTERS = sizeof(Real) * LANES == 64;
  const Problem& p;
  const bool unit;           // taps of a line lie next to each other
  const Index together;      // rows of outputs that share what they read
  const bool writes_memory;  // where the gradients are not in cache
  const Index channels, x_rows, y_rows, y_channel, y_row, x_columns, x_phase, x_channel, x_row, x_depth;  // the most of a task
  const Index at_once[3];  // taps of a line, where they are computed at one, two or three rows of outputs

  // `rows` of outputs are packed at the same time, with the rows of x that they read.
  ByColumn(const Problem& problem, const Tasks& all, Index rows, bool to_memory)
      : p(problem),
        unit(p.stride[2] == 1 && p.dilation[2] == 1),
        together(rows_together(p)),
        writes_memory(to_memory),
        channels(times(ceil_div(all.groups, all.group_blocks), p.channels)),
        x_rows(window(p, 1, least(rows, ceil_div(all.rows, all.row_blocks)))),
        y_rows(least(rows, ceil_div(all.rows, all.row_blocks))),
        y_channel(most(LANES, ceil_div(all.columns, all.column_blocks))),
        y_row(spread(times(channels, y_channel), times(p.channels, y_channel))),
        x_columns(most(window(p, 2, y_channel), p.padding[2] + LANES)),
        x_phase(ceil_div(x_columns, p.stride[2])),
        x_channel(times(x_phase, p.stride[2])),
        x_row(spread(times(channels, x_channel), times(p.channels, x_channel))),
        x_depth(times(x_rows, x_row)),
        at_once{taps_at_once(1), taps_at_once(2), taps_at_once(3)} {}

  static Index rows_together(const Problem& p) { return p.stride[1] == 1 && p.dilation[1] == 1 ? 3 : 1; }

  // So much from row to row that those of one group, of `part` elements each, follow one another in the sets of a cache.
  static Index spread(Index row, Index part) {
    constexpr Index SETS = 4096 / sizeof(Real);
    return times(ceil_div(row, SETS), SETS) + part;
  }

  // Taps of a line at a time, at `rows` rows at once: as many as there are registers for, in parts of about the same length,
  // since few sums wait for one another.
  static constexpr int most_at_once(Index rows) { return MANY_REGISTERS || rows == 1 ? 8 : rows == 2 ? 6 : 4; }
  Index taps_at_once(Index rows) const { return ceil_div(p.kernel[2], ceil_div(p.kernel[2], most_at_once(rows))); }

  struct Packed {
    Real *x, *y;
    Index* offsets;  // of each tap of a line in a packed row
  };
  Packed packed(Arena& arena) const {
    return {arena.take<Real>(times(p.kernel[0], x_depth)), arena.take<Real>(times(y_rows, y_row)), arena.take<Index>(p.kernel[2])};
  }
  void clear(const Packed& s) const {
    std::memset(s.x, 0, sizeof(Real) * p.kernel[0] * x_depth);
    std::memset(s.y, 0, sizeof(Real) * y_rows * y_row);
    for (Index t = 0; t < p.kernel[2]; ++t)
      s.offsets[t] = t * p.dilation[2] % p.stride[2] * x_phase + t * p.dilation[2] / p.stride[2];
  }

  // The taps that lie inside the image.
  Range depths_inside(const Task& task) const { return taps_inside(p, 0, task.depth * p.stride[0] - p.padding[0], p.input[0]); }
  Range lines_inside(Index out) const { return taps_inside(p, 1, out * p.stride[1] - p.padding[1], p.input[1]); }

  // Columns from `first` on of one row, of those inside the image, to [channel][phase][column / stride].
  static void pack_row(Real* to, const Element* from, const Index* step, Index first, Index stride, Index phase, Index width,
                       Index channels) {
    const Index wanted = phase * stride;
    const Range inside = {least(most(0, -first), wanted), most(0, least(wanted, width - first))};
    from += (first + inside.from) * step[4];
    if (stride > 1) {
      for (Index channel = 0; channel < channels; ++channel)
        for (Index column = inside.from; column < inside.to; ++column)
          to[(channel * stride + column % stride) * phase + column / stride] =
              widen(from[(column - inside.from) * step[4] + channel * step[1]]);
      return;
    }
    to += inside.from;
    if constexpr (LANES >= 4)
      if (step[1] == 1 && channels >= LANES) {
        for (Index column = 0; column < inside.size(); column += LANES) {
          const Index begin = most(0, least(column, inside.size() - LANES));
          for (Index channel = 0; channel < channels; channel += LANES) {
            const Index c = least(channel, channels - LANES);
#pragma GCC unroll 16
            for (int next = 0; next < LANES; ++next) __builtin_prefetch(from + (begin + LANES + next) * step[4] + c);
            transpose_block<LANES>(to + c * wanted + begin, wanted, from + begin * step[4] + c, step[4], inside.size());
          }
        }
        return;
      }
    pack_planes(to, wanted, from, step[1], step[4], inside.size(), channels);
  }

  // The outputs `outs`, and what they read of the rows of x from `done` on. Returns the first row of x that they do not read.
  Index pack(const Task& task, const Packed& s, Range outs, Index done) const {
    const Index count = task.groups.size() * p.channels, first_channel = task.groups.from * p.channels;
    const Element* y = static_cast<const Element*>(p.y) + task.batch * p.y_stride[0] + first_channel * p.y_stride[1] +
                       task.depth * p.y_stride[2];
    for (Index out = outs.from; out < outs.to; ++out)
      pack_row(s.y + (out - outs.from) * y_row, y + out * p.y_stride[3], p.y_stride, task.columns.from, 1, y_channel, task.columns.to,
               count);
    const Range depths = depths_inside(task);
    const Element* x = static_cast<const Element*>(p.x) + task.batch * p.x_stride[0] + first_channel * p.x_stride[1] +
                       (task.depth * p.stride[0] - p.padding[0]) * p.x_stride[2];
    const Index first_line = task.rows.from * p.stride[1] - p.padding[1], reach = (p.kernel[1] - 1) * p.dilation[1] + 1;
    const Index end = least(p.input[1], (outs.to - 1) * p.stride[1] - p.padding[1] + reach);
    for (Index line = most(done, outs.from * p.stride[1] - p.padding[1]); line < end; ++line)
      for (Index k = depths.from; k < depths.to; ++k)
        pack_row(s.x + k * x_depth + (line - first_line) % x_rows * x_row,
                 x + k * p.dilation[0] * p.x_stride[2] + line * p.x_stride[3], p.x_stride,
                 task.columns.from * p.stride[2] - p.padding[2], p.stride[2], x_phase, p.input[2], count);
    return most(done, end);
  }

  // The gradients of all taps of a group at `outs`, at most `together` rows of outputs, packed from the row `packed` on. In the cache,
  // a row that is shorter than LANES is written as LANES, and what is too much overwritten by the next row.
  void taps_of_rows(const Task& task, const Packed& s, Index packed, Index group, Range outs, Real* to, Index tap_step,
                    Index row_step) const {
    const Range depths = depths_inside(task);
    const Index first_channel = (group - task.groups.from) * p.channels, first = outs.from - task.rows.from;
    const Real* y = s.y + (outs.from - packed) * y_row + first_channel * y_channel;
    for (Index k = depths.from; k < depths.to; ++k) {
      const Real* x = s.x + k * x_depth + first_channel * x_channel;
      Index line = outs.from * p.stride[1] - p.padding[1], slot = first * p.stride[1] % x_rows;
      for (Index position = 0; position < outs.size() - 1 + p.kernel[1]; ++position, line += p.dilation[1], slot += p.dilation[1]) {
        if (slot >= x_rows) slot -= x_rows;
        if (line < 0 || line >= p.input[1]) continue;
        const Range rows = {most(0, position - p.kernel[1] + 1), least(outs.size(), position + 1)};
        Real* taps = to + rows.from * row_step + (k * p.kernel[1] + position - rows.from) * p.kernel[2] * tap_step;
        const auto run = [&](auto many) {
          const Real *grads = y + rows.from * y_row, *values = x + slot * x_row;
          if (unit) line_of_taps<many, true>(task.columns.size(), taps, tap_step, row_step, grads, values, s.offsets);
          else line_of_taps<many, false>(task.columns.size(), taps, tap_step, row_step, grads, values, s.offsets);
        };
        if (rows.size() == 3) run(std::integral_constant<int, 3>{});
        else if (rows.size() == 2) run(std::integral_constant<int, 2>{});
        else run(std::integral_constant<int, 1>{});
      }
    }
    clear_outside(task, outs, to, tap_step, row_step);
  }

  // Of one line of the window, at ROWS rows and all columns, LANES at a time; the last ones overlap those before.
  template <int ROWS, bool UNIT>
  void line_of_taps(Index columns, Real* taps, Index tap_step, Index row_step, const Real* y, const Real* x, const Index* offsets) const {
    const Index size = at_once[ROWS - 1], all = p.kernel[2], taps_next = row_step - all * tap_step;
    for (Index first = 0; first < all; first += size, taps += size * tap_step, offsets += size, x += UNIT ? size : 0)
      for (Index column = 0; column < columns; column += LANES) {
        const Index begin = most(0, least(column, columns - LANES));
        part_of_line<ROWS, most_at_once(ROWS), UNIT>(least(size, all - first), taps + begin, tap_step, taps_next, y + begin, x + begin,
                                                     offsets, writes_memory ? columns : LANES);
      }
  }
  template <int ROWS, int TAPS, bool UNIT>
  void part_of_line(Index size, Real* taps, Index tap_step, Index taps_next, const Real* y, const Real* x, const Index* offsets,
                    Index stored) const {
    if constexpr (TAPS > 1)
      if (size < TAPS) return part_of_line<ROWS, TAPS - 1, UNIT>(size, taps, tap_step, taps_next, y, x, offsets, stored);
    if (writes_memory)  // what the next line will write
      for (int row = 0; row < ROWS; ++row)
        for (int t = 0; t < TAPS; ++t) __builtin_prefetch(taps + row * taps_next + (p.kernel[2] + t) * tap_step, 1);
    tile_of_taps<Real, LANES, ROWS, TAPS, UNIT>(taps, tap_step, taps_next, y, y_channel, y_row, x, x_channel, offsets, p.channels, stored);
  }

  // Zeros to the gradients of the taps of lines outside the image.
  void clear_outside(const Task& task, Range outs, Real* to, Index tap_step, Index row_step) const {
    const Range depths = depths_inside(task);
    for (Index out = outs.from; out < outs.to; ++out, to += row_step) {
      const Range lines = lines_inside(out);
      for (Index line = 0; line < p.kernel[0] * p.kernel[1]; ++line)
        if (!depths.has(line / p.kernel[1]) || !lines.has(line % p.kernel[1]))
          for (Index t = 0; t < p.kernel[2]; ++t)
            std::memset(to + (line * p.kernel[2] + t) * tap_step, 0, sizeof(Real) * task.columns.size());
    }
  }
};

}  // namespace
