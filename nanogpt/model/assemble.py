"""Weights that come under our own names, whatever the file, made into a model."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nanogpt.errors import CheckpointError
from nanogpt.model.dtypes import WeightDtype, resolve
from nanogpt.model.gpt import GPT, GPTConfig

TIED = "lm_head.weight"  # the same tensor as wte.weight

Reader = Callable[[], Tensor]


def given(tensor: Tensor) -> Reader:
    return lambda: tensor


def outline(config: GPTConfig) -> tuple[GPT, dict[str, tuple[int, ...]]]:
    """A model without memory, and the shapes of the tensors that fill it: the head is tied."""
    with torch.device("meta"):
        model = GPT(config)
    return model, {name: tuple(t.shape) for name, t in model.state_dict().items() if name != TIED}


def fill(model: GPT, weights: Mapping[str, Tensor]) -> GPT:
    """The outlined model with these very tensors, in evaluation mode and without gradients."""
    model.load_state_dict(weights, strict=False, assign=True)
    model.lm_head.weight = model.wte.weight
    return model.eval().requires_grad_(False)


def assemble(
    where: str,
    config: GPTConfig,
    readers: Mapping[str, Reader],
    wanted: WeightDtype,
    device: str | torch.device,
    *,
    views: bool = False,
) -> GPT:
    """A model in evaluation mode with memory of its own, filled one tensor at a time.

    `readers` give the tensors by our names, perhaps transposed views of a mapped file: no more is
    needed beyond the file than the model and one tensor. A head of its own must be the embedding.
    With `views` the matrices of the layers may stay views of the file, for whoever makes something
    else of them at once. Raises CheckpointError, beginning with `where`, for a head that differs,
    or a tensor that is missing, extra, of another shape, or not of floating point.
    """
    readers = dict(readers)
    head, wte = readers.pop(TIED, None), readers.get("wte.weight")
    if head is not None and wte is not None and not _same(head(), wte()):
        raise CheckpointError(f"{where}: {TIED} differs from wte.weight; they must be tied")
    model, shapes = outline(config)
    if missing := sorted(shapes.keys() - readers.keys()):
        raise CheckpointError(f"{where} lacks the tensor {missing[0]} ({len(missing)} in all)")
    if extra := sorted(readers.keys() - shapes.keys()):
        raise CheckpointError(f"{where} has a tensor {extra[0]} that is not one of GPT-2's")
    dtype = resolve(wanted, (readers[name]().dtype for name in shapes))
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = readers[name]()
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {name} is {tuple(tensor.shape)}, but its configuration asks for {shape}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{where}: {name} is of {tensor.dtype}; quantised weights are not supported"
            )
        is_view = views and len(shape) == 2 and name.startswith("h.")
        weights[name] = tensor.to(device, dtype) if is_view else _own(tensor, dtype, device)
    return fill(model, weights)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _own(tensor: Tensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A contiguous copy: the file may be written anew while the model is in use."""
    moved = tensor.to(device, dtype)  # strides as they were, which is fast; then the right way
    if moved is tensor:
        return moved.clone(memory_format=torch.contiguous_format)
    return moved.contiguous()
