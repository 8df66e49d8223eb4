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
  void *x, *kernel_data, *y;
};

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

template <class V, class Real>
inline V load(const Real* from) {
  return *reinterpret_cast<const V*>(from);
}
template <class V, class Real>
inline void store(Real* to, V value) {
  *reinterpret_cast<V*>(to) = value;
}

inline Index ceil_div(Index a, Index b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
inline Index floor_div(Index a, Index b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline Index least(Index a, Index b) { return a < b ? a : b; }
inline Index most(Index a, Index b) { return a > b ? a : b; }

struct Range {
  Index from, to;
  Index size() const { return to - from; }
};

// ---------------------------------------------------------------------------------------------- packing

// The columns of one row: LANES channels at `data[chunk * chunk_step + column * step]`, in the tensor or in scratch.
template <class Real>
struct Columns {
  Real* data;
  Index step, chunk_step;
};

template <int LANES, class To, class From>
inline void copy_lanes(To* to, const From* from) {
  if constexpr (std::is_same_v<To, From>) {
    using V = typename Vector<To, LANES>::type;
    store<V>(to, load<V>(from));
  } else if constexpr (sizeof(To) > sizeof(From)) {
    for (int lane = 0; lane < LANES; ++lane) to[lane] = widen(from[lane]);
  } else {
    for (int lane = 0; lane < LANES; ++lane) narrow(from[lane], to[lane]);
  }
}

// Channels of one group at columns `wanted` of one row -> [chunk][column][LANES], zero outside the image and the group.
template <class Real, int LANES, class Element>
void pack_columns(Real* to, Index chunk_step, const Element* from, Index channel_step, Index column_step, Range wanted,
                  Index width, Index channels) {
  const Range inside = {least(most(wanted.from, 0), wanted.to), most(least(wanted.to, width), wanted.from)};
  for (Index first = 0; first < channels; first += LANES, to += chunk_step) {
    const Index lanes = least(LANES, channels - first);
    const Element* source = from + first * channel_step;
    Real* target = to - wanted.from * LANES;
    if (lanes == LANES && channel_step == 1) {
      std::memset(to, 0, sizeof(Real) * LANES * (inside.from - wanted.from));
      for (Index column = inside.from; column < inside.to; ++column)
        copy_lanes<LANES>(target + column * LANES, source + column * column_step);
      std::memset(target + inside.to * LANES, 0, sizeof(Real) * LANES * (wanted.to - inside.to));
    } else {
      std::memset(to, 0, sizeof(Real) * LANES * wanted.size());
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
  for (Index first = 0; first < channels; first += LANES, from += chunk_step) {
    const Index lanes = least(LANES, channels - first);
    Element* target = to + first * channel_step;
    if (lanes == LANES && channel_step == 1) {
      for (Index column = 0; column < columns; ++column)
        copy_lanes<LANES>(target + column * column_step, from + column * LANES);
    } else {
      for (Index lane = 0; lane < lanes; ++lane)
        for (Index column = 0; column < columns; ++column)
          narrow(from[column * LANES + lane], target[column * column_step + lane * channel_step]);
    }
  }
}

// Where the loops read the taps of one output row: at `data[row_tap_offset + tap * tap_step + column * column_step]`.
template <class Real>
struct Taps {
  const Real* data;
  Index depth_step, row_step, tap_step, column_step;
};

// The kernel of one group and output row, columns `wanted`: in place if its type and strides allow, else a dense copy of
// the taps at `depths`.
template <class Real, class Element>
Taps<Real> taps_of_row(const Problem& p, const Element* row, Range depths, Range wanted, Real* scratch) {
  const Index *step = p.kernel_stride + 2, column_step = step[5];
  const Element* first = row + wanted.from * column_step;
  const bool taps_inner = step[2] == 1 || p.kernel[2] == 1;
  if constexpr (sizeof(Element) == sizeof(Real)) {
    if (taps_inner || column_step == 1) {
      return {reinterpret_cast<const Real*>(first), step[0], step[1], taps_inner ? 1 : step[2], column_step};
    }
  }
  const Index columns = wanted.size(), taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  const Index tap_step = taps_inner ? 1 : columns, copied_step = taps_inner ? taps : 1;
  for (Index depth = depths.from; depth < depths.to; ++depth) {
    for (Index line = 0; line < p.kernel[1]; ++line) {
      const Element* source = first + depth * step[0] + line * step[1];
      Real* target = scratch + (depth * p.kernel[1] + line) * p.kernel[2] * tap_step;
      if (taps_inner) {
        for (Index column = 0; column < columns; ++column)
          for (Index tap = 0; tap < p.kernel[2]; ++tap)
            target[column * taps + tap] = widen(source[column * column_step + tap]);
      } else {
        for (Index tap = 0; tap < p.kernel[2]; ++tap)
          for (Index column = 0; column < columns; ++column)
            target[tap * columns + column] = widen(source[column * column_step + tap * step[2]]);
      }
    }
  }
  return {scratch, p.kernel[1] * p.kernel[2] * tap_step, p.kernel[2] * tap_step, tap_step, copied_step};
}

// ---------------------------------------------------------------------------------------------- tiles of columns

// The lines of the window (its depths and rows) that lie inside the image, as steps in the packed rows and in the taps.
struct Lines {
  Index depths, rows;
  Index x_depth, x_row, taps_depth, taps_row;
};

template <class Body>
inline void for_each_line(const Lines& lines, const Body& body) {
  for (Index depth = 0; depth < lines.depths; ++depth)
    for (Index row = 0; row < lines.rows; ++row)
      body(depth * lines.x_depth + row * lines.x_row, depth * lines.taps_depth + row * lines.taps_row);
}

// The taps of one line for a tile: a pointer for each column (taps inner) or for each tap, so that all offsets are constants.
template <class Real, int K, bool TAPS_INNER, int COLUMNS>
struct TileTaps {
  const Real* at[TAPS_INNER ? COLUMNS : K];
  TileTaps(const Real* first, const Taps<Real>& taps) {
#pragma GCC unroll 16
    for (int i = 0; i < (TAPS_INNER ? COLUMNS : K); ++i) at[i] = first + i * (TAPS_INNER ? taps.column_step : taps.tap_step);
  }
  Real operator()(int column, int t) const { return TAPS_INNER ? at[column][t] : at[t][column]; }
};

struct Steps {  // of one row of the window, in columns
  Index taps, stride, dilation;
};

// COLUMNS outputs of a row: sums over all lines of the window stay in registers. K, S = 0: known at run time only.
template <class Real, int LANES, int K, int S, bool TAPS_INNER, int COLUMNS>
inline void gather_tile(Real* y, Index y_step, const Real* x, const Lines& lines, const Real* data, const Taps<Real>& taps,
                        const Steps& steps) {
  using V = typename Vector<Real, LANES>::type;
  V sums[COLUMNS] = {};
  for_each_line(lines, [&](Index x_offset, Index taps_offset) {
    const Real* row = x + x_offset;
    const Real* first = data + taps_offset;
    if constexpr (K > 0) {
      const TileTaps<Real, K, TAPS_INNER, COLUMNS> tap(first, taps);
#pragma GCC unroll 32
      for (int at = 0; at < (COLUMNS - 1) * S + K; ++at) {
        const V value = load<V>(row + at * LANES);
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const int t = at - column * S;
          if (t >= 0 && t < K) sums[column] += tap(column, t) * value;
        }
      }
    } else {
      for (Index t = 0; t < steps.taps; ++t)
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column)
          sums[column] += first[column * taps.column_step + t * taps.tap_step] *
                          load<V>(row + (column * steps.stride + t * steps.dilation) * LANES);
    }
  });
#pragma GCC unroll 8
  for (int column = 0; column < COLUMNS; ++column) store<V>(y + column * y_step, sums[column]);
}

// The transpose: COLUMNS output gradients add their share to the positions each line of the window read.
template <class Real, int LANES, int K, int S, bool TAPS_INNER, int COLUMNS>
inline void scatter_tile(const Real* y, Index y_step, Real* x, const Lines& lines, const Real* data, const Taps<Real>& taps,
                        const Steps& steps) {
  using V = typename Vector<Real, LANES>::type;
  V grads[COLUMNS];
#pragma GCC unroll 8
  for (int column = 0; column < COLUMNS; ++column) grads[column] = load<V>(y + column * y_step);
  for_each_line(lines, [&](Index x_offset, Index taps_offset) {
    Real* row = x + x_offset;
    const Real* first = data + taps_offset;
    if constexpr (K > 0) {
      const TileTaps<Real, K, TAPS_INNER, COLUMNS> tap(first, taps);
#pragma GCC unroll 32
      for (int at = 0; at < (COLUMNS - 1) * S + K; ++at) {
        V sum = load<V>(row + at * LANES);
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          const int t = at - column * S;
          if (t >= 0 && t < K) sum += tap(column, t) * grads[column];
        }
        store<V>(row + at * LANES, sum);
      }
    } else {
      for (Index t = 0; t < steps.taps; ++t)
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column) {
          Real* at = row + (column * steps.stride + t * steps.dilation) * LANES;
          store<V>(at, load<V>(at) + first[column * taps.column_step + t * taps.tap_step] * grads[column]);
        }
    }
  });
}

