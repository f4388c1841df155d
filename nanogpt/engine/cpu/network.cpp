// The whole network up to its last hidden states, in one call: what nanogpt/model/gpt.py defines,
// over packed weights and a paged cache. The same bits as layer by layer from Python, without the
// time between the layers, and with buffers that stay.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "layer_norm.h"
#include "packed.h"
#include "paged.h"

namespace nanogpt {
namespace {

struct Norm {
  const float *weight, *bias;  // no bias: null
  int64_t size;
  float eps;

  Norm(const at::Tensor& w, const at::Tensor& b, int64_t size, double eps)
      : weight(w.const_data_ptr<float>()),
        bias(b.numel() ? b.const_data_ptr<float>() : nullptr),
        size(size),
        eps(static_cast<float>(eps)) {
    TORCH_CHECK(w.numel() == size && (b.numel() == size || b.numel() == 0) && w.is_contiguous() &&
                    b.is_contiguous(),
                "a norm's weight and bias must be contiguous, (", size, ",)");
  }

  // y may be x.
  void operator()(const float* x, int64_t rows, float* y) const {
    for_parts(rows, std::min(rows, threads_for(rows * size)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        layer_norm(x + r * size, size, weight, bias, eps, y + r * size);
    });
  }
};

at::Tensor layer_norm_rows(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, double eps) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kFloat,
              "x must be (rows, size), contiguous float32");
  const Norm norm(weight, bias ? *bias : at::empty({0}, x.options()), x.size(1), eps);
  at::Tensor y = at::empty(x.sizes(), x.options());
  norm(x.const_data_ptr<float>(), x.size(0), y.data_ptr<float>());
  return y;
}

// x[row] = wte[id] + wpe[position]
template <typename T>
void embed(const at::Tensor& ids, const at::Tensor& positions, const at::Tensor& wte,
           const at::Tensor& wpe, float* x) {
  const int64_t *id = ids.const_data_ptr<int64_t>(), *at = positions.const_data_ptr<int64_t>();
  const int64_t size = wte.size(1);
  for (int64_t row = 0; row < ids.numel(); row++) {
    TORCH_CHECK(id[row] >= 0 && id[row] < wte.size(0), "token ", id[row], " does not exist");
    TORCH_CHECK(at[row] >= 0 && at[row] < wpe.size(0), "position ", at[row], " does not exist");
    const T *token = wte.const_data_ptr<T>() + id[row] * size,
            *place = wpe.const_data_ptr<T>() + at[row] * size;
    for (int64_t i = 0; i < size; i++)
      x[row * size + i] = static_cast<float>(token[i]) + static_cast<float>(place[i]);
  }
}

// Of each layer in turn: weight and bias of ln_1, c_attn, c_proj, ln_2, c_fc and c_proj; last those
// of ln_f. A bias that isn't there is empty.
constexpr int64_t kTensorsOfLayer = 12;

struct Block {
  Norm ln_1;
  Packed attn, attn_proj;
  Norm ln_2;
  Packed fc, mlp_proj;

  Block(at::TensorList t, int64_t size, double eps)
      : ln_1(t[0], t[1], size, eps),
        attn(t[2], t[3], size, 3 * size),
        attn_proj(t[4], t[5], size, size),
        ln_2(t[6], t[7], size, eps),
        fc(t[8], t[9], size, 4 * size),
        mlp_proj(t[10], t[11], 4 * size, size) {}
};

// Buffers of a step, by row.
struct Room {
  Buffer<float> x, normed, qkv, attended, inner;
};

at::Tensor hidden(const at::Tensor& ids, const at::Tensor& wte, const at::Tensor& wpe,
                  at::TensorList layers, const at::Tensor& keys, const at::Tensor& values,
                  const at::Tensor& positions, const at::Tensor& slots,
                  const at::Tensor& block_tables, const at::Tensor& sequence_of, int64_t n_head,
                  int64_t gelu, double eps) {
  const int64_t rows = ids.numel(), size = wte.size(1), n_layer = keys.size(0);
  const int64_t head_size = size / n_head;
  TORCH_CHECK(ids.is_contiguous() && wte.is_contiguous() && wpe.is_contiguous() &&
                  wpe.size(1) == size && wte.scalar_type() == wpe.scalar_type(),
              "ids and embeddings must be contiguous and fit");
  TORCH_CHECK(static_cast<int64_t>(layers.size()) == n_layer * kTensorsOfLayer + 2 &&
                  values.size(0) == n_layer,
              layers.size(), " tensors don't make the layers of the cache, ", n_layer);
  const Step step = step_of(positions, slots, block_tables, sequence_of, rows, keys.size(1),
                            keys.size(3) * kLanes);
  const Plan plan(step, n_head);
  const Norm ln_f(layers[layers.size() - 2], layers[layers.size() - 1], size, eps);
  at::Tensor out = at::empty({rows, size}, at::kFloat);
  if (rows == 0) return out;

  thread_local Room room;
  float *x = room.x.room(rows * size), *normed = room.normed.room(rows * size);
  float *qkv = room.qkv.room(rows * 3 * size), *attended = room.attended.room(rows * size);
  float* inner = room.inner.room(rows * 4 * size);
  for_type(wte.scalar_type(), [&](auto element) {
    embed<decltype(element)>(ids, positions, wte, wpe, x);
  });
  const auto part = [&](int64_t i) {
    return Rows<float>{qkv + i * size, 3 * size, head_size};
  };
  for (int64_t layer = 0; layer < n_layer; layer++) {
    const Block block(layers.slice(layer * kTensorsOfLayer, kTensorsOfLayer), size, eps);
    const at::Tensor key = keys.select(0, layer), value = values.select(0, layer);
    check_cache(key, value, n_head, head_size);
    block.ln_1(x, rows, normed);
    multiply(normed, size, rows, block.attn, Gelu::kNone, nullptr, qkv);
    for_cache_type(key.scalar_type(), [&](auto element) {
      run(layer_of<float, decltype(element)>(part(0), part(1), part(2), {attended, size, head_size},
                                             key, value, n_head, head_size),
          step, plan);
    });
    multiply(attended, size, rows, block.attn_proj, Gelu::kNone, x, x);
    block.ln_2(x, rows, normed);
    multiply(normed, size, rows, block.fc, static_cast<Gelu>(gelu), nullptr, inner);
    multiply(inner, 4 * size, rows, block.mlp_proj, Gelu::kNone, x, x);
  }
  ln_f(x, rows, out.data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace nanogpt

TORCH_LIBRARY_FRAGMENT(nanogpt_cpu, m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor");
  m.def(
      "hidden(Tensor ids, Tensor wte, Tensor wpe, Tensor[] layers, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor positions, Tensor slots, Tensor block_tables, "
      "Tensor sequence_of, int n_head, int gelu, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(nanogpt_cpu, CPU, m) {
  m.impl("layer_norm", &nanogpt::layer_norm_rows);
  m.impl("hidden", &nanogpt::hidden);
}
