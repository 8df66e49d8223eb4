// Forward and grad_x: lanes are channels of a group.

#pragma once

#include "products.h"
#include "tasks.h"
#include "tiles.h"

namespace {

// The taps of a row of outputs lie position by position, all groups together: a few rows at a time, so that they are read in
// the order of memory, while those of the rows to come are fetched; yet the packed rows of a group serve several outputs.
constexpr Index ROWS_TOGETHER = 2;

template <class Body>
inline void for_rows_and_groups(Range rows, Range groups, const Body& body) {
  for (Index first = rows.from; first < rows.to; first += ROWS_TOGETHER)
    for (Index group = groups.from; group < groups.to; ++group)
      for (Index row = first; row < least(first + ROWS_TOGETHER, rows.to); ++row) body(row, group);
}

// What forward and grad_x have in common: lanes are channels. `x_rows`, `x_columns` and `y_columns` are the most that the
// packed rows of a task can have.
template <bool FORWARD, class Real, int WIDTH, class Element>
struct ByChannel : Alone {
  const Problem& p;
  const Index chunks, x_depths, x_columns, y_columns, x_row, x_depth, x_chunk, x_groups;
  const bool y_in_place, generates_taps, copies_taps;
  const Index y_chunk;
  const Index pixels;  // of a task, in whole vectors; an odd number of them, so that the rows of a plane spread over the cache
  const Layout at;
  const Row<Real> row;

  static constexpr int WIDEST = VECTOR_BYTES / int(sizeof(Real));
  static constexpr bool IN_PAIRS = sizeof(Real) == 4;  // whether WIDTH may be two vectors

  ByChannel(const Problem& problem, Index groups, Index x_rows, Index columns, Index y_rows, Index outputs)
      : p(problem),
        chunks(ceil_div(p.channels, WIDTH)),
        x_depths(FORWARD ? p.kernel[0] : 1),
        x_columns(columns),
        y_columns(outputs),
        x_row(times(x_columns, WIDTH)),
        x_depth(times(x_row, x_rows)),
        x_chunk(times(x_depth, x_depths)),
        x_groups(groups),
        y_in_place(std::is_same_v<Real, Element> && p.y_stride[1] == 1 && p.channels % WIDTH == 0),
        generates_taps(p.weight != nullptr),
        copies_taps(!generates_taps && !taps_in_place<Real, Element>(p)),
        y_chunk(y_in_place ? WIDTH : y_columns * WIDTH),
        pixels(times(ceil_div(times(y_rows, y_columns), WIDEST) | 1, WIDEST)),
        at(layout()),
        row(choose_row<FORWARD, Real, WIDTH>(at, !generates_taps && taps_innermost(p))) {}

  Layout layout() const {
    Layout result = {p.kernel[2], p.stride[2], p.dilation[2], x_depth, p.dilation[1] * x_row, y_in_place ? p.y_stride[4] : WIDTH,
                     p.kernel_stride[2], p.kernel_stride[3], p.kernel_stride[4], p.kernel_stride[7], 0};
    if (copies_taps) {
      result.tap_column = taps_innermost(p) ? 1 : y_columns;
      result.tap_row = p.kernel[2] * result.tap_column;
      result.tap_depth = p.kernel[1] * result.tap_row;
      result.tap_output = taps_innermost(p) ? p.kernel[0] * result.tap_depth : 1;
    }
    if (generates_taps) {
      result.tap_output = 1;
      result.tap_column = pixels;
      result.tap_row = times(p.kernel[2], pixels);
      result.tap_depth = times(p.kernel[1], result.tap_row);
    } else if (taps_in_one_run(p)) result.fetched = taps_of(p) * Index(sizeof(Element)) / chunks;
    return result;
  }

  struct Scratch {
    Real *x, *y, *taps, *features;
  };
  Scratch scratch(Arena& arena) const {
    const Index taps = taps_of(p);
    return {arena.take<Real>(times(x_chunk, x_groups, chunks)),
            arena.take<Real>(y_in_place ? 0 : times(y_columns, chunks, WIDTH)),
            arena.take<Real>(generates_taps ? times(pixels, taps) : copies_taps ? times(y_columns, taps) : 0),
            arena.take<Real>(generates_taps ? times(pixels, p.reduced) : 0)};
  }

