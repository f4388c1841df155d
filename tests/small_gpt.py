"""A network small enough for thousands of steps, with weights and biases that all matter."""

import torch

from nanogpt.model.gpt import GPT, GPTConfig


def small_gpt(
    dtype: torch.dtype = torch.float32, activation: str = "gelu", bias: bool = True
) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=128,
        vocab_size=65,
        n_layer=3,
        n_head=4,
        n_embd=128,
        bias=bias,
        activation=activation,  # type: ignore[arg-type]
    )
    model = GPT(config)
    model.init_weights()
    for param in model.parameters():
        param.data += 0.05 * torch.randn_like(param)
    return model.to(dtype).eval()
