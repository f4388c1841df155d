"""Can the models of a configuration be loaded?  python -m nanogpt.engine.check OPTIONS

A reload asks before it ends the ranks that run: exit code 2 and one line when they can't.
"""

import sys
from collections.abc import Sequence

import torch

from nanogpt import options, registry
from nanogpt.errors import StartupError
from nanogpt.model.load import load_model
from nanogpt.tokenizer import check_vocabulary


def main(argv: Sequence[str]) -> int:
    config = options.parse_or_exit(argv)
    cards = registry.read_cards()
    try:
        for name, source in registry.sources(config.models):
            unknown = registry.unknown_character(name, cards)
            found = load_model(source, name, dtype=torch.bfloat16, device="cpu", unknown=unknown)
            check_vocabulary(found.info.tokenizer)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
