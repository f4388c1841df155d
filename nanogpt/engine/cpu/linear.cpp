// The operators of linear layers that Python calls: checks of what comes in, then product.h and
// int8.h.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "packed.h"

namespace nanogpt {
namespace {

// x (rows, inputs), `stride` apart, as a product of weights W takes it: quantised, or padded.
template <typename W>
Input<W> prepare(const float* x, int64_t stride, int64_t rows, const Packed& weight,
                 float*& scale) {
  const int64_t inputs = weight.inputs, padded = weight.padded<W>();
  if constexpr (!kIsInt8<W>)
    if (padded == inputs) return {x, stride, rows, inputs};
  thread_local Buffer<RowOf<W>> buffer;
  thread_local Buffer<float> scales;
  RowOf<W>* q = buffer.room(rows * padded);
  scale = scales.room(rows);
  const int64_t threads = std::min(rows, threads_for(rows * inputs));
  for_parts(rows, threads, [&, scale](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      if constexpr (kIsInt8<W>) {
        scale[r] = quantize_row(x + r * stride, inputs, padded, q + r * padded);
      } else {
        std::copy_n(x + r * stride, inputs, q + r * padded);
        std::fill(q + r * padded + inputs, q + (r + 1) * padded, 0.0f);
      }
    }
  });
  return {q, padded, rows, padded};
}

}  // namespace

// Each thread has panels of its own, one stream of memory.
void multiply(const float* x, int64_t stride, int64_t rows, const Packed& weight, Gelu gelu,
                     const float* residual, float* y) {
  if (rows == 0) return;
  const Epilogue epilogue{weight.bias, gelu, residual, y, weight.outputs};
  for_type(weight.tensor.scalar_type(), [&](auto element) {
    using W = decltype(element);
    float* scale = nullptr;
    const Input<W> in = prepare<W>(x, stride, rows, weight, scale);
    const W* packed = weight.tensor.const_data_ptr<W>();
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), weight.panels);
    for_parts(weight.panels, threads, [&](int64_t begin, int64_t end) {
      product(in, scale, packed, begin, end, epilogue);
    });
  });
}

namespace {

// Packs panels begin..end-1 of weight (outputs, inputs); zeros where there are no more.
template <typename W>
void pack(const W* weight, int64_t outputs, int64_t inputs, int64_t begin, int64_t end,
          W* packed) {
  constexpr int64_t G = kGroup<W>, kBlock = 16;  // groups: a line of cache of each output
  const int64_t whole = inputs / G, size = (inputs + G - 1) / G * kPanel * G;
  for (int64_t p = begin; p < end; p++) {
    const int64_t rows = std::min<int64_t>(kPanel, outputs - p * kPanel);
    const W* from = weight + p * kPanel * inputs;
    W* to = packed + p * size;
    if (rows < kPanel || whole * G < inputs) std::fill_n(to, size, W(0.0f));
    for (int64_t first = 0; first < whole; first += kBlock)
      for (int64_t n = 0; n < rows; n++)
        for (int64_t g = first; g < std::min(whole, first + kBlock); g++)
          std::memcpy(to + (g * kPanel + n) * G, from + n * inputs + g * G, G * sizeof(W));
    for (int64_t k = whole * G; k < inputs; k++)
      for (int64_t n = 0; n < rows; n++)
        to[(whole * kPanel + n) * G + k % G] = from[n * inputs + k];
  }
}

at::Tensor pack_weight(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "a weight must be (outputs, inputs)");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  at::Tensor packed;
  for_type(weight.scalar_type(), [&](auto element) {
    using W = decltype(element);
    constexpr int64_t G = kGroup<W>;
    TORCH_CHECK(!kIsInt8<W>, "weights are quantised by pack_weight_int8");
    packed = at::empty({panels, (inputs + G - 1) / G, kPanel, G}, weight.options());
    for_parts(panels, at::get_num_threads(), [&](int64_t begin, int64_t end) {
      pack(weight.const_data_ptr<W>(), outputs, inputs, begin, end, packed.data_ptr<W>());
    });
  });
  return packed;
}

at::Tensor pack_weight_int8(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "a weight must be (outputs, inputs)");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t panels = (outputs + kPanel - 1) / kPanel, groups = (inputs + 3) / 4;
  constexpr int64_t kHeaderGroups = kHeader<int8_t> / kPanel / 4;
  at::Tensor packed = at::empty({panels, kHeaderGroups + groups, kPanel, 4}, at::kChar);
  for_type(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    for_parts(panels, at::get_num_threads(), [&](int64_t begin, int64_t end) {
      pack_int8(weight.const_data_ptr<T>(), outputs, inputs, begin, end,
                packed.data_ptr<int8_t>());
    });
  });
  return packed;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& packed,
                  const std::optional<at::Tensor>& bias, int64_t outputs, int64_t gelu,
                  const std::optional<at::Tensor>& residual) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat, "x must be (rows, inputs) in float32");
  const Packed weight(packed, bias ? *bias : at::empty({0}, x.options()), x.size(1), outputs);
  at::Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
  at::Tensor y = at::empty({x.size(0), outputs}, x.options());
  TORCH_CHECK(!residual || (residual->sizes() == y.sizes() && residual->is_contiguous() &&
                            residual->scalar_type() == at::kFloat),
              "a residual must be contiguous float32, shaped ", y.sizes());
  multiply(rows.const_data_ptr<float>(), rows.stride(0), rows.size(0), weight,
           static_cast<Gelu>(gelu), residual ? residual->const_data_ptr<float>() : nullptr,
           y.data_ptr<float>());
  return y;
}

// GELU alone, for its test.
at::Tensor gelu_of(const at::Tensor& x, int64_t kind) {
  TORCH_CHECK(x.is_contiguous() && x.numel() % kLanes == 0, "x must fill whole registers");
  at::Tensor y = at::empty(x.sizes(), x.options());
  for (int64_t i = 0; i < x.numel(); i += kLanes)
    store(y.data_ptr<float>() + i, gelu(load(x.data_ptr<float>() + i), static_cast<Gelu>(kind)));
  return y;
}

}  // namespace
}  // namespace nanogpt

TORCH_LIBRARY_FRAGMENT(nanogpt_cpu, m) {
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("pack_weight_int8(Tensor weight) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, int outputs, int gelu, Tensor? residual) -> "
      "Tensor");
  m.def("gelu(Tensor x, int kind) -> Tensor");
}

TORCH_LIBRARY_IMPL(nanogpt_cpu, CPU, m) {
  m.impl("pack_weight", &nanogpt::pack_weight);
  m.impl("pack_weight_int8", &nanogpt::pack_weight_int8);
  m.impl("linear", &nanogpt::linear);
  m.impl("gelu", &nanogpt::gelu_of);
}
