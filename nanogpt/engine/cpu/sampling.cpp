// The operator that Python calls to sample: checks of what comes in, random numbers, sampling.h.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "sampling.h"

namespace nanogpt {
namespace {

// Number `position` of the stream of a key, in [0, 1), as NumPy's Generator(Philox(key)).random():
// Philox 4x64 with ten rounds (Salmon et al., 2011), four numbers for each count from 1 on.
double uniform_at(const uint64_t* key, int64_t position) {
  uint64_t c[4] = {static_cast<uint64_t>(position) / 4 + 1, 0, 0, 0}, k[2] = {key[0], key[1]};
  for (int round = 0; round < 10; round++) {
    const unsigned __int128 a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93) * c[0];
    const unsigned __int128 b = static_cast<unsigned __int128>(0xCA5A826395121157) * c[2];
    const uint64_t next[4] = {static_cast<uint64_t>(b >> 64) ^ c[1] ^ k[0], static_cast<uint64_t>(b),
                              static_cast<uint64_t>(a >> 64) ^ c[3] ^ k[1], static_cast<uint64_t>(a)};
    std::copy_n(next, 4, c);
    k[0] += 0x9E3779B97F4A7C15;
    k[1] += 0xBB67AE8584CAA73B;
  }
  return static_cast<double>(c[position % 4] >> 11) * 0x1p-53;
}

template <typename T>
const T* column(const at::Tensor& x, int64_t rows, int64_t width, at::ScalarType type,
                const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == type && x.is_contiguous() &&
                  x.numel() == rows * width,
              name, " must be contiguous, ", type, ", with ", rows * width, " numbers");
  return static_cast<const T*>(x.data_ptr());
}

at::Tensor sample(const at::Tensor& logits, int64_t vocab_size, const at::Tensor& keys,
                  const at::Tensor& positions, const at::Tensor& scale, const at::Tensor& top_k,
                  const at::Tensor& top_p, const at::Tensor& min_p) {
  TORCH_CHECK(logits.dim() == 2 && logits.device().is_cpu() && logits.stride(1) == 1 &&
                  vocab_size >= 1 && vocab_size <= logits.size(1) && logits.size(1) < (1 << 30),
              "logits must be (rows, at least vocab_size) on the CPU");
  const int64_t rows = logits.size(0);
  const auto* key = column<uint64_t>(keys, rows, 2, at::kLong, "keys");
  const auto* position = column<int64_t>(positions, rows, 1, at::kLong, "positions");
  const auto* factor = column<float>(scale, rows, 1, at::kFloat, "scale");
  const auto* k = column<int64_t>(top_k, rows, 1, at::kLong, "top_k");
  const auto* p = column<double>(top_p, rows, 1, at::kDouble, "top_p");
  const auto* least = column<float>(min_p, rows, 1, at::kFloat, "min_p");
  at::Tensor out = at::empty({rows}, keys.options());
  int64_t* token_ids = out.data_ptr<int64_t>();

  const auto run_as = [&](auto element) {
    using T = decltype(element);
    const T* first = logits.data_ptr<T>();
    const int64_t stride = logits.stride(0);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      thread_local Sampler sampler;  // keeps its memory: new pages cost more than the sampling
      for (int64_t row = begin; row < end; row++) {
        const double uniform = factor[row] == 0 ? 0 : uniform_at(key + 2 * row, position[row]);
        token_ids[row] =
            sampler.sample(first + row * stride, static_cast<int>(vocab_size),
                           {uniform, factor[row], {k[row], p[row], least[row]}});
      }
    });
  };
  switch (logits.scalar_type()) {
    case at::kFloat: run_as(float()); break;
    case at::kBFloat16: run_as(c10::BFloat16()); break;
    case at::kHalf: run_as(c10::Half()); break;
    default: TORCH_CHECK(false, "no sampling from ", logits.scalar_type());
  }
  return out;
}

// The uniforms that `sample` draws with: for their test.
at::Tensor uniforms(const at::Tensor& keys, const at::Tensor& positions) {
  const int64_t rows = positions.numel();
  const auto* key = column<uint64_t>(keys, rows, 2, at::kLong, "keys");
  const auto* position = column<int64_t>(positions, rows, 1, at::kLong, "positions");
  at::Tensor out = at::empty({rows}, keys.options().dtype(at::kDouble));
  for (int64_t row = 0; row < rows; row++)
    out.data_ptr<double>()[row] = uniform_at(key + 2 * row, position[row]);
  return out;
}

}  // namespace
}  // namespace nanogpt

TORCH_LIBRARY_FRAGMENT(nanogpt_cpu, m) {
  m.def(
      "sample(Tensor logits, int vocab_size, Tensor keys, Tensor positions, Tensor scale, "
      "Tensor top_k, Tensor top_p, Tensor min_p) -> Tensor");
  m.def("uniforms(Tensor keys, Tensor positions) -> Tensor");
}

TORCH_LIBRARY_IMPL(nanogpt_cpu, CPU, m) {
  m.impl("sample", &nanogpt::sample);
  m.impl("uniforms", &nanogpt::uniforms);
}
