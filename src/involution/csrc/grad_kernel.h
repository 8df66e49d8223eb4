// grad_kernel where the taps of an output lie next to one another, as in channels-last tensors, and where nothing else fits.

#pragma once

#include "dots.h"
#include "tasks.h"

namespace {

// A dense copy of the gradients of all taps of a row of outputs to where they belong.
template <class Real, class Element>
void write_taps(Element* to, const Problem& p, const Real* from, Index outputs) {
  const Index *step = p.kernel_stride + 2, taps = taps_of(p);
  if (taps_in_one_run(p)) {
    for (Index output = 0; output < outputs; ++output) copy_run(to + output * step[5], from + output * taps, taps);
    return;
  }
  const bool even = step[1] == p.kernel[2] * step[2] && step[0] == p.kernel[1] * step[1];  // from tap to tap, over lines
  const Index length = even ? taps : p.kernel[2];
  for (Index first = 0; first < taps; first += length) {
    const Index line = first / p.kernel[2];
    Element* target = to + line / p.kernel[1] * step[0] + line % p.kernel[1] * step[1];
    if (step[5] == 1) {
      transpose(target, step[2], from + first, taps, outputs, length);
      continue;
    }
    for (Index output = 0; output < outputs; ++output)
      for (Index t = 0; t < length; ++t) narrow(from[output * taps + first + t], target[output * step[5] + t * step[2]]);
  }
}

constexpr Index NARROW = 14;  // columns of outputs

// The same problem with images that share vectors, `parts` at most, as long as there is a task for each thread. Parts of a row pack
// columns that their neighbours pack, too, and compute outputs twice where they overlap: narrow rows are not cut at all, if possible.
// Wide ones lose little by one cut, less than by writing to four images in turn.
inline Problem sharing_images(Problem p, Index parts) {
  const Index tasks = times(p.batch, p.output[0], p.groups, most(1, p.output[1] / LEAST_ROWS_PER_TASK)), threads = threads_for(p);
  p.images = p.output[2] > NARROW ? least(parts, 2) : parts;
  while (p.images > 1 && (p.batch % p.images != 0 || tasks / p.images < threads)) p.images /= 2;
  p.batch /= p.images;
  for (Index* step : {p.x_stride, p.kernel_stride, p.y_stride}) *step *= p.images;
  return p;
}

// Rows of x are packed into a ring, each once, when the first outputs come to it.
template <class Real, int LANES, class Element>
struct GradKernel : Alone {
  static constexpr bool LANES_ARE_CHANNELS = false;
  const Problem& p;
  const Index images;
  // Whether the loop writes where the gradients belong, and reads the outputs' where they are. If these are of another type than
  // that computed in, it does both or neither.
  const bool in_place, y_in_place;
  const Index outputs, groups;  // of a row of a task, at most
  const Index chunks, column;   // vectors of channels of a group; from one packed column to the next
  const Index x_columns, x_row, x_rows, x_depth, x_group;
  const Dots at;
  const RowOfDots<Real, LANES> row;

  GradKernel(const Problem& problem, const Tasks& all)
      : p(problem),
        images(p.images),
        in_place(taps_in_one_run(p) && (std::is_same_v<Real, Element> || y_in_one_run())),
        y_in_place(y_in_one_run() && (std::is_same_v<Real, Element> || in_place)),
        outputs(ceil_div(all.columns, all.column_blocks)),
        groups(ceil_div(all.groups, all.group_blocks)),
        chunks(ceil_div(p.channels, SUMMED<LANES>)),
        column(times(chunks, LANES)),
        x_columns(window(p, 2, Parts<LANES>(outputs, images).size)),
        x_row(times(x_columns, column)),
        x_rows(window(p, 1, 1)),
        x_depth(times(x_row, x_rows)),
        x_group(times(times(x_columns, chunks, x_rows, p.kernel[0]) | 1, LANES)),  // odd, so that groups spread over the cache
        at(layout()),
        row(in_place ? choose_row_of_dots<Real, Element, LANES>(p, chunks)
                     : choose_row_of_dots<Real, Real, LANES>(p, chunks)) {}

  bool y_in_one_run() const { return p.y_stride[1] == 1 && p.channels % SUMMED<LANES> == 0; }
  Index image_step(const Index* step) const { return step[0] / images; }
  Dots layout() const {
    const Index taps = taps_of(p), y_column = y_in_place ? p.y_stride[4] : chunks * SUMMED<LANES>;
    const Index tap_output = in_place ? p.kernel_stride[7] : taps;
    return {p.kernel[2], p.stride[2], p.dilation[2],
            y_in_place ? image_step(p.y_stride) : times(outputs, y_column), y_column,
            in_place ? image_step(p.kernel_stride) : times(outputs, tap_output), tap_output,
            chunks, taps_in_one_run(p) ? taps * Index(sizeof(Element)) : 0, image_step(p.kernel_stride) * Index(sizeof(Element))};
  }

