"""The sampler against naive references, row by row and in mixed batches."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.inverse_cdf import draw, grid, keep, padded_width, shares_of
from nanogpt.engine.logprobs import likeliest
from nanogpt.engine.sampler import NO_TOKEN, Sampler, argmax
from nanogpt.engine.sequence import Sequence
from nanogpt.engine.token_counts import TokenCounts
from nanogpt.engine.uniforms import stream_key, uniforms
from tests.engine_utils import request, threads

CONTEXT = 1024
ROWS, SIZE = 300, 290  # rows of the matrix, tokens among them
EOS = 7


needs_kernels = pytest.mark.skipif(not load_kernels(), reason="the C++ kernels are not built")
use_kernels = load_kernels()


@pytest.fixture(params=[False, pytest.param(True, marks=needs_kernels)], ids=["torch", "kernels"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs with plain torch, and with the C++ sampler."""
    monkeypatch.setattr(f"{__name__}.use_kernels", request.param)


def sampler(size: int = SIZE) -> Sampler:
    return Sampler(
        vocab_size=size, eos_token_id=EOS, device=torch.device("cpu"), kernels=use_kernels
    )


def sequence(
    prompt: tuple[int, ...] = (1, 2, 3),
    output: tuple[int, ...] = (),
    choice: int = 0,
    **params: Any,
) -> Sequence:
    req = request("r", [*prompt], n=choice + 1, **{"max_tokens": 900, **params})
    seq = Sequence(req, choice, arrival=0, context_length=CONTEXT)
    for token_id in output:
        seq.append(token_id)
    return seq


def logits_of(count: int, seed: int = 0, rows: int = ROWS, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, generator=generator) * scale


def sample(logits: Tensor, *seqs: Sequence) -> list[int]:
    return sampler().sample(logits.clone(), [*seqs])[0]


# Uniforms


def test_uniforms_are_a_pure_function_and_longer_rows_begin_with_shorter_ones() -> None:
    long = uniforms(5, 2, 3, 100)
    assert (uniforms(5, 2, 3, 40) == long[:40]).all()
    assert ((long >= 0) & (long < 1)).all()


def test_streams_of_seeds_prompts_and_choices_are_different() -> None:
    keys = [(s, p, c) for s in (-1, 0, 1, 2**63 - 1) for p in (0, 1, 2) for c in (0, 1, 127)]
    assert len({tuple(uniforms(*key, 4)) for key in keys}) == len(keys)


def test_a_resumed_choice_draws_what_it_would_have_drawn() -> None:
    logits = logits_of(1)
    whole = sequence(output=(4, 5, 6))
    resumed = Sequence(
        request("r", [1, 2, 3], resumed=((4, 5, 6),), max_tokens=900),
        0,
        arrival=9,
        context_length=CONTEXT,
    )
    assert sample(logits, whole) == sample(logits, resumed)


# Distribution


def scaled(logits: Tensor, size: int, scale: float) -> Tensor:
    """What shares are the exponentials of (count, size): in the kernels' own order of rounding."""
    x = logits[:, :size]
    return (x - x.amax(-1, keepdim=True)) * torch.tensor(scale)


def shares_in(logits: Tensor, size: int, scale: float = 1.0) -> Tensor:
    """Shares (count, padded_width(size)) as the subject of the test computes them."""
    padded = torch.full((len(logits), padded_width(size)), -torch.inf)
    padded[:, :size] = logits[:, :size]
    if not use_kernels:
        return shares_of(padded, torch.full((len(logits),), scale), size)
    magic = np.float32(grid(size) * 2**23)
    padded[:, :size] = scaled(logits, size, scale)
    return torch.ops.nanogpt_cpu.exp_nonpositive(padded).add_(magic).sub_(magic)


