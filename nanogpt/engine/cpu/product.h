// y = x W^T for any number of rows x, with weights of 32, 16 or 8 bits that are read once.
//
// Weights are packed in panels of 32 outputs, in the order in which a product reads them:
//
//   packed  (panels, groups, 32, G)    G adjacent inputs of an output side by side
//
// An output is one chain of multiply-adds over the inputs 0, 1, ..., whatever rows and threads
// share the work: a row's answer is the same to the bit alone, in any batch, in any chunk. Weights
// of 16 bits become float32 in registers, which is exact; those of 8 bits are for int8.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "buffer.h"
#include "dot4.h"
#include "gelu.h"

namespace nanogpt {

constexpr int kPanel = 32;  // outputs side by side: two registers of AVX-512
constexpr int kPanelVecs = kPanel / kLanes;

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 x 2 sums of 32 registers
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int kTileRows = 3;  // 3 x 4 sums of 16 registers
#else
constexpr int kTileRows = 2;
#endif

template <typename W>
constexpr bool kIsInt8 = std::is_same_v<W, int8_t>;

// How many adjacent inputs of an output lie side by side.
template <typename W>
constexpr int kGroup = kIsInt8<W> ? 4 : std::is_same_v<W, c10::BFloat16> ? 2 : 1;

// Before the weights of a panel: of int8, where its sums start, and its scales (see int8.h).
template <typename W>
constexpr int kHeader = kIsInt8<W> ? 2 * kPanel * 4 : 0;

template <typename W>
constexpr int64_t panel_size(int64_t inputs) {
  return kHeader<W> + inputs * kPanel;
}

// What rows and sums are made of.
template <typename W>
using RowOf = std::conditional_t<kIsInt8<W>, uint8_t, float>;
template <typename W>
using SumOf = std::conditional_t<kIsInt8<W>, int32_t, float>;

// What comes next in memory, asked for a few lines at a time.
struct Ahead {
  const char* at;
  int lines;  // for every kStep groups

  void fetch() {
    for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at);
  }
};

constexpr int kStep = 8;  // groups between prefetches

template <typename F>
inline void for_groups(int groups, Ahead ahead, const F& f) {
  int g = 0;
  for (; g + kStep <= groups; g += kStep) {
    ahead.fetch();
    for (int i = 0; i < kStep; i++) f(g + i);
  }
  for (; g < groups; g++) f(g);
}

// Sums of R rows over a panel of `groups` groups, into y (R, 32). With Keep, the weights are also
// written to `wide` in float32 for more rows: (groups * G, 32).
template <typename W, int R, bool Keep>
void tile(const float* x, int64_t stride, const W* w, int groups, Ahead ahead, float* wide,
          float* y) {
  constexpr int G = kGroup<W>;
  Vec sum[R][kPanelVecs];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < kPanelVecs; c++) sum[r][c] = broadcast(0.0f);
  for_groups(groups, ahead, [&](int64_t g) {
    Vec weight[G][kPanelVecs];
    for (int c = 0; c < kPanelVecs; c++) {
      const W* at = w + (g * kPanel + c * kLanes) * G;
      if constexpr (G == 2)
        load_pairs(at, weight[0][c], weight[1][c]);
      else
        weight[0][c] = load(at);
    }
    for (int i = 0; i < G; i++) {
      if constexpr (Keep)
        for (int c = 0; c < kPanelVecs; c++)
          store(wide + (g * G + i) * kPanel + c * kLanes, weight[i][c]);
      for (int r = 0; r < R; r++) {
        const Vec a = broadcast(x[r * stride + g * G + i]);
        for (int c = 0; c < kPanelVecs; c++) sum[r][c] = fma(a, weight[i][c], sum[r][c]);
      }
    }
  });
  for (int r = 0; r < R; r++)
    for (int c = 0; c < kPanelVecs; c++) store(y + r * kPanel + c * kLanes, sum[r][c]);
}

template <typename W, int R, bool Keep>
void tile(const uint8_t* x, int64_t stride, const int8_t* panel, int groups, Ahead ahead, float*,
          int32_t* y) {
  const int8_t* w = panel + kHeader<W>;
  Ints32 sum[R][kPanelVecs];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < kPanelVecs; c++) sum[r][c] = load_ints(panel + c * kLanes * 4);
  for_groups(groups, ahead, [&](int64_t g) {
    Ints32 weight[kPanelVecs];
    for (int c = 0; c < kPanelVecs; c++) weight[c] = load_ints(w + (g * kPanel + c * kLanes) * 4);
    for (int r = 0; r < R; r++) {
      const Ints32 a = broadcast4(x + r * stride + g * 4);
      for (int c = 0; c < kPanelVecs; c++) sum[r][c] = dot4(a, weight[c], sum[r][c]);
    }
  });
  for (int r = 0; r < R; r++)
    for (int c = 0; c < kPanelVecs; c++) store_ints(y + r * kPanel + c * kLanes, sum[r][c]);
}

template <typename W>
using Tile = void (*)(const RowOf<W>*, int64_t, const W*, int, Ahead, float*, SumOf<W>*);

// tile<W, rows, Keep> for rows of 1 .. kTileRows.
template <typename W, bool Keep>
Tile<W> tile_of(int rows) {
  static constexpr auto all = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array<Tile<W>, kTileRows>{&tile<W, R + 1, Keep>...};
  }(std::make_integer_sequence<int, kTileRows>());
  return all[rows - 1];
}

