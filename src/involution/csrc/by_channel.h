// What forward and grad_x share: lanes are channels of a group, or of several that share vectors.

#pragma once

#include "layer.h"
#include "products.h"
#include "tasks.h"
#include "tiles.h"

namespace {

// What the passes have in common. `rows`, `columns`, `y_rows` and `outputs` are the most that a task can have. Rows of x are
// packed into a ring, each once, when the first outputs come to it.
template <bool FORWARD, class Real, int WIDTH, class Element>
struct ByChannel : Alone {
  const Problem& p;
  const bool generates_taps;
  const Index sharing;  // groups that share a vector, at least one
  // Rows of outputs that all groups run on in turn. Where the taps of all groups lie together, position by position, one is enough
  // for them to be read in order. Where each lies in a plane, a line of the cache holds taps of many columns, or rows. Generated
  // ones are those of a whole task.
  const Index together;
  const Index chunks, x_depths, x_columns, y_columns, x_rows, x_row, x_depth, x_chunk, x_groups;
  const bool y_in_place, copies_taps;
  const Index y_chunk;
  const Index pixels;  // of a task, in whole vectors; an odd number of them, so that the rows of a plane spread over the cache
  const Layout at;
  const Row<Real> row;

  static constexpr Index ROWS_OF_PLANES = 8;
  static constexpr int WIDEST = VECTOR_BYTES / int(sizeof(Real));
  static constexpr bool LANES_ARE_CHANNELS = true;

  ByChannel(const Problem& problem, Index groups, Index rows, Index columns, Index y_rows, Index outputs)
      : p(problem),
        generates_taps(p.weight != nullptr),
        sharing(most(1, p.sharing)),
        together(generates_taps ? most(1, y_rows) : taps_innermost(p) ? 1 : ROWS_OF_PLANES),
        chunks(ceil_div(p.channels, WIDTH)),
        x_depths(FORWARD ? p.kernel[0] : 1),
        x_columns(columns),
        y_columns(outputs),
        x_rows(least(least(rows, window(p, 1, together)), FORWARD ? most(1, p.input[1]) : rows)),  // no row outside the image
        x_row(times(x_columns, WIDTH)),
        x_depth(times(x_row, x_rows)),
        x_chunk(times(times(x_columns, x_rows, x_depths) | 1, WIDTH)),
        x_groups(groups),
        y_in_place(p.y_stride[1] == 1 && p.channels % WIDTH == 0 && (generates_taps || !taps_alone<Element>(p))),
        copies_taps(!generates_taps && !taps_in_place<Real, Element, WIDTH>(p, y_in_place)),
        y_chunk(y_in_place ? WIDTH : y_columns * WIDTH),
        pixels(times(ceil_div(times(y_rows, y_columns), WIDEST) | 1, WIDEST)),
        at(layout()),
        row(choose()) {}

  Row<Real> choose() const {
    const bool runs = !generates_taps && taps_innermost(p), scratch = generates_taps || copies_taps;
    const Taps taps = runs ? Taps::IN_RUNS : scratch ? Taps::IN_SCRATCH : Taps::IN_PLANES;
    if constexpr (sizeof(Real) == 4 && WIDTH == WIDEST && WIDTH > SHARED)
      if (sharing > 1) return choose_row<FORWARD, Real, Element, WIDTH, WIDTH / SHARED>(at, taps, y_in_place, copies_taps);
    return choose_row<FORWARD, Real, Element, WIDTH, 1>(at, taps, y_in_place, copies_taps);
  }

  Index slot(Index row) const { return row % x_rows * x_row; }  // where the rows of a task are in the ring

