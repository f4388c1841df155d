// The operators that Python calls to sample: checks of what comes in, random numbers, sampling.h,
// and log probabilities.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "logprobs.h"
#include "rules.h"
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

// How many rows of logits, each with at least so many tokens.
int64_t rows_of(const at::Tensor& logits, int64_t vocab_size) {
  TORCH_CHECK(logits.dim() == 2 && logits.device().is_cpu() && logits.stride(1) == 1 &&
                  vocab_size >= 1 && vocab_size <= logits.size(1) && logits.size(1) < (1 << 30),
              "logits must be (rows, at least vocab_size) on the CPU");
  return logits.size(0);
}

// f(pointer to the first logit), by type.
template <typename F>
void for_logits(const at::Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case at::kFloat: return f(logits.data_ptr<float>());
    case at::kBFloat16: return f(logits.data_ptr<c10::BFloat16>());
    case at::kHalf: return f(logits.data_ptr<c10::Half>());
    default: TORCH_CHECK(false, "no sampling from ", logits.scalar_type());
  }
}

Tokens tokens_of(const at::Tensor& ends, const at::Tensor& ids, int64_t rows) {
  const auto* end = column<int64_t>(ends, rows, 1, at::kLong, "ends");
  int64_t before = 0;
  for (int64_t row = 0; row < rows; before = end[row++])
    TORCH_CHECK(before <= end[row], "ends must not descend");
  return {end, column<int64_t>(ids, before, 1, at::kLong, "ids")};
}

// The tensors of LogitRules.tensors(), in their order.
Rules rules_of(at::TensorList parts, int64_t rows) {
  static_assert(sizeof(Penalties) == 3 * sizeof(float));
  TORCH_CHECK(parts.size() == 10, "rules are ten tensors");
  const auto floats = [&](int i, int64_t count, const char* name) {
    return column<float>(parts[i], count, 1, at::kFloat, name);
  };
  Rules rules;
  rules.seen = tokens_of(parts[0], parts[1], rows);
  rules.counts = floats(2, parts[1].numel(), "counts");
  rules.penalties = reinterpret_cast<const Penalties*>(floats(3, 3 * rows, "penalties"));
  rules.biased = tokens_of(parts[4], parts[5], rows);
  rules.bias = floats(6, parts[5].numel(), "bias");
  rules.ends = tokens_of(parts[7], parts[8], rows);
  rules.minimum = column<int64_t>(parts[9], rows, 1, at::kLong, "minimum");
  return rules;
}

at::Tensor sample(const at::Tensor& logits, int64_t vocab_size, const at::Tensor& keys,
                  const at::Tensor& positions, const at::Tensor& scale, const at::Tensor& top_k,
                  const at::Tensor& top_p, const at::Tensor& min_p, at::TensorList rules) {
  const int64_t rows = rows_of(logits, vocab_size), stride = logits.stride(0);
  const int size = static_cast<int>(vocab_size);
  const auto* key = column<uint64_t>(keys, rows, 2, at::kLong, "keys");
  const auto* position = column<int64_t>(positions, rows, 1, at::kLong, "positions");
  const auto* factor = column<float>(scale, rows, 1, at::kFloat, "scale");
  const auto* k = column<int64_t>(top_k, rows, 1, at::kLong, "top_k");
  const auto* p = column<double>(top_p, rows, 1, at::kDouble, "top_p");
  const auto* least = column<float>(min_p, rows, 1, at::kFloat, "min_p");
  const bool has_rules = !rules.empty();
  TORCH_CHECK(!has_rules || (logits.scalar_type() == at::kFloat && (rows < 2 || stride >= size)),
              "rules are for rows of float32 that can be changed");
  const Rules changes = has_rules ? rules_of(rules, rows) : Rules{};
  at::Tensor out = at::empty({rows}, keys.options());
  int64_t* token_ids = out.data_ptr<int64_t>();

  for_logits(logits, [&](auto* first) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      thread_local Sampler sampler;  // keep their memory: new pages cost more than the sampling
      thread_local RowRules row_rules;
      for (int64_t row = begin; row < end; row++) {
        auto* logit = first + row * stride;
        const double uniform = factor[row] == 0 ? 0 : uniform_at(key + 2 * row, position[row]);
        const Wanted wanted{uniform, factor[row], {k[row], p[row], least[row]}};
        if constexpr (std::is_same_v<decltype(logit), float*>)
          if (has_rules) row_rules.apply(changes, row, position[row], logit, size);
        token_ids[row] = sampler.sample(logit, size, wanted);
        if constexpr (std::is_same_v<decltype(logit), float*>)
          if (has_rules) row_rules.undo(logit);
      }
    });
  });
  return out;
}

