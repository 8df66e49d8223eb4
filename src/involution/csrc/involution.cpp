// Involution on a CPU: the forward pass and both gradients, any strides, one to three spatial axes (lifted to three).
//
// The file is compiled once for each instruction set, with VECTOR_BYTES the width of its registers; Python picks the
// library to load. It includes no header of Python or torch: the interface is one struct of 64-bit integers.
//
// The plan of all three ops. A task is a block of rows (and columns) of one image. For each group, the rows the block
// needs are packed into a scratch that is dense, zero-padded and of the type computed in; then the loops run on it:
//   forward, grad_x   lanes are channels of the group, a tap of the kernel is a scalar that multiplies all lanes, and a
//                     tile of columns stays in registers, so that a vector read once serves up to K columns;
//   grad_kernel       lanes are columns, so that the sum over channels needs no sum over lanes.
// Packing makes strides, element types and image borders vanish from the loops; it costs one copy for every K * K uses.
// Tasks share nothing and no result depends on how they are dealt out: the same bits for any number of threads.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

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
};

static_assert(sizeof(Problem) == 62 * 8, "cpu.py packs 62 words");

enum DType : Index { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

// ---------------------------------------------------------------------------------------------- element types

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline float widen(BFloat16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float widen(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &value, sizeof half);
  return half;
#else
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  std::uint32_t bits = rest << 13;
  float result;
  if (rest >= 0x7c00) {
    bits |= 0x7f800000;  // infinity, NaN
  } else {               // 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal
    std::memcpy(&result, &bits, sizeof result);
    result *= 0x1p112f;
    std::memcpy(&bits, &result, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }

inline void narrow(float value, BFloat16& out) {  // round to nearest, ties to even
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits = nan ? 0x7fc0 : std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float value, Float16& out) {
#if defined(__F16C__)
  out.bits = std::uint16_t(_cvtss_sh(value, 0));
#elif defined(__aarch64__)
  const __fp16 half = value;
  std::memcpy(&out, &half, sizeof out);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    out.bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 2^16 or more
    out.bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: adding 0.5 rounds at the place of the last bit
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    out.bits = sign | std::uint16_t(bits - 0x3f000000);
  } else {
    out.bits = sign | std::uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
  }
#endif
}

template <class Real, int LANES>
struct Vector {
  typedef Real type __attribute__((vector_size(sizeof(Real) * LANES), aligned(sizeof(Real)), may_alias));
};

// At any address. clang forgets in a template that the type asks for no alignment, and would move it as if it were aligned;
// g++ does not, and makes somewhat slower code of a copy.
template <class V, class Real>
inline V load(const Real* from) {
#if defined(__clang__)
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
#else
  static_assert(alignof(V) == alignof(Real));
  return *reinterpret_cast<const V*>(from);
#endif
}
template <class V, class Real>
inline void store(Real* to, V value) {
#if defined(__clang__)
  std::memcpy(to, &value, sizeof value);
#else
  static_assert(alignof(V) == alignof(Real));
  *reinterpret_cast<V*>(to) = value;
#endif
}

inline Index ceil_div(Index a, Index b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
inline Index floor_div(Index a, Index b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
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
};

// ---------------------------------------------------------------------------------------------- packing

template <int LANES, class To, class From>
inline void copy_lanes(To* to, const From* from) {
#if defined(__F16C__)  // compilers do not make vectors of these conversions by themselves
  if constexpr (std::is_same_v<To, float> && std::is_same_v<From, Float16> && LANES % 8 == 0) {
    for (int lane = 0; lane < LANES; lane += 8)
      _mm256_storeu_ps(to + lane, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + lane))));
    return;
  }
  if constexpr (std::is_same_v<To, Float16> && std::is_same_v<From, float> && LANES % 8 == 0) {
    for (int lane = 0; lane < LANES; lane += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + lane), _mm256_cvtps_ph(_mm256_loadu_ps(from + lane), 0));
    return;
  }
#endif
  if constexpr (std::is_same_v<To, From>) {
    using V = typename Vector<To, LANES>::type;
    store<V>(to, load<V>(from));
  } else if constexpr (sizeof(To) > sizeof(From)) {
    for (int lane = 0; lane < LANES; ++lane) to[lane] = widen(from[lane]);
  } else {
    for (int lane = 0; lane < LANES; ++lane) narrow(from[lane], to[lane]);
  }
}

// A run of elements, to the type computed in.
template <class To, class From>
inline void widen_run(To* to, const From* from, Index count) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, sizeof(To) * count);
  } else {
    Index i = 0;
    for (; i + 16 <= count; i += 16) copy_lanes<16>(to + i, from + i);
    for (; i < count; ++i) to[i] = widen(from[i]);
  }
}

// One half of the elements of `a` and `b`, in turn.
template <int N, bool UPPER, class V, int... I>
inline V interleave(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (I % 2 * N + I / 2 + (UPPER ? N / 2 : 0))...);
#else
  using Lane = std::conditional_t<sizeof(V) / N == 4, std::int32_t, std::int64_t>;
  typedef Lane Mask __attribute__((vector_size(sizeof(Lane) * N)));
  return __builtin_shuffle(a, b, Mask{(I % 2 * N + I / 2 + (UPPER ? N / 2 : 0))...});
#endif
}

// to[j * to_step + i] = from[i * from_step + j], in blocks of N x N; the last block of a row or column overlaps the one before.
template <int N, class To, class From>
void transpose_blocks(To* to, Index to_step, const From* from, Index from_step, Index i_size, Index j_size) {
  using Real = std::common_type_t<decltype(widen(To{})), decltype(widen(From{}))>;
  using V = typename Vector<Real, N>::type;
  constexpr auto lanes = std::make_integer_sequence<int, N>{};
  for (Index i = 0; i < i_size; i += N) {
    for (Index j = 0; j < j_size; j += N) {
      const Index i_from = least(i, i_size - N), j_from = least(j, j_size - N);
      Real lane[N];
      V rows[N], mixed[N];
      for (int row = 0; row < N; ++row) {
        copy_lanes<N>(lane, from + (i_from + row) * from_step + j_from);
        rows[row] = load<V>(lane);
      }
      for (int stage = 1; stage < N; stage *= 2) {
        for (int row = 0; row < N / 2; ++row) {
          mixed[2 * row] = interleave<N, false>(rows[row], rows[row + N / 2], lanes);
          mixed[2 * row + 1] = interleave<N, true>(rows[row], rows[row + N / 2], lanes);
        }
        for (int row = 0; row < N; ++row) rows[row] = mixed[row];
      }
      for (int row = 0; row < N; ++row) {
        store<V>(lane, rows[row]);
        copy_lanes<N>(to + (j_from + row) * to_step + i_from, lane);
      }
    }
  }
}