  Layout layout() const {
    Layout result = {p.kernel[2], p.stride[2], p.dilation[2], y_in_place ? p.y_stride[4] : WIDTH, p.kernel_stride[2],
                     p.kernel_stride[3], p.kernel_stride[4], p.kernel_stride[7], p.kernel_stride[1], 0};
    if (copies_taps) {
      const bool innermost = taps_innermost(p);
      result.tap_column = innermost ? 1 : y_columns;
      result.tap_row = p.kernel[2] * result.tap_column;
      result.tap_depth = p.kernel[1] * result.tap_row;
      result.tap_output = innermost ? copied_taps() : 1;
      result.next_group = times(y_columns, copied_taps());
    }
    if (generates_taps) {
      result.tap_output = 1;
      result.tap_column = pixels;
      result.tap_row = times(p.kernel[2], pixels);
      result.tap_depth = times(p.kernel[1], result.tap_row);
      result.next_group = times(p.kernel[0], result.tap_depth);
    } else if (taps_in_one_run(p)) result.fetched = sharing * taps_of(p) * Index(sizeof(Element)) / most(1, chunks);
    return result;
  }

  Index copied_taps() const { return ceil_div(taps_of(p), WIDEST) * WIDEST; }  // room for those of an output; vectors begin there

  struct Scratch {
    Real *x, *y, *taps, *features;
    Line* lines;  // of the window of each row of a block
    Lines* of_row;
  };
  Scratch scratch(Arena& arena) const {
    return {arena.take<Real>(times(x_chunk, x_groups, chunks)),
            arena.take<Real>(y_in_place ? 0 : times(y_columns, chunks, WIDTH)),
            arena.take<Real>(generates_taps ? times(sharing, pixels, taps_of(p))
                                            : copies_taps ? times(sharing, y_columns, copied_taps()) : 0),
            arena.take<Real>(generates_taps ? times(pixels, p.reduced) : 0),
            arena.take<Line>(times(together, p.kernel[0], p.kernel[1])), arena.take<Lines>(together)};
  }

  // The lines of the window, `depths` x `rows` of them, of the outputs in the place `row` of a block. The first is at `slot`.
  void find_lines(const Scratch& s, Index row, Range depths, Range rows, Index slot) const {
    Line *first = s.lines + row * p.kernel[0] * p.kernel[1], *next = first;
    for (Index depth = depths.from; depth < depths.to; ++depth)
      for (Index line = rows.from, in_ring = slot; line < rows.to; ++line, ++next) {
        *next = {(depth - depths.from) * x_depth + in_ring, depth * at.tap_depth + line * at.tap_row};
        in_ring += p.dilation[1] * x_row;
        if (in_ring >= x_depth) in_ring -= x_depth;
      }
    s.of_row[row] = {first, next};
  }

  // Calls body(first group, channels) for runs of channels that fill whole vectors: all groups at once, or each alone.
  template <class Body>
  void for_each_run(Range groups, const Body& body) const {
    if (p.channels % WIDTH == 0) return body(groups.from, groups.size() * p.channels);
    for (Index group = groups.from; group < groups.to; ++group) body(group, p.channels);
  }

  static Element* row_of(void* data, const Index* step, Index batch, Index channel, Index depth, Index row) {
    return static_cast<Element*>(data) + batch * step[0] + channel * step[1] + depth * step[2] + row * step[3];
  }

  // The features of the outputs `rows` x `columns`, [channel][pixel], where there are any. Returns how many vectors of pixels.
  Index pack_features(Real* to, Index batch, Index depth, Range rows, Range columns) const {
    if (!generates_taps) return 0;
    const Index used = rows.size() * columns.size(), vectors = ceil_div(used, WIDEST);
    const bool one_run = p.features_stride[3] == columns.size() * p.features_stride[4];  // rows follow one another like columns
    const Index runs = one_run ? 1 : rows.size(), length = used / most(1, runs);
    for (Index run = 0; run < runs; ++run)
      pack_planes(to + run * length, pixels,
                  row_of(p.features, p.features_stride, batch, 0, depth, rows.from + run) + columns.from * p.features_stride[4],
                  p.features_stride[1], p.features_stride[4], length, p.reduced);
    for (Index channel = 0; channel < p.reduced; ++channel)
      std::memset(to + channel * pixels + used, 0, sizeof(Real) * (vectors * WIDEST - used));
    return vectors;
  }

