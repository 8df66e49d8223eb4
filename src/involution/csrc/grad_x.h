// grad_x: each output adds to its window.

#pragma once

#include "by_channel.h"

namespace {

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
    std::memset(s.x, 0, sizeof(Real) * task.groups.size() * this->chunks * this->x_chunk);
    Index done = 0;  // rows of the block
    const auto finish = [&](Index rows) {
      for (; done < least(rows, task.rows.size()); ++done) unpack(task, done, s);
    };
    // Blocks of rows begin where they would in any other task, so that sums over depths and rows have one order.
    const Index together = this->together, begin = this->generates_taps ? outs.from : outs.from / together * together;
    for (Index block = begin; block < outs.to; block += together) {
      const Range these = {most(block, outs.from), least(block + together, outs.to)};
      finish(these.from * p.stride[1] - p.padding[1] - task.rows.from);  // outputs to come reach none of those before
      scatter(task, these, outputs, s);
    }
    finish(task.rows.size());
  }

  Real* packed(const Task& task, Index group, const typename Base::Scratch& s) const {
    return s.x + (group - task.groups.from) * this->chunks * this->x_chunk;
  }
  Index reach() const { return (p.kernel[2] - 1) * p.dilation[2]; }  // the packed rows begin this far before the block

  void scatter(const Task& task, Range outs, Range outputs, const typename Base::Scratch& s) const {
    const Index first_column = outputs.from * p.stride[2] - p.padding[2] - (task.columns.from - reach());
    for (Index tap = 0; tap < p.kernel[0]; ++tap) {
      const Index reads = task.depth + p.padding[0] - tap * p.dilation[0], depth = floor_div(reads, p.stride[0]);
      if (reads % p.stride[0] != 0 || depth < 0 || depth >= p.output[0] || outputs.size() == 0) continue;
      for (Index out = outs.from; out < outs.to; ++out) {
        const Index position = out * p.stride[1] - p.padding[1] - task.rows.from;
        const Range lines = taps_inside(p, 1, position, task.rows.size());
        this->find_lines(s, out - outs.from, {tap, tap + 1}, lines, this->slot(position + lines.from * p.dilation[1]));
      }
      const Index vectors = this->pack_features(s.features, task.batch, depth, outs, outputs), of_depth = p.kernel[1] * p.kernel[2];
      for (Index group = task.groups.from; group < task.groups.to; ++group) {
        this->generate(s, group, {tap * of_depth, (tap + 1) * of_depth}, vectors);
        for (Index out = outs.from; out < outs.to; ++out)
          if (s.of_row[out - outs.from].size() > 0)
            this->run_row({task.batch, group, depth, out, outs, outputs}, {tap, tap + 1},
                          packed(task, group, s) + first_column * WIDTH, s);
      }
    }
  }

  // A row of the block to where it belongs, and room for another.
  void unpack(const Task& task, Index row, const typename Base::Scratch& s) const {
    this->for_each_run(task.groups, [&](Index group, Index channels) {
      Real* from = packed(task, group, s) + this->slot(row);
      unpack_columns<Real, WIDTH>(Base::row_of(p.x, p.x_stride, task.batch, group * p.channels, task.depth, task.rows.from + row) +
                                      task.columns.from * p.x_stride[4],
                                  p.x_stride[1], p.x_stride[4], from + reach() * WIDTH, this->x_chunk, task.columns.size(), channels);
      for (Index chunk = 0; row + this->x_rows < task.rows.size() && chunk < ceil_div(channels, WIDTH); ++chunk)
        std::memset(from + chunk * this->x_chunk, 0, sizeof(Real) * this->x_row);
    });
  }
};

}  // namespace