// to[j * to_step + i] = from[i * from_step + j]. LANES: of the widest register to use.
template <int LANES, class To, class From>
void transpose(To* to, Index to_step, const From* from, Index from_step, Index i_size, Index j_size) {
  const Index smaller = least(i_size, j_size);
  if constexpr (LANES >= 16) {
    if (smaller >= 16) return transpose_blocks<16>(to, to_step, from, from_step, i_size, j_size);
  }
  if constexpr (LANES >= 8) {
    if (smaller >= 8) return transpose_blocks<8>(to, to_step, from, from_step, i_size, j_size);
  }
  if (smaller >= 4) return transpose_blocks<4>(to, to_step, from, from_step, i_size, j_size);
  for (Index i = 0; i < i_size; ++i)
    for (Index j = 0; j < j_size; ++j) copy_lanes<1>(to + j * to_step + i, from + i * from_step + j);
}

// Channels at columns `wanted` of one row -> [chunk][column][LANES], zero outside the image and beyond the last channel.
template <class Real, int LANES, class Element>
void pack_columns(Real* to, Index chunk_step, const Element* from, Index channel_step, Index column_step, Range wanted,
                  Index width, Index channels) {
  const Range inside = {least(most(wanted.from, 0), wanted.to), most(least(wanted.to, width), wanted.from)};
  const Index whole = channels / LANES, chunks = ceil_div(channels, LANES);
  for (Index chunk = 0; chunk < chunks; ++chunk) {
    Real* row = to + chunk * chunk_step;
    const Index before = chunk < whole ? inside.from - wanted.from : wanted.size();
    std::memset(row, 0, sizeof(Real) * LANES * before);
    std::memset(row + (inside.to - wanted.from) * LANES, 0, sizeof(Real) * LANES * (wanted.to - inside.to));
  }
  to -= wanted.from * LANES;
  const bool by_column = channel_step == 1;
  if (by_column) {  // in the order of memory
    for (Index column = inside.from; column < inside.to; ++column)
      for (Index chunk = 0; chunk < whole; ++chunk)
        copy_lanes<LANES>(to + chunk * chunk_step + column * LANES, from + column * column_step + chunk * LANES);
  }
  for (Index chunk = by_column ? whole : 0; chunk < chunks; ++chunk) {
    const Element* source = from + chunk * LANES * channel_step;
    Real* target = to + chunk * chunk_step;
    const Index lanes = least(LANES, channels - chunk * LANES);
    if (column_step == 1) {
      transpose<LANES>(target + inside.from * LANES, LANES, source + inside.from, channel_step, lanes, inside.size());
    } else {
      for (Index lane = 0; lane < lanes; ++lane)
        for (Index column = inside.from; column < inside.to; ++column)
          target[column * LANES + lane] = widen(source[column * column_step + lane * channel_step]);
    }
  }
}

// The reverse, for columns that all lie inside.
template <class Real, int LANES, class Element>
void unpack_columns(Element* to, Index channel_step, Index column_step, const Real* from, Index chunk_step, Index columns,
                    Index channels) {
  const Index whole = channels / LANES, chunks = ceil_div(channels, LANES);
  const bool by_column = channel_step == 1;
  if (by_column) {
    for (Index column = 0; column < columns; ++column)
      for (Index chunk = 0; chunk < whole; ++chunk)
        copy_lanes<LANES>(to + column * column_step + chunk * LANES, from + chunk * chunk_step + column * LANES);
  }
  for (Index chunk = by_column ? whole : 0; chunk < chunks; ++chunk) {
    const Real* source = from + chunk * chunk_step;
    Element* target = to + chunk * LANES * channel_step;
    const Index lanes = least(LANES, channels - chunk * LANES);
    if (column_step == 1) {
      transpose<LANES>(target, channel_step, source, LANES, columns, lanes);
    } else {
      for (Index lane = 0; lane < lanes; ++lane)
        for (Index column = 0; column < columns; ++column)
          narrow(source[column * LANES + lane], target[column * column_step + lane * channel_step]);
    }
  }
}

// Channels at all columns of one row -> [channel][to_step].
template <int LANES, class Real, class Element>
void pack_planes(Real* to, Index to_step, const Element* from, Index channel_step, Index column_step, Index columns,
                 Index channels) {
  if (channel_step == 1) return transpose<LANES>(to, to_step, from, column_step, columns, channels);
  for (Index channel = 0; channel < channels; ++channel) {
    Real* target = to + channel * to_step;
    const Element* row = from + channel * channel_step;
    if (column_step == 1) {
      widen_run(target, row, columns);
    } else {
      for (Index column = 0; column < columns; ++column) target[column] = widen(row[column * column_step]);
    }
  }
}

constexpr Index CACHE_LINE = 64;

// Where the loops find things, the same for all rows of all tasks. Steps are in elements.
struct Layout {
  Index taps, stride, dilation;                     // of one line of the window, in columns
  Index x_depth, x_row;                             // from line to line of the window in the packed rows
  Index y_column;                                   // from output to output
  Index tap_depth, tap_row, tap_column, tap_output;  // from tap to tap along each axis, and from output to output
  Index fetched;                                    // bytes of taps to come that each tile prefetches
};

// Whether the taps are read where they lie, and if not, which way they are copied.
template <class Real, class Element>
bool taps_in_place(const Problem& p) {
  return std::is_same_v<Real, Element> && (p.kernel_stride[4] == 1 || p.kernel[2] == 1 || p.kernel_stride[7] == 1);
}
inline bool taps_innermost(const Problem& p) { return p.kernel_stride[4] == 1 || p.kernel[2] == 1; }

// Whether all taps of a position lie in one run; the stride of an axis of size one means nothing.
inline bool taps_in_one_run(const Problem& p) {
  const Index* step = p.kernel_stride + 2;
  return taps_innermost(p) && (p.kernel[1] == 1 || step[1] == p.kernel[2]) &&
         (p.kernel[0] == 1 || step[0] == p.kernel[1] * p.kernel[2]);
}

