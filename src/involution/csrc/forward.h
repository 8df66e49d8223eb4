// The forward pass: each output reads its window.

#pragma once

#include "by_channel.h"

namespace {

template <class Real, int WIDTH, class Element>
struct Forward : ByChannel<true, Real, WIDTH, Element> {
  using Base = ByChannel<true, Real, WIDTH, Element>;
  using Base::p;

  Forward(const Problem& p, const Tasks& all)
      : Base(p, ceil_div(all.groups, all.group_blocks), window(p, 1, ceil_div(all.rows, all.row_blocks)),
             window(p, 2, ceil_div(all.columns, all.column_blocks)), ceil_div(all.rows, all.row_blocks),
             ceil_div(all.columns, all.column_blocks)) {}

  void run(const Task& task, const typename Base::Scratch& s, Index) const {
    const Index first_depth = task.depth * p.stride[0] - p.padding[0];
    const Index first_row = task.rows.from * p.stride[1] - p.padding[1];
    const Index first_column = task.columns.from * p.stride[2] - p.padding[2];
    const Range depths = taps_inside(p, 0, first_depth, p.input[0]);
    const auto packed = [&](Index group, Index depth) {
      return s.x + (group - task.groups.from) * this->chunks * this->x_chunk + depth * this->x_depth;
    };
    Index row = most(0, -first_row);  // the next to pack
    for (Index first = task.rows.from; first < task.rows.to; first += this->together) {
      const Range outs = {first, least(first + this->together, task.rows.to)};
      const Index rows = least(window(p, 1, outs.to - task.rows.from), p.input[1] - first_row);
      for (; row < rows; ++row)
        for (Index depth = depths.from; depth < depths.to; ++depth)
          this->for_each_run(task.groups, [&](Index group, Index channels) {
            pack_columns<Real, WIDTH>(packed(group, depth) + this->slot(row), this->x_chunk, WIDTH,
                                      Base::row_of(p.x, p.x_stride, task.batch, group * p.channels,
                                                   first_depth + depth * p.dilation[0], first_row + row),
                                      p.x_stride[1], p.x_stride[4], {first_column, first_column + this->x_columns}, p.input[2], channels);
          });
      for (Index out = outs.from; out < outs.to; ++out) {
        const Range lines = taps_inside(p, 1, out * p.stride[1] - p.padding[1], p.input[1]);
        this->find_lines(s, out - outs.from, depths, lines,
                         this->slot((out - task.rows.from) * p.stride[1] + lines.from * p.dilation[1]));
      }
      const Index vectors = this->pack_features(s.features, task.batch, task.depth, outs, task.columns);
      for (Index group = task.groups.from; group < task.groups.to; ++group) {
        this->generate(s, group, {0, taps_of(p)}, vectors);
        for (Index out = outs.from; out < outs.to; ++out)
          this->run_row({task.batch, group, task.depth, out, outs, task.columns}, depths, packed(group, depths.from), s);
      }
    }
  }
};

}  // namespace