  struct Scratch {
    Real *x, *y, *taps, *room;
    Line* lines;  // all those of the window of a row of outputs
  };
  Scratch scratch(Arena& arena) const {
    return {arena.take<Real>(times(x_group, groups)), arena.take<Real>(y_in_place ? 0 : times(images, at.y_image)),
            arena.take<Real>(in_place ? 0 : times(images, at.tap_image)), arena.take<Real>(column),
            arena.take<Line>(times(p.kernel[0], p.kernel[1]))};
  }

  // The taps of a row of outputs lie position by position, all groups together. So all groups run on a row in turn, while the
  // places of the next row are fetched.
  void run(const Task& task, const Scratch& s, Index) const {
    const Index first_row = task.rows.from * p.stride[1] - p.padding[1], first_depth = task.depth * p.stride[0] - p.padding[0];
    const Range depths = taps_inside(p, 0, first_depth, p.input[0]);
    const Parts<LANES> parts(task.columns.size(), images);
    Index line = most(0, -first_row);  // the next to pack
    for (Index out = task.rows.from; out < task.rows.to; ++out) {
      const Index lines = least(window(p, 1, out + 1 - task.rows.from), p.input[1] - first_row);
      for (; line < lines; ++line)
        for (Index depth = depths.from; depth < depths.to; ++depth)
          pack_x(task, parts, first_depth, first_row, depth, line, s);
      find_lines(task, out, depths, s);
      for (Index group = task.groups.from; group < task.groups.to; ++group) run_row(task, group, out, parts, s);
    }
  }

  void find_lines(const Task& task, Index out, Range depths, const Scratch& s) const {
    const Range inside = taps_inside(p, 1, out * p.stride[1] - p.padding[1], p.input[1]);
    for (Index depth = 0; depth < p.kernel[0]; ++depth)
      for (Index row = 0; row < p.kernel[1]; ++row) {
        const Index slot = ((out - task.rows.from) * p.stride[1] + row * p.dilation[1]) % x_rows;
        const Index line = depth * p.kernel[1] + row;
        s.lines[line] = {depths.has(depth) && inside.has(row) ? depth * x_depth + slot * x_row : OUTSIDE, line * p.kernel[2]};
      }
  }

  void pack_x(const Task& task, const Parts<LANES>& parts, Index first_depth, Index first_row, Index depth, Index line,
              const Scratch& s) const {
    const Index* step = p.x_stride;
    pack_parts<Real, LANES>(s.x + depth * x_depth + line % x_rows * x_row, x_group,
                            static_cast<const Element*>(p.x) + task.batch * step[0] + task.groups.from * p.channels * step[1] +
                                (first_depth + depth * p.dilation[0]) * step[2] + (first_row + line) * step[3],
                            image_step(step), step[1], step[4], parts, p.stride[2], task.columns.from * p.stride[2] - p.padding[2],
                            window(p, 2, parts.size), p.input[2], task.groups.size(), p.channels);
  }

  // A row of the outputs' gradients of a group -> [column][channel].
  void pack_y(Real* to, const Element* from, Index count) const {
    const auto pack = [&](auto width) {
      pack_columns<Real, width>(to, width, at.y_column, from, p.y_stride[1], p.y_stride[4], {0, count}, count, p.channels);
    };
    if (p.channels % 8 == 0) return pack(std::integral_constant<int, 8>{});
    pack(std::integral_constant<int, SUMMED<LANES>>{});
  }

  // A row of outputs of each image and one group, with the lines found for it.
  void run_row(const Task& task, Index group, Index out, const Parts<LANES>& parts, const Scratch& s) const {
    const Index *step = p.kernel_stride, *y_step = p.y_stride, count = task.columns.size();
    Element* kernel = static_cast<Element*>(p.kernel_data) + task.batch * step[0] + task.depth * step[5] + out * step[6] +
                      task.columns.from * step[7];
    Element* target = kernel + group * step[1];
    const Element* y = static_cast<const Element*>(p.y) + task.batch * y_step[0] + group * p.channels * y_step[1] +
                       task.depth * y_step[2] + out * y_step[3] + task.columns.from * y_step[4];
    for (Index image = 0; !y_in_place && image < images; ++image)
      pack_y(s.y + image * at.y_image, y + image * image_step(y_step), count);
    row(y_in_place ? static_cast<const void*>(y) : s.y, s.x + (group - task.groups.from) * x_group,
        in_place ? static_cast<void*>(target) : s.taps, parts, {s.lines, s.lines + p.kernel[0] * p.kernel[1]}, at, s.room,
        reinterpret_cast<const char*>(kernel + step[6]) + group * count * at.fetched);
    for (Index image = 0; !in_place && image < images; ++image)
      write_taps(target + image * image_step(step), p, s.taps + image * at.tap_image, count);
  }
};

}  // namespace
