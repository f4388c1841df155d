"""What every subcommand ends with: tables, a plot when asked for, and one JSON object."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from nanogpt.bench.machine import Machine, this_machine
from nanogpt.errors import ConfigError


class Result(msgspec.Struct, kw_only=True):
    """The last line of stdout."""

    benchmark: str
    machine: Machine
    settings: dict[str, Any]
    results: Any


def add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures as well")


def check_plot(path: Path | None) -> None:
    """Before anything is measured. Raises ConfigError."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ConfigError(f"--plot: there is no directory {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None


def save_plot(path: Path | None, panels: int, draw: Callable[[list[Any]], None]) -> None:
    """`draw` gets that many axes, side by side."""
    if path is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 4.2), layout="constrained")
    draw(list(figure.subplots(1, panels, squeeze=False)[0]))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def emit(benchmark: str, args: argparse.Namespace, results: Any) -> None:
    """Print the JSON object. Keys are never part of it."""
    hidden = {"run", "command", "api_key", "parser"}
    settings = {
        name: msgspec.to_builtins(value, enc_hook=str)
        for name, value in vars(args).items()
        if name not in hidden and value is not None
    }
    result = Result(benchmark=benchmark, machine=this_machine(), settings=settings, results=results)
    print(msgspec.json.encode(result).decode(), flush=True)
