// A 1x1 convolution where a network only infers: a matrix product that does what follows while the sums are in registers.

#pragma once

#include <algorithm>

#include "layer.h"

namespace {

struct Pointwise {  // in the order in which cpu.py packs it
  Index dtype, batch, sources, channels, output[3];
  Index step[4];       // of x, from output to output: batch, axes; its channels lie innermost
  const void *x, *weight, *bias;  // weight[channel][source]; bias may be null
  void* y;             // [batch][pixel][channel]
  const void* beside;  // of the same layout; null: nothing is added
  Norm norm;           // its ReLU comes behind the sum
};

static_assert(sizeof(Pointwise) == 22 * 8, "cpu.py packs 22 words");

// Tasks are blocks of pixels; where there are few, also of channels. Lanes are channels, a strip of weights is packed for all the
// pixels of a task, and a tile of pixels by channels stays in registers for the whole sum. So every output is one sum, in the order
// of sources, however the tasks are dealt out.
template <class Real>
class Points final : public Plan {
 public:
  Points(const Pointwise& product, Scaled<Real> norm)
      : Plan(threads_for(product)), p_(product), norm_(norm), image_(p_.output[0] * p_.output[1] * p_.output[2]) {
    const Index pixels = p_.batch * image_, strips = ceil_div(p_.channels, WIDTH);
    blocks_ = ceil_div(pixels, PIXELS);
    parts_ = threads > 1 ? least(strips, ceil_div(TASKS * threads, blocks_)) : 1;
    lots = blocks_ * parts_;
    Arena measure(nullptr);
    pieces(measure);
    scratch = (measure.used() + 4095) & ~Index(4095);
  }

  void run(Index lot, char* memory) const override {
    Arena arena(memory);
    const Pieces s = pieces(arena);
    // Neighbouring tasks are of the same channels: they read the same weights.
    const Range pixels = part(p_.batch * image_, blocks_, lot % blocks_), strips = part(ceil_div(p_.channels, WIDTH), parts_, lot / blocks_);
    find(s.from, pixels);
    for (Index channel = strips.from * WIDTH; channel < least(strips.to * WIDTH, p_.channels); channel += WIDTH) {
      const Index width = least(WIDTH, p_.channels - channel), vectors = ceil_div(width, LANES);
      if (width < WIDTH) std::fill_n(s.weights, p_.sources * WIDTH, Real(0));
      transpose(s.weights, WIDTH, static_cast<const Real*>(p_.weight) + channel * p_.sources, p_.sources, width, p_.sources);
      if (vectors == 1) strip<1>(s, pixels, channel, width);
      else if (VECTORS > 2 && vectors == 2) strip<2>(s, pixels, channel, width);
      else strip<VECTORS>(s, pixels, channel, width);
    }
  }
  void finish() const override {}

 private:
  static constexpr int LANES = VECTOR_BYTES / int(sizeof(Real));
  static constexpr bool MANY_REGISTERS = VECTOR_BYTES == 64;
  static constexpr int ROWS = MANY_REGISTERS ? 7 : 6, VECTORS = MANY_REGISTERS ? 4 : 2;  // of a tile, which fills the registers
  static constexpr Index WIDTH = VECTORS * LANES;
  static constexpr Index PIXELS = 192;  // of a task, at most: then packing takes little of its time
  static constexpr Index TASKS = 16;    // for each thread, if there are so many