// The logits as `sample` has them after rules, in place: for their test.
void apply_rules(const at::Tensor& logits, int64_t vocab_size, const at::Tensor& positions,
                 at::TensorList rules) {
  const int64_t rows = rows_of(logits, vocab_size);
  const auto* position = column<int64_t>(positions, rows, 1, at::kLong, "positions");
  const Rules changes = rules_of(rules, rows);
  RowRules row_rules;
  for (int64_t row = 0; row < rows; row++)
    row_rules.apply(changes, row, position[row],
                    logits.data_ptr<float>() + row * logits.stride(0),
                    static_cast<int>(vocab_size));
}

// Log probabilities of one token in each of some rows (R,), and ids and log probabilities of the
// `top` likeliest (R, top). NaN for a row that is no distribution, and for a token that is none.
std::tuple<at::Tensor, at::Tensor, at::Tensor> logprobs(
    const at::Tensor& logits, int64_t vocab_size, const at::Tensor& rows,
    const at::Tensor& token_ids, int64_t top) {
  const int64_t all = rows_of(logits, vocab_size), count = rows.numel();
  const int size = static_cast<int>(vocab_size);
  const auto* row = column<int64_t>(rows, count, 1, at::kLong, "rows");
  const auto* token_id = column<int64_t>(token_ids, count, 1, at::kLong, "token_ids");
  TORCH_CHECK(0 <= top && top <= size, "there are no ", top, " likeliest of ", size);
  TORCH_CHECK(std::all_of(row, row + count, [&](int64_t r) { return 0 <= r && r < all; }),
              "rows must be below ", all);
  at::Tensor ids = at::empty({count, top}, rows.options());
  at::Tensor own = at::empty({count}, logits.options().dtype(at::kFloat));
  at::Tensor values = at::empty({count, top}, own.options());
  float* value = own.data_ptr<float>();
  int64_t* top_id = ids.data_ptr<int64_t>();
  float* top_value = values.data_ptr<float>();

  for_logits(logits, [&](const auto* first) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      thread_local Logprobs logprobs;
      for (int64_t i = begin; i < end; i++) {
        const auto* logit = first + row[i] * logits.stride(0);
        logprobs.read(logit, size);
        value[i] = logprobs.of(logit, token_id[i]);
        if (top)
          logprobs.likeliest(logit, static_cast<int>(top), top_id + i * top, top_value + i * top);
      }
    });
  });
  return {own, ids, values};
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
      "Tensor top_k, Tensor top_p, Tensor min_p, Tensor[] rules) -> Tensor");
  m.def("apply_rules(Tensor(a!) logits, int vocab_size, Tensor positions, Tensor[] rules) -> ()");
  m.def(
      "logprobs(Tensor logits, int vocab_size, Tensor rows, Tensor token_ids, int top) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("uniforms(Tensor keys, Tensor positions) -> Tensor");
}

TORCH_LIBRARY_IMPL(nanogpt_cpu, CPU, m) {
  m.impl("sample", &nanogpt::sample);
  m.impl("apply_rules", &nanogpt::apply_rules);
  m.impl("logprobs", &nanogpt::logprobs);
  m.impl("uniforms", &nanogpt::uniforms);
}