// The kernel of one group and output row, outputs `wanted`: a dense copy of the taps at `depths`.
template <class Real, class Element>
void copy_taps(Real* to, const Layout& at, const Problem& p, const Element* from, Range depths, Range wanted) {
  const Index *step = p.kernel_stride + 2, outputs = wanted.size();
  from += wanted.from * step[5];
  if (taps_in_one_run(p)) {
    const Index first = depths.from * at.tap_depth, count = depths.size() * at.tap_depth;
    for (Index output = 0; output < outputs; ++output)
      widen_run(to + output * at.tap_output + first, from + output * step[5] + first, count);
    return;
  }
  for (Index depth = depths.from; depth < depths.to; ++depth)
    for (Index row = 0; row < p.kernel[1]; ++row)
      for (Index tap = 0; tap < p.kernel[2]; ++tap) {
        const Element* source = from + depth * step[0] + row * step[1] + tap * step[2];
        Real* target = to + depth * at.tap_depth + row * at.tap_row + tap * at.tap_column;
        if (at.tap_output == 1 && step[5] == 1) {
          widen_run(target, source, outputs);
          continue;
        }
        for (Index output = 0; output < outputs; ++output) target[output * at.tap_output] = widen(source[output * step[5]]);
      }
}

// ---------------------------------------------------------------------------------------------- tiles of columns

// Calls body(x, taps) for every line of the window that lies inside the image: `depths` x `rows` of them.
template <class Real, class Body>
inline void for_each_line(Real* x, const Real* taps, Index depths, Index rows, const Layout& at, const Body& body) {
  for (Index depth = 0; depth < depths; ++depth)
    for (Index row = 0; row < rows; ++row)
      body(x + depth * at.x_depth + row * at.x_row, taps + depth * at.tap_depth + row * at.tap_row);
}

// The taps of one line for a tile: a pointer for each output (taps innermost) or each tap, so that all offsets are constants.
template <class Real, int K, bool TAPS_INNERMOST, int COLUMNS>
struct TileTaps {
  const Real* at[TAPS_INNERMOST ? COLUMNS : K];
  TileTaps(const Real* first, const Layout& layout) {
#pragma GCC unroll 16
    for (int i = 0; i < (TAPS_INNERMOST ? COLUMNS : K); ++i)
      at[i] = first + i * (TAPS_INNERMOST ? layout.tap_output : layout.tap_column);
  }
  Real operator()(int column, int tap) const { return TAPS_INNERMOST ? at[column][tap] : at[tap][column]; }
};

// COLUMNS outputs of a row: the sums over all lines of the window stay in registers. K, S = 0: known at run time only.
template <class Real, int LANES, int K, int S, bool TAPS_INNERMOST, int COLUMNS>
inline void gather_tile(Real* y, Real* x, const Real* taps, Index depths, Index rows, const Layout& at) {
  using V = typename Vector<Real, LANES>::type;
  V sums[COLUMNS] = {};
  for_each_line(x, taps, depths, rows, at, [&](const Real* line, const Real* first) {
    if constexpr (K > 0) {
      const TileTaps<Real, K, TAPS_INNERMOST, COLUMNS> tap(first, at);
#pragma GCC unroll 32
      for (int position = 0; position < (COLUMNS - 1) * S + K; ++position) {
        const V value = load<V>(line + position * LANES);
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const int t = position - column * S;
          if (t >= 0 && t < K) sums[column] += tap(column, t) * value;
        }
      }
    } else {
      for (Index t = 0; t < at.taps; ++t)
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column)
          sums[column] += first[column * at.tap_output + t * at.tap_column] *
                          load<V>(line + (column * at.stride + t * at.dilation) * LANES);
    }
  });
#pragma GCC unroll 8
  for (int column = 0; column < COLUMNS; ++column) store<V>(y + column * at.y_column, sums[column]);
}

// The transpose: COLUMNS output gradients add their share to the positions each line of the window read.
template <class Real, int LANES, int K, int S, bool TAPS_INNERMOST, int COLUMNS>
inline void scatter_tile(Real* y, Real* x, const Real* taps, Index depths, Index rows, const Layout& at) {
  using V = typename Vector<Real, LANES>::type;
  V grads[COLUMNS];
#pragma GCC unroll 8
  for (int column = 0; column < COLUMNS; ++column) grads[column] = load<V>(y + column * at.y_column);
  for_each_line(x, taps, depths, rows, at, [&](Real* line, const Real* first) {
    if constexpr (K > 0) {
      const TileTaps<Real, K, TAPS_INNERMOST, COLUMNS> tap(first, at);
#pragma GCC unroll 32
      for (int position = 0; position < (COLUMNS - 1) * S + K; ++position) {
        V sum = load<V>(line + position * LANES);
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const int t = position - column * S;
          if (t >= 0 && t < K) sum += tap(column, t) * grads[column];
        }
        store<V>(line + position * LANES, sum);
      }
    } else {
      for (Index t = 0; t < at.taps; ++t)
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          Real* position = line + (column * at.stride + t * at.dilation) * LANES;
          store<V>(position, load<V>(position) + first[column * at.tap_output + t * at.tap_column] * grads[column]);
        }
    }
  });
}

// A row of outputs, in tiles of 7 columns, which leave no rest on any map of a 224-pixel network.
template <bool FORWARD, class Real, int LANES, int K, int S, bool TAPS_INNERMOST>
void row_of_tiles(Real* y, Real* x, const Real* taps, Index columns, Index depths, Index rows, const Layout& at,
                  const char* coming) {
  Index column = 0;
  const auto run = [&](auto width) {
    constexpr auto tile = FORWARD ? gather_tile<Real, LANES, K, S, TAPS_INNERMOST, width>
                                  : scatter_tile<Real, LANES, K, S, TAPS_INNERMOST, width>;
    for (; column + width <= columns; column += width) {
      for (const char* end = coming + at.fetched * width; coming < end; coming += CACHE_LINE) __builtin_prefetch(coming, 0, 2);
      for (int next = width; next < 2 * width; ++next) __builtin_prefetch(y + (column + next) * at.y_column, FORWARD);
      tile(y + column * at.y_column, x + column * at.stride * LANES, taps + column * at.tap_output, depths, rows, at);
    }
  };
  run(std::integral_constant<int, 7>{});
  run(std::integral_constant<int, 3>{});
  run(std::integral_constant<int, 1>{});
}

template <class Real>
using Row = void (*)(Real*, Real*, const Real*, Index, Index, Index, const Layout&, const char*);

