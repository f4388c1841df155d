"""What the engine does on the host for a GPU, without one."""

import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt.config import ServeConfig
from nanogpt.engine import setup
from nanogpt.engine.attention import (
    AttentionMetadata,
    PagedAttend,
    Span,
    TorchBackend,
    allocate_kv_cache,
)
from nanogpt.engine.cuda import linear, memory, select, varlen
from nanogpt.engine.cuda.linear import TILE, Head, TiledLinear
from nanogpt.engine.cuda.memory import MIB, Limits, Needs
from nanogpt.engine.decode import DecodeState, DecodeStep
from nanogpt.engine.model_runner import ModelRunner
from nanogpt.errors import StartupError
from nanogpt.model.gpt import GPT, GPTConfig
from tests.attention_cases import Text, assert_is_attention, attend_all, chunked, paged
from tests.engine_utils import model_info

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent


def documented_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn over pages, as its documentation has it."""
    assert cu_seq_k is None
    assert window_size == (-1, 0)
    assert all(x.dtype == torch.int32 for x in (cu_seq_q, seqused_k, block_table))
    assert cu_seq_q[-1] == len(query)
    out = torch.empty_like(query)
    for i, (first, end) in enumerate(pairwise(cu_seq_q.tolist())):
        rows, used = end - first, int(seqused_k[i])
        assert rows <= max_q
        assert used <= max_k
        keys, values = (cache[block_table[i].long()].flatten(0, 1)[:used] for cache in (key, value))
        seen = torch.ones(rows, used, dtype=torch.bool).tril(used - rows)  # aligned at the end
        q, k, v = (x.transpose(0, 1)[None] for x in (query[first:end], keys, values))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out[first:end] = attended[0].transpose(0, 1)
    return out


def test_varlen_attention_is_asked_for_the_right_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen.varlen, "varlen_attn", documented_varlen_attn)
    rng = random.Random(1)
    lengths = [50, 1, 33]
    texts = [Text.random(n, 2, 32, torch.float32, i) for i, n in enumerate(lengths)]
    steps = chunked(lengths, rng, 30)
    answers = attend_all(varlen.VarlenBackend(), texts, paged(lengths, rng), steps)
    assert_is_attention(answers, texts)


def test_torch_has_the_arguments_that_varlen_attention_needs() -> None:
    """If a new torch drops or renames them, this says so; `fits` would only be slower."""
    parameters = varlen.inspect.signature(varlen.varlen.varlen_attn).parameters
    metadata = AttentionMetadata.build([Span(0, 4, [0])], 16)
    assert parameters.keys() >= varlen.NEEDED | varlen.arguments(metadata).keys()


@pytest.mark.parametrize(
    ("capability", "dtype", "block_size", "head_size", "works", "expected"),
    [
        ((9, 0), torch.bfloat16, 256, 64, True, "varlen"),
        ((9, 0), torch.bfloat16, 256, 64, False, "triton"),
        ((9, 0), torch.bfloat16, 16, 64, True, "triton"),
        ((9, 0), torch.float32, 256, 64, True, "triton"),
        ((9, 0), torch.bfloat16, 256, 20, True, "triton"),
        ((7, 5), torch.float16, 256, 64, True, "triton"),
    ],
)
def test_attention_by_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    block_size: int,
    head_size: int,
    works: bool,
    expected: str,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    properties = SimpleNamespace(multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(varlen, "_works", lambda *_: works)
    backend = select.choose_backend(CUDA, dtype, block_size, head_size, deterministic=False)
    assert backend.name == expected
    fixed = select.choose_backend(CUDA, dtype, block_size, head_size, deterministic=True)
    assert fixed.name == "triton"


def test_without_triton_attention_is_plain_torch_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda _: None)
    backend = select.choose_backend(CUDA, torch.float16, 16, 64, deterministic=False)
    assert backend.name == "torch"
    with pytest.raises(StartupError, match="needs Triton"):
        select.choose_backend(CUDA, torch.float16, 16, 64, deterministic=True)


@pytest.mark.parametrize("rows", [1, TILE - 1, TILE, TILE + 1, 3 * TILE + 7])
def test_tiled_products_are_of_one_shape(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40)
    tiled = TiledLinear(plain)
    x = torch.randn(rows, 24)
    expected = plain(x)
    shapes = set()
    product = F.linear

    def noting(x: Tensor, *rest: Any) -> Tensor:
        shapes.add(tuple(x.shape))
        return product(x, *rest)

    monkeypatch.setattr(linear.F, "linear", noting)
    torch.testing.assert_close(tiled(x), expected)
    torch.testing.assert_close(tiled(x[None]), expected[None])
    torch.testing.assert_close(Head(plain.weight, tiled=True)(x), product(x, plain.weight))
    assert shapes == {(TILE, 24)}


def test_every_linear_layer_is_tiled_but_the_head() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=16)).eval()
    model.init_weights()
    linear.make_deterministic(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(TiledLinear) == 4 * 2
    assert kinds.count(nn.Linear) == 1
    linear.make_deterministic(model)  # it changes nothing more
    assert [type(module) for module in model.modules()] == kinds


def test_a_head_in_half_precision_gives_float32() -> None:
    weight = torch.randn(40, 24).bfloat16()
    logits = Head(weight)(torch.randn(3, 24).bfloat16())
    assert logits.dtype == torch.float32


def test_memory_for_keys_and_values() -> None:
    """Buffers and graphs of every model, and the largest step of one."""
    needs = [Needs(300 * MIB, 10 * MIB, 40 * MIB), Needs(500 * MIB, 20 * MIB, 60 * MIB)]
    free = 10_000 * MIB
    left = int(free * memory.SHARE) - memory.UNCOUNTED - (10 + 20 + 40 + 60 + 500) * MIB
    assert memory.budget(free, needs) == left
    assert memory.budget(600 * MIB, needs) == 0


def test_the_largest_step_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory is planned by is a real batch; here it runs on the CPU."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=72, n_layer=1, n_head=2, n_embd=32)).eval()
    model.init_weights()
    loaded: Any = SimpleNamespace(model=model, info=model_info(32))
    limits = Limits(max_num_seqs=5, max_batch_tokens=80, block_size=16, deterministic=False)
    batch = memory.largest_batch(loaded, limits, num_blocks=2)
    assert sum(chunk.end - chunk.start for chunk in batch.chunks) == 80
    counters = {"memory_allocated": iter([100, 130, 130]), "max_memory_allocated": iter([900, 450])}
    for name, values in counters.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, values=values: next(values))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    sampled = []
    run = ModelRunner.run
    monkeypatch.setattr(
        ModelRunner, "run", lambda self, batch: sampled.append(run(self, batch)) or sampled[0]
    )
    needs = memory.measure(loaded, limits, torch.device("cpu"))
    assert len(sampled[0].token_ids) == 5
    assert needs == Needs(step=900 - 130, kept=30, graphs=450 - 130)


def test_setup_plans_gpu_memory_by_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(memory, "kv_budget", lambda *args: seen.append(args) or 5)
    config = ServeConfig()
    ranks: Any = None  # a GPU is one rank's
    assert setup.kv_budget(config, ranks, CUDA, []) == 5
    engine = config.engine
    expected = Limits(engine.max_num_seqs, engine.max_batch_tokens, engine.block_size, False)
    assert seen == [([], expected, CUDA)]


class MetadataOnly(TorchBackend):
    """Asks of the metadata what every backend for GPUs asks, and attends to nothing."""

    name = "metadata only"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, meta: AttentionMetadata
    ) -> Tensor:
        for tiles in (meta.tiles(1, at_most=1), meta.tiles(64, at_least=2), meta.tiles(16)):
            assert len(tiles) in (0, len(q))
        varlen.arguments(meta)
        return torch.empty_like(q, memory_format=torch.contiguous_format)


class Devices(TorchDispatchMode):
    """Which devices the tensors of all operations are on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        self.seen |= {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        return out


@pytest.mark.parametrize("tiled", [False, True])
def test_a_decode_step_neither_asks_nor_tells_the_host_anything(tiled: bool) -> None:
    """Else it could not be recorded. On the meta device numbers don't exist: asking is an error."""
    device = torch.device("meta")
    config = GPTConfig(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=32)
    with device:
        model = GPT(config).eval().bfloat16()
    if tiled:
        for block in model.h:
            block.mlp.c_fc = TiledLinear(block.mlp.c_fc)
    backend = MetadataOnly()
    cache = allocate_kv_cache(config, 9, 16, torch.bfloat16, device, backend=backend)
    head = Head(model.wte.weight, tiled=tiled)

    def network(token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        return head(model.hidden(token_ids, metadata.positions, PagedAttend(cache, metadata)))

    state = DecodeState(max_rows=8, max_steps=4, max_blocks=4, device=device)
    step = DecodeStep(network, state, block_size=16, spare_block=8, vocab_size=290)
    with torch.no_grad(), Devices() as devices:
        step(5)
    assert devices.seen == {"meta"}


def test_a_cpu_imports_nothing_of_this() -> None:
    """Triton takes a second to import."""
    code = """
import sys
from types import SimpleNamespace
import nanogpt.engine.setup
from nanogpt.engine.engine import Engine
from nanogpt.model.gpt import GPT, GPTConfig
from tests.engine_utils import model_info
model = GPT(GPTConfig(block_size=32, vocab_size=72, n_layer=1, n_head=2, n_embd=32)).eval()
model.init_weights()
loaded = SimpleNamespace(model=model, info=model_info(32))
Engine(loaded, rank=0, device="cpu", num_kv_blocks=8).warm_up()
print([name for name in sys.modules if name.startswith(("triton", "nanogpt.engine.cuda"))])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
