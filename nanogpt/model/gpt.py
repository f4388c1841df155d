"""The network: GPT-2 as nanoGPT defines it. One definition for training and for serving.

The network does not know how attention finds its keys. Each layer hands its queries, keys and
values to an `Attend`: in training that is plain causal attention over a (B, T) batch, in the
engine it writes keys and values to the paged KV cache and reads a whole batch of sequences of
different lengths. Everything else works on the last dimension only, so the leading shape is free:
(B, T) in training, (N,) packed tokens in the engine.
"""

import math
from collections.abc import Callable
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (layer, q, k, v) -> attended values; each tensor is (..., n_head, head_size).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class GPTConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The shape of a network, and the little else that changes its answers.

    `vocab_size` is the number of rows of the embedding, padding included; the tokenizer may have
    fewer ids. `activation` is "gelu" (exact, nanoGPT's own training) or "gelu_tanh" (Hugging
    Face's GPT-2).
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = True
    activation: Literal["gelu", "gelu_tanh"] = "gelu"

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


class CausalAttend:
    """Plain causal attention over a batch of equal-length sequences, for training and reference."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.dropout = dropout

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return y.transpose(-3, -2)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (..., 3, nh, hs)
        y = attend(self.layer, *qkv.unbind(-3))  # (..., nh, hs)
        return self.resid_dropout(self.c_proj(y.flatten(-2)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer, dropout)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Uninitialised: weights are loaded, or set by `init_weights`. torch's own initialisation, on
    the meta device, imports its compiler: two seconds of every start."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class GPT(nn.Module):
    """Decoder-only transformer with learned positions and a head tied to the token embedding."""

    def __init__(self, config: GPTConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(config, i, dropout) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def hidden(self, idx: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states (..., n_embd) of token ids and positions, both (...)."""
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (..., C)
        for block in self.h:
            x = block(x, attend)
        return self.ln_f(x)

    def forward(self, idx: Tensor, attend: Attend) -> Tensor:
        """Logits (B, T, vocab_size) of whole sequences of token ids (B, T), without a cache."""
        positions = torch.arange(idx.size(-1), device=idx.device)
        return self.lm_head(self.hidden(idx, positions, attend))

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), and residual projections scaled by depth."""
        for name, param in self.named_parameters():
            if name.endswith("bias"):
                param.zero_()
            elif param.dim() == 2:
                scale = math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 1.0
                param.normal_(mean=0.0, std=0.02 / scale)

    def num_parameters(self) -> int:
        """Parameters, with the tied head counted once."""
        return sum(p.numel() for p in self.parameters())
