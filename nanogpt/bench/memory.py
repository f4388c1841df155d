"""`memory`: what fits on a device. Nothing is measured: it is the arithmetic of weights and KV."""

import argparse

from nanogpt.bench import output
from nanogpt.bench.options import COUNT, number
from nanogpt.bench.table import table
from nanogpt.config import nearest
from nanogpt.engine.capacity import Capacity, capacity
from nanogpt.errors import ConfigError
from nanogpt.registry import find_card, read_cards

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
GB, KIB, MIB = 10**9, 2**10, 2**20

EXAMPLES = """\
A model is alone on its device, and KV gets 85 % of what its weights leave. Choices of one prompt
share its blocks, so that more contexts than these fit where prompts are shared.

examples:
  python -m nanogpt.bench memory
  python -m nanogpt.bench memory --model gpt2-xl --memory 24 --dtype bfloat16
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "memory",
        help="what fits: bytes of KV a token, contexts at once",
        description="Compute how many contexts of a known model run at once in a given memory.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", default="gpt2,gpt2-xl", metavar="N1,...", help="(gpt2,gpt2-xl)")
    parser.add_argument(
        "--memory", type=number(float, 0.1), default=16, metavar="GB", help="of the device (16)"
    )
    parser.add_argument(
        "--dtype", choices=ITEM_BYTES, default="float16", help="of weights and KV (float16)"
    )
    parser.add_argument(
        "--block-size", type=COUNT, default=16, metavar="TOKENS", help="as engine.block_size (16)"
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    cards = read_cards()
    found: dict[str, Capacity] = {}
    for name in args.model.split(","):
        card = find_card(name, cards)
        if card is None:
            raise ConfigError(f"unknown model {name!r:.100}{nearest(name, [*cards])}")
        found[card.name] = capacity(
            card,
            memory=int(args.memory * GB),
            item_bytes=ITEM_BYTES[args.dtype],
            block_size=args.block_size,
        )
    print(_table(found), flush=True)
    output.emit("memory", args, {name: each._asdict() for name, each in found.items()})
    return 0


def _table(found: dict[str, Capacity]) -> str:
    return table(
        ["model", "weights MiB", "KiB a token", "MiB a context", "contexts", "tokens"],
        [
            [
                name,
                each.weights / MIB,
                each.per_token / KIB,
                each.per_context / MIB,
                each.contexts,
                each.tokens,
            ]
            for name, each in found.items()
        ],
    )
