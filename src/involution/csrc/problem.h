// What an op is asked to do: the one struct that Python passes, and arithmetic on its sizes.

#pragma once

#include <cstdint>

namespace {

using Index = std::int64_t;

struct Problem {  // in the order in which cpu.py packs it; sizes and strides in elements, spatial axes (depth, row, column)
  Index dtype, batch, groups, channels;  // channels of one group
  Index kernel[3], input[3], output[3], stride[3], padding[3], dilation[3];
  Index x_stride[5];       // batch, channel, axes: x, or its gradient
  Index kernel_stride[8];  // batch, group, taps, output axes: the kernel, or its gradient
  Index y_stride[5];       // batch, channel, axes: the output, or its gradient
  // Channels of the features, and strides (batch, channel, output axes): of the features, and of their gradient.
  Index reduced, features_stride[5], grad_features_stride[5];
  Index lots;  // how many partial sums `partial` has room for
  void *x, *kernel_data, *y;
  // Where the kernel is generated: kernel[group, tap] = bias[group, tap] + weight[group, tap, :] * features. Weight and bias are
  // dense and of the type computed in, as are their gradients; null where a kernel is given.
  void *features, *weight, *bias;
  void *grad_features, *grad_weight, *grad_bias;
  void* partial;  // of the gradients of weight and bias: [lot][group, tap][padded(reduced)], then [lot][group, tap]
  void* after;    // what follows the forward pass, `Scaled` of layer.h; null: nothing
  // Python leaves 0 in both. Else so many groups share vectors: `groups` and `channels` count them as one, strides and rows of weights
  // do not. And so many images: `batch` and its strides count them as one.
  Index sharing, images;
};

static_assert(sizeof(Problem) == 65 * 8, "cpu.py packs 65 words");

enum DType : Index { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

inline Index ceil_div(Index a, Index b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
inline Index floor_div(Index a, Index b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
constexpr Index CACHE_LINE = 64;             // bytes
constexpr Index TOO_MUCH = Index(1) << 56;  // more elements than any memory has

// A product of sizes; TOO_MUCH where it is more than that, so that it stays so in further products.
template <class... More>
inline Index times(Index a, More... more) {
  Index product = a;
  const auto multiply = [&](Index b) {
    if (__builtin_mul_overflow(product, b, &product) || product > TOO_MUCH) product = b == 0 ? 0 : TOO_MUCH;
  };
  (multiply(more), ...);
  return product;
}

inline Index least(Index a, Index b) { return a < b ? a : b; }
inline Index most(Index a, Index b) { return a > b ? a : b; }

struct Range {
  Index from, to;
  Index size() const { return to - from; }
  bool has(Index index) const { return from <= index && index < to; }
};

inline Index taps_of(const Problem& p) { return p.kernel[0] * p.kernel[1] * p.kernel[2]; }

inline bool taps_innermost(const Problem& p) { return p.kernel_stride[4] == 1 || p.kernel[2] == 1; }

// Taps along `axis` that lie in [0, limit) when the first lies at `position`.
inline Range taps_inside(const Problem& p, int axis, Index position, Index limit) {
  const Index step = p.dilation[axis], from = most(0, ceil_div(-position, step));
  return {from, most(from, least(p.kernel[axis], floor_div(limit - 1 - position, step) + 1))};
}

// How far along `axis` the inputs of `outputs` neighbouring outputs reach.
inline Index window(const Problem& p, int axis, Index outputs) {
  return (outputs - 1) * p.stride[axis] + (p.kernel[axis] - 1) * p.dilation[axis] + 1;
}

// Whether all taps of a position lie in one run; the stride of an axis of size one means nothing.
inline bool taps_in_one_run(const Problem& p) {
  const Index* step = p.kernel_stride + 2;
  return taps_innermost(p) && (p.kernel[1] == 1 || step[1] == p.kernel[2]) &&
         (p.kernel[0] == 1 || step[0] == p.kernel[1] * p.kernel[2]);
}

}  // namespace