class Reference:
    """The definition in integers, one token after the other. Shares are multiples of the grid."""

    def __init__(
        self, shares: Tensor, size: int, top_k: int = 0, top_p: float = 1, min_p: float = 0
    ) -> None:
        weights = [round(share / grid(size)) for share in shares.tolist()]
        assert [weight * grid(size) for weight in weights] == shares.tolist()
        least = float(np.float32(min_p)) / grid(size)
        ranked = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
        ranked = [i for i in ranked if weights[i] >= least]
        ranked = ranked[: top_k or None]
        nucleus = top_p * float(sum(weights[i] for i in ranked))  # exact but for this product
        count, mass = 0, 0
        while not count or (top_p < 1 and mass < nucleus):
            mass += weights[ranked[count]]
            count += 1
        kept = sorted(ranked if top_p == 1 else ranked[:count])
        self._kept = [(i, weights[i]) for i in kept]
        self._total = sum(weights[i] for i in kept)

    def draw(self, u: float) -> int:
        target, end = u * float(self._total), 0
        for i, weight in self._kept:
            end += weight
            if end > target:
                return i
        return max(i for i, weight in self._kept if weight)  # the product was rounded up


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 2000},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-8},
    {"top_p": 0.8, "min_p": 1e-8},
    {"top_k": 10, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 150, "top_p": 0.5},
]


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("scale", [0.3, 1.5, 6.0])
@pytest.mark.parametrize("size", [65, 300, 3000])
def test_sampling_equals_its_definition_in_integers(
    size: int, scale: float, filters: dict[str, Any]
) -> None:
    """Logits rounded to bfloat16, so that many are equal, also where a filter cuts."""
    count = 24
    logits = logits_of(1, seed=size, rows=size, scale=scale).bfloat16().float()
    shares = shares_in(logits, size, scale=float(np.float32(1 / 0.7)))[0]
    seqs = [sequence(seed=5, choice=j, temperature=0.7, **filters) for j in range(count)]
    ids, _ = sampler(size).sample(logits.expand(count, -1).clone(), seqs)
    reference = Reference(shares, size, **filters)
    assert ids == [reference.draw(uniforms(5, 0, j, 1)[0]) for j in range(count)]


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("filters", [{}, *FILTERS[6:8], *FILTERS[11:], {"top_k": 3000}], ids=str)
@pytest.mark.parametrize("scale", [0.6, 3.0])
def test_filters_of_a_large_vocabulary(scale: float, filters: dict[str, Any]) -> None:
    """Large enough that the kernels take a sample of the row."""
    size, count = 30000, 4
    logits = logits_of(1, seed=5, rows=size, scale=scale)
    logits[:, ::3] = logits[:, ::3].bfloat16().float()
    shares = shares_in(logits, size)[0]
    seqs = [sequence(seed=5, choice=j, **filters) for j in range(count)]
    ids, _ = sampler(size).sample(logits.expand(count, -1).clone(), seqs)
    reference = Reference(shares, size, **filters)
    assert ids == [reference.draw(uniforms(5, 0, j, 1)[0]) for j in range(count)]


@needs_kernels
def test_kernels_and_torch_agree_but_for_the_last_bit_of_exp() -> None:
    """One draw in a million falls between two roundings; the seed is fixed."""
    rng = random.Random(3)
    logits = logits_of(300, rows=3000)
    seqs = [
        sequence(
            choice=choice % 100,
            temperature=rng.choice([0.5, 1.0]),
            top_k=rng.choice([0, 40]),
            top_p=rng.choice([0.9, 1.0]),
        )
        for choice in range(300)
    ]
    ids = [
        Sampler(
            vocab_size=3000, eos_token_id=EOS, device=torch.device("cpu"), kernels=kernels
        ).sample(logits.clone(), seqs)[0]
        for kernels in (False, True)
    ]
    assert ids[0] == ids[1]


@needs_kernels
def test_the_kernels_draw_the_same_uniforms() -> None:
    for seed, prompt_i, choice_j in [(0, 0, 0), (-1, 3, 127), (2**63 - 1, 2, 5)]:
        key = torch.from_numpy(stream_key(seed, prompt_i, choice_j).view(np.int64))
        numbers = torch.ops.nanogpt_cpu.uniforms(key.repeat(1030, 1), torch.arange(1030))
        assert numbers.tolist() == uniforms(seed, prompt_i, choice_j, 1030).tolist()


