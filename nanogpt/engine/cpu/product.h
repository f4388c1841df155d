// y = x W^T for any number of rows x, with weights of 32 or 16 bits that are read once.
//
// Weights are packed in panels of 32 outputs, in the order in which a product reads them:
//
//   packed  (panels, ceil(inputs / G), 32, G)    G adjacent inputs of an output side by side
//
// An output is one chain of multiply-adds over the inputs 0, 1, ..., whatever rows and threads
// share the work: a row's answer is the same to the bit alone, in any batch, in any chunk. Weights
// of 16 bits become float32 in registers, which is exact.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

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

// How many adjacent inputs of an output lie side by side.
template <typename W>
constexpr int kGroup = std::is_same_v<W, c10::BFloat16> ? 2 : 1;

// One group of inputs: kGroup rows of a panel, in float32.
template <typename W>
struct Group32 {
  Vec x[kGroup<W>][kPanelVecs];

  explicit Group32(const W* w) {
    for (int c = 0; c < kPanelVecs; c++) {
      if constexpr (kGroup<W> == 2)
        load_pairs(w + 2 * c * kLanes, x[0][c], x[1][c]);
      else
        x[0][c] = load(w + c * kLanes);
    }
  }
};

// What comes next in memory, asked for a few lines at a time.
struct Ahead {
  const char* at;
  int lines;  // for every kStep groups

  void fetch() {
    for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at);
  }
};

constexpr int kStep = 8;  // groups between prefetches

// Sums of R rows over a panel of `groups` groups, into y (R, 32). When `wide` is given, the
// weights are kept there in float32 for more rows: (groups * kGroup, 32).
template <typename W, int R, bool Keep>
void tile(const float* x, int64_t stride, const W* w, int groups, Ahead ahead, float* wide,
          float* y) {
  constexpr int G = kGroup<W>;
  Vec sum[R][kPanelVecs];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < kPanelVecs; c++) sum[r][c] = broadcast(0.0f);
  const auto add_group = [&](int g) {
    const Group32<W> weights(w + int64_t{g} * G * kPanel);
    for (int i = 0; i < G; i++) {
      if constexpr (Keep)
        for (int c = 0; c < kPanelVecs; c++)
          store(wide + (int64_t{g} * G + i) * kPanel + c * kLanes, weights.x[i][c]);
      for (int r = 0; r < R; r++) {
        const Vec a = broadcast(x[r * stride + g * G + i]);
        for (int c = 0; c < kPanelVecs; c++) sum[r][c] = fma(a, weights.x[i][c], sum[r][c]);
      }
    }
  };
  int g = 0;
  for (; g + kStep <= groups; g += kStep) {
    ahead.fetch();
    for (int i = 0; i < kStep; i++) add_group(g + i);
  }
  for (; g < groups; g++) add_group(g);
  for (int r = 0; r < R; r++)
    for (int c = 0; c < kPanelVecs; c++) store(y + r * kPanel + c * kLanes, sum[r][c]);
}

template <typename W>
using Tile = void (*)(const float*, int64_t, const W*, int, Ahead, float*, float*);

// tile<W, rows, Keep> for rows of 1 .. kTileRows.
template <typename W, bool Keep>
Tile<W> tile_of(int rows) {
  static constexpr auto all = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array<Tile<W>, kTileRows>{&tile<W, R + 1, Keep>...};
  }(std::make_integer_sequence<int, kTileRows>());
  return all[rows - 1];
}

