"""Training: it learns, it resumes exactly, and ranks add up to accumulation."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nanogpt.data import prepare
from nanogpt.data.dataset import Dataset
from nanogpt.errors import CheckpointError, ConfigError
from nanogpt.model import checkpoint
from nanogpt.model.gpt import GPT, GPTConfig
from nanogpt.train import __main__ as train
from nanogpt.train import config as recipes
from nanogpt.train import state
from nanogpt.train.average import Average
from nanogpt.train.dropout import ByteDropout, replace_dropout
from nanogpt.train.evaluate import evaluate
from nanogpt.train.muon import Muon, orthogonalize
from nanogpt.train.optim import build_optimizers, lr_scale
from nanogpt.train.setup import Place
from nanogpt.train.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
CPU = Place(device=torch.device("cpu"), dtype=torch.float32)
TEXT = "It was the best of times, it was the worst of times; " * 40


@pytest.fixture
def data(tmp_path):
    prepare.prepare("char", TEXT.encode(), "times", tmp_path / "data")
    return str(tmp_path / "data")


def recipe(data, out, **changes):
    shape = recipes.Shape(block_size=16, n_layer=2, n_head=2, n_embd=32)
    values = {
        "data": data,
        "out": str(out),
        "model": shape,
        "lr": 3e-3,
        "muon_lr": 3e-3,
        "batch_size": 4,
        "max_steps": 40,
        "warmup_steps": 5,
        "eval_every": 10,
        "dropout": 0.1,
        "dtype": "float32",
        **changes,
    }
    return recipes.TrainConfig(**values)


def losses(out):
    with open(Path(out) / "loss.csv") as file:
        return {int(r["step"]): float(r["val_loss"]) for r in csv.DictReader(file)}


BFLOAT16 = Place(device=CPU.device, dtype=torch.bfloat16)


@pytest.mark.parametrize(("optimizer", "place"), [("adamw", CPU), ("muon", BFLOAT16)])
def test_learns_and_exports_the_best(data, tmp_path, optimizer, place):
    Trainer(recipe(data, tmp_path / "out", optimizer=optimizer), place).run()
    curve = losses(tmp_path / "out")
    assert list(curve) == [10, 20, 30, 40]
    assert curve[40] < curve[10] - 0.3
    model, tokenizer = checkpoint.load(tmp_path / "out" / "best")
    assert tokenizer == Dataset(data).meta.tokenizer
    assert evaluate(model, Dataset(data).val) == pytest.approx(min(curve.values()), abs=0.01)
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "out" / "best" / "README.md").read_text()
    assert f"| validation loss | {min(curve.values()):.4f} " in card
    assert Dataset(data).meta.source_sha256 in card


def test_a_finished_run_stays_finished(data, tmp_path):
    config = recipe(data, tmp_path / "out", max_steps=10)
    Trainer(config, CPU).run()
    before = (tmp_path / "out" / "state.safetensors").read_bytes()
    Trainer(config, CPU).run()
    assert (tmp_path / "out" / "state.safetensors").read_bytes() == before
    assert list(losses(tmp_path / "out")) == [10]


TRAIN_TOML = """
data = "{data}"
out = "{out}"
optimizer = "muon"
dropout = 0.2
ema_decay = 0.9
batch_size = 4
accumulate = 2
max_steps = {steps}
warmup_steps = 5
eval_every = 10
save_every_s = 0.001
dtype = "float32"
[model]
block_size = 16
n_layer = 1
n_head = 2
n_embd = 32
"""


def start(tmp_path, data, out, steps=80, launcher=(sys.executable,)):
    file = tmp_path / f"{out}.toml"
    file.write_text(TRAIN_TOML.format(data=data, out=tmp_path / out, steps=steps))
    return subprocess.Popen(
        [*launcher, "-m", "nanogpt.train", "--config", str(file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def finish(process):
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors.decode()


def test_kill_and_resume_changes_nothing(data, tmp_path):
    """kill -9 in the middle, start again: the same losses and weights, bit for bit."""
    uninterrupted = start(tmp_path, data, "whole")
    with start(tmp_path, data, "killed") as process:
        try:
            deadline = time.monotonic() + 120
            while not (found := state.peek(tmp_path / "killed")) or found[0].step < 25:
                assert process.poll() is None, process.communicate()[1].decode()
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
    killed_at = state.peek(tmp_path / "killed")[0].step
    assert 25 <= killed_at < 80
    finish(start(tmp_path, data, "killed"))
    finish(uninterrupted)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 8
    killed, whole = state_tensors(tmp_path / "killed"), state_tensors(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    for name in whole:
        assert torch.equal(killed[name], whole[name]), name


def state_tensors(out):
    return load_file(out / state.FILE)


def test_two_ranks_equal_accumulation(data, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    one = start(tmp_path, data, "one", steps=20)
    finish(start(tmp_path, data, "two", steps=20, launcher=(*torchrun, "--nproc-per-node=2")))
    finish(one)
    one, two = state_tensors(tmp_path / "one"), state_tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3, msg=name)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-3)


def test_ranks_must_divide_the_micro_batches(data, tmp_path):
    place = Place(device=CPU.device, dtype=CPU.dtype, rank=0, world_size=2)
    with pytest.raises(ConfigError, match="among 2 ranks: use a multiple"):
        Trainer(recipe(data, tmp_path / "out", accumulate=3), place)


def test_another_recipe_does_not_continue_a_run(data, tmp_path):
    Trainer(recipe(data, tmp_path / "out", max_steps=10), CPU).run()
    with pytest.raises(ConfigError, match=r"lr = 0.003, now it is 0.1.*--out"):
        Trainer(recipe(data, tmp_path / "out", lr=0.1), CPU)
    Trainer(recipe(data, tmp_path / "out", max_steps=12), CPU).run()
    assert state.peek(tmp_path / "out")[0].step == 12, "a longer run is a continuation"


def test_a_damaged_state_is_one_line(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / state.FILE).write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="remove it to train anew"):
        Trainer(recipe(data, tmp_path / "out"), CPU)


def test_finetuning_begins_with_the_other_model(data, tmp_path):
    first = recipe(data, tmp_path / "first")
    Trainer(first, CPU).run()
    best = str(tmp_path / "first" / "best")
    second = Trainer(recipe(data, tmp_path / "second", init_from=best), CPU)
    loss = evaluate(second.model, Dataset(data).val)
    assert loss == pytest.approx(min(losses(tmp_path / "first").values()), abs=0.01)
    assert second.model.lm_head.weight is second.model.wte.weight
    assert second.model.config == checkpoint.load(best)[0].config


def test_a_smaller_model_grows_into_the_recipes_shape(data, tmp_path):
    Trainer(recipe(data, tmp_path / "first"), CPU).run()
    best = str(tmp_path / "first" / "best")
    shape = recipes.Shape(block_size=16, n_layer=3, n_head=3, n_embd=48)
    config = recipe(data, tmp_path / "second", init_from=best, model=shape)
    second = Trainer(config, CPU)
    begins = min(losses(tmp_path / "first").values())
    assert evaluate(second.model, Dataset(data).val) == pytest.approx(begins, abs=0.01)
    second.run()
    assert min(losses(tmp_path / "second").values()) < begins
    grown, _ = checkpoint.load(tmp_path / "second" / "best")
    assert (grown.config.n_layer, grown.config.n_embd) == (3, 48)
    card = (tmp_path / "second" / "best" / "README.md").read_text()
    assert f"| begun with | {best}, grown to this shape |" in card


# ---------------------------------------------------------------------- average


def test_average_of_weights():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = Average(model, 0.5)
    for step, value in ((1, 11.0), (2, 8.0)):
        nn.init.constant_(model.weight, value)
        average.update(step)
    after_one = 11.0 * 9 / 11  # the decay of step 1 is 2/11
    assert average.means["weight"].item() == pytest.approx(after_one / 4 + 8.0 * 3 / 4)
    average.update(1_000_000)
    assert average.means["weight"].item() == pytest.approx((after_one / 4 + 6.0 + 8.0) / 2)
    mean = average.means["weight"].item()
    with average.in_place():
        assert model.weight.item() == mean
    assert model.weight.item() == 8.0
    assert average.means["weight"].item() == mean


def test_the_average_is_what_is_measured_and_exported(data, tmp_path):
    Trainer(recipe(data, tmp_path / "plain", eval_every=40), CPU).run()
    Trainer(recipe(data, tmp_path / "out", ema_decay=0.9, eval_every=40), CPU).run()
    plain, tensors = state_tensors(tmp_path / "plain"), state_tensors(tmp_path / "out")
    exported = checkpoint.load(tmp_path / "out" / "best")[0].state_dict()
    for name in plain:
        assert torch.equal(plain[name], tensors[name]), "training itself is the same"
    for name in (n.removeprefix("model.") for n in plain if n.startswith("model.")):
        mean = tensors[f"average.{name}"]
        assert not torch.equal(mean, tensors[f"model.{name}"])
        torch.testing.assert_close(exported[name], mean, atol=1e-3, rtol=1e-3)
    model, _ = checkpoint.load(tmp_path / "out" / "best")
    measured = losses(tmp_path / "out")[40]
    assert evaluate(model, Dataset(data).val) == pytest.approx(measured, abs=0.01)


def test_finetuning_needs_the_same_tokens(data, tmp_path):
    Trainer(recipe(data, tmp_path / "first", max_steps=10), CPU).run()
    prepare.prepare("char", TEXT.upper().encode(), "loud", tmp_path / "loud")
    best = str(tmp_path / "first" / "best")
    with pytest.raises(ConfigError, match="have different tokens"):
        Trainer(recipe(str(tmp_path / "loud"), tmp_path / "second", init_from=best), CPU)


# ---------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.toml")), ids=str)
def test_recipes_are_valid_and_say_how_to_run_them(path):
    config = recipes.load(str(path))
    assert config.out.startswith("out/")
    head = path.read_text().split("\n\n")[0]
    assert f"--config configs/train/{path.name}" in head
    assert "loss" in head


def test_unknown_key_names_the_nearest(tmp_path):
    (tmp_path / "r.toml").write_text('data = "d"\nout = "o"\nwarmup_step = 1\n')
    with pytest.raises(ConfigError, match=r"r.toml: unknown key 'warmup_step'.*'warmup_steps'"):
        recipes.load(str(tmp_path / "r.toml"))


def test_overrides(tmp_path):
    (tmp_path / "r.toml").write_text('data = "d"\nout = "o"\n[model]\nn_head = 4\nn_embd = 64\n')
    config = recipes.load(str(tmp_path / "r.toml"), ["lr=0.01", "model.n_embd=32"], out="p")
    assert (config.lr, config.model.n_embd, config.model.n_head) == (0.01, 32, 4)
    assert config.out == "p"
    with pytest.raises(ConfigError, match="key=value"):
        recipes.load(str(tmp_path / "r.toml"), ["lr"])
    with pytest.raises(ConfigError, match=r"unknown key model\.'n_heads'"):
        recipes.load(str(tmp_path / "r.toml"), ["model.n_heads=3"])
    with pytest.raises(ConfigError, match="not a multiple of n_head 5"):
        recipes.load(str(tmp_path / "r.toml"), ["model.n_head=5"])


def test_command_line_errors_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["--config", str(tmp_path / "none.toml")])
    errors = capsys.readouterr().err
    assert caught.value.code == 2
    assert errors.startswith("error: can't read ")
    assert errors.count("\n") == 1


def test_schedule():
    config = recipe("d", "o", warmup_steps=10, final_lr_scale=0.1)
    assert lr_scale(0, 0.0, config) == pytest.approx(0.1)
    assert lr_scale(9, 0.0, config) == 1.0
    assert lr_scale(500, 0.5, config) == pytest.approx(0.55)
    assert lr_scale(1000, 1.0, config) == pytest.approx(0.1)


# ---------------------------------------------------------------------- optimisers and dropout


def test_orthogonalize():
    """Singular values of both wide and tall matrices come near 1; the singular vectors stay."""
    torch.manual_seed(0)
    for shape in [(3, 16, 16), (2, 16, 64), (2, 64, 16)]:
        x = torch.randn(shape)
        y = orthogonalize(x)
        exact = torch.linalg.svd(x, full_matrices=False)
        assert (torch.linalg.svdvals(y)[..., :-2] - 1).abs().max() < 0.45
        cosine = nn.functional.cosine_similarity(y.flatten(1), (exact.U @ exact.Vh).flatten(1))
        assert cosine.min() > 0.95


def test_muon_treats_stacked_matrices_apart():
    """Queries, keys and values in one parameter move as three parameters would."""
    torch.manual_seed(0)
    parts = [nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    whole = nn.Parameter(torch.cat([p.detach() for p in parts]))
    grads = [torch.randn(8, 8) for _ in range(3)]
    for param, grad in zip(parts, grads, strict=True):
        param.grad = grad
    whole.grad = torch.cat(grads)
    Muon(parts, lr=0.1, weight_decay=0.1).step()
    Muon([{"params": [whole], "parts": 3}], lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_once_and_no_decay_on_vectors(optimizer, bias):
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=2, n_head=2, n_embd=16, bias=bias))
    groups = [
        group
        for opt in build_optimizers(model, recipe("d", "o", optimizer=optimizer))
        for group in opt.param_groups
    ]
    params = [id(p) for group in groups for p in group["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters())
    for group in groups:
        for param in group["params"]:
            assert (group["weight_decay"] > 0) == (param.dim() == 2)


def test_byte_dropout():
    torch.manual_seed(0)
    drop, x = ByteDropout(0.25), torch.ones(1000, 101, requires_grad=True)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert (y[:500] == y[500:]).float().mean() == pytest.approx(0.625, abs=0.01), "independent"
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()), "the same elements, and the same scale"
    drop.eval()
    assert torch.equal(drop(x), x)


def test_replace_dropout_reaches_every_layer():
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=2, n_head=2, n_embd=16), dropout=0.2)
    replace_dropout(model)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(ByteDropout) == 1 + 2 * 2
    assert nn.Dropout not in kinds


# ---------------------------------------------------------------------- what ships


SHIPPED = ROOT / "nanogpt" / "weights"
shipped = pytest.mark.parametrize("weights", sorted(SHIPPED.iterdir()), ids=lambda path: path.name)


def stated_loss(weights):
    card = (weights / "README.md").read_text()
    return float(card.split("| validation loss | ")[1].split()[0])


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    prepared, text = ROOT / "data" / "shakespeare_char", ROOT.parent / "shared" / "data"
    if (prepared / "meta.json").exists():
        return Dataset(prepared)
    text = text / "tinyshakespeare.txt"
    if not text.exists():
        pytest.skip("needs the text: python -m nanogpt.data.prepare char")
    directory = tmp_path_factory.mktemp("shakespeare")
    prepare.prepare("char", text.read_bytes(), "tinyshakespeare", directory)
    return Dataset(directory)


def test_the_shipped_weights_are_small_enough():
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*.safetensors")) < 60_000_000


def test_the_deeper_one_is_better():
    assert stated_loss(SHIPPED / "shakespeare-deep") < stated_loss(SHIPPED / "shakespeare-char")


@shipped
def test_shipped_card_states_the_best_of_the_curve(weights):
    with open(weights / "loss.csv") as file:
        best = min(float(row["val_loss"]) for row in csv.DictReader(file))
    assert stated_loss(weights) == pytest.approx(best, abs=1e-4)


@shipped
def test_shipped_weights_on_a_part_of_the_split(shakespeare, weights):
    model, tokenizer = checkpoint.load(weights)
    assert tokenizer == shakespeare.meta.tokenizer
    assert evaluate(model, shakespeare.val, windows=40) == pytest.approx(
        stated_loss(weights), abs=0.05
    )


@shipped
@pytest.mark.large
def test_shipped_weights_are_as_good_as_their_card_says(shakespeare, weights):
    model, _ = checkpoint.load(weights)
    assert evaluate(model, shakespeare.val) == pytest.approx(stated_loss(weights), abs=0.002)