  // Calls body(first group, channels) for runs of channels that fill whole vectors: all groups at once, or each alone.
  template <class Body>
  void for_each_run(Range groups, const Body& body) const {
    if (p.channels % WIDTH == 0) return body(groups.from, groups.size() * p.channels);
    for (Index group = groups.from; group < groups.to; ++group) body(group, p.channels);
  }

  // Taps along `axis` that lie in [0, limit) when the first lies at `position`.
  Range taps_inside(int axis, Index position, Index limit) const {
    const Index step = p.dilation[axis], from = most(0, ceil_div(-position, step));
    return {from, most(from, least(p.kernel[axis], floor_div(limit - 1 - position, step) + 1))};
  }
  static Element* row_of(void* data, const Index* step, Index batch, Index channel, Index depth, Index row) {
    return static_cast<Element*>(data) + batch * step[0] + channel * step[1] + depth * step[2] + row * step[3];
  }

  // The features of the outputs `rows` x `columns`, [channel][pixel]. Returns how many vectors of pixels there are.
  Index pack_features(Real* to, Index batch, Index depth, Range rows, Range columns) const {
    const Index used = rows.size() * columns.size(), vectors = ceil_div(used, WIDEST);
    const bool one_run = p.features_stride[3] == columns.size() * p.features_stride[4];  // rows follow one another like columns
    const Index runs = one_run ? 1 : rows.size(), length = used / most(1, runs);
    for (Index run = 0; run < runs; ++run)
      pack_planes(to + run * length, pixels,
                          row_of(p.features, p.features_stride, batch, 0, depth, rows.from + run) + columns.from * p.features_stride[4],
                          p.features_stride[1], p.features_stride[4], length, p.reduced);
    for (Index channel = 0; channel < p.reduced; ++channel)
      std::memset(to + channel * pixels + used, 0, sizeof(Real) * (vectors * WIDEST - used));
    return vectors;
  }

  // Runs the loops on one row of outputs with the kernel that is given: see `run_row`.
  void run_row_of_kernel(Index batch, Index group, Index depth, Index out, Range outputs, Range depths, Range rows, Element* y, Real* x,
               const Scratch& s) const {
    const Index* step = p.kernel_stride;
    const Element* all_groups = static_cast<const Element*>(p.kernel_data) + batch * step[0] + depth * step[5] + out * step[6];
    const Element* kernel = all_groups + group * step[1];
    const char* coming = reinterpret_cast<const char*>(all_groups + ROWS_TOGETHER * step[6] + outputs.from * step[7]) +
                         group * outputs.size() * at.fetched;
    const Real* taps = s.taps;
    if constexpr (std::is_same_v<Real, Element>) taps = kernel + outputs.from * step[7];
    if (copies_taps) {
      copy_taps(s.taps, at, p, kernel, depths, outputs);
      taps = s.taps;
    }
    run_row(outputs, taps, coming, depths, rows, y, x, s);
  }

  // Runs the loops on one row of outputs: `y` of a group, lines (`depths` x `rows`) of the window, the first of them at `x`;
  // `taps` of the first output, memory to prefetch.
  void run_row(Range outputs, const Real* taps, const char* coming, Range depths, Range rows, Element* y, Real* x, const Scratch& s) const {
    taps += depths.from * at.tap_depth + rows.from * at.tap_row;
    Real* values = s.y;
    if constexpr (std::is_same_v<Real, Element>) values = y_in_place ? y : s.y;
    if (!FORWARD && !y_in_place)
      pack_columns<Real, WIDTH>(s.y, y_chunk, y, p.y_stride[1], p.y_stride[4], {0, outputs.size()}, outputs.size(), p.channels);
    for (Index chunk = 0; chunk < chunks; ++chunk)
      row(values + chunk * y_chunk, x + chunk * x_chunk, taps, outputs.size(), depths.size(), rows.size(), at, coming);
    if (FORWARD && !y_in_place)
      unpack_columns<Real, WIDTH>(y, p.y_stride[1], p.y_stride[4], s.y, y_chunk, outputs.size(), p.channels);
  }
};

template <class Real, int WIDTH, class Element>
struct Forward : ByChannel<true, Real, WIDTH, Element> {
  using Base = ByChannel<true, Real, WIDTH, Element>;
  using Base::p;

