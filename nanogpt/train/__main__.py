"""Train a model by a recipe.

python -m nanogpt.train --config configs/train/shakespeare_char.toml [--out DIR] [--set KEY=VALUE]

With several GPUs: torchrun --standalone --nproc-per-node 4 -m nanogpt.train --config ...
A run whose directory holds an unfinished one of the same recipe goes on where that was saved.
"""

import argparse
import sys
from collections.abc import Sequence

import torch.distributed as dist

from nanogpt.errors import StartupError
from nanogpt.train.config import load
from nanogpt.train.setup import find_place
from nanogpt.train.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nanogpt.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe (configs/train/)")
    parser.add_argument("--out", default="", metavar="DIR", help="directory of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting"
    )
    args = parser.parse_args(argv)
    try:
        config = load(args.config, args.set, args.out)
        trainer = Trainer(config, find_place(config))
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    trainer.run()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
