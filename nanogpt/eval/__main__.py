"""Loss, perplexity and bits per character of a model on a text.

    nanogpt eval shakespeare-char --data input.txt          as training measures it
    nanogpt eval gpt2 --data input.txt --split all --stride 512
    nanogpt eval out/mine/best --data data/mine --write-card

MODEL is all that --model takes: a known name, a directory, a ckpt.pt or a name on the hub. It is
computed as it is served, in the type of weights that the device is fastest with.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nanogpt import registry
from nanogpt.engine.cpu.library import load_kernels
from nanogpt.engine.cpu.linear import best_dtype, pack_model
from nanogpt.errors import ConfigError, StartupError
from nanogpt.eval import card, text
from nanogpt.eval.score import score, windows_of
from nanogpt.model.dtypes import DTYPES, WeightDtype, fastest_dtype
from nanogpt.model.load import load_model
from nanogpt.tokenizer import load_tokenizer


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="nanogpt eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="MODEL")
    p.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="UTF-8 text, or a directory of `nanogpt prepare`",
    )
    p.add_argument(
        "--split",
        choices=[*text.PARTS],
        default="val",
        help="which part of the text: val is the last 10 %%, as in training (val)",
    )
    p.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="N",
        help="a window every N tokens, of which only new tokens count (consecutive windows)",
    )
    p.add_argument(
        "--dtype", choices=["auto", *DTYPES, "int8"], default="auto", help="of weights (auto)"
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    p.add_argument(
        "--write-card", action="store_true", help="put the table into the checkpoint's README.md"
    )
    return p


def evaluate(args: argparse.Namespace, command: str) -> str:
    """The table, which goes into the card too if that is asked for. Raises StartupError."""
    device = _device(args.device)
    name, source = registry.any_source(args.model)
    if args.write_card and not Path(source).is_dir():
        raise ConfigError(f"{args.model} has no card here: --write-card is for a directory")
    int8 = args.dtype == "int8"
    loaded = load_model(source, name, dtype=_dtype(args.dtype, device), device=device, int8=int8)
    tokenizer = load_tokenizer(loaded.info.tokenizer)
    data = text.read(args.data, args.split, loaded.info, tokenizer)
    windows = windows_of(len(data.tokens), loaded.info.context_length, args.stride)
    if device.type == "cpu":
        pack_model(loaded.model, int8=int8)
    quiet = not sys.stderr.isatty()
    result = score(loaded.model, tokenizer, data.tokens, windows, quiet=quiet)
    table = card.table(result, loaded.info, data, args.split, windows, args.stride)
    if args.write_card:
        card.write(Path(source), table, command)
    return table


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no usable GPU; use --device cpu")
    usable = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(usable if name == "auto" else name)


def _dtype(name: str, device: torch.device) -> WeightDtype:
    if name == "int8" and not (device.type == "cpu" and load_kernels()):
        raise ConfigError("dtype int8 is for CPUs, with the kernels that dev/setup.sh builds")
    if name in DTYPES:
        return DTYPES[name]
    return fastest_dtype(device) if device.type == "cuda" else best_dtype


def main(argv: Sequence[str] | None = None) -> int:
    given = [*(sys.argv[1:] if argv is None else argv)]
    args = _parser().parse_args(given)
    try:
        table = evaluate(args, shlex.join(["nanogpt", "eval", *given]))
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