// x: `rows` rows, `stride` apart, of `inputs` elements, a multiple of the group.
template <typename W>
struct Input {
  const RowOf<W>* x;
  int64_t stride, rows, inputs;
};

// Sums over one panel, given to finish(first row, rows, sums) tile by tile. `next` is where the
// panel lies that comes after it; `wide` has room for a panel in float32.
template <typename W, typename F>
void panel_product(const Input<W>& in, const W* panel, const W* next, float* wide,
                   const F& finish) {
  constexpr bool kNarrow = sizeof(W) == 2;
  constexpr int kLines = kStep * kGroup<W> * kPanel * sizeof(W) / 64;
  const int tiles = static_cast<int>((in.rows + kTileRows - 1) / kTileRows);
  const int groups = static_cast<int>(in.inputs / kGroup<W>);
  const int lines = (kLines + tiles - 1) / tiles;
  alignas(64) SumOf<W> y[kTileRows * kPanel];
  int64_t first = 0;
  for (int i = 0; i < tiles; i++) {
    const int64_t end = in.rows * (i + 1) / tiles;
    const int count = static_cast<int>(end - first);
    const RowOf<W>* x = in.x + first * in.stride;
    const Ahead ahead{reinterpret_cast<const char*>(next + panel_size<W>(in.inputs) * i / tiles),
                      lines};
    if (kNarrow && i > 0) {
      if constexpr (kNarrow)
        tile_of<float, false>(count)(x, in.stride, wide, groups * kGroup<W>,
                                     {ahead.at, (lines + kGroup<W> - 1) / kGroup<W>}, nullptr, y);
    } else {
      const auto run = kNarrow && tiles > 1 ? tile_of<W, kNarrow>(count) : tile_of<W, false>(count);
      run(x, in.stride, panel, groups, ahead, wide, y);
    }
    finish(first, count, y);
    first = end;
  }
}

// What becomes of the sums: bias, GELU, then the residual. y is (rows, outputs), contiguous.
struct Epilogue {
  const float* bias;  // null for none
  Gelu kind;
  const float* residual;  // laid out like y, and may be y; null for none
  float* y;
  int64_t outputs;

  // Takes sums (rows, 32) of a panel whose first output is `output`.
  void operator()(int64_t row, int rows, int64_t output, const float* sums) const {
    const int64_t end = std::min(output + kPanel, outputs);
    for (int r = 0; r < rows; r++)
      for (int64_t n = output; n < end; n += kLanes)
        put(sums + r * kPanel + (n - output), n, (row + r) * outputs + n,
            std::min<int64_t>(kLanes, end - n));
  }

 private:
  void put(const float* sums, int64_t output, int64_t at, int64_t width) const {
    if (width == kLanes) {
      const float* rest = residual ? residual + at : nullptr;
      return store(y + at, value(sums, bias ? bias + output : nullptr, rest));
    }
    alignas(64) float b[kLanes] = {}, rest[kLanes] = {}, result[kLanes];
    if (bias) std::copy_n(bias + output, width, b);
    if (residual) std::copy_n(residual + at, width, rest);
    store(result, value(sums, bias ? b : nullptr, residual ? rest : nullptr));
    std::copy_n(result, width, y + at);
  }

  Vec value(const float* sums, const float* b, const float* rest) const {
    Vec v = load(sums);
    if (b) v = add(v, load(b));
    v = gelu(v, kind);
    return rest ? add(load(rest), v) : v;
  }
};

// How many rows of input stay in the second-level cache, beside two panels.
template <typename W>
int64_t rows_at_once(int64_t inputs) {
  constexpr int64_t kElements = (768 << 10) / sizeof(RowOf<W>);
  return std::max<int64_t>(1, kElements / inputs / kTileRows) * kTileRows;
}

// Panels begin..end-1 for all rows. `scale`, for int8 only, are those of the rows.
template <typename W>
void product(const Input<W>& in, const float* scale, const W* packed, int64_t begin, int64_t end,
             const Epilogue& epilogue) {
  thread_local Buffer<float> wide;
  float* room = sizeof(W) == 2 && in.rows > kTileRows ? wide.room(in.inputs * kPanel) : nullptr;
  const int64_t size = panel_size<W>(in.inputs), at_once = rows_at_once<W>(in.inputs);
  for (int64_t row = 0; row < in.rows; row += at_once) {
    const Input<W> part{in.x + row * in.stride, in.stride, std::min(at_once, in.rows - row),
                        in.inputs};
    for (int64_t p = begin; p < end; p++) {
      const W* panel = packed + p * size;
      const W* next = packed + (p + 1 < end ? p + 1 : begin) * size;
      panel_product(part, panel, next, room, [&](int64_t first, int rows, SumOf<W>* sums) {
        if constexpr (kIsInt8<W>) {
          alignas(64) float y[kTileRows * kPanel];
          const float* column = reinterpret_cast<const float*>(panel + kPanel * 4);
          for (int r = 0; r < rows; r++)
            for (int c = 0; c < kPanelVecs; c++)
              store(y + r * kPanel + c * kLanes,
                    mul(to_float(load_ints(sums + r * kPanel + c * kLanes)),
                        mul(load(column + c * kLanes), broadcast(scale[row + first + r]))));
          epilogue(row + first, rows, p * kPanel, y);
        } else {
          epilogue(row + first, rows, p * kPanel, sums);
        }
      });
    }
  }
}

}  // namespace nanogpt
