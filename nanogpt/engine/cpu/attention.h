// Paged attention for CPUs: every row's answer is the same to the bit in any batch, prefill chunk,
// block placement and number of threads.
//
// A row's scores over all its keys are kept (two passes, no running maximum to rescale by), so its
// arithmetic is fixed by its own keys alone; see tiles.h. Speed comes from grouping rows that read
// the same keys: adjacent tokens of a prompt, and sequences whose block tables begin with the same
// blocks (the n choices of one prompt). A group reads common keys once; grouping changes no bits.
//
//   key    (num_blocks, n_head, block_size / 16, head_size, 16)
//   value  (num_blocks, n_head, block_size / 16, 16, head_size rounded up to 16)
//
// In memory the blocks of one head are neighbours: a thread reads one head of many blocks, and the
// processor's own prefetching then runs into data that is wanted. That made decoding 10 to 15 %
// faster than blocks with their heads side by side.

#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <memory>
#include <vector>

#include "tiles.h"

namespace nanogpt {

// Adjacent rows that are computed together.
struct Group {
  int first, rows;
  int shared;              // keys 0..shared-1 lie in the same places for all rows; whole tiles
  int least_keys, most_keys;
};

struct Step {
  const int64_t* positions;
  const int64_t* slots;
  const int32_t* tables;
  const int32_t* sequence_of;
  int rows, max_blocks, block_size;

  int keys_of(int row) const { return static_cast<int>(positions[row]) + 1; }
  const int32_t* table_of(int row) const { return tables + int64_t{sequence_of[row]} * max_blocks; }

  // Keys that two rows find in the same places, in whole blocks; all of them within a sequence.
  int shared_keys(int a, int b) const {
    const int limit = std::min(keys_of(a), keys_of(b));
    if (sequence_of[a] == sequence_of[b]) return max_blocks * block_size;
    const int32_t *x = table_of(a), *y = table_of(b);
    int block = 0;
    while (block * block_size < limit && x[block] == y[block]) block++;
    return block * block_size;
  }
};

// Greedy: a row joins while it brings more shared reading than it takes from those before it.
inline std::vector<Group> group_rows(const Step& step, int max_rows) {
  std::vector<Group> groups;
  for (int row = 0; row < step.rows; row++) {
    const int keys = step.keys_of(row);
    if (!groups.empty() && groups.back().rows < max_rows) {
      Group& g = groups.back();
      const int shared = std::min(g.shared, step.shared_keys(row - 1, row));
      const int before = std::min(g.shared, g.least_keys);
      const int after = std::min({shared, g.least_keys, keys});
      if (after > 0 && after >= (before - after) * (g.rows - 1)) {
        g = {g.first, g.rows + 1, shared, std::min(g.least_keys, keys),
             std::max(g.most_keys, keys)};
        continue;
      }
    }
    groups.push_back({row, 1, step.max_blocks * step.block_size, keys, keys});
  }
  return groups;
}

// A layer's key or value cache: where the tiles of a head of a block are.
template <typename T>
struct Tiles {
  T* data;
  int64_t block_stride, head_stride, tile_size;
  int tiles_of_block;

  T* at(int32_t block, int head, int tile) const {
    return data + block * block_stride + head * head_stride + tile * tile_size;
  }
};

// (rows, n_head, head_size) with any strides but the last.
template <typename T>
struct Rows {
  T* data;
  int64_t row_stride, head_stride;

  T* at(int row, int head) const { return data + row * row_stride + head * head_stride; }
};

// Queries, keys and values come as A, and are kept as T.
template <typename A, typename T>
struct Layer {
  Rows<A> q, k, v, out;
  Tiles<T> key, value;
  int n_head, head_size, padded;
  float scale;
};

template <typename A, typename T>
void write(const Layer<A, T>& layer, const Step& step, int head, int begin, int end) {
  for (int row = begin; row < end; row++) {
    const int32_t block = static_cast<int32_t>(step.slots[row] / step.block_size);
    const int offset = static_cast<int>(step.slots[row] % step.block_size);
    const int tile = offset / kLanes, lane = offset % kLanes;
    const A *k = layer.k.at(row, head), *v = layer.v.at(row, head);
    T* key = layer.key.at(block, head, tile) + lane;
    T* value = layer.value.at(block, head, tile) + lane * layer.padded;
    for (int d = 0; d < layer.head_size; d++) key[d * kLanes] = static_cast<T>(k[d]);
    for (int d = 0; d < layer.head_size; d++) value[d] = static_cast<T>(v[d]);
  }
}

// Room for one group, reused from group to group.
template <typename T>
struct Scratch {
  Scratch(int padded, int max_tiles)
      : stride(max_tiles * kLanes),
        q(new float[kMaxRows * kQueryStride]),
        scores(new float[int64_t{kMaxRows} * stride]),
        out(new float[kMaxRows * padded]),
        keys(max_tiles),
        values(max_tiles) {}

