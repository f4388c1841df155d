"""Recipes: TOML files in configs/train/, as one frozen value."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nanogpt.config import Section, convert, read_toml
from nanogpt.errors import ConfigError

Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


class Shape(Section, frozen=True):
    """The network to train; the vocabulary comes with the data."""

    block_size: Count = 256
    n_layer: Count = 6
    n_head: Count = 6
    n_embd: Count = 384
    bias: bool = False

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


class TrainConfig(Section, frozen=True):
    """Everything that a training run depends on."""

    data: str  # directory that nanogpt.data.prepare wrote
    out: str  # directory of the run
    title: str = "A nanoGPT model"  # of the model card
    licence: str = "not stated"  # of the weights, for the card
    init_from: str = "scratch"  # or a checkpoint directory, or a name on the Hugging Face hub
    model: Shape | None = None  # init_from grows to it; none: stays as it is (scratch: Shape())
    dropout: Fraction = 0.0

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-3
    muon_lr: Positive = 1e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    ema_decay: Fraction = 0.0  # of an average of the weights, evaluated and exported; 0: none
    grad_clip: Annotated[float, Meta(ge=0)] = 1.0  # norm; 0: none
    warmup_steps: Natural = 100
    final_lr_scale: Annotated[float, Meta(ge=0, le=1)] = 0.0  # of the peak, at the end

    batch_size: Count = 64  # sequences of a micro-batch
    accumulate: Count = 1  # micro-batches of a step, over all ranks
    max_steps: Count = 5000
    max_minutes: Annotated[float, Meta(ge=0)] = 0.0  # then the schedule ends sooner; 0: never

    eval_every: Count = 250  # steps
    eval_windows: Natural = 0  # of the validation split; 0: all
    save_every_s: Positive = 300.0
    seed: Natural = 1337
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


# What may change between a run and its continuation: the rest decides the losses.
_MAY_CHANGE = {
    *("out", "title", "licence", "max_steps", "max_minutes", "eval_every", "save_every_s"),
}


def load(file: str, overrides: Sequence[str] = (), out: str = "") -> TrainConfig:
    """The recipe in `file`, changed by "key=value" and "model.key=value". Raises ConfigError."""
    raw = read_toml(file)
    convert(raw, TrainConfig, source=file)
    for override in overrides:
        _set(raw, override)
    if out:
        raw["out"] = out
    return convert(raw, TrainConfig)


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override!r}: write it as key=value")
    table, _, name = key.strip().rpartition(".")
    (raw.setdefault(table, {}) if table else raw)[name] = value.strip()


def check_same_run(old: TrainConfig, new: TrainConfig) -> None:
    """Raises ConfigError when `new` can't continue a run of `old`."""
    a, b = msgspec.to_builtins(old), msgspec.to_builtins(new)
    changed = [key for key in a if key not in _MAY_CHANGE and a[key] != b[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{new.out} has a run with {key} = {a[key]!r}, now it is {b[key]!r}: "
            "choose another --out, or remove the old run"
        )
