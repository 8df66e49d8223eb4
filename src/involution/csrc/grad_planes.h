// grad_kernel of a kernel whose columns lie next to each other, as they do in contiguous tensors.

#pragma once

#include "by_column.h"

namespace {

// Whether the loops can write the gradients where they belong: at least half a vector of them, and taps with one step between them.
inline bool taps_in_planes(const Problem& p) {
  const Index* step = p.kernel_stride + 2;
  return (p.dtype == FLOAT32 || p.dtype == FLOAT64) && step[5] == 1 && p.output[2] >= 4 &&
         (p.kernel[1] == 1 || step[1] == p.kernel[2] * step[2]) &&
         (p.kernel[0] == 1 || step[0] == p.kernel[1] * p.kernel[2] * step[2]);
}

template <class Real, int LANES, class Element>
struct GradPlanes : ByColumn<Real, LANES, Element>, Alone {
  using Base = ByColumn<Real, LANES, Element>;
  using Base::p;
  using Scratch = typename Base::Packed;

  GradPlanes(const Problem& problem, const Tasks& all) : Base(problem, all, Base::rows_together(problem), true) {}

  Scratch scratch(Arena& arena) const { return Base::packed(arena); }

  void run(const Task& task, const Scratch& s, Index) const {
    Base::clear(s);
    const Index *step = p.kernel_stride, blocks = ceil_div(task.rows.size(), this->together);
    Real* to = static_cast<Real*>(p.kernel_data) + task.batch * step[0] + task.depth * step[5] + task.columns.from;
    Index done = 0;  // rows of x that are packed
    for (Index block = 0; block < blocks; ++block) {
      const Range some = part(task.rows.size(), blocks, block), outs = {task.rows.from + some.from, task.rows.from + some.to};
      done = this->pack(task, s, outs, done);
      for (Index group = task.groups.from; group < task.groups.to; ++group)
        this->taps_of_rows(task, s, outs.from, group, outs, to + group * step[1] + outs.from * step[6], step[4], step[6]);
    }
  }
};

}  // namespace
