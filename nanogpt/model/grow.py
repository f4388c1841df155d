"""A larger network that computes what a smaller, trained one does: training goes on from there.

Chen, Goodfellow and Shlens, "Net2Net: Accelerating learning via knowledge transfer" (2016); the
zeros that make new parts silent at first are as in Gesmundo and Maile, "Composable
function-preserving expansions for transformer architectures" (2023).

Deeper: a new block is a copy of the one before it whose output projections are zero, so it adds
nothing. Wider: new heads and new units of an MLP are read by zeros. New channels of the residual
stream carry the mean of the old ones: then the mean over all channels is the old mean, LayerNorm
gives zero in the new channels, whatever reads them, and the variance is smaller by old / new width,
which the gains undo. Only LayerNorm's epsilon, beside a smaller variance, makes a difference.
Longer: the table of positions is repeated, so what fits the old context has its old answers.
What is random breaks the symmetry between new parts; it is as large as the weights beside it.
"""

import torch
from torch import Tensor

from nanogpt.errors import ConfigError
from nanogpt.model.assemble import TIED
from nanogpt.model.gpt import GPT, GPTConfig


@torch.no_grad()
def grow(model: GPT, config: GPTConfig, dropout: float = 0.0) -> GPT:
    """A model of the shape `config` with the function of `model`, on its device and in its dtype.

    New layers are spread evenly; new heads, units and channels come last. Draws from torch's
    generator. Raises ConfigError for a shape that is smaller somewhere, or that differs in what
    can't grow: vocabulary, size of a head, biases and activation.
    """
    _check(model.config, config)
    old = model.state_dict()
    wider = _Wider(model.config, config)
    weights = {f"{n}.weight": wider.residual(old[f"{n}.weight"], -1) for n in ("wte", "wpe")}
    positions = torch.arange(config.block_size) % model.config.block_size
    weights["wpe.weight"] = weights["wpe.weight"][positions]
    weights |= {n: wider.norm(n, x) for n, x in old.items() if n.startswith("ln_f.")}
    before = None
    for layer in range(config.n_layer):
        origin = layer * model.config.n_layer // config.n_layer
        for name, tensor in model.h[origin].state_dict().items():
            grown = wider.block(name, tensor)
            silent = origin == before and ".c_proj." in name
            weights[f"h.{layer}.{name}"] = torch.zeros_like(grown) if silent else grown
        before = origin
    weights[TIED] = weights["wte.weight"]
    larger = GPT(config, dropout).to(old["wte.weight"])
    larger.load_state_dict(weights)
    return larger


def _check(old: GPTConfig, new: GPTConfig) -> None:
    for name in ("vocab_size", "bias", "activation", "head_size"):
        is_, wanted = getattr(old, name), getattr(new, name)
        if is_ != wanted:
            raise ConfigError(f"a model with {name} = {is_} can't grow into one with {wanted}")
    for name in ("block_size", "n_layer", "n_embd"):
        is_, wanted = getattr(old, name), getattr(new, name)
        if is_ > wanted:
            raise ConfigError(f"a model with {name} = {is_} can't shrink to {wanted}")


class _Wider:
    """From the tensors of one width to those of another; n channels become n + m."""

    def __init__(self, old: GPTConfig, new: GPTConfig) -> None:
        self.old, self.new = old, new

    def block(self, name: str, x: Tensor) -> Tensor:
        """A tensor of a block, by its name in there."""
        extra = self.new.n_embd - self.old.n_embd
        match name.split("."):
            case ["ln_1" | "ln_2", _]:
                return self.norm(name, x)
            case [_, "c_proj", "weight"]:
                inputs = extra if name.startswith("attn") else 4 * extra
                return self.residual(_zeros(x, inputs, -1), 0)
            case [_, "c_proj", "bias"]:
                return self.residual(x, 0)
            case ["attn", "c_attn", kind]:
                heads = x.unflatten(0, (3, self.old.n_embd))  # (3, n, ...): queries, keys, values
                if kind == "bias":
                    return _zeros(heads, extra, 1).flatten()
                return _noise(_noise(heads, extra, 1), extra, 2).flatten(0, 1)
            case ["mlp", "c_fc", "weight"]:
                return _noise(_noise(x, extra, -1), 4 * extra, 0)
            case ["mlp", "c_fc", "bias"]:
                return _zeros(x, 4 * extra, 0)
        raise AssertionError(name)

    def residual(self, x: Tensor, dim: int) -> Tensor:
        """What is written to the residual stream, along `dim`: m times the mean at the end."""
        mean = x.mean(dim, keepdim=True)
        shape = list(x.shape)
        shape[dim] = self.new.n_embd - self.old.n_embd
        return torch.cat((x, mean.expand(shape)), dim)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Gains or biases of a LayerNorm, (n,) to (n + m,): new channels stay at zero."""
        if name.endswith("bias"):
            return _zeros(x, self.new.n_embd - self.old.n_embd, 0)
        return self.residual(x, 0) * (self.old.n_embd / self.new.n_embd) ** 0.5


def _zeros(x: Tensor, count: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = count
    return torch.cat((x, x.new_zeros(shape)), dim)


def _noise(x: Tensor, count: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = count
    return torch.cat((x, torch.randn(shape, dtype=x.dtype, device=x.device) * x.std()), dim)
