"""Growing a network: the same function, in a larger shape that can learn."""

import msgspec
import pytest
import torch
from torch.nn import functional as F

from nanogpt.errors import ConfigError
from nanogpt.model.gpt import GPT, CausalAttend, GPTConfig
from nanogpt.model.grow import grow

SMALL = GPTConfig(block_size=16, vocab_size=11, n_layer=3, n_head=2, n_embd=16, bias=False)


def shaped(like=SMALL, **changes):
    return msgspec.structs.replace(like, **changes)


@pytest.fixture(params=[False, True], ids=["no biases", "biases"])
def model(request):
    """Every parameter random, LayerNorms and biases too, and a residual stream with a mean."""
    torch.manual_seed(1)
    model = GPT(shaped(bias=request.param)).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            at = 1.0 if "ln_" in name and name.endswith("weight") else 0.1
            param.normal_(at, 0.3)
    return model


IDS = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(3))


def logits(model):
    return model.eval()(IDS, CausalAttend())


def test_deeper_is_the_same_function_to_the_bit(model):
    larger = grow(model, shaped(model.config, n_layer=5))
    assert torch.equal(logits(larger), logits(model))
    assert len(larger.h) == 5


def test_the_same_shape_is_the_same_model(model):
    same = grow(model, model.config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor), name
    assert same.lm_head.weight is same.wte.weight
    assert all(p.requires_grad for p in same.parameters())


@pytest.mark.parametrize("layers", [3, 4])
def test_wider_is_nearly_the_same_function(model, layers):
    """But for LayerNorm's epsilon beside another variance."""
    config = shaped(model.config, n_layer=layers, n_head=5, n_embd=40)
    larger = grow(model, config)
    assert larger.config == config
    torch.testing.assert_close(logits(larger), logits(model), atol=2e-3, rtol=1e-3)


def test_longer_is_the_same_function_of_what_fits_the_old_context(model):
    larger = grow(model, shaped(model.config, block_size=40))
    assert torch.equal(logits(larger), logits(model))
    longer = torch.cat((IDS, IDS, IDS[:, :8]), 1)  # positions repeat: nothing is left out
    assert larger(longer, CausalAttend()).isfinite().all()
    assert torch.equal(larger.wpe.weight[32:], model.wpe.weight[:8])


def test_new_layers_are_spread():
    larger = grow(GPT(SMALL), shaped(n_layer=5))
    silent = [not block.mlp.c_proj.weight.any() for block in larger.h]
    assert silent == [False, True, False, True, False]


def test_every_new_part_learns():
    """Zeros and equal channels are left behind: no two rows, units or channels stay the same."""
    torch.manual_seed(1)
    model = GPT(SMALL)
    model.init_weights()
    larger = grow(model, shaped(n_layer=4, n_head=4, n_embd=32)).train()
    optimizer = torch.optim.AdamW(larger.parameters(), lr=3e-3)
    for _ in range(5):
        out = larger(IDS[:, :-1], CausalAttend())
        F.cross_entropy(out.flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, param in larger.named_parameters():
        if param.dim() == 2 and name != "wpe.weight":
            assert len(param.unique(dim=0)) == len(param), f"{name} has equal rows"
            assert len(param.unique(dim=1).T) == param.size(1), f"{name} has equal columns"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layer": 2}, "n_layer = 3 can't shrink to 2"),
        ({"n_embd": 8, "n_head": 1}, "n_embd = 16 can't shrink to 8"),
        ({"n_head": 4}, "head_size = 8 can't grow into one with 4"),
        ({"block_size": 8}, "block_size = 16 can't shrink to 8"),
        ({"bias": True}, "bias = False can't grow"),
        ({"activation": "gelu_tanh"}, "activation = gelu can't grow"),
    ],
)
def test_what_can_not_grow(changes, said):
    with pytest.raises(ConfigError, match=said):
        grow(GPT(SMALL), shaped(**changes))