// Sums of `rows` rows over one panel, given to finish(first row, rows, sums) tile by tile. `next`
// is where the panel lies that comes after it; `wide` has room for a panel in float32.
template <typename W, typename F>
void panel_product(const float* x, int64_t stride, int rows, const W* panel, int groups,
                   const W* next, float* wide, const F& finish) {
  constexpr int kLines = kStep * kGroup<W> * kPanel * sizeof(W) / 64;
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  const int lines = (kLines + tiles - 1) / tiles;
  const int64_t share = int64_t{groups} * kGroup<W> * kPanel / tiles;  // of `next`, for each tile
  alignas(64) float y[kTileRows * kPanel];
  for (int i = 0, first = 0, end; i < tiles; i++, first = end) {
    end = static_cast<int>(int64_t{rows} * (i + 1) / tiles);
    const float* a = x + first * stride;
    const Ahead ahead{reinterpret_cast<const char*>(next + i * share), lines};
    if constexpr (std::is_same_v<W, float>) {
      tile_of<W, false>(end - first)(a, stride, panel, groups, ahead, nullptr, y);
    } else {
      if (i > 0)
        tile_of<float, false>(end - first)(a, stride, wide, groups * kGroup<W>,
                                           {ahead.at, (lines + kGroup<W> - 1) / kGroup<W>}, nullptr, y);
      else if (tiles > 1)
        tile_of<W, true>(end - first)(a, stride, panel, groups, ahead, wide, y);
      else
        tile_of<W, false>(end - first)(a, stride, panel, groups, ahead, nullptr, y);
    }
    finish(first, end - first, y);
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
        put(sums + r * kPanel + (n - output), n, (row + r) * outputs + n, std::min<int64_t>(kLanes, end - n));
  }

 private:
  void put(const float* sums, int64_t output, int64_t at, int64_t width) const {
    if (width == kLanes) {
      const float* add = residual ? residual + at : nullptr;
      return store(y + at, value(sums, bias ? bias + output : nullptr, add));
    }
    alignas(64) float b[kLanes] = {}, add[kLanes] = {}, result[kLanes];
    if (bias) std::copy_n(bias + output, width, b);
    if (residual) std::copy_n(residual + at, width, add);
    store(result, value(sums, bias ? b : nullptr, residual ? add : nullptr));
    std::copy_n(result, width, y + at);
  }

  Vec value(const float* sums, const float* b, const float* residual) const {
    Vec v = load(sums);
    if (b) v = add(v, load(b));
    v = gelu(v, kind);
    return residual ? add(load(residual), v) : v;
  }
};

// x: `rows` rows, `stride` apart, of `inputs` floats, a multiple of the group.
struct Input {
  const float* x;
  int64_t stride, rows, inputs;
};

// How many rows of input stay in the second-level cache, beside two panels.
inline int64_t rows_at_once(int64_t inputs) {
  constexpr int64_t kFloats = (768 << 10) / sizeof(float);
  return std::max<int64_t>(1, kFloats / inputs / kTileRows) * kTileRows;
}

// Panels begin..end-1 for all rows.
template <typename W>
void product(const Input& in, const W* packed, int64_t begin, int64_t end,
             const Epilogue& epilogue) {
  const int64_t panel = in.inputs * kPanel, at_once = rows_at_once(in.inputs);
  thread_local std::vector<float> wide;  // kept: fresh memory costs page faults
  if (!std::is_same_v<W, float> && in.rows > kTileRows && int64_t(wide.size()) < panel)
    wide.resize(panel);
  for (int64_t row = 0; row < in.rows; row += at_once) {
    const int rows = static_cast<int>(std::min(at_once, in.rows - row));
    for (int64_t p = begin; p < end; p++) {
      const int64_t next = p + 1 < end ? p + 1 : begin;
      panel_product(in.x + row * in.stride, in.stride, rows, packed + p * panel,
                    static_cast<int>(in.inputs / kGroup<W>), packed + next * panel, wide.data(),
                    [&](int first, int count, const float* sums) {
                      epilogue(row + first, count, p * kPanel, sums);
                    });
    }
  }
}

// Packs rows of weight (outputs, inputs) into panels begin..end-1, zeros where there are no more.
template <typename W>
void pack(const W* weight, int64_t outputs, int64_t inputs, int64_t begin, int64_t end, W* packed) {
  constexpr int64_t G = kGroup<W>;
  const int64_t groups = (inputs + G - 1) / G;
  W* to = packed + begin * groups * kPanel * G;
  for (int64_t p = begin; p < end; p++)
    for (int64_t g = 0; g < groups; g++)
      for (int64_t n = p * kPanel; n < (p + 1) * kPanel; n++)
        for (int64_t k = g * G; k < (g + 1) * G; k++)
          *to++ = n < outputs && k < inputs ? weight[n * inputs + k] : W(0.0f);
}

}  // namespace nanogpt
