// What follows a convolution where a network only infers: a norm, a sum with a shortcut and an activation, by one pass over memory.

#pragma once

#include "layer.h"

namespace {

struct Following {  // in the order in which cpu.py packs it
  Index dtype, pixels, channels;
  void* y;             // [pixel][channel], changed in place
  const void* beside;  // of the same layout; null: nothing is added
  Norm norm;           // its ReLU comes behind the sum
};

static_assert(sizeof(Following) == 11 * 8, "cpu.py packs 11 words");

template <class Real>
class Follow final : public Plan {
 public:
  Follow(const Following& following, Scaled<Real> norm) : Plan(threads_for(following)), f_(following), norm_(norm) {
    lots = ceil_div(times(f_.pixels, f_.channels), ELEMENTS);
    scratch = 4096;  // nothing is kept there
  }
  void run(Index lot, char*) const override {
    const Range pixels = part(f_.pixels, lots, lot);
    f_.beside ? run<true>(pixels) : run<false>(pixels);
  }
  void finish() const override {}

 private:
  static constexpr int LANES = VECTOR_BYTES / int(sizeof(Real));
  static constexpr Index ELEMENTS = 1 << 14;  // of a lot, at most, unless a pixel has more

  static Index threads_for([[maybe_unused]] const Following& f) {
#if defined(_OPENMP)
    if (times(f.pixels, f.channels) > SERIAL_WORK) return omp_get_max_threads();
#endif
    return 1;
  }
  template <bool BESIDE>
  void run(Range pixels) const {
    for (Index at = pixels.from * f_.channels; at < pixels.to * f_.channels; at += f_.channels) {
      Index channel = 0;
      for (; channel + LANES <= f_.channels; channel += LANES) run<BESIDE, typename Vector<Real, LANES>::type>(at, channel);
      for (; channel < f_.channels; ++channel) run<BESIDE, Real>(at, channel);
    }
  }
  template <bool BESIDE, class V>
  void run(Index at, Index channel) const {
    Real* y = static_cast<Real*>(f_.y) + at + channel;
    V sum = load<V>(y) * load<V>(norm_.scale + channel) + load<V>(norm_.shift + channel);
    if constexpr (BESIDE) sum += load<V>(static_cast<const Real*>(f_.beside) + at + channel);
    store<V>(y, norm_.activated(sum));
  }

  const Following& f_;
  const Scaled<Real> norm_;
};

}  // namespace
