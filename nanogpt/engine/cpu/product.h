// y = x W^T for any number of rows x, with packed weights that are read from memory once. A row's
// answer is the same to the bit alone, in any batch, in any chunk, on any number of threads: see
// panels.h.
#pragma once

#include "buffer.h"
#include "epilogue.h"

namespace nanogpt {

// x: `rows` rows, `stride` apart, of `inputs` elements, a multiple of the group.
template <typename W>
struct Input {
  const RowOf<W>* x;
  int64_t stride, rows, inputs;
};

// Lines of cache that kStep groups of a panel take.
template <typename W>
constexpr int kLines = kStep * kGroup<W> * kPanel * sizeof(W) / 64;

// Weights of 16 bits are widened once, and kept, for more tiles than these: storing takes longer
// than widening them again.
constexpr int kWidenedTwice = 3;

// Sums over P panels, tile by tile: finish(which panel, first row, rows, sums). `next` is where
// those panels lie that come afterwards; `wide` has room for P panels in float32.
template <int P, typename W, typename F>
void panels_product(const Input<W>& in, const W* panels, const W* next, float* wide,
                    const F& finish) {
  constexpr bool kNarrow = sizeof(W) == 2;
  constexpr int kRows = kTileRows / P, G = kGroup<W>;
  const int tiles = static_cast<int>((in.rows + kRows - 1) / kRows);
  const int groups = static_cast<int>(in.inputs / G), lines = (kLines<W> + tiles - 1) / tiles;
  const int64_t bytes = panel_size<W>(in.inputs) * sizeof(W);
  const bool keep = kNarrow && tiles > kWidenedTwice;
  alignas(64) SumOf<W> y[kTileRows * kPanel];
  int64_t first = 0;
  for (int i = 0; i < tiles; i++) {
    const int64_t end = in.rows * (i + 1) / tiles;
    const int count = static_cast<int>(end - first);
    const RowOf<W>* x = in.x + first * in.stride;
    // Each tile asks for its share of the next panels.
    const Ahead ahead{reinterpret_cast<const char*>(next) + bytes * i / tiles, lines, bytes};
    if constexpr (kNarrow) {
      if (keep && i > 0)
        tile_of<float, P, false>(count)(x, in.stride, wide, groups * G,
                                        {ahead.at, (lines + G - 1) / G, bytes}, nullptr, y);
      else if (keep)
        tile_of<W, P, true>(count)(x, in.stride, panels, groups, ahead, wide, y);
    }
    if (!keep)
      tile_of<W, P, false>(count)(x, in.stride, panels, groups, ahead, nullptr, y);
    for (int p = 0; p < P; p++) finish(p, first, count, y + p * count * kPanel);
    first = end;
  }
}

// How many rows of input stay in the second-level cache, beside two panels.
template <typename W>
int64_t rows_at_once(int64_t inputs) {
  constexpr int64_t kElements = (768 << 10) / sizeof(RowOf<W>);
  return std::max<int64_t>(1, kElements / inputs / kTileRows) * kTileRows;
}

// The sums of a panel's rows in float32: `scale` are those of the rows.
inline void rescale(const int8_t* panel, const float* scale, int rows, const int32_t* sums,
                    float* y) {
  const float* column = reinterpret_cast<const float*>(panel + kPanel * 4);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < kPanel; c += kLanes)
      store(y + r * kPanel + c, mul(to_float(load_ints(sums + r * kPanel + c)),
                                    mul(load(column + c), broadcast(scale[r]))));
}

// How many panels to take at once: few rows have too few sums to hide how long an addition takes,
// and memory delivers more when it is asked in several places.
// For many rows, panels of int8 stay in the first-level cache one at a time.
template <typename W>
int panels_at_once(int64_t rows, int64_t left) {
  if (rows * 4 <= kTileRows && left >= 4) return 4;
  const bool pair = rows * 2 <= kTileRows ||
                    (kTileRows >= 8 && (rows <= kTileRows || !kIsInt8<W>));
  return pair && left >= 2 ? 2 : 1;
}

// Panels begin..end-1 for all rows. `scale`, for int8 only, are those of the rows.
template <typename W>
void product(const Input<W>& in, const float* scale, const W* packed, int64_t begin, int64_t end,
             const Epilogue& epilogue) {
  thread_local Buffer<float> wide;
  float* room = sizeof(W) == 2 ? wide.room(2 * in.inputs * kPanel) : nullptr;
  const int64_t size = panel_size<W>(in.inputs), at_once = rows_at_once<W>(in.inputs);
  for (int64_t row = 0; row < in.rows; row += at_once) {
    const Input<W> part{in.x + row * in.stride, in.stride, std::min(at_once, in.rows - row),
                        in.inputs};
    for (int64_t p = begin, step; p < end; p += step) {
      const auto finish = [&](int64_t k, int64_t first, int rows, const SumOf<W>* sums) {
        const int64_t output = (p + k) * kPanel;
        if constexpr (kIsInt8<W>) {
          alignas(64) float y[kTileRows * kPanel];
          rescale(packed + (p + k) * size, scale + row + first, rows, sums, y);
          epilogue(row + first, rows, output, y);
        } else {
          epilogue(row + first, rows, output, sums);
        }
      };
      step = panels_at_once<W>(part.rows, end - p);
      const W* panel = packed + p * size;
      const W* next = packed + (p + step < end ? p + step : begin) * size;
      if constexpr (kTileRows >= 4)
        if (step == 4) panels_product<4>(part, panel, next, room, finish);
      if (step == 2) panels_product<2>(part, panel, next, room, finish);
      if (step == 1) panels_product<1>(part, panel, next, room, finish);
    }
  }
}

}  // namespace nanogpt
