"""What can be checked before anything is started."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

from nanogpt import network, options, process, registry, servable
from nanogpt.config import PROJECT, ServeConfig
from nanogpt.errors import StartupError
from nanogpt.network import split_endpoint

GIB = 2**30
CHECK_S = 600.0  # for loading all models once before a reload
FIXED = ("host", "port", "role", "nnodes", "node_rank", "rdzv_endpoint")  # while the server runs


def count_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that CUDA would see, without importing torch. 0 when there is no driver."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len([line for line in listed.stdout.splitlines() if line.startswith("GPU ")])


def plan_ranks(config: ServeConfig, gpus: int) -> int:
    """Processes on this node. Raises StartupError when there are fewer GPUs than asked for."""
    if config.device == "cuda" and gpus == 0:
        raise StartupError("device is cuda, but no GPU is visible here; use --device cpu")
    use_gpus = gpus if config.device != "cpu" else 0
    if config.ranks == "auto":
        # On a CPU one rank with all cores reads the weights once for all its sequences.
        return max(1, use_gpus)
    if use_gpus and config.ranks > use_gpus:
        raise StartupError(f"{config.ranks} ranks, but only {use_gpus} GPUs are visible here")
    return config.ranks


def check_port(host: str, port: int, option: str) -> None:
    """Raises StartupError when nothing can listen there; `option` is what says where."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise StartupError(f"host {host!r} is not an address of this machine: {error}") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise StartupError(
                f"can't listen on {host}:{port}: {error.strerror}; choose another with {option}"
            ) from error


def interface(config: ServeConfig) -> str | None:
    """The network interface for the ranks to meet on; None when it can't be told. Raises
    StartupError when there is no way to node 0."""
    if config.nnodes == 1:
        return "lo"
    host, _ = split_endpoint(config.rdzv_endpoint)
    try:
        return network.interface_towards(host)
    except OSError as error:
        raise StartupError(f"no way to {host} (rdzv_endpoint): {error.strerror}") from error


def check_memory(config: ServeConfig, sources: Sequence[tuple[str, str]], ranks: int) -> None:
    """Raises StartupError when this machine can't hold the weights, or what was set for the models.
    For ranks on the CPU: what a GPU has free is known once torch runs there."""
    # "auto" may become float32: refuse only what is too large in any case.
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    sizes = {name: registry.estimate_memory(source, dtype) or 0 for name, source in sources}
    free = process.available_memory()
    limit = config.residency.memory_gib
    if limit == "auto":
        servable.check_weights(int(free * servable.MODELS_SHARE / ranks), sizes)
        return
    if limit:
        servable.check_weights(int(limit * GIB), sizes)
        if ranks * limit * GIB > free:
            raise StartupError(
                f"residency.memory_gib is {limit:g} for each of {ranks} ranks, and "
                f"{free / GIB:.1f} GiB are free: lower it, or use fewer ranks"
            )
        return
    needed = ranks * sum(sizes.values())
    if needed > free:
        raise StartupError(
            f"too little memory: {ranks} x the weights take {needed / GIB:.1f} GiB, and "
            f"{free / GIB:.1f} GiB are free; use fewer ranks, fewer models or a smaller dtype"
        )


def plan(config: ServeConfig) -> int:
    """Number of ranks on this node. Raises StartupError when they could not run."""
    gpus = count_gpus(os.environ) if config.device != "cpu" else 0
    ranks = plan_ranks(config, gpus)
    sources = registry.sources(config.models)
    for name, source in sources:
        registry.check_source(name, source)
    servable.check_pinned(config, [name for name, _ in servable.servable(config)])
    if not gpus:
        check_memory(config, sources, ranks)
    return ranks


def check_fixed(config: ServeConfig, running: ServeConfig) -> None:
    """Raises StartupError when it differs in what can't change."""
    for name in FIXED:
        if getattr(config, name) != getattr(running, name):
            raise StartupError(f"{name} can't change while the server runs")


def plan_reload(
    argv: Sequence[str],
    running: ServeConfig,
    wait_for: Callable[[float, Callable[[], int | None]], int | None],
) -> tuple[ServeConfig, int]:
    """The configuration as it is now, and its number of ranks. Its models are loaded once, in a
    process of their own. Raises StartupError when it could not take the place of `running`.
    `wait_for` a number of seconds at most gives what a function gives that is no longer None.
    """
    config = options.parse(argv)
    if config.nnodes > 1:
        raise StartupError("a reload is for one machine; restart the launchers one by one")
    check_fixed(config, running)
    ranks = plan(config)
    command = [sys.executable, "-m", "nanogpt.engine.check", *argv]
    with tempfile.TemporaryFile() as output:
        check = process.start_below(command, os.environ, cwd=PROJECT, output=output)
        code = wait_for(CHECK_S, check.poll)
        if code is None:
            process.abandon(check)
            raise StartupError(f"the check of its models was ended; it has {CHECK_S:.0f} s")
        output.seek(0)
        said = output.read().decode(errors="replace").strip().splitlines()
    if code != 0:
        silent = f"the check of its models ended with code {code}, without a word"
        raise StartupError(said[-1].removeprefix("error: ") if said else silent)
    return config, ranks