template <bool FORWARD, class Real, int LANES, int K, int S, bool TAPS_INNER, int COLUMNS>
inline void tile(Real* y, Index y_step, Real* x, const Lines& lines, const Real* data, const Taps<Real>& taps,
                 const Steps& steps) {
  if constexpr (FORWARD) {
    gather_tile<Real, LANES, K, S, TAPS_INNER, COLUMNS>(y, y_step, x, lines, data, taps, steps);
  } else {
    scatter_tile<Real, LANES, K, S, TAPS_INNER, COLUMNS>(y, y_step, x, lines, data, taps, steps);
  }
}

// A row of outputs, in tiles of 7 columns, which leave no rest on any map of a 224-pixel network.
template <bool FORWARD, class Real, int LANES, int K, int S, bool TAPS_INNER>
void row_of_tiles(Real* y, Index y_step, Real* x, Index columns, const Lines& lines, const Taps<Real>& taps, const Steps& steps) {
  Index column = 0;
  const auto run = [&](auto width) {
    constexpr int COLUMNS = width;
    for (; column + COLUMNS <= columns; column += COLUMNS) {
      tile<FORWARD, Real, LANES, K, S, TAPS_INNER, COLUMNS>(y + column * y_step, y_step, x + column * steps.stride * LANES,
                                                            lines, taps.data + column * taps.column_step, taps, steps);
    }
  };
  run(std::integral_constant<int, 7>{});
  run(std::integral_constant<int, 3>{});
  run(std::integral_constant<int, 1>{});
}

