"""What a run leaves for people: loss.csv, loss.png and the model card."""

import csv
from pathlib import Path

import msgspec

from nanogpt.data.dataset import Meta
from nanogpt.model.gpt import GPT
from nanogpt.train.config import TrainConfig
from nanogpt.train.state import Progress

_COLUMNS = ("step", "tokens", "elapsed_s", "lr_scale", "train_loss", "val_loss")


class LossLog:
    """loss.csv, one row for each evaluation. Rows past `step`, of a killed run, are dropped."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "loss.csv"
        rows = [r for r in read_losses(self.path) if int(r["step"]) <= step] if step else []
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def add(self, **row: float) -> None:
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, _COLUMNS, lineterminator="\n").writerow(row)


def read_losses(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def plot(out: Path) -> None:
    """loss.png from loss.csv."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_losses(out / "loss.csv")
    tokens = [float(r["tokens"]) / 1e6 for r in rows]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for column, label in (("train_loss", "training"), ("val_loss", "validation")):
        axes.plot(tokens, [float(r[column]) for r in rows], label=label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=100)
    pyplot.close(figure)


def model_card(
    config: TrainConfig,
    meta: Meta,
    progress: Progress,
    model: GPT,
    *,
    train_loss: float,
    val_loss: float,
) -> bytes:
    """README.md of a trained checkpoint, from the run itself."""
    tokens = progress.step * config.batch_size * config.accumulate * model.config.block_size
    epochs = tokens / meta.train_tokens
    kind = "characters" if meta.tokenizer.kind == "char" else "GPT-2's byte pairs"
    recipe = msgspec.to_builtins(config)
    del recipe["model"]  # which a run that starts from another model doesn't use
    shape = msgspec.to_builtins(model.config)
    recipe = {k: v for k, v in recipe.items() if k not in ("out", "title", "licence", "data")}
    table = "\n".join(f"| {k} | {v} |" for k, v in {**shape, **recipe}.items())
    return f"""# {config.title}

| | |
| --- | --- |
| parameters | {model.num_parameters():,} |
| tokens are | {kind} ({meta.vocab_size:,} kinds) |
| context | {model.config.block_size} tokens |
| validation loss | {val_loss:.4f} nats a token |
| training loss | {train_loss:.4f} nats a token, without dropout |
| trained for | {progress.step:,} steps, {tokens:,} tokens, {epochs:.1f} epochs |
| begun with | {_beginning(config)} |
| data | {meta.source}, SHA-256 `{meta.source_sha256}` |
| split | first 90 % of the text to train ({meta.train_tokens:,} tokens), the rest to validate |
| licence | {config.licence} |

The validation loss is the mean over consecutive windows of the validation split, each with the
full context, {_windows(config)}. Written by `python -m nanogpt.train`.

## Recipe

| setting | value |
| --- | --- |
{table}
""".encode()


def _beginning(config: TrainConfig) -> str:
    if config.init_from == "scratch":
        return "random weights"
    return f"{config.init_from}{', grown to this shape' if config.model else ''}"


def _windows(config: TrainConfig) -> str:
    return f"{config.eval_windows} of them" if config.eval_windows else "all of them"