// The variant for this window: unrolled for float32, the usual kernel sizes and strides; else the general one.
template <bool FORWARD, class Real, int LANES>
Row<Real> choose_row(const Layout& at, bool innermost) {
#define VARIANT(K, S) (innermost ? row_of_tiles<FORWARD, Real, LANES, K, S, true> : row_of_tiles<FORWARD, Real, LANES, K, S, false>)
  if constexpr (sizeof(Real) == 4) {
    if (at.dilation == 1 && at.stride == 1) {
      if (at.taps == 3) return VARIANT(3, 1);
      if (at.taps == 5) return VARIANT(5, 1);
      if (at.taps == 7) return VARIANT(7, 1);
      if (at.taps == 9) return VARIANT(9, 1);
    }
    if (at.dilation == 1 && at.stride == 2) {
      if (at.taps == 3) return VARIANT(3, 2);
      if (at.taps == 7) return VARIANT(7, 2);
    }
  }
  return VARIANT(0, 0);
#undef VARIANT
}

// ---------------------------------------------------------------------------------------------- generated kernels

// A part of a matrix product: to[m][n] = start + sum over k of a[m * a_row + k * a_term] * b[k][n], ROWS by VECTORS vectors of it.
// `start` is a number for each row; null: what `to` holds.
template <class Real, int LANES, int ROWS, int VECTORS>
inline void product_tile(Real* to, Index to_row, const Real* start, const Real* a, Index a_row, Index a_term, const Real* b,
                         Index b_row, Index terms) {
  using V = typename Vector<Real, LANES>::type;
  V sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[m][v] = start ? V{} + start[m] : load<V>(to + m * to_row + v * LANES);
  for (Index k = 0; k < terms; ++k) {
    V values[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) values[v] = load<V>(b + k * b_row + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[m][v] += a[m * a_row + k * a_term] * values[v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store<V>(to + m * to_row + v * LANES, sums[m][v]);
}

// The whole product, of `rows` rows and `vectors` vectors in each: strips of vectors, each in tiles of at most ROWS rows, which
// with their operands fill the registers. Rows that are no multiple of that are dealt to tiles of one row less first, since
// small tiles wait for their own sums.
template <class Real, int LANES>
void product(Real* to, Index to_row, const Real* start, const Real* a, Index a_row, Index a_term, const Real* b, Index b_row,
             Index rows, Index vectors, Index terms) {
  constexpr bool MANY_REGISTERS = sizeof(Real) * LANES == 64;
  Index vector = 0;
  const auto strip = [&](auto width, auto height) {
    Index row = 0;
    const auto tile = [&](auto tall) {
      product_tile<Real, LANES, tall, width>(to + row * to_row + vector * LANES, to_row, start ? start + row : nullptr,
                                             a + row * a_row, a_row, a_term, b + vector * LANES, b_row, terms);
      row += tall;
    };
    while (row < rows) {
      const Index left = rows - row;
      if (left % height == 0) tile(height);
      else if (left >= height - 1) tile(std::integral_constant<int, height - 1>{});
      else if (left >= 2) tile(std::integral_constant<int, 2>{});
      else tile(std::integral_constant<int, 1>{});
    }
    vector += width;
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  constexpr std::integral_constant<int, 4> four;
  constexpr std::integral_constant<int, MANY_REGISTERS ? 7 : 6> rows_of_two;
  constexpr std::integral_constant<int, MANY_REGISTERS ? 7 : 4> rows_of_three;
  if constexpr (MANY_REGISTERS)
    while (vectors - vector >= 4 && vectors - vector != 5) strip(four, rows_of_two);
  if (vectors - vector >= 3 && (vectors - vector) % 2 == 1) strip(three, rows_of_three);
  while (vectors - vector >= 2) strip(two, rows_of_two);
  if (vectors > vector) strip(one, rows_of_two);
}

inline Index taps_of(const Problem& p) { return p.kernel[0] * p.kernel[1] * p.kernel[2]; }

// The part `which` of the taps of one group, at `vectors` vectors of pixels: [tap][pixels], from features [channel][pixels].
template <class Real, int LANES>
void span(Real* taps, const Problem& p, Index group, Range which, const Real* features, Index vectors, Index pixels) {
  const Index first = group * taps_of(p) + which.from;
  product<Real, LANES>(taps + which.from * pixels, pixels, static_cast<const Real*>(p.bias) + first,
                       static_cast<const Real*>(p.weight) + first * p.reduced, p.reduced, 1, features, pixels, which.size(), vectors,
                       p.reduced);
}

// ---------------------------------------------------------------------------------------------- tasks

constexpr Index COLUMNS_PER_TASK = 512;
constexpr Index KERNEL_BYTES_PER_TASK = 320 << 10;  // the taps of a task's rows stay in the second-level cache between groups
constexpr Index PIXELS_PER_TASK = 448;              // where the kernel is generated, so do those of one group
[[maybe_unused]] constexpr Index SERIAL_WORK = 1 << 15;              // multiply-adds below which a second thread costs more than it gives

// How one op is cut: into batch x depths x blocks of rows x blocks of columns x blocks of groups.
struct Tasks {
  Index depths, rows, columns, groups;                      // extents
  Index row_blocks, column_blocks, group_blocks, count;     // how many
  Tasks(const Problem& p, const Index* size, Index threads) : depths(size[0]), rows(size[1]), columns(size[2]), groups(p.groups) {
    const Index taps = taps_of(p);
    column_blocks = ceil_div(columns, COLUMNS_PER_TASK);
    const Index row_bytes = ceil_div(columns, column_blocks) * groups * taps * Index(sizeof(float));
    const Index rows_per_task = p.weight ? PIXELS_PER_TASK / ceil_div(columns, column_blocks) : KERNEL_BYTES_PER_TASK / row_bytes;
    row_blocks = ceil_div(rows, most(1, least(rows, rows_per_task)));
    // Few tasks are dealt out by group, too: a given kernel suffers when it is not read in order, a generated one does not.
    const Index tasks = p.batch * depths * row_blocks * column_blocks, wanted = (p.weight ? 4 : 2) * threads;
    // The gradient of the features is a sum over groups, so these stay together there.
    group_blocks = tasks >= wanted || p.grad_weight ? 1 : least(groups, ceil_div(wanted, most(1, tasks)));
    count = tasks * group_blocks;
  }
};

inline Range part(Index size, Index blocks, Index block) { return {size * block / blocks, size * (block + 1) / blocks}; }

struct Task {
  Index batch, depth;
  Range rows, columns, groups;
  Task(const Tasks& all, Index index) {
    groups = part(all.groups, all.group_blocks, index % all.group_blocks), index /= all.group_blocks;
    columns = part(all.columns, all.column_blocks, index % all.column_blocks), index /= all.column_blocks;
    rows = part(all.rows, all.row_blocks, index % all.row_blocks), index /= all.row_blocks;
    depth = index % all.depths, batch = index / all.depths;
  }
};

// Scratch memory of one thread, carved into aligned pieces. The first pass, without memory, measures.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(Index count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ = count >= TOO_MUCH / 8 ? TOO_MUCH : used_ + ((count * Index(sizeof(T)) + 63) & ~Index(63));
    return piece;
  }
  Index used() const { return least(used_, TOO_MUCH); }

 private:
  char* base_;
  Index used_ = 0;
};

// Scratch of a calling thread, kept for its next call: fresh memory costs a page fault for every 4 KiB.
class Kept {
 public:
  ~Kept() { std::free(memory_); }
  char* at_least(Index bytes) {
    if (bytes > size_) {
      std::free(memory_);
      memory_ = static_cast<char*>(std::aligned_alloc(4096, std::size_t(bytes)));
      size_ = memory_ == nullptr ? 0 : bytes;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  Index size_ = 0;
};

// How the tasks of an op are dealt out: in lots of consecutive ones, here each alone. `begin` and `finish` are for sums over tasks.
struct Alone {
  Index lots(Index tasks) const { return tasks; }
  void begin(Index) const {}
  void finish(Index) const {}
};

// Runs all tasks of an op on torch's threads. Returns 0, or 1 if there is no memory for the scratch.
template <class Op>
int run_tasks(const Problem& p, const Index* size) {
  Index threads = 1;
#if defined(_OPENMP)
  const Index outputs = p.output[0] * p.output[1] * p.output[2];
  if (p.batch * p.groups * p.channels * outputs * taps_of(p) > SERIAL_WORK) threads = omp_get_max_threads();
#endif
  const Tasks tasks(p, size, threads);
  const Op op(p, tasks);
  Arena measure(nullptr);
  op.scratch(measure);
  const Index bytes = (measure.used() + 4095) & ~Index(4095);
  if (bytes >= TOO_MUCH) return 1;
  static thread_local Kept kept;
  char* memory = kept.at_least(bytes * threads);
  if (memory == nullptr) return 1;
  const Index lots = op.lots(tasks.count);
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(threads)) if (threads > 1)
#endif
  for (Index lot = 0; lot < lots; ++lot) {
#if defined(_OPENMP)
    Arena arena(memory + bytes * omp_get_thread_num());
#else
    Arena arena(memory);
#endif
    const auto scratch = op.scratch(arena);
    op.begin(lot);
    for (Index index = part(tasks.count, lots, lot).from; index < part(tasks.count, lots, lot).to; ++index)
      op.run(Task(tasks, index), scratch, lot);
  }
  op.finish(lots);
  return 0;
}

// ---------------------------------------------------------------------------------------------- the ops

// The taps of a row of outputs lie position by position, all groups together: a few rows at a time, so that they are read in
// the order of memory, while those of the rows to come are fetched; yet the packed rows of a group serve several outputs.
constexpr Index ROWS_TOGETHER = 2;

template <class Body>
inline void for_rows_and_groups(Range rows, Range groups, const Body& body) {
  for (Index first = rows.from; first < rows.to; first += ROWS_TOGETHER)
    for (Index group = groups.from; group < groups.to; ++group)
      for (Index row = first; row < least(first + ROWS_TOGETHER, rows.to); ++row) body(row, group);
}

// What forward and grad_x have in common: lanes are channels. `x_rows`, `x_columns` and `y_columns` are the most that the
// packed rows of a task can have.
template <bool FORWARD, class Real, int LANES, class Element>
struct ByChannel : Alone {
  const Problem& p;
  const Index chunks, x_depths, x_columns, y_columns, x_row, x_depth, x_chunk, x_groups;
  const bool y_in_place, generates_taps, copies_taps;
  const Index y_chunk;
  const Index pixels;  // of a task, in whole vectors; an odd number of them, so that the rows of a plane spread over the cache
  const Layout at;
  const Row<Real> row;

  static constexpr int WIDEST = VECTOR_BYTES / int(sizeof(Real));

  ByChannel(const Problem& problem, Index groups, Index x_rows, Index columns, Index y_rows, Index outputs)
      : p(problem),
        chunks(ceil_div(p.channels, LANES)),
        x_depths(FORWARD ? p.kernel[0] : 1),
        x_columns(columns),
        y_columns(outputs),
        x_row(times(x_columns, LANES)),
        x_depth(times(x_row, x_rows)),
        x_chunk(times(x_depth, x_depths)),
        x_groups(groups),
        y_in_place(std::is_same_v<Real, Element> && p.y_stride[1] == 1 && p.channels % LANES == 0),
        generates_taps(p.weight != nullptr),
        copies_taps(!generates_taps && !taps_in_place<Real, Element>(p)),
        y_chunk(y_in_place ? LANES : y_columns * LANES),
        pixels(times(ceil_div(times(y_rows, y_columns), WIDEST) | 1, WIDEST)),
        at(layout()),
        row(choose_row<FORWARD, Real, LANES>(at, !generates_taps && taps_innermost(p))) {}

  Layout layout() const {
    Layout result = {p.kernel[2], p.stride[2], p.dilation[2], x_depth, p.dilation[1] * x_row, y_in_place ? p.y_stride[4] : LANES,
                     p.kernel_stride[2], p.kernel_stride[3], p.kernel_stride[4], p.kernel_stride[7], 0};
    if (copies_taps) {
      result.tap_column = taps_innermost(p) ? 1 : y_columns;
      result.tap_row = p.kernel[2] * result.tap_column;
      result.tap_depth = p.kernel[1] * result.tap_row;
      result.tap_output = taps_innermost(p) ? p.kernel[0] * result.tap_depth : 1;
    }
    if (generates_taps) {
      result.tap_output = 1;
      result.tap_column = pixels;
      result.tap_row = times(p.kernel[2], pixels);
      result.tap_depth = times(p.kernel[1], result.tap_row);
    } else if (taps_in_one_run(p)) result.fetched = taps_of(p) * Index(sizeof(Element)) / chunks;
    return result;
  }

  struct Scratch {
    Real *x, *y, *taps, *features;
  };
  Scratch scratch(Arena& arena) const {
    const Index taps = taps_of(p);
    return {arena.take<Real>(times(x_chunk, x_groups, chunks)),
            arena.take<Real>(y_in_place ? 0 : times(y_columns, chunks, LANES)),
            arena.take<Real>(generates_taps ? times(pixels, taps) : copies_taps ? times(y_columns, taps) : 0),
            arena.take<Real>(generates_taps ? times(pixels, p.reduced) : 0)};
  }

  // Calls body(first group, channels) for runs of channels that fill whole vectors: all groups at once, or each alone.
  template <class Body>
  void for_each_run(Range groups, const Body& body) const {
    if (p.channels % LANES == 0) return body(groups.from, groups.size() * p.channels);
    for (Index group = groups.from; group < groups.to; ++group) body(group, p.channels);
  }

  // Taps along `axis` that lie in [0, limit) when the first lies at `position`.
  Range taps_inside(int axis, Index position, Index limit) const {
    const Index step = p.dilation[axis], from = most(0, ceil_div(-position, step));
    return {from, most(from, least(p.kernel[axis], floor_div(limit - 1 - position, step) + 1))};
  }
  static Element* row_of(void* data, const Index* step, Index batch, Index channel, Index depth, Index row) {
    return static_cast<Element*>(data) + batch * step[0] + channel * step[1] + depth * step[2] + row * step[3];
  }

  // The features of the outputs `rows` x `columns`, [channel][pixel]. Returns how many vectors of pixels there are.
  Index pack_features(Real* to, Index batch, Index depth, Range rows, Range columns) const {
    const Index used = rows.size() * columns.size(), vectors = ceil_div(used, WIDEST);
    const bool one_run = p.features_stride[3] == columns.size() * p.features_stride[4];  // rows follow one another like columns
    const Index runs = one_run ? 1 : rows.size(), length = used / most(1, runs);
    for (Index run = 0; run < runs; ++run)
      pack_planes<WIDEST>(to + run * length, pixels,
                          row_of(p.features, p.features_stride, batch, 0, depth, rows.from + run) + columns.from * p.features_stride[4],
                          p.features_stride[1], p.features_stride[4], length, p.reduced);
    for (Index channel = 0; channel < p.reduced; ++channel)
      std::memset(to + channel * pixels + used, 0, sizeof(Real) * (vectors * WIDEST - used));
    return vectors;
  }

  // Runs the loops on one row of outputs with the kernel that is given: see `run_row`.
  void run_row_of_kernel(Index batch, Index group, Index depth, Index out, Range outputs, Range depths, Range rows, Element* y, Real* x,
               const Scratch& s) const {
    const Index* step = p.kernel_stride;
    const Element* all_groups = static_cast<const Element*>(p.kernel_data) + batch * step[0] + depth * step[5] + out * step[6];
    const Element* kernel = all_groups + group * step[1];
    const char* coming = reinterpret_cast<const char*>(all_groups + ROWS_TOGETHER * step[6] + outputs.from * step[7]) +
                         group * outputs.size() * at.fetched;
    const Real* taps = s.taps;
    if constexpr (std::is_same_v<Real, Element>) taps = kernel + outputs.from * step[7];
    if (copies_taps) {
      copy_taps(s.taps, at, p, kernel, depths, outputs);
      taps = s.taps;
    }
    run_row(outputs, taps, coming, depths, rows, y, x, s);
  }

  // Runs the loops on one row of outputs: `y` of a group, lines (`depths` x `rows`) of the window, the first of them at `x`;
  // `taps` of the first output, memory to prefetch.
  void run_row(Range outputs, const Real* taps, const char* coming, Range depths, Range rows, Element* y, Real* x, const Scratch& s) const {
    taps += depths.from * at.tap_depth + rows.from * at.tap_row;
    Real* values = s.y;
    if constexpr (std::is_same_v<Real, Element>) values = y_in_place ? y : s.y;
    if (!FORWARD && !y_in_place)
      pack_columns<Real, LANES>(s.y, y_chunk, y, p.y_stride[1], p.y_stride[4], {0, outputs.size()}, outputs.size(), p.channels);
    for (Index chunk = 0; chunk < chunks; ++chunk)
      row(values + chunk * y_chunk, x + chunk * x_chunk, taps, outputs.size(), depths.size(), rows.size(), at, coming);
    if (FORWARD && !y_in_place)
      unpack_columns<Real, LANES>(y, p.y_stride[1], p.y_stride[4], s.y, y_chunk, outputs.size(), p.channels);
  }
};

template <class Real, int LANES, class Element>
struct Forward : ByChannel<true, Real, LANES, Element> {
  using Base = ByChannel<true, Real, LANES, Element>;
  using Base::p;

  Forward(const Problem& p, const Tasks& all)
      : Base(p, ceil_div(all.groups, all.group_blocks),
             (ceil_div(all.rows, all.row_blocks) - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1,
             (ceil_div(all.columns, all.column_blocks) - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1,
             ceil_div(all.rows, all.row_blocks), ceil_div(all.columns, all.column_blocks)) {}

  void run(const Task& task, const typename Base::Scratch& s, Index) const {
    const Index first_depth = task.depth * p.stride[0] - p.padding[0];
    const Index first_row = task.rows.from * p.stride[1] - p.padding[1];
    const Index first_column = task.columns.from * p.stride[2] - p.padding[2];
    const Index rows = (task.rows.size() - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
    const Range depths = this->taps_inside(0, first_depth, p.input[0]);
    const auto packed = [&](Index group) { return s.x + (group - task.groups.from) * this->chunks * this->x_chunk; };
    for (Index depth = depths.from; depth < depths.to; ++depth)
      for (Index row = most(0, -first_row); row < least(rows, p.input[1] - first_row); ++row)
        this->for_each_run(task.groups, [&](Index group, Index channels) {
          pack_columns<Real, LANES>(packed(group) + depth * this->x_depth + row * this->x_row, this->x_chunk,
                                    Base::row_of(p.x, p.x_stride, task.batch, group * p.channels,
                                                 first_depth + depth * p.dilation[0], first_row + row),
                                    p.x_stride[1], p.x_stride[4], {first_column, first_column + this->x_columns}, p.input[2], channels);
        });
    const auto run_out = [&](Index out, Index group, const auto& run_lines) {
      const Range lines = this->taps_inside(1, out * p.stride[1] - p.padding[1], p.input[1]);
      const Index row = (out - task.rows.from) * p.stride[1] + lines.from * p.dilation[1];
      run_lines(lines, Base::row_of(p.y, p.y_stride, task.batch, group * p.channels, task.depth, out) + task.columns.from * p.y_stride[4],
                packed(group) + depths.from * this->x_depth + row * this->x_row);
    };
    if (!this->generates_taps) {
      for_rows_and_groups(task.rows, task.groups, [&](Index out, Index group) {
        run_out(out, group, [&](Range lines, Element* y, Real* x) {
          this->run_row_of_kernel(task.batch, group, task.depth, out, task.columns, depths, lines, y, x, s);
        });
      });
      return;
    }
    const Index vectors = this->pack_features(s.features, task.batch, task.depth, task.rows, task.columns);
    for (Index group = task.groups.from; group < task.groups.to; ++group) {
      span<Real, Base::WIDEST>(s.taps, p, group, {0, taps_of(p)}, s.features, vectors, this->pixels);
      for (Index out = task.rows.from; out < task.rows.to; ++out)
        run_out(out, group, [&](Range lines, Element* y, Real* x) {
          this->run_row(task.columns, s.taps + (out - task.rows.from) * task.columns.size(), nullptr, depths, lines, y, x, s);
        });
    }
  }
};

// Each block of x gathers what all outputs that read it scatter into it; here `y` is the output's gradient, which is read.
template <class Real, int LANES, class Element>
struct GradX : ByChannel<false, Real, LANES, Element> {
  using Base = ByChannel<false, Real, LANES, Element>;
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
    const Index reach = (p.kernel[2] - 1) * p.dilation[2];  // the packed rows begin this far before the block
    const Index first_column = outputs.from * p.stride[2] - p.padding[2] - (task.columns.from - reach);
    const auto packed = [&](Index group) { return s.x + (group - task.groups.from) * this->chunks * this->x_chunk; };
    std::memset(s.x, 0, sizeof(Real) * task.groups.size() * this->chunks * this->x_chunk);
    for (Index tap = 0; tap < p.kernel[0]; ++tap) {
      const Index reads = task.depth + p.padding[0] - tap * p.dilation[0], depth = floor_div(reads, p.stride[0]);
      if (reads % p.stride[0] != 0 || depth < 0 || depth >= p.output[0] || outputs.size() == 0) continue;
      const Range depths = {tap, tap + 1};
      const auto run_out = [&](Index out, Index group, const auto& run_lines) {
        const Index position = out * p.stride[1] - p.padding[1] - task.rows.from;
        const Range lines = this->taps_inside(1, position, task.rows.size());
        if (lines.size() == 0) return;
        run_lines(lines, Base::row_of(p.y, p.y_stride, task.batch, group * p.channels, depth, out) + outputs.from * p.y_stride[4],
                  packed(group) + (position + lines.from * p.dilation[1]) * this->x_row + first_column * LANES);
      };
      if (!this->generates_taps) {
        for_rows_and_groups(outs, task.groups, [&](Index out, Index group) {
          run_out(out, group, [&](Range lines, Element* y, Real* x) {
            this->run_row_of_kernel(task.batch, group, depth, out, outputs, depths, lines, y, x, s);
          });
        });
        continue;
      }
      const Index vectors = this->pack_features(s.features, task.batch, depth, outs, outputs), of_depth = p.kernel[1] * p.kernel[2];
      for (Index group = task.groups.from; group < task.groups.to; ++group) {
        span<Real, Base::WIDEST>(s.taps, p, group, {tap * of_depth, (tap + 1) * of_depth}, s.features, vectors, this->pixels);
        for (Index out = outs.from; out < outs.to; ++out)
          run_out(out, group, [&](Range lines, Element* y, Real* x) {
            this->run_row(outputs, s.taps + (out - outs.from) * outputs.size(), nullptr, depths, lines, y, x, s);
          });
      }
    }
    for (Index row = 0; row < task.rows.size(); ++row)
      this->for_each_run(task.groups, [&](Index group, Index channels) {
        unpack_columns<Real, LANES>(Base::row_of(p.x, p.x_stride, task.batch, group * p.channels, task.depth, task.rows.from + row) +
                                        task.columns.from * p.x_stride[4],
                                    p.x_stride[1], p.x_stride[4], packed(group) + row * this->x_row + reach * LANES, this->x_chunk,
                                    task.columns.size(), channels);
      });
  }
};

// Lanes are columns. Packed rows of x lie [channel][phase][column / stride], phase = column mod stride, so that the
// inputs of neighbouring outputs are neighbours for any stride.
// Where the kernel is generated its gradient stays in cache, too, and is multiplied at once into those of the features, of
// the weight and of the bias. The last two are sums over all tasks: partial ones for each lot of tasks, added up at the end.
// How many lots there are does not depend on the threads.
template <class Real, int LANES, class Element>
struct GradKernel {
  using V = typename Vector<Real, LANES>::type;
  static constexpr int WIDEST = VECTOR_BYTES / int(sizeof(Real));
  const Problem& p;
  const bool generated;
  const Index groups, columns, x_rows, x_columns, x_phase, x_channel;  // the most that a task can have
  const Index tap_step;                                                // from tap to tap of the gradient of the kernel
  const Index features_row;                                            // features of a position, in whole vectors

  struct Scratch {
    Real *x, *y, *taps;  // taps: [tap][column], all taps of a row of outputs, or [tap][pixel], of all rows of the task
    Index* offsets;      // of each tap of a line in a packed row
    Real *features, *grad_features;  // [pixel][features_row], [channel][pixel]
  };
  void (GradKernel::*const taps_of_line_)(const Scratch&, const Real*, Real*) const;

  GradKernel(const Problem& problem, const Tasks& all)
      : p(problem),
        generated(p.grad_weight != nullptr),
        groups(ceil_div(all.groups, all.group_blocks)),
        columns(ceil_div(ceil_div(all.columns, all.column_blocks), LANES) * LANES),
        x_rows((ceil_div(all.rows, all.row_blocks) - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1),
        x_columns((columns - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1),
        x_phase(ceil_div(x_columns, p.stride[2])),
        x_channel(times(x_phase, p.stride[2])),
        tap_step(generated ? pixels(all) : columns),
        features_row(ceil_div(p.reduced, WIDEST) * WIDEST),
        taps_of_line_(choose(p)) {}

  // Of a task, in an odd number of whole vectors, so that taps spread over the cache; the last row is written in whole vectors.
  Index pixels(const Tasks& all) const {
    const Index rows = ceil_div(all.rows, all.row_blocks), width = ceil_div(all.columns, all.column_blocks);
    return times(ceil_div(times(rows - 1, width) + columns, WIDEST) | 1, WIDEST);
  }

  static auto choose(const Problem& p) -> void (GradKernel::*)(const Scratch&, const Real*, Real*) const {
    if (p.stride[2] == 1 && p.dilation[2] == 1) {
      if (p.kernel[2] == 3) return &GradKernel::taps_of_line<3, true>;
      if (p.kernel[2] == 5) return &GradKernel::taps_of_line<5, true>;
      if (p.kernel[2] == 7) return &GradKernel::taps_of_line<7, true>;
      if (p.kernel[2] == 9) return &GradKernel::taps_of_line<9, true>;
    }
    if (p.kernel[2] % 3 == 0) return &GradKernel::taps_of_line<3, false>;
    if (p.kernel[2] % 7 == 0) return &GradKernel::taps_of_line<7, false>;
    return &GradKernel::taps_of_line<1, false>;
  }

  Scratch scratch(Arena& arena) const {
    return {arena.take<Real>(times(x_channel, x_rows, p.kernel[0], p.channels, groups)),
            arena.take<Real>(times(p.channels, columns)),
            arena.take<Real>(times(p.kernel[0], p.kernel[1], p.kernel[2], tap_step)),
            arena.take<Index>(p.kernel[2]),
            arena.take<Real>(generated ? times(tap_step, features_row) : 0),
            arena.take<Real>(generated ? times(tap_step, p.reduced) : 0)};
  }

  // Columns from `first` on of `channels` rows, zero outside the image, to [channel][phase][column / stride].
  void pack(Real* to, const Element* from, Index channel_step, Index column_step, Index first, Index stride, Index phase,
            Index width) const {
    const Index wanted = phase * stride;
    const Range inside = {least(most(0, -first), wanted), most(0, least(wanted, width - first))};
    std::memset(to, 0, sizeof(Real) * p.channels * wanted);
    const Element* source = from + first * column_step;
    if (stride == 1)
      return pack_planes<LANES>(to + inside.from, wanted, source + inside.from * column_step, channel_step, column_step,
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
    if (!generated) {  // all groups of a row in turn, so that memory is written in its order where the channels lie together
      for (Index out = task.rows.from; out < task.rows.to; ++out)
        for (Index group = task.groups.from; group < task.groups.to; ++group) {
          taps_of_row(task, s, group, out, s.taps);
          write(task, s, group, out);
        }
      return;
    }
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
          widen_run(target, from + column * p.features_stride[4], p.reduced);
        } else if (p.features_stride[4] != 1) {
          for (Index r = 0; r < p.reduced; ++r) target[r] = widen(from[column * p.features_stride[4] + r * p.features_stride[1]]);
        }
        std::memset(target + p.reduced, 0, sizeof(Real) * (features_row - p.reduced));
      }
      if (p.features_stride[1] != 1 && p.features_stride[4] == 1)
        transpose<LANES>(to, features_row, from, p.features_stride[1], p.reduced, task.columns.size());
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
    if (step[1] == 1) return transpose<LANES>(to, step[4], from, tap_step, p.reduced, width);
    for (Index r = 0; r < p.reduced; ++r)
      for (Index column = 0; column < width; ++column) narrow(from[r * tap_step + column], to[r * step[1] + column * step[4]]);
  }

  // Partial sums of the gradients of weight and bias.
  Index partial_row() const { return ceil_div(p.reduced, 16) * 16; }
  Real* partial_weight(Index lot) const { return static_cast<Real*>(p.partial) + lot * p.groups * taps_of(p) * partial_row(); }
  Real* partial_bias(Index lot) const { return partial_weight(p.lots) + lot * p.groups * taps_of(p); }
  Index lots(Index tasks) const { return generated ? least(tasks, p.lots) : tasks; }
  void begin(Index lot) const {
    if (!generated) return;
    std::memset(partial_weight(lot), 0, sizeof(Real) * p.groups * taps_of(p) * partial_row());
    std::memset(partial_bias(lot), 0, sizeof(Real) * p.groups * taps_of(p));
  }
  void finish(Index lots) const {
    if (!generated) return;
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

  void write(const Task& task, const Scratch& s, Index group, Index out) const {
    const Index *step = p.kernel_stride, count = task.columns.size();
    Element* target = static_cast<Element*>(p.kernel_data) + task.batch * step[0] + group * step[1] + task.depth * step[5] +
                      out * step[6] + task.columns.from * step[7];
    const Index taps = taps_of(p);
    if (taps_in_one_run(p)) {
      transpose<LANES>(target, step[7], s.taps, tap_step, taps, count);
      return;
    }
    for (Index tap = 0; tap < taps; ++tap) {
      const Index column = tap % p.kernel[2], row = tap / p.kernel[2] % p.kernel[1], depth = tap / p.kernel[2] / p.kernel[1];
      const Real* values = s.taps + tap * tap_step;
      Element* line = target + depth * step[2] + row * step[3] + column * step[4];
      if (step[7] == 1) {
        for (Index i = 0; i < count; ++i) narrow(values[i], line[i]);
      } else {
        for (Index i = 0; i < count; ++i) narrow(values[i], line[i * step[7]]);
      }
    }
  }
};

// The widest registers, unless a group (or a row) fits into narrower ones.
template <template <class, int, class> class Op, class Real, class Element>
int run_lanes(const Problem& p, Index wanted, const Index* size) {
  constexpr int MOST = VECTOR_BYTES / int(sizeof(Real));
  if (MOST >= 16 && wanted <= 4) return run_tasks<Op<Real, MOST >= 16 ? MOST / 4 : MOST, Element>>(p, size);
  if (MOST >= 8 && wanted <= MOST / 2) return run_tasks<Op<Real, MOST >= 8 ? MOST / 2 : MOST, Element>>(p, size);
  return run_tasks<Op<Real, MOST, Element>>(p, size);
}

template <template <class, int, class> class Op>
int run_dtype(const Problem& p, Index lanes, const Index* size) {
  switch (p.dtype) {
    case FLOAT32: return run_lanes<Op, float, float>(p, lanes, size);
    case FLOAT64: return run_lanes<Op, double, double>(p, lanes, size);
    case BFLOAT16: return run_lanes<Op, float, BFloat16>(p, lanes, size);
    case FLOAT16: return run_lanes<Op, float, Float16>(p, lanes, size);
  }
  return 1;
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

// Each fills one of its tensors from the other two: y, x and kernel_data in turn; the last, if the kernel is generated, the
// gradients of what it is generated from. 0: done; 1: no memory for the scratch.
int involution_forward(const Problem* p) { return run_dtype<Forward>(*p, p->channels, p->output); }
int involution_grad_x(const Problem* p) { return run_dtype<GradX>(*p, p->channels, p->input); }
int involution_grad_kernel(const Problem* p) { return run_dtype<GradKernel>(*p, p->output[2], p->output); }
#pragma GCC visibility pop
}