template <class Real>
using Row = void (*)(Real*, Index, Real*, Index, const Lines&, const Taps<Real>&, const Steps&);

// The variant for this window: unrolled for float32, the usual kernel sizes and strides; else the general one.
template <bool FORWARD, class Real, int LANES>
Row<Real> choose_row(const Steps& steps, bool taps_inner) {
#define VARIANT(K, S) (taps_inner ? row_of_tiles<FORWARD, Real, LANES, K, S, true> : row_of_tiles<FORWARD, Real, LANES, K, S, false>)
  if constexpr (sizeof(Real) == 4) {
    if (steps.dilation == 1 && steps.stride == 1) {
      if (steps.taps == 3) return VARIANT(3, 1);
      if (steps.taps == 5) return VARIANT(5, 1);
      if (steps.taps == 7) return VARIANT(7, 1);
      if (steps.taps == 9) return VARIANT(9, 1);
    }
    if (steps.dilation == 1 && steps.stride == 2) {
      if (steps.taps == 3) return VARIANT(3, 2);
      if (steps.taps == 7) return VARIANT(7, 2);
    }
  }
  return VARIANT(0, 0);
#undef VARIANT
}

// ---------------------------------------------------------------------------------------------- tasks

constexpr Index COLUMNS_PER_TASK = 512;
constexpr Index KERNEL_BYTES_PER_TASK = 320 << 10;  // the taps of a task's rows stay in the second-level cache between groups
constexpr Index SERIAL_WORK = 1 << 15;              // multiply-adds below which a second thread costs more than it gives