@pytest.mark.usefixtures("both")
def test_chi_square_of_plain_sampling() -> None:
    """5000 draws from a fixed seed; the 99.9 % quantile for 39 degrees of freedom is 72.1."""
    logits = logits_of(1, seed=3, rows=40, scale=1.0)
    count = 5000
    seqs = [sequence(seed=11, choice=choice) for choice in range(count)]
    ids = torch.tensor(sampler(40).sample(logits.expand(count, -1).clone(), seqs)[0])
    seen = torch.bincount(ids, minlength=40).double()
    expected = logits[0].softmax(-1).double() * count
    assert float(((seen - expected) ** 2 / expected).sum()) < 72.1


EDGES = [0.0, 5e-324, 0.5, 1 - 2**-53, math.nextafter(1, 0)]


@pytest.mark.usefixtures("both")
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    allowed=st.sets(st.integers(0, 289), min_size=1, max_size=4),
    filters=st.sampled_from(FILTERS),
    scale=st.sampled_from([1e-30, 1.0, 50.0]),
)
def test_a_banned_token_is_never_drawn(
    allowed: set[int], filters: dict[str, Any], scale: float
) -> None:
    logits = torch.full((1, 300), -torch.inf)
    for token_id in allowed:
        logits[0, token_id] = (token_id % 7) * scale
    for choice in range(3):
        (token_id,) = sample(logits, sequence(choice=choice, **filters))
        assert token_id in allowed


@pytest.mark.parametrize("u", EDGES)
def test_uniforms_at_the_edges_find_a_token_with_a_share(u: float) -> None:
    for first, last in [(0, 0), (3, 200), (127, 128), (255, 255)]:
        shares = torch.zeros(1, 256)
        shares[0, first : last + 1] = 2.0**-37
        token_id = int(draw(shares, torch.tensor([u], dtype=torch.float64)))
        assert first <= token_id <= last
        assert token_id == last or u < 0.9


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 128, 50257, 65535, 65536, 10**6])
def test_shares_are_multiples_of_the_grid_and_sum_up_exactly(size: int) -> None:
    width = padded_width(size)
    logits = torch.full((1, width), -torch.inf)
    logits[0, :size] = logits_of(1, rows=size, scale=8.0)
    shares = shares_of(logits, torch.ones(1), size)[0].double() / grid(size)
    assert torch.equal(shares, shares.round())
    assert float(shares.max()) == 1 / grid(size)
    assert size / grid(size) < 2**53


@pytest.mark.usefixtures("both")
def test_padding_is_never_sampled() -> None:
    logits = logits_of(4)
    logits[:, SIZE:] = 100.0
    seqs = [
        sequence(temperature=0.0),
        sequence(),
        sequence(top_k=5),
        sequence(temperature=2.0, logprobs=20),
    ]
    token_ids, logprobs = sampler().sample(logits, seqs)
    assert max(token_ids) < SIZE
    assert logprobs[3] is not None
    assert max(logprobs[3].top_ids) < SIZE


# Filters


@pytest.mark.usefixtures("both")
def test_of_equally_likely_tokens_those_with_lower_ids_are_kept() -> None:
    logits = torch.zeros(50, 2000)
    for filters in ({"top_k": 3}, {"top_p": 2.5 / 2000}):
        seqs = [sequence(choice=choice, **filters) for choice in range(50)]
        assert {*sampler(2000).sample(logits.clone(), seqs)[0]} == {0, 1, 2}


def test_what_is_kept_keeps_its_share() -> None:
    shares = shares_of(logits_of(2, rows=256), torch.ones(2), 256)
    filters = [torch.tensor([3, 0]), torch.tensor([1, 1.0]).double(), torch.zeros(2)]
    kept = keep(shares, *filters)
    assert int((kept[0] > 0).sum()) == 3
    assert torch.equal(kept[0][kept[0] > 0], shares[0][kept[0] > 0])
    assert torch.equal(kept[1], shares[1])


# Greedy


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.zeros(3, 256)
    logits[0, [5, 200, 201]] = 2.0
    logits[1, [131, 130, 255]] = 2.0
    assert argmax(logits).tolist() == [5, 130, 0]


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 1e-3])
def test_tiny_temperatures_are_greedy_without_overflow(temperature: float) -> None:
    logits = logits_of(1, scale=100.0)
    best = int(logits[0, :SIZE].argmax())
    for choice in range(5):
        assert sample(logits, sequence(temperature=temperature, choice=choice)) == [best]
        assert sample(logits, sequence(temperature=temperature, top_p=0.5)) == [best]


