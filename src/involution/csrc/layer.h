// What a layer does around the operator when it only infers: the features that its kernel is generated from, reduced from an
// input by a matrix product, and what follows them and the outputs: norms and activations.

#pragma once

#include <cmath>

#include "packing.h"
#include "products.h"
#include "tasks.h"

namespace {

// (value - mean) / sqrt(variance + epsilon) * weight + bias for each channel, then max(0, .) if `relu`. Where pointers are null, so
// much is left out. All is dense and of the type computed in.
struct Norm {
  const void *mean, *variance, *weight, *bias;
  double epsilon;
  Index relu;
};

struct Layer {  // in the order in which cpu.py packs it
  const void *source, *reduce, *reduce_bias;  // of features: bias + reduce[feature, :] * source
  Index sources, source_stride[5];            // channels of the source, and strides (batch, channel, output axes)
  Norm features, outputs;
};

static_assert(sizeof(Layer) == 21 * 8, "cpu.py packs 21 words");

// What a norm amounts to.
template <class Real>
struct Scaled {
  Real *scale, *shift;
  bool relu;

  static Scaled take(Arena& arena, Index channels) {
    const Index padded = channels + CACHE_LINE;  // the last vector of a group, which it may not fill, reads beyond them
    return {arena.take<Real>(padded), arena.take<Real>(padded), false};
  }
  // Of a sum that `added` is to be added to before; null: nothing is.
  void fold(const Norm& norm, const void* added, Index channels) {
    const auto of = [](const void* values, Index channel, double otherwise) {
      return values ? double(static_cast<const Real*>(values)[channel]) : otherwise;
    };
    relu = norm.relu;
    for (Index c = 0; c < channels; ++c) {
      const double factor = norm.variance ? of(norm.weight, c, 1) / std::sqrt(of(norm.variance, c, 1) + norm.epsilon) : 1;
      scale[c] = Real(factor);
      shift[c] = Real(of(norm.bias, c, 0) + (of(added, c, 0) - of(norm.mean, c, 0)) * factor);
    }
  }
  template <class V>
  V operator()(V value, V scales, V shifts) const {
    return activated(V(value * scales + shifts));
  }
  template <class V>
  V activated(V value) const {
    return relu ? (value < 0 ? V{} : value) : value;  // NaN stays
  }
};

// The features of all outputs, [feature][pixel] with all pixels of the batch in turn. Tasks are blocks of pixels; where there are
// few, also of features.
template <class Real>
class Reduce final : public Plan {
 public:
  Reduce(const Problem& problem, const Layer& layer, const Real* start, Scaled<Real> norm)
      : Plan(threads_for(problem, layer)), p_(problem), layer_(layer), start_(start), norm_(norm) {
    const Index *size = p_.output, *step = layer.source_stride, row = size[2] * step[4], depth = size[1] * row;
    pixels_ = p_.batch * size[0] * size[1] * size[2];
    const bool rows = (size[1] == 1 || step[3] == row) && (size[0] == 1 || step[2] == depth);  // follow one another
    const bool images = rows && (p_.batch == 1 || step[0] == size[0] * depth);
    line_ = images ? pixels_ : rows ? pixels_ / p_.batch : size[2];
    blocks_ = ceil_div(line_, PIXELS);
    const Index blocks = pixels_ / line_ * blocks_;
    parts_ = least(p_.reduced, ceil_div(threads, blocks));
    lots = blocks * parts_;
    Arena measure(nullptr);
    pieces(measure);
    scratch = (measure.used() + 4095) & ~Index(4095);
  }

  void run(Index lot, char* memory) const override {
    Arena arena(memory);
    const Pieces s = pieces(arena);
    const Range features = part(p_.reduced, parts_, lot % parts_);
    const Index block = lot / parts_ % blocks_, line = lot / parts_ / blocks_;
    const Range whole = part(ceil_div(line_, LANES), blocks_, block), pixels = {whole.from * LANES, least(whole.to * LANES, line_)};
    pack_planes(s.source, WIDTH, source_of(line) + pixels.from * layer_.source_stride[4], layer_.source_stride[1],
                layer_.source_stride[4], pixels.size(), layer_.sources);
    product<Real, LANES>(s.sums, WIDTH, start_ + features.from, static_cast<const Real*>(layer_.reduce) + features.from * layer_.sources,
                         layer_.sources, 1, s.source, WIDTH, features.size(), whole.size(), layer_.sources);
    for (Index feature = features.from; feature < features.to; ++feature) {
      const Real* sums = s.sums + (feature - features.from) * WIDTH;
      Real* to = static_cast<Real*>(p_.features) + feature * pixels_ + line * line_ + pixels.from;
      for (Index pixel = 0; pixel < pixels.size(); ++pixel) to[pixel] = norm_(sums[pixel], norm_.scale[feature], norm_.shift[feature]);
    }
  }
  void finish() const override {}

 private:
  static constexpr int LANES = VECTOR_BYTES / int(sizeof(Real));
  static constexpr Index PIXELS = 64;                           // of a block, at most
  static constexpr Index WIDTH = (PIXELS / LANES | 1) * LANES;  // odd in vectors, so that rows spread over the cache

  struct Pieces {
    Real *source, *sums;
  };
  Pieces pieces(Arena& arena) const {
    return {arena.take<Real>(times(layer_.sources, WIDTH)), arena.take<Real>(times(p_.reduced, WIDTH))};
  }
  static Index threads_for([[maybe_unused]] const Problem& p, [[maybe_unused]] const Layer& layer) {
#if defined(_OPENMP)
    const Index pixels = p.batch * p.output[0] * p.output[1] * p.output[2];
    if (pixels * p.reduced * layer.sources > SERIAL_WORK) return omp_get_max_threads();
#endif
    return 1;
  }
  const Real* source_of(Index line) const {
    const Index *size = p_.output, *step = layer_.source_stride;
    const Index image = size[0] * size[1] * size[2], pixel = line * line_, row = pixel % image / size[2];
    const Index at = pixel / image * step[0] + row / size[1] * step[2] + row % size[1] * step[3];
    return static_cast<const Real*>(layer_.source) + at;
  }

  const Problem& p_;
  const Layer& layer_;
  const Real* const start_;
  const Scaled<Real> norm_;
  Index pixels_, line_, blocks_, parts_;  // all pixels; those of a line, its blocks, and the parts of features
};

}  // namespace