// How one op is cut: into batch x depths x blocks of rows x blocks of columns x blocks of groups.
struct Tasks {
  Index depths, rows, columns, groups;                      // extents
  Index row_blocks, column_blocks, group_blocks, count;     // how many
  Tasks(const Problem& p, const Index* size, Index threads) : depths(size[0]), rows(size[1]), columns(size[2]), groups(p.groups) {
    const Index taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
    column_blocks = ceil_div(columns, COLUMNS_PER_TASK);
    const Index row_bytes = ceil_div(columns, column_blocks) * groups * taps * Index(sizeof(float));
    row_blocks = ceil_div(rows, most(1, least(rows, KERNEL_BYTES_PER_TASK / row_bytes)));
    const Index tasks = p.batch * depths * row_blocks * column_blocks;
    group_blocks = tasks >= 2 * threads ? 1 : least(groups, ceil_div(2 * threads, most(1, tasks)));
    count = tasks * group_blocks;
  }
};

struct Task {
  Index batch, depth;
  Range rows, columns, groups;
  Task(const Tasks& all, Index index) {
    const auto part = [](Index size, Index blocks, Index block) { return Range{size * block / blocks, size * (block + 1) / blocks}; };
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
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * Index(sizeof(T)) + 127) & ~Index(63);  // 64 bytes apart: whole vectors may overhang the end
    return piece;
  }
  Index used() const { return used_; }

 private:
  char* base_;
  Index used_ = 0;
};

// Runs all tasks of an op on torch's threads. Returns 0, or 1 if there is no memory for the scratch.
template <class Op>
int run_tasks(const Problem& p, const Index* size) {
  Index threads = 1;
#if defined(_OPENMP)
  const Index taps = p.kernel[0] * p.kernel[1] * p.kernel[2], outputs = p.output[0] * p.output[1] * p.output[2];
  if (p.batch * p.groups * p.channels * outputs * taps > SERIAL_WORK) threads = omp_get_max_threads();
#endif
  const Tasks tasks(p, size, threads);
  const Op op(p, tasks);
  Arena measure(nullptr);
  op.scratch(measure);
  const Index bytes = (measure.used() + 4095) & ~Index(4095);
  char* memory = static_cast<char*>(std::aligned_alloc(4096, std::size_t(bytes * threads)));
  if (memory == nullptr) return 1;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(threads)) if (threads > 1)
#endif
  for (Index index = 0; index < tasks.count; ++index) {
#if defined(_OPENMP)
    Arena arena(memory + bytes * omp_get_thread_num());
#else
    Arena arena(memory);
#endif
    op.run(Task(tasks, index), op.scratch(arena));
  }
  std::free(memory);
  return 0;
}

// ---------------------------------------------------------------------------------------------- the three ops

// What forward and grad_x have in common: lanes are channels.
template <bool FORWARD, class Real, int LANES, class Element>
struct ByChannel {
  const Problem& p;
  const Index chunks, x_rows, x_columns, y_columns;  // extents of the packed rows of a task
  const Steps steps;
  const Row<Real> row;

  ByChannel(const Problem& problem, Index rows, Index columns, Index outputs)
      : p(problem),
        chunks(ceil_div(p.channels, LANES)),
        x_rows(rows),
        x_columns(columns),
        y_columns(outputs),
        steps{p.kernel[2], p.stride[2], p.dilation[2]},
        row(choose_row<FORWARD, Real, LANES>(steps, p.kernel_stride[4] == 1 || p.kernel[2] == 1)) {}

