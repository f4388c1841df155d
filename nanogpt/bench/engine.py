"""`engine`: our engine in this process, without HTTP, against the machine's roofline."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from nanogpt import options as serve_options
from nanogpt import process
from nanogpt.bench import output
from nanogpt.bench.options import COUNT, numbers
from nanogpt.bench.table import table
from nanogpt.errors import ConfigError

if TYPE_CHECKING:
    from nanogpt.bench.sweep import Bench, DecodeRow, PrefillRow

EXAMPLES = """\
The roofline is measured here and now: the rate of reading memory, and of multiplying matrices in
the dtype used. A decode step can't be faster than reading weights and KV, or multiplying, takes.
Other settings of the engine are read from --config and NANOGPT_* variables, as launch.sh does.

examples:
  python -m nanogpt.bench engine
  python -m nanogpt.bench engine --model gpt2=/models/gpt2 --dtype bfloat16 \\
      --batch 1,8,32 --context 128,384 --prefill 128,900 --plot engine.png
  python -m nanogpt.bench engine --model gpt2-xl --device cuda --batch 1,64,256
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "engine",
        help="our engine without HTTP: prefill and decode, share of the roofline",
        description="Time prefill and decode steps of our engine in this process.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", metavar="NAME[=PATH]", help="as for launch.sh")
    parser.add_argument("--dtype", metavar="auto|float32|bfloat16|float16|int8")
    parser.add_argument("--device", metavar="auto|cpu|cuda")
    parser.add_argument("--config", metavar="FILE", help="TOML file, as for launch.sh")
    parser.add_argument(
        "--prefill", type=numbers, metavar="LENGTHS", help="prompts (an eighth, half, most of it)"
    )
    parser.add_argument(
        "--batch", type=numbers, default=[1, 8, 32], metavar="SIZES", help="of decode (1,8,32)"
    )
    parser.add_argument(
        "--context", type=numbers, metavar="LENGTHS", help="of decode (an eighth, three eighths)"
    )
    parser.add_argument(
        "--steps", type=COUNT, default=16, metavar="N", help="timed steps for each row (16)"
    )
    output.add_output_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    output.check_plot(args.plot)
    config = serve_options.parse(
        [
            f"--{name}={value}"
            for name in ("model", "dtype", "device", "config")
            if (value := getattr(args, name)) is not None
        ]
    )
    if len(config.models) != 1:
        raise ConfigError("one model at a time: choose it with --model")
    process.keep_freed_memory()  # as a rank does, before torch is imported
    process.spin_briefly()
    process.no_blas_threads()
    from nanogpt.bench.sweep import Bench

    bench = Bench(config, args.batch, args.context, args.prefill, args.steps)
    roof = bench.roof
    print(
        f"{bench.info.name}, {bench.info.num_parameters / 1e6:.1f} M parameters, "
        f"{bench.info.dtype} on {bench.device}: reads {roof.bytes_per_s / 1e9:.1f} GB/s, "
        f"multiplies {roof.flops_per_s / 1e9:,.0f} GFLOP/s in {roof.products}; KV takes "
        f"{bench.shape.kv_bytes / 1024:.1f} KiB a token",
        flush=True,
    )
    prefill, decode = _measure(bench, args)
    print(f"\n{_prefill_table(prefill)}\n\n{_decode_table(decode)}", flush=True)
    output.save_plot(args.plot, 2, lambda axes: _draw(axes, prefill, decode))
    output.emit(
        "engine",
        args,
        {
            "model": bench.info,
            "device": str(bench.device),
            "roof": roof,
            "shape": bench.shape,
            "prefill": prefill,
            "decode": decode,
        },
    )
    return 0


def _measure(
    bench: "Bench", args: argparse.Namespace
) -> tuple[list["PrefillRow"], list["DecodeRow"]]:
    points = [(batch, context) for context in bench.contexts for batch in args.batch]
    with tqdm(
        total=len(bench.lengths) + len(points), unit="row", file=sys.stderr, leave=False
    ) as bar:
        prefill = []
        for length in bench.lengths:
            bar.set_description(f"prefill {length}")
            prefill.append(bench.prefill(length, repeats=3))
            bar.update()
        decode = []
        for batch, context in points:
            bar.set_description(f"decode {batch} x {context}")
            decode.append(bench.decode(batch, context, args.steps))
            bar.update()
    return prefill, decode


def _prefill_table(rows: Sequence["PrefillRow"]) -> str:
    return table(
        ["prefill", "ms", "tokens/s", "least ms", "roofline"],
        [[str(r.length), r.ms, r.tokens_per_s, r.least_ms, f"{r.roofline:.0%}"] for r in rows],
    )


def _decode_table(rows: Sequence["DecodeRow"]) -> str:
    return table(
        ["decode", "ms/step", "tokens/s", "least ms", "roofline", "network", "sampler", "host"],
        [
            [
                f"{r.batch} x {r.context}",
                r.step_ms,
                r.tokens_per_s,
                r.least_ms,
                f"{r.roofline:.0%}",
                r.network_ms,
                r.sampler_ms,
                r.host_ms,
            ]
            for r in rows
        ],
    )


def _draw(axes: Sequence, prefill: Sequence["PrefillRow"], decode: Sequence["DecodeRow"]) -> None:
    names = [f"{r.batch} x {r.context}" for r in decode]
    below = [0.0] * len(decode)
    for part in ("network_ms", "sampler_ms", "host_ms"):
        values = [getattr(r, part) or 0.0 for r in decode]
        axes[0].bar(names, values, bottom=below, label=part.removesuffix("_ms"))
        below = [b + v for b, v in zip(below, values, strict=True)]
    axes[0].plot(names, [r.least_ms for r in decode], "k_", markersize=20, label="roofline")
    axes[0].set_ylabel("ms a decode step (batch x context)")
    axes[0].tick_params(axis="x", rotation=45)
    axes[0].legend(fontsize=8)
    lengths = [r.length for r in prefill]
    axes[1].plot(lengths, [r.ms for r in prefill], "o-", label="measured")
    axes[1].plot(lengths, [r.least_ms for r in prefill], "k--", label="roofline")
    axes[1].set(xlabel="prompt tokens", ylabel="ms to the first token")
    axes[1].legend(fontsize=8)