  int stride;
  std::unique_ptr<float[]> q, scores, out;
  std::vector<const T*> keys, values;
};

// Where tiles begin..end-1 of a row's keys and values are.
template <typename A, typename T>
void find_tiles(const Layer<A, T>& layer, const int32_t* table, int head, int begin, int end,
                Scratch<T>& s) {
  for (int tile = begin; tile < end; tile++) {
    const int32_t block = table[tile / layer.key.tiles_of_block];
    s.keys[tile] = layer.key.at(block, head, tile % layer.key.tiles_of_block);
    s.values[tile] = layer.value.at(block, head, tile % layer.key.tiles_of_block);
  }
}

inline int tiles_for(int keys) { return (keys + kLanes - 1) / kLanes; }

template <typename A, typename T>
void attend(const Layer<A, T>& layer, const Step& step, const Group& g, int head, Scratch<T>& s) {
  for (int r = 0; r < g.rows; r++) {
    const A* q = layer.q.at(g.first + r, head);
    for (int d = 0; d < layer.head_size; d++)
      s.q[r * kQueryStride + d] = static_cast<float>(q[d]) * layer.scale;
  }
  std::fill_n(s.out.get(), g.rows * layer.padded, 0.0f);

  // Scores of a tile that a row sees only in part, or not at all, are computed and left unused.
  const int shared_tiles = std::min(g.shared / kLanes, tiles_for(g.most_keys));
  find_tiles(layer, step.table_of(g.first), head, 0, shared_tiles, s);
  score(s.q.get(), g.rows, s.keys.data(), 0, shared_tiles, layer.head_size, s.scores.get(),
        s.stride);
  float sums[kMaxRows];
  const auto own_tiles = [&](int r) {
    const int row = g.first + r, end = tiles_for(step.keys_of(row));
    find_tiles(layer, step.table_of(row), head, shared_tiles, end, s);
    return end;
  };
  for (int r = 0; r < g.rows; r++) {
    float* scores = s.scores.get() + r * s.stride;
    const int end = own_tiles(r);
    score(s.q.get() + r * kQueryStride, 1, s.keys.data(), shared_tiles, end, layer.head_size, scores, s.stride);
    sums[r] = softmax_weights(scores, step.keys_of(g.first + r));
  }

  const int common = std::min(g.shared, g.least_keys);
  mix(s.scores.get(), s.stride, g.rows, s.values.data(), layer.padded, 0, common, s.out.get());
  for (int r = 0; r < g.rows; r++) {
    if (g.rows > 1) own_tiles(r);
    const float* p = s.scores.get() + r * s.stride;
    float* out = s.out.get() + r * layer.padded;
    mix(p, s.stride, 1, s.values.data(), layer.padded, common, step.keys_of(g.first + r), out);
    A* y = layer.out.at(g.first + r, head);
    for (int d = 0; d < layer.head_size; d++) y[d] = static_cast<A>(out[d] / sums[r]);
  }
}

// Hands out units 0..count-1 one at a time: groups differ too much in length for equal shares.
// Each thread makes its own state first.
template <typename Make, typename F>
void share_out(int64_t count, const Make& make, const F& f) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto state = make();
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      f(unit, state);
  });
}

// How a step's rows are shared out, the same for every layer.
struct Plan {
  std::vector<Group> groups;
  int max_tiles = 0;
  bool decode;  // one row of each sequence: no row reads what another one writes

  Plan(const Step& step, int64_t n_head) {
    int max_rows = kMaxRows;
    while (max_rows > 1 && step.rows / max_rows * n_head < at::get_num_threads()) max_rows /= 2;
    groups = group_rows(step, max_rows);
    for (const Group& g : groups) max_tiles = std::max(max_tiles, tiles_for(g.most_keys));
    decode = true;
    for (int row = 1; row < step.rows; row++)
      if (step.sequence_of[row] <= step.sequence_of[row - 1]) decode = false;
  }
};

template <typename A, typename T>
void run(const Layer<A, T>& layer, const Step& step, const Plan& plan) {
  if (!plan.decode) {
    constexpr int kChunk = 64;
    const int chunks = (step.rows + kChunk - 1) / kChunk;
    share_out(
        int64_t{chunks} * layer.n_head, [] { return 0; },
        [&](int64_t unit, int) {
          const int begin = static_cast<int>(unit % chunks) * kChunk;
          write(layer, step, static_cast<int>(unit / chunks), begin,
                std::min(step.rows, begin + kChunk));
        });
  }
  const int64_t count = static_cast<int64_t>(plan.groups.size());
  // All groups of a head in turn, since neighbours may read the same keys; of a prompt the last
  // rows first, since they take longest.
  share_out(
      count * layer.n_head,
      [&] { return Scratch<T>(layer.padded, plan.max_tiles); },
      [&](int64_t unit, Scratch<T>& scratch) {
        const Group& g = plan.groups[count - 1 - unit % count];
        const int head = static_cast<int>(unit / count);
        if (plan.decode) write(layer, step, head, g.first, g.first + g.rows);
        attend(layer, step, g, head, scratch);
      });
}

}  // namespace nanogpt
