// What follows from grad_kernel where the kernel is generated: lanes are columns.

#pragma once

#include "packing.h"
#include "products.h"
#include "tasks.h"

namespace {

// Lanes are columns, as those of the products with the weight and the features are pixels. Packed rows of x lie
// [channel][phase][column / stride], phase = column mod stride, so that the inputs of neighbouring outputs are neighbours for any
// stride. The gradient of the kernel stays in cache and is multiplied at once into those of the features, of the weight and of
// the bias. The last two are sums over all tasks: partial ones for each lot of tasks, added up at the end. How many lots there
// are does not depend on the threads.
template <class Real, int LANES, class Element>
struct GradSpan {
  using V = typename Vector<Real, LANES>::type;
  static constexpr int WIDEST = VECTOR_BYTES / int(sizeof(Real));
  static constexpr bool IN_PAIRS = false;
  const Problem& p;
  const Index groups, columns, x_rows, x_columns, x_phase, x_channel;  // the most that a task can have
  const Index tap_step;                                                // from tap to tap of the gradient of the kernel
  const Index features_row;                                            // features of a position, in whole vectors

  struct Scratch {
    Real *x, *y, *taps;  // taps: [tap][pixel], of all rows of the task
    Index* offsets;      // of each tap of a line in a packed row
    Real *features, *grad_features;  // [pixel][features_row], [channel][pixel]
  };
  void (GradSpan::*const taps_of_line_)(const Scratch&, const Real*, Real*) const;

