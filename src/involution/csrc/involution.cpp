// Involution on a CPU: the forward pass and both gradients, any strides, one to three spatial axes (lifted to three).
//
// It is compiled once for each instruction set, with VECTOR_BYTES the width of its registers; Python picks the
// library to load. Nothing of Python or torch is included: the interface is two structs of 64-bit words.
//
// The plan of all ops. A task is a block of rows (and columns) of an image. The rows the block needs are packed into a
// scratch that is dense, zero-padded and of the type computed in; then the loops run on it:
//   forward, grad_x   lanes are channels of the group, a tap of the kernel is a scalar that multiplies all lanes, and a
//                     tile of columns stays in registers, so that a vector read once serves up to K columns; groups of
//                     four channels share vectors, each with its own taps;
//   grad_kernel       lanes are channels at a few outputs, of as many images if possible, and are added up for four taps of a line
//                     at a time;
//   ... in planes     (contiguous, or generated) lanes are columns, and a tile of taps at several rows stays in registers.
// Packing makes strides, element types and image borders vanish from the loops; it costs one copy for every K * K uses.
// Tasks share nothing, or sum in an order that sizes alone decide, so no result depends on how they are dealt out: the same
// bits for any number of threads. A kernel that is generated never leaves the cache, and neither does its gradient.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "follow.h"
#include "forward.h"
#include "grad_kernel.h"
#include "grad_planes.h"
#include "grad_span.h"
#include "grad_x.h"
#include "layer.h"
#include "pointwise.h"