  struct Pieces {
    Real* weights;      // of a strip, [source][channel]
    const Real** from;  // where the sources of each pixel lie; then those of the last once more for a tile
  };
  Pieces pieces(Arena& arena) const { return {arena.take<Real>(times(p_.sources, WIDTH)), arena.take<const Real*>(PIXELS + ROWS)}; }
  static Index threads_for([[maybe_unused]] const Pointwise& p) {
#if defined(_OPENMP)
    if (times(p.batch, p.output[0], p.output[1], p.output[2], p.channels, p.sources) > SERIAL_WORK) return omp_get_max_threads();
#endif
    return 1;
  }
  void find(const Real** from, Range pixels) const {
    const Index *size = p_.output, *step = p_.step;
    for (Index pixel = pixels.from; pixel < pixels.to;) {
      const Index row = pixel % image_ / size[2], column = pixel % size[2], end = least(pixel - column + size[2], pixels.to);
      const Index at = pixel / image_ * step[0] + row / size[1] * step[1] + row % size[1] * step[2] + column * step[3];
      for (const Real* x = static_cast<const Real*>(p_.x) + at; pixel < end; ++pixel, x += step[3]) *from++ = x;
    }
    for (int m = 0; m < ROWS; ++m, ++from) *from = from[-1];
  }
  // Tiles of one row less come first where it takes some, since small tiles wait for their own sums.
  template <int WIDE>
  void strip(const Pieces& s, Range pixels, Index channel, Index width) const {
    for (Index done = 0; done < pixels.size();) {
      const Index left = pixels.size() - done, rows = left % ROWS == 0 ? ROWS : least(left, ROWS - 1);
      const Index at = (pixels.from + done) * p_.channels + channel;
      if (rows == ROWS) tile<ROWS, WIDE>(s, s.from + done, rows, at, channel, width);
      else tile<ROWS - 1, WIDE>(s, s.from + done, rows, at, channel, width);
      done += rows;
    }
  }
  template <int TALL, int WIDE>
  void tile(const Pieces& s, const Real* const* pixels, Index rows, Index at, Index channel, Index width) const {
    using V = typename Vector<Real, LANES>::type;
    const Real* from[TALL];
#pragma GCC unroll 8
    for (int m = 0; m < TALL; ++m) from[m] = pixels[m];
    V sums[TALL][WIDE] = {};
    for (Index source = 0; source < p_.sources; ++source) {
      V values[WIDE];
#pragma GCC unroll 4
      for (int v = 0; v < WIDE; ++v) values[v] = load<V>(s.weights + source * WIDTH + v * LANES);
#pragma GCC unroll 8
      for (int m = 0; m < TALL; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; ++v) sums[m][v] += from[m][source] * values[v];
    }
    if (rows < TALL || width < WIDE * LANES) {
      Real values[TALL][WIDE * LANES];
#pragma GCC unroll 8
      for (int m = 0; m < TALL; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; ++v) store<V>(values[m] + v * LANES, sums[m][v]);
      return finish_some(values[0], WIDE * LANES, rows, at, channel, width);
    }
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; ++v) {
      const V scale = load<V>(norm_.scale + channel + v * LANES), shift = load<V>(norm_.shift + channel + v * LANES);
#pragma GCC unroll 8
      for (int m = 0; m < TALL; ++m) sums[m][v] = sums[m][v] * scale + shift;
    }
    const auto each = [&](const auto& body) {
#pragma GCC unroll 8
      for (int m = 0; m < TALL; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; ++v) body(sums[m][v], at + m * p_.channels + v * LANES);
    };
    if (p_.beside) each([&](V& sum, Index place) { sum += load<V>(static_cast<const Real*>(p_.beside) + place); });
    if (norm_.relu) each([&](V& sum, Index) { sum = norm_.activated(sum); });
    each([&](V sum, Index place) { store<V>(static_cast<Real*>(p_.y) + place, sum); });
  }
  // The same for what does not fill a tile.
  void finish_some(const Real* sums, Index row, Index rows, Index at, Index channel, Index width) const {
    for (Index m = 0; m < rows; ++m, sums += row, at += p_.channels)
      for (Index lane = 0; lane < least(width, row); ++lane) {
        Real sum = sums[lane] * norm_.scale[channel + lane] + norm_.shift[channel + lane];
        if (p_.beside) sum += static_cast<const Real*>(p_.beside)[at + lane];
        static_cast<Real*>(p_.y)[at + lane] = norm_.activated(sum);
      }
  }

  const Pointwise& p_;
  const Scaled<Real> norm_;
  const Index image_;      // pixels
  Index blocks_, parts_;  // of all pixels and all strips
};

}  // namespace
