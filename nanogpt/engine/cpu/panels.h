// Weights of 32, 16 or 8 bits in panels of 32 outputs, in the order in which a product reads them:
//
//   packed  (panels, groups, 32, G)    G adjacent inputs of an output side by side
//
// and the sums of a tile: a few rows times a few panels, in registers. An output is one chain of
// multiply-adds over the inputs 0, 1, ..., whatever rows and panels share the registers. Weights of
// 16 bits become float32 in registers, which is exact; those of 8 bits are for int8.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "dot4.h"
#include "vec.h"

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

// What comes next in memory, asked for a few lines at a time, in each of P panels.
struct Ahead {
  const char* at;
  int lines;      // for every kStep groups
  int64_t panel;  // bytes from one panel to the next

  template <int P>
  void fetch() {
    for (int i = 0; i < lines; i++, at += 64)
      for (int p = 0; p < P; p++) __builtin_prefetch(at + p * panel);
  }
};

constexpr int kStep = 8;  // groups between prefetches

template <int P, typename F>
inline void for_groups(int groups, Ahead ahead, const F& f) {
  int g = 0;
  for (; g + kStep <= groups; g += kStep) {
    ahead.fetch<P>();
    for (int i = 0; i < kStep; i++) f(g + i);
  }
  for (; g < groups; g++) f(g);
}

// Sums of R rows over P panels of `groups` groups, into y (P, R, 32). With Keep, the weights are
// also written to `wide` in float32 for more rows: (P, groups * G, 32).
template <typename W, int R, int P, bool Keep>
void tile(const float* x, int64_t stride, const W* w, int groups, Ahead ahead, float* wide,
          float* y) {
  constexpr int G = kGroup<W>, C = P * kPanelVecs;
  const int64_t size = int64_t{groups} * G * kPanel;
  Vec sum[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sum[r][c] = broadcast(0.0f);
  for_groups<P>(groups, ahead, [&](int64_t g) {
    Vec weight[G][C];
    for (int c = 0; c < C; c++) {
      const W* at = w + c / kPanelVecs * size + (g * kPanel + c % kPanelVecs * kLanes) * G;
      if constexpr (G == 2)
        load_pairs(at, weight[0][c], weight[1][c]);
      else
        weight[0][c] = load(at);
    }
    for (int i = 0; i < G; i++) {
      if constexpr (Keep)
        for (int c = 0; c < C; c++)
          store(wide + c / kPanelVecs * size + (g * G + i) * kPanel + c % kPanelVecs * kLanes,
                weight[i][c]);
      for (int r = 0; r < R; r++) {
        const Vec a = broadcast(x[r * stride + g * G + i]);
        for (int c = 0; c < C; c++) sum[r][c] = fma(a, weight[i][c], sum[r][c]);
      }
    }
  });
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++)
      store(y + (c / kPanelVecs * R + r) * kPanel + c % kPanelVecs * kLanes, sum[r][c]);
}

template <typename W, int R, int P, bool Keep>
void tile(const uint8_t* x, int64_t stride, const int8_t* panel, int groups, Ahead ahead, float*,
          int32_t* y) {
  constexpr int C = P * kPanelVecs;
  const int64_t size = kHeader<W> + int64_t{groups} * 4 * kPanel;
  const auto at = [&](int c, int64_t offset) {
    return load_ints(panel + c / kPanelVecs * size + offset + c % kPanelVecs * kLanes * 4);
  };
  Ints32 sum[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sum[r][c] = at(c, 0);
  for_groups<P>(groups, ahead, [&](int64_t g) {
    Ints32 weight[C];
    for (int c = 0; c < C; c++) weight[c] = at(c, kHeader<W> + g * kPanel * 4);
    for (int r = 0; r < R; r++) {
      const Ints32 a = broadcast4(x + r * stride + g * 4);
      for (int c = 0; c < C; c++) sum[r][c] = dot4(a, weight[c], sum[r][c]);
    }
  });
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++)
      store_ints(y + (c / kPanelVecs * R + r) * kPanel + c % kPanelVecs * kLanes, sum[r][c]);
}

template <typename W>
using Tile = void (*)(const RowOf<W>*, int64_t, const W*, int, Ahead, float*, SumOf<W>*);

// The tile for 1 .. kTileRows / P rows over P panels.
template <typename W, int P, bool Keep>
Tile<W> tile_of(int rows) {
  static constexpr auto all = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array<Tile<W>, kTileRows / P>{&tile<W, R + 1, P, Keep>...};
  }(std::make_integer_sequence<int, kTileRows / P>());
  return all[rows - 1];
}

}  // namespace nanogpt
