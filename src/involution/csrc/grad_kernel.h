// grad_kernel where the taps of an output lie next to one another, as they do in channels-last tensors, and where nothing else fits.

#pragma once

#include "dots.h"
#include "tasks.h"

namespace {

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

// Rows of x are packed into a ring, each once, when the first outputs come to it.
template <class Real, int LANES, class Element>
struct GradKernel : Alone {
  static constexpr bool IN_PAIRS = false;
  const Problem& p;
  const bool in_place, y_in_place;  // whether the loop writes where the gradients belong, and reads the outputs' where they are
  const Index outputs, groups;      // of a row of a task, at most
  const Index chunks, column;       // vectors of channels of a group; from one packed column to the next
  const Index x_columns, x_row, x_rows, x_depth, x_group;
  const Dots at;
  const RowOfDots<Real> row;

  GradKernel(const Problem& problem, const Tasks& all)
      : p(problem),
        in_place(std::is_same_v<Real, Element> && taps_in_one_run(p)),
        y_in_place(std::is_same_v<Real, Element> && p.y_stride[1] == 1 && p.channels % SUMMED<LANES> == 0),
        outputs(ceil_div(all.columns, all.column_blocks)),
        groups(ceil_div(all.groups, all.group_blocks)),
        chunks(ceil_div(p.channels, SUMMED<LANES>)),
        column(times(chunks, LANES)),
        x_columns(window(p, 2, Parts<LANES>(outputs).size)),
        x_row(times(x_columns, column)),
        x_rows(window(p, 1, least(ROWS_TOGETHER, ceil_div(all.rows, all.row_blocks)))),
        x_depth(times(x_row, x_rows)),
        x_group(times(times(x_columns, chunks, x_rows, p.kernel[0]) | 1, LANES)),  // odd, so that groups spread over the cache
        at(layout()),
        row(choose_row_of_dots<Real, LANES>(p, chunks)) {}

  Dots layout() const {
    return {p.kernel[0], p.kernel[1], p.kernel[2], p.stride[2], p.dilation[2], x_depth, times(p.dilation[1], x_row),
            y_in_place ? p.y_stride[4] : chunks * SUMMED<LANES>, in_place ? p.kernel_stride[7] : taps_of(p), chunks,
            taps_in_one_run(p) ? taps_of(p) * Index(sizeof(Element)) : 0};
  }

  struct Scratch {
    Real *x, *y, *taps, *room;
  };
  Scratch scratch(Arena& arena) const {
    return {arena.take<Real>(times(x_group, groups)), arena.take<Real>(y_in_place ? 0 : times(outputs, chunks, SUMMED<LANES>)),
            arena.take<Real>(in_place ? 0 : times(outputs, taps_of(p))), arena.take<Real>(column)};
  }

  // Some rows of outputs that all groups run on in turn, the first of which packs what they read.
  struct Rows {
    Range outs, lines[ROWS_TOGETHER];  // lines of the window that lie inside the image
    Index slots[ROWS_TOGETHER];        // where the first of these are in the ring
  };

  void run(const Task& task, const Scratch& s, Index) const {
    const Index first_row = task.rows.from * p.stride[1] - p.padding[1];
    const Range depths = taps_inside(p, 0, task.depth * p.stride[0] - p.padding[0], p.input[0]);
    const Parts<LANES> parts(task.columns.size());
    Index line = most(0, -first_row);  // the next to pack
    for (Index first = task.rows.from; first < task.rows.to; first += ROWS_TOGETHER) {
      Rows rows = {{first, least(first + ROWS_TOGETHER, task.rows.to)}, {}, {}};
      const Index lines = least(window(p, 1, rows.outs.to - task.rows.from), p.input[1] - first_row);
      for (; line < lines; ++line) pack_x(task, parts, depths, first_row, line, s);
      for (Index out = first; out < rows.outs.to; ++out) {
        Range& inside = rows.lines[out - first] = taps_inside(p, 1, out * p.stride[1] - p.padding[1], p.input[1]);
        if (inside.size() == 0) inside = {0, 0};
        rows.slots[out - first] = ((out - task.rows.from) * p.stride[1] + inside.from * p.dilation[1]) % x_rows * x_row;
      }
      for (Index group = task.groups.from; group < task.groups.to; ++group) run_group(task, group, rows, depths, s);
    }
  }

  void pack_x(const Task& task, const Parts<LANES>& parts, Range depths, Index first_row, Index line, const Scratch& s) const {
    const Index *step = p.x_stride, first_depth = task.depth * p.stride[0] - p.padding[0];
    for (Index depth = depths.from; depth < depths.to; ++depth)
      pack_parts<Real, LANES>(s.x + depth * x_depth + line % x_rows * x_row, x_group,
                              static_cast<const Element*>(p.x) + task.batch * step[0] + task.groups.from * p.channels * step[1] +
                                  (first_depth + depth * p.dilation[0]) * step[2] + (first_row + line) * step[3],
                              step[1], step[4], parts, p.stride[2], task.columns.from * p.stride[2] - p.padding[2],
                              window(p, 2, parts.size), p.input[2], task.groups.size(), p.channels);
  }

  void run_group(const Task& task, Index group, const Rows& rows, Range depths, const Scratch& s) const {
    const Index *step = p.kernel_stride, count = task.columns.size(), local = group - task.groups.from;
    Element* all = static_cast<Element*>(p.kernel_data) + task.batch * step[0] + task.depth * step[5] + task.columns.from * step[7];
    const Element* y = static_cast<const Element*>(p.y) + task.batch * p.y_stride[0] + group * p.channels * p.y_stride[1] +
                       task.depth * p.y_stride[2] + task.columns.from * p.y_stride[4];
    for (Index r = 0; r < rows.outs.size(); ++r) {
      Element* groups_of_row = all + (rows.outs.from + r) * step[6];
      const char* coming = reinterpret_cast<const char*>(groups_of_row + ROWS_TOGETHER * step[6]) + group * count * at.fetched;
      Real* taps = s.taps;
      if constexpr (std::is_same_v<Real, Element>) taps = in_place ? groups_of_row + group * step[1] : s.taps;
      const Element* y_row = y + (rows.outs.from + r) * p.y_stride[3];
      const Real* values = s.y;
      if constexpr (std::is_same_v<Real, Element>) values = y_in_place ? y_row : s.y;
      if (!y_in_place)
        pack_columns<Real, SUMMED<LANES>>(s.y, SUMMED<LANES>, at.y_column, y_row, p.y_stride[1], p.y_stride[4], {0, count}, count,
                                          p.channels);
      row(values, s.x + local * x_group + depths.from * x_depth, rows.slots[r], taps, count, depths, rows.lines[r], at, s.room, coming);
      if (!in_place) write_taps(groups_of_row + group * step[1], p, s.taps, count);
    }
  }
};

}  // namespace