  struct Scratch {
    Real *x, *y, *taps;
  };
  Scratch scratch(Arena& arena) const {
    const Index depths = FORWARD ? p.kernel[0] : 1, taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
    const bool copied = sizeof(Element) != sizeof(Real) || (p.kernel_stride[4] != 1 && p.kernel_stride[7] != 1);
    return {arena.take<Real>(chunks * depths * x_rows * x_columns * LANES), arena.take<Real>(chunks * y_columns * LANES),
            arena.take<Real>(copied ? y_columns * taps : 0)};
  }
  void run_row(const Columns<Real>& y, Real* x, Index x_chunk, Index columns, const Lines& lines, const Taps<Real>& taps) const {
    for (Index chunk = 0; chunk < chunks; ++chunk)
      row(y.data + chunk * y.chunk_step, y.step, x + chunk * x_chunk, columns, lines, taps, steps);
  }
  // Taps along `axis` that lie in [0, limit) when the first lies at `position`.
  Range taps_inside(int axis, Index position, Index limit) const {
    const Index step = p.dilation[axis], from = most(0, ceil_div(-position, step));
    return {from, most(from, least(p.kernel[axis], floor_div(limit - 1 - position, step) + 1))};
  }
  // Where the loops find a row of y: in place if its type and strides allow, else in scratch.
  bool y_in_place() const {
    return sizeof(Element) == sizeof(Real) && p.y_stride[1] == 1 && p.channels % LANES == 0;
  }
  Columns<Real> y_columns_at(Element* first, Real* scratch) const {
    if (y_in_place()) return {reinterpret_cast<Real*>(first), p.y_stride[4], LANES};
    return {scratch, LANES, y_columns * LANES};
  }
  const Element* kernel_row(Index batch, Index group, Index depth, Index line) const {
    const Index* step = p.kernel_stride;
    return static_cast<const Element*>(p.kernel_data) + batch * step[0] + group * step[1] + depth * step[5] + line * step[6];
  }
  static Element* row_of(void* data, const Index* step, Index batch, Index channel, Index depth, Index line) {
    return static_cast<Element*>(data) + batch * step[0] + channel * step[1] + depth * step[2] + line * step[3];
  }
};

template <class Real, int LANES, class Element>
struct Forward : ByChannel<true, Real, LANES, Element> {
  using Base = ByChannel<true, Real, LANES, Element>;
  using Base::p, Base::chunks, Base::x_rows, Base::x_columns, Base::y_columns;