namespace {

// Calls body(plan) for the op on a problem, with the widest registers, unless a group (or a row) fits into narrower ones. Where lanes
// are channels of float, with pairs of registers if a group fills pairs, and with as many groups of four as fill one.
template <template <class, int, class> class Op, class Real, class Element, class Body>
int with_lanes(const Problem& p, Index wanted, const Index* size, const Body& body) {
  constexpr int MOST = VECTOR_BYTES / int(sizeof(Real));
  constexpr bool BY_CHANNEL = Op<Real, MOST, Element>::LANES_ARE_CHANNELS && sizeof(Real) == 4;
  if constexpr (BY_CHANNEL && MOST > SHARED)
    if (share_vectors(p, MOST)) {
      Problem shared = p;
      shared.sharing = MOST / SHARED, shared.groups /= shared.sharing, shared.channels = MOST;
      return body(PlanOf<Op<Real, MOST, Element>>(shared, size));
    }
  if (MOST >= 16 && wanted <= 4) return body(PlanOf<Op<Real, MOST >= 16 ? MOST / 4 : MOST, Element>>(p, size));
  if (MOST >= 8 && wanted <= MOST / 2) return body(PlanOf<Op<Real, MOST >= 8 ? MOST / 2 : MOST, Element>>(p, size));
  if constexpr (BY_CHANNEL)
    if (ceil_div(wanted, MOST) % 2 == 0) return body(PlanOf<Op<Real, 2 * MOST, Element>>(p, size));
  return body(PlanOf<Op<Real, MOST, Element>>(p, size));
}

template <template <class, int, class> class Op, class Body>
int with_dtype(const Problem& p, Index lanes, const Index* size, const Body& body) {
  switch (p.dtype) {
    case FLOAT32: return with_lanes<Op, float, float>(p, lanes, size, body);
    case FLOAT64: return with_lanes<Op, double, double>(p, lanes, size, body);
    case BFLOAT16: return with_lanes<Op, float, BFloat16>(p, lanes, size, body);
    case FLOAT16: return with_lanes<Op, float, Float16>(p, lanes, size, body);
  }
  return 1;
}

template <class Body>
int with_grad_kernel(const Problem& p, const Body& body) {
  if (p.grad_weight) return with_dtype<GradSpan>(p, p.output[2], p.output, body);
  if (!taps_in_planes(p)) {
    const Index parts = p.dtype == FLOAT64 ? Parts<VECTOR_BYTES / 8>::COUNT : Parts<VECTOR_BYTES / 4>::COUNT;
    return with_dtype<GradKernel>(sharing_images(p, parts), VECTOR_BYTES, p.output, body);
  }
  const Index lanes = p.output[2] < 8 ? 8 : 16;  // of which a row fills half, at least
  return p.dtype == FLOAT32 ? with_lanes<GradPlanes, float, float>(p, lanes, p.output, body)
                            : with_lanes<GradPlanes, double, double>(p, lanes, p.output, body);
}

int run(const Plan& plan) { return run_plans(plan); }

// A whole layer: features first, as groups share them, then the operator with what follows it.
template <class Real>
int run_layer(Problem p, const Layer& layer) {
  const Index channels = p.groups * p.channels;
  struct Pieces {
    Real* start;
    Scaled<Real> features, outputs;
  };
  const auto pieces = [&](Arena& arena) {
    return Pieces{arena.take<Real>(p.reduced), Scaled<Real>::take(arena, p.reduced), Scaled<Real>::take(arena, channels)};
  };
  return with_scratch(pieces, [&](Pieces s) {
    for (Index r = 0; r < p.reduced; ++r) s.start[r] = layer.reduce_bias ? static_cast<const Real*>(layer.reduce_bias)[r] : 0;
    s.features.fold(layer.features, nullptr, p.reduced);
    s.outputs.fold(layer.outputs, nullptr, channels);
    if (run_plans(Reduce<Real>(p, layer, s.start, s.features))) return 1;
    if (layer.outputs.mean || layer.outputs.relu) p.after = &s.outputs;
    return with_lanes<Forward, Real, Real>(p, p.channels, p.output, run);
  });
}

// An op whose outputs are finished by a norm, and by what a sum begins with; null: nothing.
template <template <class> class Op, class Real, class Problem>
int run_normed(const Problem& p, const void* added) {
  return with_scratch([&](Arena& arena) { return Scaled<Real>::take(arena, p.channels); }, [&](Scaled<Real> norm) {
    norm.fold(p.norm, added, p.channels);
    return run_plans(Op<Real>(p, norm));
  });
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

// Each fills one of its tensors from the other two: y, x and kernel_data in turn; the last, if the kernel is generated, the
// gradients of what it is generated from. 0: done; 1: no memory for the scratch.
int involution_forward(const Problem* p) { return with_dtype<Forward>(*p, p->channels, p->output, run); }
int involution_grad_x(const Problem* p) { return with_dtype<GradX>(*p, p->channels, p->input, run); }
int involution_grad_kernel(const Problem* p) { return with_grad_kernel(*p, run); }

// Both gradients, block by block in turns, as both read the gradient of y: as a rule one from memory, one from the cache.
int involution_gradients(const Problem* x, const Problem* kernel) {
  return with_grad_kernel(*kernel, [&](const Plan& plan) {
    return with_dtype<GradX>(*x, x->channels, x->input, [&](const Plan& other) { return run_plans(plan, &other); });
  });
}

// Fills the features, then y as `involution_forward` does, and does what follows. For float32 and float64.
int involution_layer(const Problem* p, const Layer* layer) {
  return p->dtype == FLOAT64 ? run_layer<double>(*p, *layer) : run_layer<float>(*p, *layer);
}

// Normalises y in place, and adds to it. For float32 and float64.
int involution_follow(const Following* f) {
  return f->dtype == FLOAT64 ? run_normed<Follow, double>(*f, nullptr) : run_normed<Follow, float>(*f, nullptr);
}

// Fills y with a 1x1 convolution of x, and does what follows. For float32 and float64.
int involution_pointwise(const Pointwise* p) {
  return p->dtype == FLOAT64 ? run_normed<Points, double>(*p, p->bias) : run_normed<Points, float>(*p, p->bias);
}

// Asks for large pages behind fresh memory, of which the first write to each page of 4 KiB would stop for a page fault. A system
// that has none, or grants none, is only slower.
void involution_large_pages([[maybe_unused]] void* data, [[maybe_unused]] Index bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t PAGE = 1 << 21;
  const std::uintptr_t from = (reinterpret_cast<std::uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const std::uintptr_t to = (reinterpret_cast<std::uintptr_t>(data) + std::uintptr_t(bytes)) / PAGE * PAGE;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}
#pragma GCC visibility pop
}