# Penalties, bias, bans


def adjusted(logits: Tensor, seq: Sequence) -> list[float]:
    """The rules one token at a time, in plain Python."""
    p, out = seq.params, [float(x) for x in logits]
    prompt, output = seq.tokens[: seq.prompt_len], seq.tokens[seq.prompt_len :]
    for i in range(len(out)):
        count = output.count(i)
        if i in prompt or count:
            out[i] = out[i] / p.repetition_penalty if out[i] > 0 else out[i] * p.repetition_penalty
        out[i] -= count * p.frequency_penalty + (count > 0) * p.presence_penalty
        out[i] += p.logit_bias.get(i, 0.0)
        banned = {EOS, *p.stop_token_ids} if not p.ignore_eos else {*p.stop_token_ids}
        if len(output) < p.min_tokens and i in banned:
            out[i] = -math.inf
    return out


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.7},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "presence_penalty": -2.0, "frequency_penalty": 0.3},
        {"logit_bias": {3: 1.5, 100: -2.0, 289: 4.0}},
        {"min_tokens": 6, "stop_token_ids": (4, 9), "logit_bias": {4: 50.0, EOS: 60.0}},
        {"min_tokens": 6, "stop_token_ids": (4,), "ignore_eos": True, "logit_bias": {EOS: 60.0}},
        {"min_tokens": 5, "stop_token_ids": (4,), "logit_bias": {4: 50.0}},
    ],
)
def test_rules_equal_a_naive_reference(params: dict[str, Any]) -> None:
    output = (4, 4, 250, 2, 4)
    logits = logits_of(1, seed=5)[0, :SIZE]
    seq = sequence(output=output, temperature=0.0, **params)
    changed = logits.clone()[None]
    sampler()._plan_for([seq]).rules.apply(changed)
    assert changed[0].tolist() == pytest.approx(adjusted(logits, seq), abs=1e-5)
    assert sample(logits[None], seq) == [int(np.argmax(adjusted(logits, seq)))]


@needs_kernels
def test_the_kernels_apply_rules_as_torch_does_to_the_bit() -> None:
    rng = random.Random(8)
    for trial in range(20):
        seqs = [random_sequence(rng) for _ in range(rng.randint(1, 12))]
        logits = logits_of(len(seqs), trial)
        plan = sampler()._plan_for(seqs)
        want, got = logits[:, :SIZE].clone(), logits.clone()
        plan.rules.apply(want)
        positions = torch.tensor(plan.positions())
        torch.ops.nanogpt_cpu.apply_rules(got, SIZE, positions, plan.rules.tensors())
        assert torch.equal(got[:, :SIZE], want)
        assert torch.equal(got[:, SIZE:], logits[:, SIZE:])


@needs_kernels
def test_the_kernels_ignore_rules_for_what_is_no_token() -> None:
    """A stop token's id may be anything; it used to be compared with the width of the logits."""
    logits = logits_of(2)
    seqs = [
        sequence(temperature=0.0, min_tokens=5, stop_token_ids=(SIZE, ROWS, 10**6)),
        sequence(temperature=0.0),
    ]
    want = logits[:, :SIZE].clone()
    want[0, EOS] = -torch.inf
    assert sample(logits, *seqs) == want.argmax(-1).tolist()


@needs_kernels
def test_rules_leave_the_logits_as_they_were() -> None:
    """Log probabilities are taken from them afterwards."""
    logits = logits_of(3)
    seqs = [
        sequence(output=(EOS, 4, 5), presence_penalty=1.0, logit_bias={4: 2.0, EOS: -1.0}),
        sequence(output=(EOS,), min_tokens=4, logit_bias={EOS: 9.0}, repetition_penalty=1.5),
        sequence(),
    ]
    changed = logits.clone()
    Sampler(vocab_size=SIZE, eos_token_id=EOS, device=torch.device("cpu"), kernels=True).sample(
        changed, seqs
    )
    assert torch.equal(changed, logits)


