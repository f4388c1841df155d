"""Optimisers for a GPT, and the learning rate's schedule."""

import math
from typing import Any

import torch
from torch import nn

from nanogpt.model.gpt import GPT
from nanogpt.train.config import TrainConfig
from nanogpt.train.muon import Muon


def build_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the matrices of the blocks and AdamW for the rest.

    Weight decay applies to matrices only, embeddings included, never to LayerNorms and biases.
    """
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    vectors = [p for p in model.parameters() if p.dim() < 2]
    hidden = {n: p for n, p in matrices.items() if n.startswith("h.")}
    with_muon = config.optimizer == "muon"
    decayed = [p for n, p in matrices.items() if not with_muon or n not in hidden]
    optimizers: list[torch.optim.Optimizer] = [_adamw(decayed, vectors, config)]
    if with_muon:
        optimizers.append(_muon(hidden, config))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _adamw(
    decayed: list[nn.Parameter], others: list[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def _muon(hidden: dict[str, nn.Parameter], config: TrainConfig) -> Muon:
    qkv = [p for n, p in hidden.items() if n.endswith("c_attn.weight")]
    rest = [p for n, p in hidden.items() if not n.endswith("c_attn.weight")]
    groups: list[dict[str, Any]] = [{"params": qkv, "parts": 3}, {"params": rest}]
    return Muon(
        groups,
        lr=config.muon_lr,
        weight_decay=config.weight_decay,
    )


def lr_scale(step: int, progress: float, config: TrainConfig) -> float:
    """Factor of the peak learning rate: linear warm-up, then a half cosine to `final_lr_scale`.

    `progress` runs from 0 to 1 over the whole training.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    low = config.final_lr_scale
    return warm * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_lr(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
