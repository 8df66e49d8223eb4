// Rows of one or several images, cut into parts whose outputs share vectors: lanes are a few channels at the same column of each part.

#pragma once

#include "packing.h"

namespace {

// How many channels of one output are in a vector; it has room for that many of LANES / SUMMED outputs.
template <int LANES>
constexpr int SUMMED = LANES < 4 ? LANES : 4;

// Of a row of outputs: how many a part has, and where each begins, in which image. As many images as can share vectors have a row
// each; it is cut into as many parts as are still needed. The last part ends with the row and may overlap the one before.
template <int LANES>
struct Parts {
  static constexpr int COUNT = LANES / SUMMED<LANES>;
  Index size, first[COUNT], image[COUNT];
  Parts(Index outputs, Index images) : size(ceil_div(outputs, COUNT / images)) {
    const Index cuts = COUNT / images;
    for (int part = 0; part < COUNT; ++part) first[part] = least(part % cuts * size, outputs - size), image[part] = part / cuts;
  }
};

// Elements as they are stored: of those of 16 bits only the bits.
template <class Element>
using Stored = std::conditional_t<sizeof(Element) == 2, std::uint16_t, Element>;

// SUMMED elements of each part, `at` places from where `from` says, as one vector.
template <int LANES, class Element>
inline auto join_parts(const Element* const* from, Index at) {
  if constexpr (LANES > 4) return joined<Element>(join_parts<LANES / 2>(from, at), join_parts<LANES / 2>(from + LANES / 8, at));
  else return load<typename Vector<Element, LANES>::type>(*from + at);
}

// Rows -> [group][column of a part][chunk][part][channel], `columns` of each part, zero outside the image and beyond the last
// channel of a group. The first part begins at the column `first` of the image, outputs are `stride` columns apart.
template <class Real, int LANES, class Element>
void pack_parts(Real* to, Index to_group, const Element* from, Index image_step, Index channel_step, Index column_step,
                const Parts<LANES>& parts, Index stride, Index first, Index columns, Index width, Index groups, Index channels) {
  constexpr int ALL = SUMMED<LANES>, PARTS = Parts<LANES>::COUNT;
  const Index chunks = ceil_div(channels, ALL), all = groups * channels;
  Index done = 0;  // channels
  if constexpr (LANES >= 4)
    if (channel_step == 1 && channels % ALL == 0) {  // in the order of memory, whole vectors of channels
      using V = typename Vector<Real, LANES>::type;
      done = all / LANES * LANES;
      for (Index column = first; column < first + columns; ++column, to += chunks * LANES) {
        Real* target = to;
        Index chunk = 0;
        for (Index channel = 0; channel < done; channel += LANES) {
          V values[PARTS];
#pragma GCC unroll 4
          for (int part = 0; part < PARTS; ++part) {
            const Index source = column + parts.first[part] * stride;
            values[part] = V{};
            if (source < 0 || source >= width) continue;
            values[part] = load_as<V>(from + parts.image[part] * image_step + source * column_step + channel);
          }
          if constexpr (PARTS >= 2) exchange<LANES, ALL, PARTS, 1>(values);
          if constexpr (PARTS >= 4) exchange<LANES, 2 * ALL, PARTS, 2>(values);
#pragma GCC unroll 4
          for (int part = 0; part < PARTS; ++part) {
            store<V>(target + chunk * LANES, values[part]);
            if (++chunk == chunks) chunk = 0, target += to_group;
          }
        }
      }
      to -= columns * chunks * LANES;
    }
  while (done < all) {
    const Index group = done / channels, channel = done % channels;
    for (int part = 0; part < PARTS; ++part) {
      const Index begin = first + parts.first[part] * stride;
      pack_columns<Real, ALL>(to + group * to_group + channel / ALL * LANES + part * ALL, LANES, chunks * LANES,
                              from + parts.image[part] * image_step + done * channel_step, channel_step, column_step,
                              {begin, begin + columns}, width, channels - channel);
    }
    done += channels - channel;
  }
}

}  // namespace