  GradSpan(const Problem& problem, const Tasks& all)
      : p(problem),
        groups(ceil_div(all.groups, all.group_blocks)),
        columns(ceil_div(ceil_div(all.columns, all.column_blocks), LANES) * LANES),
        x_rows((ceil_div(all.rows, all.row_blocks) - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1),
        x_columns((columns - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1),
        x_phase(ceil_div(x_columns, p.stride[2])),
        x_channel(times(x_phase, p.stride[2])),
        tap_step(pixels(all)),
        features_row(ceil_div(p.reduced, WIDEST) * WIDEST),
        taps_of_line_(choose(p)) {}

  // Of a task, in an odd number of whole vectors, so that taps spread over the cache; the last row is written in whole vectors.
  Index pixels(const Tasks& all) const {
    const Index rows = ceil_div(all.rows, all.row_blocks), width = ceil_div(all.columns, all.column_blocks);
    return times(ceil_div(times(rows - 1, width) + columns, WIDEST) | 1, WIDEST);
  }

  static auto choose(const Problem& p) -> void (GradSpan::*)(const Scratch&, const Real*, Real*) const {
    if (p.stride[2] == 1 && p.dilation[2] == 1) {
      if (p.kernel[2] == 3) return &GradSpan::taps_of_line<3, true>;
      if (p.kernel[2] == 5) return &GradSpan::taps_of_line<5, true>;
      if (p.kernel[2] == 7) return &GradSpan::taps_of_line<7, true>;
      if (p.kernel[2] == 9) return &GradSpan::taps_of_line<9, true>;
    }
    if (p.kernel[2] % 3 == 0) return &GradSpan::taps_of_line<3, false>;
    if (p.kernel[2] % 7 == 0) return &GradSpan::taps_of_line<7, false>;
    return &GradSpan::taps_of_line<1, false>;
  }

  Scratch scratch(Arena& arena) const {
    return {arena.take<Real>(times(x_channel, x_rows, p.kernel[0], p.channels, groups)),
            arena.take<Real>(times(p.channels, columns)),
            arena.take<Real>(times(p.kernel[0], p.kernel[1], p.kernel[2], tap_step)),
            arena.take<Index>(p.kernel[2]),
            arena.take<Real>(times(tap_step, features_row)),
            arena.take<Real>(times(tap_step, p.reduced))};
  }

  // Columns from `first` on of `channels` rows, zero outside the image, to [channel][phase][column / stride].
  void pack(Real* to, const Element* from, Index channel_step, Index column_step, Index first, Index stride, Index phase,
            Index width) const {
    const Index wanted = phase * stride;
    const Range inside = {least(most(0, -first), wanted), most(0, least(wanted, width - first))};
    std::memset(to, 0, sizeof(Real) * p.channels * wanted);
    const Element* source = from + first * column_step;
    if (stride == 1)
      return pack_planes(to + inside.from, wanted, source + inside.from * column_step, channel_step, column_step,
                                inside.size(), p.channels);
    for (Index channel = 0; channel < p.channels; ++channel)
      for (Index column = inside.from; column < inside.to; ++column)
        to[channel * wanted + column % stride * phase + column / stride] = widen(source[column * column_step + channel * channel_step]);
  }

  // UNIT: stride and dilation are one, so that the offset of a tap is its number.
  template <int K, bool UNIT>
  void taps_of_line(const Scratch& s, const Real* x, Real* taps) const {
    for (Index column = 0; column < columns; column += LANES) {
      for (Index first = 0; first < p.kernel[2]; first += K) {
        V sums[K] = {};
        for (Index channel = 0; channel < p.channels; ++channel) {
          const V grad = load<V>(s.y + channel * columns + column);
          const Real* row = x + channel * x_channel + column;
#pragma GCC unroll 16
          for (int t = 0; t < K; ++t) sums[t] += grad * load<V>(row + (UNIT ? first + t : s.offsets[first + t]));
        }
#pragma GCC unroll 16
        for (int t = 0; t < K; ++t) store<V>(taps + (first + t) * tap_step + column, sums[t]);
      }
    }
  }

  void run(const Task& task, const Scratch& s, Index lot) const {
    for (Index t = 0; t < p.kernel[2]; ++t) s.offsets[t] = t * p.dilation[2] % p.stride[2] * x_phase + t * p.dilation[2] / p.stride[2];
    pack_x(task, s);
    const Index width = task.columns.size(), used = task.rows.size() * width, vectors = ceil_div(used, WIDEST);
    pack_features(task, s);
    std::memset(s.grad_features, 0, sizeof(Real) * p.reduced * tap_step);
    for (Index group = task.groups.from; group < task.groups.to; ++group) {
      for (Index out = task.rows.from; out < task.rows.to; ++out)  // each row overwrites what the one before wrote too much
        taps_of_row(task, s, group, out, s.taps + (out - task.rows.from) * width);
      for (Index tap = 0; tap < taps_of(p); ++tap)
        std::memset(s.taps + tap * tap_step + used, 0, sizeof(Real) * (vectors * WIDEST - used));
      multiply(s, group, lot, used, vectors);
    }
    for (Index row = 0; row < task.rows.size(); ++row) unpack_features(task, s, row);
  }

  void pack_x(const Task& task, const Scratch& s) const {
    const Index x_row = p.channels * x_channel, first_column = task.columns.from * p.stride[2] - p.padding[2];
    const Index first_depth = task.depth * p.stride[0] - p.padding[0];
    const Index first_row = task.rows.from * p.stride[1] - p.padding[1];
    const Index rows = (task.rows.size() - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
    for (Index k = 0; k < p.kernel[0]; ++k) {
      const Index depth = first_depth + k * p.dilation[0];
      if (depth < 0 || depth >= p.input[0]) continue;
      for (Index line = most(0, -first_row); line < least(rows, p.input[1] - first_row); ++line)
        for (Index group = task.groups.from; group < task.groups.to; ++group)
          pack(packed(task, s, group) + (k * x_rows + line) * x_row,
               static_cast<const Element*>(p.x) + task.batch * p.x_stride[0] + group * p.channels * p.x_stride[1] +
                   depth * p.x_stride[2] + (first_row + line) * p.x_stride[3],
               p.x_stride[1], p.x_stride[4], first_column, p.stride[2], x_phase, p.input[2]);
    }
  }
  Real* packed(const Task& task, const Scratch& s, Index group) const {
    return s.x + (group - task.groups.from) * p.kernel[0] * x_rows * p.channels * x_channel;
  }

  // The gradient of the kernel of one group and output row, [tap][tap_step].
  void taps_of_row(const Task& task, const Scratch& s, Index group, Index out, Real* to) const {
    const Index first_depth = task.depth * p.stride[0] - p.padding[0], first_row = task.rows.from * p.stride[1] - p.padding[1];
    pack(s.y,
         static_cast<const Element*>(p.y) + task.batch * p.y_stride[0] + group * p.channels * p.y_stride[1] +
             task.depth * p.y_stride[2] + out * p.y_stride[3],
         p.y_stride[1], p.y_stride[4], task.columns.from, 1, columns, task.columns.to);
    for (Index kd = 0; kd < p.kernel[0]; ++kd) {
      const Index depth = first_depth + kd * p.dilation[0];
      for (Index kr = 0; kr < p.kernel[1]; ++kr) {
        const Index line = (out - task.rows.from) * p.stride[1] + kr * p.dilation[1];
        Real* taps = to + (kd * p.kernel[1] + kr) * p.kernel[2] * tap_step;
        if (depth < 0 || depth >= p.input[0] || first_row + line < 0 || first_row + line >= p.input[1]) {  // all in the padding
          for (Index t = 0; t < p.kernel[2]; ++t) std::memset(taps + t * tap_step, 0, sizeof(Real) * columns);
          continue;
        }
        (this->*taps_of_line_)(s, packed(task, s, group) + (kd * x_rows + line) * p.channels * x_channel, taps);
      }
    }
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