  Forward(const Problem& p, const Tasks& all)
      : Base(p, (ceil_div(all.rows, all.row_blocks) - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1,
             (ceil_div(all.columns, all.column_blocks) - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1,
             ceil_div(all.columns, all.column_blocks)) {}

  void run(const Task& task, const typename Base::Scratch& s) const {
    const Index x_row = x_columns * LANES, x_depth = x_rows * x_row, x_chunk = p.kernel[0] * x_depth;
    const Index first_depth = task.depth * p.stride[0] - p.padding[0];
    const Index first_row = task.rows.from * p.stride[1] - p.padding[1];
    const Index rows = (task.rows.size() - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
    const Index first_column = task.columns.from * p.stride[2] - p.padding[2];
    const Range depths = this->taps_inside(0, first_depth, p.input[0]);
    for (Index group = task.groups.from; group < task.groups.to; ++group) {
      const Index channel = group * p.channels;
      for (Index k = depths.from; k < depths.to; ++k) {
        const Index depth = first_depth + k * p.dilation[0];
        for (Index line = most(0, -first_row); line < least(rows, p.input[1] - first_row); ++line)
          pack_columns<Real, LANES>(s.x + k * x_depth + line * x_row, x_chunk,
                                    Base::row_of(p.x, p.x_stride, task.batch, channel, depth, first_row + line), p.x_stride[1],
                                    p.x_stride[4], {first_column, first_column + x_columns}, p.input[2], p.channels);
      }
      for (Index out = task.rows.from; out < task.rows.to; ++out) {
        const Index position = out * p.stride[1] - p.padding[1], line = (out - task.rows.from) * p.stride[1];
        const Range kernel_rows = this->taps_inside(1, position, p.input[1]);
        Taps<Real> taps = taps_of_row<Real>(p, this->kernel_row(task.batch, group, task.depth, out), depths, task.columns, s.taps);
        taps.data += depths.from * taps.depth_step + kernel_rows.from * taps.row_step;
        const Lines lines = {depths.size(), kernel_rows.size(), x_depth, p.dilation[1] * x_row, taps.depth_step, taps.row_step};
        Real* x = s.x + depths.from * x_depth + (line + kernel_rows.from * p.dilation[1]) * x_row;
        Element* first = Base::row_of(p.y, p.y_stride, task.batch, channel, task.depth, out) + task.columns.from * p.y_stride[4];
        const Columns<Real> y = this->y_columns_at(first, s.y);
        this->run_row(y, x, x_chunk, task.columns.size(), lines, taps);
        if (!this->y_in_place())
          unpack_columns<Real, LANES>(first, p.y_stride[1], p.y_stride[4], s.y, y.chunk_step, task.columns.size(), p.channels);
      }
    }
  }
};

// Each block of x gathers what all outputs that read it scatter into it; here `y` is the output's gradient, which is read.
template <class Real, int LANES, class Element>
struct GradX : ByChannel<false, Real, LANES, Element> {
  using Base = ByChannel<false, Real, LANES, Element>;
  using Base::p, Base::chunks, Base::x_rows, Base::x_columns, Base::y_columns;

  GradX(const Problem& p, const Tasks& all)
      : Base(p, ceil_div(all.rows, all.row_blocks), ceil_div(all.columns, all.column_blocks) + 2 * (p.kernel[2] - 1) * p.dilation[2],
             (ceil_div(all.columns, all.column_blocks) + (p.kernel[2] - 1) * p.dilation[2]) / p.stride[2] + 1) {}

  // Outputs along `axis` of which some tap reads a position in `positions`.
  Range readers(int axis, Range positions) const {
    const Index reach = (p.kernel[axis] - 1) * p.dilation[axis];
    const Index from = most(0, ceil_div(positions.from + p.padding[axis] - reach, p.stride[axis]));
    const Index to = least(p.output[axis], floor_div(positions.to - 1 + p.padding[axis], p.stride[axis]) + 1);
    return {from, most(from, to)};
  }

  void run(const Task& task, const typename Base::Scratch& s) const {
    const Index x_row = x_columns * LANES, x_chunk = x_rows * x_row;
    const Range outs = readers(1, task.rows), columns = readers(2, task.columns);
    const Index reach = (p.kernel[2] - 1) * p.dilation[2];
    const Index first_column = task.columns.from - reach;  // position of the first packed column
    const Index x_offset = (columns.from * p.stride[2] - p.padding[2] - first_column) * LANES;
    for (Index group = task.groups.from; group < task.groups.to; ++group) {
      const Index channel = group * p.channels;
      std::memset(s.x, 0, sizeof(Real) * chunks * x_chunk);
      for (Index kd = 0; kd < p.kernel[0]; ++kd) {
        const Index reads = task.depth + p.padding[0] - kd * p.dilation[0], depth = floor_div(reads, p.stride[0]);
        if (reads % p.stride[0] != 0 || depth < 0 || depth >= p.output[0] || columns.size() == 0) continue;
        for (Index out = outs.from; out < outs.to; ++out) {
          const Element* kernel = this->kernel_row(task.batch, group, depth, out);
          const Index position = out * p.stride[1] - p.padding[1] - task.rows.from;
          const Range kernel_rows = this->taps_inside(1, position, task.rows.size());
          if (kernel_rows.size() == 0) continue;
          Taps<Real> taps = taps_of_row<Real>(p, kernel, {kd, kd + 1}, columns, s.taps);
          taps.data += kd * taps.depth_step + kernel_rows.from * taps.row_step;
          const Lines lines = {1, kernel_rows.size(), 0, p.dilation[1] * x_row, 0, taps.row_step};
          Real* x = s.x + x_offset + (position + kernel_rows.from * p.dilation[1]) * x_row;
          Element* grads = Base::row_of(p.y, p.y_stride, task.batch, channel, depth, out);
          const Columns<Real> y = this->y_columns_at(grads + columns.from * p.y_stride[4], s.y);
          if (!this->y_in_place())
            pack_columns<Real, LANES>(s.y, y.chunk_step, grads, p.y_stride[1], p.y_stride[4], columns, p.output[2], p.channels);
          this->run_row(y, x, x_chunk, columns.size(), lines, taps);
        }
      }
      for (Index line = 0; line < task.rows.size(); ++line)
        unpack_columns<Real, LANES>(Base::row_of(p.x, p.x_stride, task.batch, channel, task.depth, task.rows.from + line) +
                                        task.columns.from * p.x_stride[4],
                                    p.x_stride[1], p.x_stride[4], s.x + line * x_row + reach * LANES, x_chunk,
                                    task.columns.size(), p.channels);
    }
  }
};

// Lanes are columns. Packed rows of x lie [channel][phase][column / stride], phase = column mod stride, so that the
// inputs of neighbouring outputs are neighbours for any stride.
template <class Real, int LANES, class Element>
struct GradKernel {
  using V = typename Vector<Real, LANES>::type;
  const Problem& p;
  const Index columns, x_rows, x_columns, x_phase, x_channel;

  GradKernel(const Problem& problem, const Tasks& all)
      : p(problem),
        columns(ceil_div(ceil_div(all.columns, all.column_blocks), LANES) * LANES),
        x_rows((ceil_div(all.rows, all.row_blocks) - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1),
        x_columns((columns - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1),
        x_phase(ceil_div(x_columns, p.stride[2])),
        x_channel(x_phase * p.stride[2]) {}

  struct Scratch {
    Real *x, *y, *taps;
    Index* offsets;  // of each tap of a line in a packed row
  };
  Scratch scratch(Arena& arena) const {
    return {arena.take<Real>(p.kernel[0] * x_rows * p.channels * x_channel), arena.take<Real>(p.channels * columns),
            arena.take<Real>(p.kernel[2] * columns), arena.take<Index>(p.kernel[2])};
  }

  // Columns from `first` on of `channels` rows, zero outside the image, to [channel][phase][column / stride].
  void pack(Real* to, const Element* from, Index channel_step, Index column_step, Index first, Index stride, Index phase,
            Index width) const {
    const Index wanted = phase * stride;
    const Range inside = {least(most(0, -first), wanted), most(0, least(wanted, width - first))};
    std::memset(to, 0, sizeof(Real) * p.channels * wanted);
    const Element* source = from + first * column_step;
    const auto place = [&](Index column) { return column % stride * phase + column / stride; };
    if (channel_step == 1) {
      for (Index column = inside.from; column < inside.to; ++column) {
        Real* target = to + place(column);
        for (Index channel = 0; channel < p.channels; ++channel) target[channel * wanted] = widen(source[column * column_step + channel]);
      }
    } else {
      for (Index channel = 0; channel < p.channels; ++channel)
        for (Index column = inside.from; column < inside.to; ++column)
          to[channel * wanted + place(column)] = widen(source[column * column_step + channel * channel_step]);
    }
  }

  template <int K>
  void taps_of_line(const Scratch& s, const Real* x) const {
    for (Index column = 0; column < columns; column += LANES) {
      for (Index first = 0; first < p.kernel[2]; first += K) {
        V sums[K] = {};
        for (Index channel = 0; channel < p.channels; ++channel) {
          const V grad = load<V>(s.y + channel * columns + column);
          const Real* row = x + channel * x_channel + column;
#pragma GCC unroll 16
          for (int t = 0; t < K; ++t) sums[t] += grad * load<V>(row + s.offsets[first + t]);
        }
#pragma GCC unroll 16
        for (int t = 0; t < K; ++t) store<V>(s.taps + (first + t) * columns + column, sums[t]);
      }
    }
  }

  void run(const Task& task, const Scratch& s) const {
    const Index x_row = p.channels * x_channel, first_column = task.columns.from * p.stride[2] - p.padding[2];
    const Index first_depth = task.depth * p.stride[0] - p.padding[0];
    const Index first_row = task.rows.from * p.stride[1] - p.padding[1];
    const Index rows = (task.rows.size() - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
    const Element *x = static_cast<const Element*>(p.x), *y = static_cast<const Element*>(p.y);
    for (Index t = 0; t < p.kernel[2]; ++t) s.offsets[t] = t * p.dilation[2] % p.stride[2] * x_phase + t * p.dilation[2] / p.stride[2];
    for (Index group = task.groups.from; group < task.groups.to; ++group) {
      const Element* x_group = x + task.batch * p.x_stride[0] + group * p.channels * p.x_stride[1];
      const Element* y_group = y + task.batch * p.y_stride[0] + group * p.channels * p.y_stride[1] + task.depth * p.y_stride[2];
      for (Index k = 0; k < p.kernel[0]; ++k) {
        const Index depth = first_depth + k * p.dilation[0];
        if (depth < 0 || depth >= p.input[0]) continue;
        for (Index line = most(0, -first_row); line < least(rows, p.input[1] - first_row); ++line)
          pack(s.x + (k * x_rows + line) * x_row, x_group + depth * p.x_stride[2] + (first_row + line) * p.x_stride[3],
               p.x_stride[1], p.x_stride[4], first_column, p.stride[2], x_phase, p.input[2]);
      }
      for (Index out = task.rows.from; out < task.rows.to; ++out) {
        pack(s.y, y_group + out * p.y_stride[3], p.y_stride[1], p.y_stride[4], task.columns.from, 1, columns, p.output[2]);
        for (Index kd = 0; kd < p.kernel[0]; ++kd) {
          const Index depth = first_depth + kd * p.dilation[0];
          for (Index kr = 0; kr < p.kernel[1]; ++kr) {
            const Index line = (out - task.rows.from) * p.stride[1] + kr * p.dilation[1];
            if (depth < 0 || depth >= p.input[0] || first_row + line < 0 || first_row + line >= p.input[1]) {
              std::memset(s.taps, 0, sizeof(Real) * p.kernel[2] * columns);  // all in the padding
            } else {
              const Real* row = s.x + (kd * x_rows + line) * x_row;
              switch (p.kernel[2]) {
                case 3: taps_of_line<3>(s, row); break;
                case 5: taps_of_line<5>(s, row); break;
                case 7: taps_of_line<7>(s, row); break;
                case 9: taps_of_line<9>(s, row); break;
                default: taps_of_line<1>(s, row);
              }
            }
            write(task, s, group, out, kd, kr);
          }
        }
      }
    }
  }

  void write(const Task& task, const Scratch& s, Index group, Index out, Index kd, Index kr) const {
    const Index* step = p.kernel_stride;
    Element* target = static_cast<Element*>(p.kernel_data) + task.batch * step[0] + group * step[1] + kd * step[2] +
                      kr * step[3] + task.depth * step[5] + out * step[6] + task.columns.from * step[7];
    if (step[4] == 1) {
      for (Index column = 0; column < task.columns.size(); ++column)
        for (Index t = 0; t < p.kernel[2]; ++t) narrow(s.taps[t * columns + column], target[column * step[7] + t]);
    } else {
      for (Index t = 0; t < p.kernel[2]; ++t)
        for (Index column = 0; column < task.columns.size(); ++column)
          narrow(s.taps[t * columns + column], target[column * step[7] + t * step[4]]);
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
  return 2;
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

// Each fills one of its tensors from the other two: y, x and kernel_data in turn. 0: done; 1: no memory; 2: no such dtype.
int involution_forward(const Problem* p) { return run_dtype<Forward>(*p, p->channels, p->output); }
int involution_grad_x(const Problem* p) { return run_dtype<GradX>(*p, p->channels, p->input); }
int involution_grad_kernel(const Problem* p) { return run_dtype<GradKernel>(*p, p->output[2], p->output); }
#pragma GCC visibility pop
}