  // The taps `which` of a group where they are generated, at `vectors` vectors of pixels.
  void generate(const Scratch& s, Index group, Range which, Index vectors) const {
    if (!generates_taps) return;
    for (Index i = 0; i < sharing; ++i)
      span<Real, WIDEST>(s.taps + i * at.next_group, p, group * sharing + i, which, s.features, vectors, pixels);
  }

  // One row of the outputs of a group; `block` are those that all groups run on in turn.
  struct Outputs {
    Index batch, group, depth, row;
    Range block, columns;
  };

  // Runs the loops on a row of outputs, with the lines found for it in `x`; `depths` is where these are.
  void run_row(const Outputs& outputs, Range depths, Real* x, const Scratch& s) const {
    const Index *step = p.kernel_stride, count = outputs.columns.size();
    Element* y = row_of(p.y, p.y_stride, outputs.batch, outputs.group * p.channels, outputs.depth, outputs.row) +
                 outputs.columns.from * p.y_stride[4];
    const Lines lines = s.of_row[outputs.row - outputs.block.from];
    const void* taps = s.taps;
    const char* coming = nullptr;  // taps to fetch meanwhile
    if (generates_taps) {
      taps = s.taps + (outputs.row - outputs.block.from) * count;
    } else {
      const Element* groups = static_cast<const Element*>(p.kernel_data) + outputs.batch * step[0] + outputs.depth * step[5] +
                        outputs.row * step[6] + outputs.columns.from * step[7];
      const Element* kernel = groups + outputs.group * sharing * step[1];
      // Behind the last row of a group comes the first one of the next.
      const bool last = outputs.row + 1 == outputs.block.to;
      const Element* next = kernel + (last ? sharing * step[1] - (outputs.block.size() - 1) * step[6] : step[6]);
      if (taps_innermost(p)) coming = reinterpret_cast<const char*>(groups + step[6]) + outputs.group * chunks * count * at.fetched;
      else if (!copies_taps) coming = reinterpret_cast<const char*>(next);
      if (copies_taps)
        for (Index i = 0; i < sharing; ++i)
          copy_taps(s.taps + i * at.next_group, at, p, kernel + i * step[1], next + i * step[1], depths, count);
      else taps = kernel;
    }
    if (!FORWARD && !y_in_place)
      pack_columns<Real, WIDTH>(s.y, y_chunk, WIDTH, y, p.y_stride[1], p.y_stride[4], {0, count}, count, p.channels);
    const Index inside = p.padding[2] - outputs.columns.from * p.stride[2];  // from where the first output reads
    for (Index chunk = 0; chunk < chunks; ++chunk)
      row(y_in_place ? static_cast<void*>(y + chunk * y_chunk) : s.y + chunk * y_chunk, x + chunk * x_chunk, taps, count, lines,
          {inside, inside + p.input[2]}, at, coming + chunk * count * at.fetched);
    if constexpr (std::is_same_v<Real, Element>)
      if (FORWARD && p.after) finish_row(y_in_place ? y : s.y, outputs.group, count);
    if (FORWARD && !y_in_place)
      unpack_columns<Real, WIDTH>(y, p.y_stride[1], p.y_stride[4], s.y, y_chunk, count, p.channels);
  }

  // What follows the forward pass, on a row of the outputs of a group.
  void finish_row(Real* values, Index group, Index count) const {
    constexpr int LANES = lanes_of<Real>(WIDTH);
    using V = typename Vector<Real, LANES>::type;
    const auto& after = *static_cast<const Scaled<Real>*>(p.after);
    for (Index chunk = 0; chunk < chunks; ++chunk)
      for (Index lane = 0; lane < WIDTH; lane += LANES) {
        const Index channel = group * p.channels + chunk * WIDTH + lane;
        const V scale = load<V>(after.scale + channel), shift = load<V>(after.shift + channel);
        Real* to = values + chunk * y_chunk + lane;
        for (Index column = 0; column < count; ++column, to += at.y_column) store<V>(to, after(load<V>(to), scale, shift));
      }
  }
};

}  // namespace