@pytest.mark.usefixtures("both")
def test_penalties_follow_the_output() -> None:
    logits = torch.zeros(1, SIZE)
    logits[0, 5], logits[0, 6] = 1.0, 0.5
    seq, subject = sequence(temperature=0.0, frequency_penalty=0.3), sampler()
    tokens = []
    for _ in range(6):
        (token_id,), _ = subject.sample(logits.clone(), [seq])
        tokens.append(token_id)
        seq.append(token_id)
    assert tokens == [5, 5, 6, 5, 6, 5]


def test_counts_of_more_tokens_than_the_arrays_first_hold() -> None:
    """Adding a token that made the arrays grow used to write to the old ones."""
    counts = TokenCounts(range(40), [])
    for token_id in [*range(20, 200)] * 2:
        counts.add(token_id)
    assert counts.ids.tolist() == [*range(200)]
    assert counts.counts.tolist() == [0.0] * 20 + [2.0] * 180


@pytest.mark.usefixtures("both")
def test_bias_of_100_decides() -> None:
    logits = logits_of(1)
    best = int(logits[0, :SIZE].argmax())
    for choice in range(20):
        assert sample(logits, sequence(choice=choice, logit_bias={42: 100.0})) == [42]
        (token_id,) = sample(logits, sequence(choice=choice, logit_bias={best: -100.0}))
        assert token_id != best


# Log probabilities


@pytest.mark.usefixtures("both")
def test_logprobs_are_those_of_the_model_itself() -> None:
    logits = logits_of(3)
    expected = logits[:, :SIZE].log_softmax(-1)
    seqs = [
        sequence(temperature=0.3, logit_bias={5: 100.0}, logprobs=3),
        sequence(),
        sequence(temperature=0.0, logprobs=0),
    ]
    token_ids, entries = sampler().sample(logits.clone(), seqs)
    assert entries[1] is None
    first, last = entries[0], entries[2]
    assert first is not None
    assert last is not None
    assert token_ids[0] == 5
    assert first.logprob == pytest.approx(float(expected[0, 5]))
    values, ids = expected[0].topk(3)
    assert first.top_ids == tuple(ids.tolist())
    assert first.top_logprobs == pytest.approx(values.tolist())
    assert last.logprob == pytest.approx(float(expected[2].max()))
    assert last.top_ids == ()


@pytest.mark.usefixtures("both")
def test_the_sampled_token_has_the_same_float_in_the_top_list() -> None:
    for seed in range(20):
        seq = sequence(temperature=0.0, logprobs=5)
        (token_id,), (entry,) = sampler().sample(logits_of(1, seed), [seq])
        assert entry is not None
        assert entry.top_ids[0] == token_id
        assert entry.top_logprobs[0] == entry.logprob


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [SIZE, 300, 384])
def test_the_width_and_type_of_the_logits_do_not_matter(rows: int, dtype: torch.dtype) -> None:
    logits = torch.full((3, rows), 100.0)
    logits[:, :SIZE] = logits_of(3, rows=SIZE)
    seqs = [sequence(logprobs=20), sequence(top_p=0.9), sequence(temperature=0.0)]
    subject = sampler()
    expected = subject.sample(logits[:, :SIZE].to(dtype).float(), seqs)
    assert subject.sample(logits.to(dtype), seqs) == expected


def test_likeliest_equals_a_full_sort() -> None:
    """bfloat16 makes many equal values."""
    for seed in range(20):
        x = logits_of(5, seed, 1280, scale=1.0).bfloat16().float()
        ids, values = likeliest(x, 20)
        expected, order = x.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(values, expected[:, :20])
        decided = values > values[:, -1:]  # of those equal to the last any may be in
        assert torch.equal(ids[decided], order[:, :20][decided])


