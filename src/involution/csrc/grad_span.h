// What follows from grad_kernel where the kernel is generated: lanes are columns.

#pragma once

#include "by_column.h"
#include "products.h"

namespace {

// The gradient of the kernel stays in cache and is multiplied at once into those of the features, of the weight and of the bias.
// The last two are sums over all tasks: partial ones for each lot of tasks, added up at the end. How many lots there are does
// not depend on the threads.
template <class Real, int LANES, class Element>
struct GradSpan : ByColumn<Real, LANES, Element> {
  using Base = ByColumn<Real, LANES, Element>;
  using Base::p;
  static constexpr int WIDEST = VECTOR_BYTES / int(sizeof(Real));
  const Index tap_step;      // from tap to tap of the gradient of the kernel
  const Index features_row;  // features of a position, in whole vectors

  struct Scratch : Base::Packed {
    Real* taps;                      // [tap][pixel], of all rows of the task
    Real *features, *grad_features;  // [pixel][features_row], [channel][pixel]
  };

  GradSpan(const Problem& problem, const Tasks& all)
      : Base(problem, all, all.rows, false), tap_step(pixels(all)), features_row(ceil_div(p.reduced, WIDEST) * WIDEST) {}

  // Of a task, in an odd number of whole vectors, so that taps spread over the cache; the last row is written in whole vectors.
  Index pixels(const Tasks& all) const {
    const Index rows = ceil_div(all.rows, all.row_blocks), width = ceil_div(all.columns, all.column_blocks);
    return times(ceil_div(times(rows - 1, width) + this->y_channel, WIDEST) | 1, WIDEST);
  }

  Scratch scratch(Arena& arena) const {
    return {Base::packed(arena), arena.take<Real>(times(p.kernel[0], p.kernel[1], p.kernel[2], tap_step)),
            arena.take<Real>(times(tap_step, features_row)), arena.take<Real>(times(tap_step, p.reduced))};
  }

  void run(const Task& task, const Scratch& s, Index lot) const {
    Base::clear(s);
    this->pack(task, s, task.rows, 0);
    const Index width = task.columns.size(), used = task.rows.size() * width, vectors = ceil_div(used, WIDEST);
    pack_features(task, s);
    std::memset(s.grad_features, 0, sizeof(Real) * p.reduced * tap_step);
    for (Index group = task.groups.from; group < task.groups.to; ++group) {
      for (Index out = task.rows.from; out < task.rows.to; out += this->together)
        this->taps_of_rows(task, s, task.rows.from, group, {out, least(out + this->together, task.rows.to)},
                           s.taps + (out - task.rows.from) * width, tap_step, width);
      for (Index tap = 0; tap < taps_of(p); ++tap)
        std::memset(s.taps + tap * tap_step + used, 0, sizeof(Real) * (vectors * WIDEST - used));
      multiply(s, group, lot, used, vectors);
    }
    for (Index row = 0; row < task.rows.size(); ++row) unpack_features(task, s, row);
  }

  // The features of the task's outputs, [pixel][features_row].
  void pack_features(const Task& task, const Scratch& s) const {
    Real* to = s.features;
    for (Index row = task.rows.from; row < task.rows.to; ++row, to += task.columns.size() * features_row) {
      const Element* from = static_cast<const Element*>(p.features) + task.batch * p.features_stride[0] +
                            task.depth * p.features_stride[2] + row * p.features_stride[3] + task.columns.from * p.features_stride[4];
      for (Index column = 0; column < task.columns.size(); ++column) {
        Real* target = to + column * features_row;
        if (p.features_stride[1] == 1) {
          copy_run(target, from + column * p.features_stride[4], p.reduced);
        } else if (p.features_stride[4] != 1) {
          for (Index r = 0; r < p.reduced; ++r) target[r] = widen(from[column * p.features_stride[4] + r * p.features_stride[1]]);
        }
        std::memset(target + p.reduced, 0, sizeof(Real) * (features_row - p.reduced));
      }
      if (p.features_stride[1] != 1 && p.features_stride[4] == 1)
        transpose(to, features_row, from, p.features_stride[1], p.reduced, task.columns.size());
    }
  }

  // The gradient of the kernel of one group, times the weight and times the features.
  void multiply(const Scratch& s, Index group, Index lot, Index used, Index vectors) const {
    const Index taps = taps_of(p);
    product<Real, WIDEST>(s.grad_features, tap_step, nullptr, static_cast<const Real*>(p.weight) + group * taps * p.reduced, 1,
                          p.reduced, s.taps, tap_step, p.reduced, vectors, taps);
    product<Real, WIDEST>(partial_weight(lot) + group * taps * partial_row(), partial_row(), nullptr, s.taps, tap_step, 1, s.features,
                          features_row, taps, features_row / WIDEST, used);
    Real* bias = partial_bias(lot) + group * taps;
    for (Index tap = 0; tap < taps; ++tap) {
      using Wide = typename Vector<Real, WIDEST>::type;
      Wide sums = {};
      for (Index vector = 0; vector < vectors; ++vector) sums += load<Wide>(s.taps + tap * tap_step + vector * WIDEST);
      for (int lane = 0; lane < WIDEST; ++lane) bias[tap] += sums[lane];
    }
  }

  void unpack_features(const Task& task, const Scratch& s, Index row) const {
    const Index *step = p.grad_features_stride, width = task.columns.size();
    Element* to = static_cast<Element*>(p.grad_features) + task.batch * step[0] + task.depth * step[2] +
                  (task.rows.from + row) * step[3] + task.columns.from * step[4];
    const Real* from = s.grad_features + row * width;
    if (step[1] == 1) return transpose(to, step[4], from, tap_step, p.reduced, width);
    for (Index r = 0; r < p.reduced; ++r)
      for (Index column = 0; column < width; ++column) narrow(from[r * tap_step + column], to[r * step[1] + column * step[4]]);
  }

  // Partial sums of the gradients of weight and bias.
  Index partial_row() const { return ceil_div(p.reduced, 16) * 16; }
  Real* partial_weight(Index lot) const { return static_cast<Real*>(p.partial) + lot * p.groups * taps_of(p) * partial_row(); }
  Real* partial_bias(Index lot) const { return partial_weight(p.lots) + lot * p.groups * taps_of(p); }
  Index lots(Index tasks) const { return least(tasks, p.lots); }
  void begin(Index lot) const {
    std::memset(partial_weight(lot), 0, sizeof(Real) * p.groups * taps_of(p) * partial_row());
    std::memset(partial_bias(lot), 0, sizeof(Real) * p.groups * taps_of(p));
  }
  void finish(Index lots) const {
    Real *weight = static_cast<Real*>(p.grad_weight), *bias = static_cast<Real*>(p.grad_bias);
#if defined(_OPENMP)
#pragma omp parallel for
#endif
    for (Index tap = 0; tap < p.groups * taps_of(p); ++tap) {
      Real* row = weight + tap * p.reduced;
      std::memset(row, 0, sizeof(Real) * p.reduced);
      bias[tap] = 0;
      for (Index lot = 0; lot < lots; ++lot) {
        const Real* part = partial_weight(lot) + tap * partial_row();
        for (Index r = 0; r < p.reduced; ++r) row[r] += part[r];
        bias[tap] += partial_bias(lot)[tap];
      }
    }
  }
};

}  // namespace
