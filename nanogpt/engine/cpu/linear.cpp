// The operators of linear layers that Python calls: checks of what comes in, then product.h and
// int8.h.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <mutex>
#include <vector>

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

// The same from the transpose, (inputs, outputs), as Hugging Face's files have it: panels are rows of
// it side by side.
template <typename W>
void pack_transposed(const W* weight, int64_t outputs, int64_t inputs, int64_t begin, int64_t end,
                     W* packed) {
  constexpr int64_t G = kGroup<W>;
  const int64_t groups = (inputs + G - 1) / G, size = groups * kPanel * G;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t p = begin; p < end; p++) {
      const int64_t rows = std::min<int64_t>(kPanel, outputs - p * kPanel);
      W* to = packed + p * size + g * kPanel * G;
      if (rows < kPanel || (g + 1) * G > inputs) std::fill_n(to, kPanel * G, W(0.0f));
      for (int64_t k = g * G; k < std::min(inputs, (g + 1) * G); k++) {
        const W* from = weight + k * outputs + p * kPanel;
        if (rows == kPanel)
          for (int64_t n = 0; n < kPanel; n++) to[n * G + k % G] = from[n];
        else
          for (int64_t n = 0; n < rows; n++) to[n * G + k % G] = from[n];
      }
    }
}

bool is_transposed(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2, "a weight must be (outputs, inputs)");
  TORCH_CHECK(weight.is_contiguous() || weight.t().is_contiguous(),
              "a weight must be contiguous, or the transpose of what is");
  return !weight.is_contiguous();
}

// A large new tensor in large pages, where there are any: a thousandth of the page faults, and
// products then miss fewer translations of addresses.
at::Tensor new_weight(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor packed = at::empty(sizes, options);
  constexpr uintptr_t kPage = 2 << 20;
  const auto start = reinterpret_cast<uintptr_t>(packed.mutable_data_ptr());
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + packed.nbytes()) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return packed;
}

at::Tensor pack_weight(const at::Tensor& weight) {
  const bool transposed = is_transposed(weight);
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  at::Tensor packed;
  for_type(weight.scalar_type(), [&](auto element) {
    using W = decltype(element);
    constexpr int64_t G = kGroup<W>;
    TORCH_CHECK(!kIsInt8<W>, "weights are quantised by pack_weight_int8");
    packed = new_weight({panels, (inputs + G - 1) / G, kPanel, G}, weight.options());
    const W* from = weight.const_data_ptr<W>();
    W* to = packed.data_ptr<W>();
    for_parts(panels, at::get_num_threads(), [&](int64_t begin, int64_t end) {
      (transposed ? pack_transposed<W> : pack<W>)(from, outputs, inputs, begin, end, to);
    });
  });
  return packed;
}

at::Tensor pack_weight_int8(const at::Tensor& any) {
  const at::Tensor weight = is_transposed(any) ? any.contiguous() : any;
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t panels = (outputs + kPanel - 1) / kPanel, groups = (inputs + 3) / 4;
  constexpr int64_t kHeaderGroups = kHeader<int8_t> / kPanel / 4;
  at::Tensor packed =
      new_weight({panels, kHeaderGroups + groups, kPanel, 4}, weight.options().dtype(at::kChar));
  for_type(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    for_parts(panels, at::get_num_threads(), [&](int64_t begin, int64_t end) {
      pack_int8(weight.const_data_ptr<T>(), outputs, inputs, begin, end,
                packed.data_ptr<int8_t>());
    });
  });
  return packed;
}

// Sums over the first and over the second index of word(i, j), modulo 2^64.
template <typename F>
void sum_words(int64_t rows, int64_t columns, uint64_t* row_sums, uint64_t* column_sums,
               const F& word) {
  std::mutex mutex;
  std::fill_n(column_sums, columns, 0);
  for_parts(rows, at::get_num_threads(), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> sums(columns);
    for (int64_t i = begin; i < end; i++) {
      uint64_t sum = 0;
      for (int64_t j = 0; j < columns; j++) {
        const uint64_t w = word(i, j);
        sum += w;
        sums[j] += w;
      }
      row_sums[i] = sum;
    }
    const std::lock_guard lock(mutex);
    for (int64_t j = 0; j < columns; j++) column_sums[j] += sums[j];
  });
}

// Of a weight (outputs, inputs) in words of 64 bits, so many inputs at a time: sums over its outputs
// (words,), and over the words of each output (outputs,). Of a transposed weight too, as it lies.
std::tuple<at::Tensor, at::Tensor> bit_sums(const at::Tensor& weight) {
  const bool transposed = is_transposed(weight);
  const int64_t outputs = weight.size(0), bytes = weight.size(1) * weight.itemsize();
  TORCH_CHECK(bytes % 8 == 0, "an output must be whole words of 64 bits");
  const int64_t words = bytes / 8;
  const auto options = weight.options().dtype(at::kLong);
  at::Tensor of_words = at::empty({words}, options), of_outputs = at::empty({outputs}, options);
  auto* word_sums = reinterpret_cast<uint64_t*>(of_words.data_ptr<int64_t>());
  auto* output_sums = reinterpret_cast<uint64_t*>(of_outputs.data_ptr<int64_t>());
  const void* data = weight.const_data_ptr();
  const auto sum_transposed = [&](auto element) {
    using E = decltype(element);
    constexpr int kEach = 8 / sizeof(E);
    const E* at = static_cast<const E*>(data);
    sum_words(words, outputs, word_sums, output_sums, [=](int64_t i, int64_t j) {
      uint64_t word = 0;
      for (int k = 0; k < kEach; k++)
        word |= static_cast<uint64_t>(at[(i * kEach + k) * outputs + j]) << (8 * sizeof(E) * k);
      return word;
    });
  };
  if (!transposed) {
    const auto* at = static_cast<const uint64_t*>(data);
    sum_words(outputs, words, output_sums, word_sums,
              [=](int64_t i, int64_t j) { return at[i * words + j]; });
  } else if (weight.itemsize() == 2) {
    sum_transposed(uint16_t());
  } else {
    TORCH_CHECK(weight.itemsize() == 4, "no sums of ", weight.scalar_type());
    sum_transposed(uint32_t());
  }
  return {of_words, of_outputs};
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
  m.def("bit_sums(Tensor weight) -> (Tensor, Tensor)");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, int outputs, int gelu, Tensor? residual) -> "
      "Tensor");
  m.def("gelu(Tensor x, int kind) -> Tensor");
}

TORCH_LIBRARY_IMPL(nanogpt_cpu, CPU, m) {
  m.impl("pack_weight", &nanogpt::pack_weight);
  m.impl("pack_weight_int8", &nanogpt::pack_weight_int8);
  m.impl("bit_sums", &nanogpt::bit_sums);
  m.impl("linear", &nanogpt::linear);
  m.impl("gelu", &nanogpt::gelu_of);
}