  Forward(const Problem& p, const Tasks& all)
      : Base(p, ceil_div(all.groups, all.group_blocks),
             (ceil_div(all.rows, all.row_blocks) - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1,
             (ceil_div(all.columns, all.column_blocks) - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1,
             ceil_div(all.rows, all.row_blocks), ceil_div(all.columns, all.column_blocks)) {}

  void run(const Task& task, const typename Base::Scratch& s, Index) const {
    const Index first_depth = task.depth * p.stride[0] - p.padding[0];
    const Index first_row = task.rows.from * p.stride[1] - p.padding[1];
    const Index first_column = task.columns.from * p.stride[2] - p.padding[2];
    const Index rows = (task.rows.size() - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
    const Range depths = this->taps_inside(0, first_depth, p.input[0]);
    const auto packed = [&](Index group) { return s.x + (group - task.groups.from) * this->chunks * this->x_chunk; };
    for (Index depth = depths.from; depth < depths.to; ++depth)
      for (Index row = most(0, -first_row); row < least(rows, p.input[1] - first_row); ++row)
        this->for_each_run(task.groups, [&](Index group, Index channels) {
          pack_columns<Real, WIDTH>(packed(group) + depth * this->x_depth + row * this->x_row, this->x_chunk,
                                    Base::row_of(p.x, p.x_stride, task.batch, group * p.channels,
                                                 first_depth + depth * p.dilation[0], first_row + row),
                                    p.x_stride[1], p.x_stride[4], {first_column, first_column + this->x_columns}, p.input[2], channels);
        });
    const auto run_out = [&](Index out, Index group, const auto& run_lines) {
      const Range lines = this->taps_inside(1, out * p.stride[1] - p.padding[1], p.input[1]);
      const Index row = (out - task.rows.from) * p.stride[1] + lines.from * p.dilation[1];
      run_lines(lines, Base::row_of(p.y, p.y_stride, task.batch, group * p.channels, task.depth, out) + task.columns.from * p.y_stride[4],
                packed(group) + depths.from * this->x_depth + row * this->x_row);
    };
    if (!this->generates_taps) {
      for_rows_and_groups(task.rows, task.groups, [&](Index out, Index group) {
        run_out(out, group, [&](Range lines, Element* y, Real* x) {
          this->run_row_of_kernel(task.batch, group, task.depth, out, task.columns, depths, lines, y, x, s);
        });
      });
      return;
    }
    const Index vectors = this->pack_features(s.features, task.batch, task.depth, task.rows, task.columns);
    for (Index group = task.groups.from; group < task.groups.to; ++group) {
      span<Real, Base::WIDEST>(s.taps, p, group, {0, taps_of(p)}, s.features, vectors, this->pixels);
      for (Index out = task.rows.from; out < task.rows.to; ++out)
        run_out(out, group, [&](Range lines, Element* y, Real* x) {
          this->run_row(task.columns, s.taps + (out - task.rows.from) * task.columns.size(), nullptr, depths, lines, y, x, s);
        });
    }
  }
};

// Each block of x gathers what all outputs that read it scatter into it; here `y` is the output's gradient, which is read.
template <class Real, int WIDTH, class Element>
struct GradX : ByChannel<false, Real, WIDTH, Element> {
  using Base = ByChannel<false, Real, WIDTH, Element>;
  using Base::p;

  GradX(const Problem& p, const Tasks& all)
      : Base(p, ceil_div(all.groups, all.group_blocks), ceil_div(all.rows, all.row_blocks),
             ceil_div(all.columns, all.column_blocks) + 2 * (p.kernel[2] - 1) * p.dilation[2],
             (ceil_div(all.rows, all.row_blocks) + (p.kernel[1] - 1) * p.dilation[1]) / p.stride[1] + 1,
             (ceil_div(all.columns, all.column_blocks) + (p.kernel[2] - 1) * p.dilation[2]) / p.stride[2] + 1) {}

  // Outputs along `axis` of which some tap reads a position in `positions`.
  Range readers(int axis, Range positions) const {
    const Index reach = (p.kernel[axis] - 1) * p.dilation[axis];
    const Index from = most(0, ceil_div(positions.from + p.padding[axis] - reach, p.stride[axis]));
    const Index to = least(p.output[axis], floor_div(positions.to - 1 + p.padding[axis], p.stride[axis]) + 1);
    return {from, most(from, to)};
  }

  void run(const Task& task, const typename Base::Scratch& s, Index) const {
    const Range outs = readers(1, task.rows), outputs = readers(2, task.columns);
    const Index reach = (p.kernel[2] - 1) * p.dilation[2];  // the packed rows begin this far before the block
    const Index first_column = outputs.from * p.stride[2] - p.padding[2] - (task.columns.from - reach);
    const auto packed = [&](Index group) { return s.x + (group - task.groups.from) * this->chunks * this->x_chunk; };
    std::memset(s.x, 0, sizeof(Real) * task.groups.size() * this->chunks * this->x_chunk);
    for (Index tap = 0; tap < p.kernel[0]; ++tap) {
      const Index reads = task.depth + p.padding[0] - tap * p.dilation[0], depth = floor_div(reads, p.stride[0]);
      if (reads % p.stride[0] != 0 || depth < 0 || depth >= p.output[0] || outputs.size() == 0) continue;
      const Range depths = {tap, tap + 1};
      const auto run_out = [&](Index out, Index group, const auto& run_lines) {
        const Index position = out * p.stride[1] - p.padding[1] - task.rows.from;
        const Range lines = this->taps_inside(1, position, task.rows.size());
        if (lines.size() == 0) return;
        run_lines(lines, Base::row_of(p.y, p.y_stride, task.batch, group * p.channels, depth, out) + outputs.from * p.y_stride[4],
                  packed(group) + (position + lines.from * p.dilation[1]) * this->x_row + first_column * WIDTH);
      };
      if (!this->generates_taps) {
        for_rows_and_groups(outs, task.groups, [&](Index out, Index group) {
          run_out(out, group, [&](Range lines, Element* y, Real* x) {
            this->run_row_of_kernel(task.batch, group, depth, out, outputs, depths, lines, y, x, s);
          });
        });
        continue;
      }
      const Index vectors = this->pack_features(s.features, task.batch, depth, outs, outputs), of_depth = p.kernel[1] * p.kernel[2];
      for (Index group = task.groups.from; group < task.groups.to; ++group) {
        span<Real, Base::WIDEST>(s.taps, p, group, {tap * of_depth, (tap + 1) * of_depth}, s.features, vectors, this->pixels);
        for (Index out = outs.from; out < outs.to; ++out)
          run_out(out, group, [&](Range lines, Element* y, Real* x) {
            this->run_row(outputs, s.taps + (out - outs.from) * outputs.size(), nullptr, depths, lines, y, x, s);
          });
      }
    }
    for (Index row = 0; row < task.rows.size(); ++row)
      this->for_each_run(task.groups, [&](Index group, Index channels) {
        unpack_columns<Real, WIDTH>(Base::row_of(p.x, p.x_stride, task.batch, group * p.channels, task.depth, task.rows.from + row) +
                                        task.columns.from * p.x_stride[4],
                                    p.x_stride[1], p.x_stride[4], packed(group) + row * this->x_row + reach * WIDTH, this->x_chunk,
                                    task.columns.size(), channels);
      });
  }
};

}  // namespace