@needs_kernels
@pytest.mark.parametrize("size", [1, 5, 127, 290, 3000])
def test_the_kernels_likeliest_equal_a_full_sort(size: int) -> None:
    """bfloat16 makes many equal values; equal log probabilities go by id."""
    for seed in range(10):
        logits = logits_of(5, seed, size + 3, scale=1.0).bfloat16().float()
        rows, token_ids = torch.tensor([3, 0, 4]), torch.tensor([0, NO_TOKEN, size - 1])
        top = min(20, size)
        own, ids, values = torch.ops.nanogpt_cpu.logprobs(logits, size, rows, token_ids, top)
        _, _, every = torch.ops.nanogpt_cpu.logprobs(logits, size, rows, token_ids, size)
        exact = logits[rows, :size].double().log_softmax(-1)
        torch.testing.assert_close(own[[0, 2]].double(), exact[[0, 2], [0, size - 1]])
        assert own[1].isnan()
        torch.testing.assert_close(every.double(), exact.sort(descending=True).values)
        assert torch.equal(values, every[:, :top])
        order = exact.float().sort(dim=-1, descending=True, stable=True).indices
        assert torch.equal(ids, order[:, :top])


@pytest.mark.usefixtures("both")
def test_fewer_of_the_likeliest_are_the_first_of_more() -> None:
    logits = logits_of(3)
    seqs = [sequence(temperature=0.0, logprobs=count) for count in (2, 20, 0)]
    _, (few, many, none) = sampler().sample(logits[:1].expand(3, -1).clone(), seqs)
    assert few is not None
    assert many is not None
    assert none is not None
    assert few.top_ids == many.top_ids[:2]
    assert few.top_logprobs == many.top_logprobs[:2]
    assert none.top_ids == ()


@pytest.mark.usefixtures("both")
def test_logprobs_are_finite() -> None:
    logits = torch.full((1, 40), -1e30)
    logits[0, 3] = 0.0
    _, (entry,) = sampler(30).sample(logits, [sequence(temperature=0.0, logprobs=20)])
    assert entry is not None
    assert entry.top_ids[0] == 3
    assert min(entry.top_logprobs) == -9999.0


# Rows are independent


def random_sequence(rng: random.Random) -> Sequence:
    params: dict[str, Any] = {"seed": rng.randrange(10**9)}
    options: list[dict[str, Any]] = [
        {"temperature": rng.choice([0.0, 0.5, 1e-6, 1.7])},
        {"top_k": rng.choice([1, 10, 2000])},
        {"top_p": rng.choice([0.0, 0.5, 0.99, 0.99999])},
        {"min_p": rng.choice([1e-9, 0.01, 0.5])},
        {"presence_penalty": 0.7, "frequency_penalty": -0.2},
        {"repetition_penalty": 1.2},
        {"logit_bias": {rng.randrange(SIZE): 3.0 for _ in range(4)}},
        {"min_tokens": 4, "stop_token_ids": (rng.randrange(SIZE),)},
        {"logprobs": rng.choice([0, 1, 20])},
    ]
    for option in options:
        if rng.random() < 0.3:
            params |= option
    output = tuple(rng.randrange(SIZE) for _ in range(rng.randrange(8)))
    return sequence(output=output, choice=rng.randrange(3), **params)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("rows", [300, 2560])
@pytest.mark.parametrize("count_of_threads", [1, 2])
def test_a_row_does_not_depend_on_the_others(rows: int, count_of_threads: int) -> None:
    with threads(count_of_threads):
        rng = random.Random(rows)
        subject = sampler(rows - 10)
        for trial in range(15 if count_of_threads == 1 else 4):
            count = rng.randint(2, 24)
            logits = logits_of(count, trial, rows).bfloat16().float()  # with many equal values
            seqs = [random_sequence(rng) for _ in range(count)]
            together = subject.sample(logits.clone(), seqs)
            for row in range(count):
                single = subject.sample(logits[row : row + 1].clone(), seqs[row : row + 1])
                assert single == ([together[0][row]], [together[1][row]])


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_distribution_leaves_the_others_alone(poison: float) -> None:
    logits = logits_of(3)
    seqs = [sequence(), sequence(top_p=0.9, logprobs=2), sequence(temperature=0.0)]
    expected = sample(logits, *seqs)
    for row in range(3):
        broken = logits.clone()
        broken[row, :SIZE] = poison
        want = [*expected]
        want[row] = NO_TOKEN
        assert sample(broken, *seqs) == want
        if poison != -math.inf:  # one is enough
            broken[row] = logits[row]
            broken[row, SIZE - 1] = poison
            assert sample(broken, *seqs) == want
