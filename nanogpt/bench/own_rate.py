"""The engine alone, with all lines of a batch at once: tokens a second, as the last line.

Started by the subcommand `jobs`:  python -m nanogpt.bench.own_rate MODEL LINES TOKENS SEED
"""

import sys
import time
from collections.abc import Sequence

from nanogpt import options as serve_options
from nanogpt import process
from nanogpt.bench.job_serving import prompts


def main(argv: Sequence[str]) -> None:
    model, lines, line_len, seed = argv[0], *map(int, argv[1:])
    process.keep_freed_memory()  # as a rank does, before torch is imported
    process.spin_briefly()
    process.no_blas_threads()
    from nanogpt.bench.sweep import Lines

    engine = Lines(serve_options.parse(["--model", model]))
    engine.run(prompts(2, seed + 1_000_000), line_len)  # what only the first step does
    texts = prompts(lines, seed)
    started = time.perf_counter()
    engine.run(texts, line_len)
    print(lines * line_len / (time.perf_counter() - started))


if __name__ == "__main__":
    main(sys.argv[1:])
