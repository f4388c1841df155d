"""Configuration: defaults, then a TOML file, then NANOGPT_* variables, then command-line options.

Everything is frozen after loading. An unknown key, option or variable is an error that names the
nearest known one, and so is a value of the wrong type or out of range.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from nanogpt.admission_config import AdmissionConfig
from nanogpt.errors import ConfigError
from nanogpt.jobs_config import JobsConfig, QueueConfig
from nanogpt.section import Section

PROJECT = Path(__file__).resolve().parent.parent

Port = Annotated[int, Meta(ge=1, le=65535)]
Count = Annotated[int, Meta(ge=1)]
Role = Literal["all", "web", "worker"]
Seconds = Annotated[float, Meta(ge=0.1, le=86400)]
T = TypeVar("T")


class EngineConfig(Section, frozen=True, kw_only=True):
    """Memory and batching of each model on each rank."""

    kv_memory_gib: Annotated[float, Meta(ge=0)] = 0.0  # for all models of a rank; 0: planned
    block_size: Annotated[int, Meta(ge=8, le=256)] = 16  # tokens in a block of KV
    max_num_seqs: Annotated[int, Meta(ge=1, le=4096)] = 256  # choices that run at once
    max_batch_tokens: Annotated[int, Meta(ge=16, le=65536)] = 512  # tokens of one step
    # GPUs only: tokens of each choice between two looks at new requests, at most; 0: no CUDA graphs
    burst_steps: Annotated[int, Meta(ge=0, le=64)] = 8
    deterministic: bool = False  # GPUs too: a choice is the same to the bit in any batch; slower


class ClusterConfig(Section, frozen=True, kw_only=True):
    """How ranks are watched, and brought back."""

    heartbeat_s: Seconds = 1.0
    watchdog_s: Seconds = 3.0  # a rank that is silent for so long is killed
    stuck_s: Seconds = 300.0  # a rank whose step takes so long is killed
    max_restarts: Annotated[int, Meta(ge=0)] = 1_000_000
    node_wait_s: Seconds = 30.0  # for nodes that are missing; then the others go on without
    max_outstanding: Count = 16384  # choices that wait or run; one more is answered 503 at once


class ResidencyConfig(Section, frozen=True, kw_only=True):
    """Which models are in memory, when not all of them can be."""

    # Of weights and KV together, on each rank; 0: all models stay. With a limit, models of
    # configs/models/ whose weights are here are served as well, and models come and go.
    # "auto": most of what the device has free at the start.
    memory_gib: Annotated[float, Meta(ge=0)] | Literal["auto"] = 0.0
    wait_s: Seconds = 120.0  # a request whose model is not in memory by then is answered 503
    pinned: tuple[str, ...] = ()  # these never go


class HttpConfig(Section, frozen=True, kw_only=True):
    """The front end's limits."""

    workers: Annotated[int, Meta(ge=0, le=256)] = (
        0  # processes of a web server; 0: one a core, to 4
    )
    threads: Annotated[int, Meta(ge=4, le=4096)] = 640  # requests in progress at once
    max_body_mib: Annotated[int, Meta(ge=1, le=1024)] = 8
    drain_s: Seconds = 30.0  # SIGTERM: how long accepted requests may take to finish
    queue_timeout_s: Seconds = 600.0  # a request without any token by then is answered 503
    cors_origins: tuple[str, ...] = ()


class ServeConfig(Section, frozen=True, kw_only=True):
    """Everything that serving needs, as one frozen value."""

    role: Role = "all"  # web: HTTP, no models; worker: models, no HTTP
    host: str = "127.0.0.1"
    port: Port = 8000
    ranks: Count | Literal["auto"] = "auto"  # processes on this node
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    models: tuple[str, ...] = ("shakespeare-char",)  # NAME or NAME=PATH
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    nnodes: Count = 1
    node_rank: Annotated[int, Meta(ge=0)] = 0
    rdzv_endpoint: str = ""  # HOST:PORT of node 0, when there is more than one node
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    residency: ResidencyConfig = ResidencyConfig()
    http: HttpConfig = HttpConfig()
    admission: AdmissionConfig = AdmissionConfig()
    jobs: JobsConfig = JobsConfig()
    queue: QueueConfig = QueueConfig()

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("at least one model is needed")
        if self.nnodes > 1 and not re.fullmatch(r".+:\d+", self.rdzv_endpoint):
            raise ValueError("nnodes > 1 needs rdzv_endpoint = HOST:PORT of the first node")
        if self.role != "all" and not self.queue.url:
            raise ValueError(
                f"role {self.role} needs a queue that web servers and workers share: "
                "--queue redis://HOST:PORT/0"
            )
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank {self.node_rank} must be below nnodes {self.nnodes}")

    @property
    def shared_admission(self) -> AdmissionConfig:
        """Servers of one queue share limits and bans, by its Redis unless another is named."""
        if self.admission.redis_url:
            return self.admission
        return msgspec.structs.replace(self.admission, redis_url=self.queue.redis_url)


def nearest(word: str, known: list[str]) -> str:
    """A hint such as "; did you mean 'port'?", or nothing when no known word is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_keys(raw: Mapping[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    fields = {f.encode_name: f for f in msgspec.structs.fields(kind)}
    for key, value in raw.items():
        if key not in fields:
            raise ConfigError(f"unknown key {where}{key!r}{nearest(key, list(fields))}")
        kind_of = fields[key].type
        for inner in get_args(kind_of) if isinstance(kind_of, UnionType) else (kind_of,):
            table = isinstance(inner, type) and issubclass(inner, Section)
            if table and isinstance(value, Mapping):
                _check_keys(value, inner, f"{where}{key}.")


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The file's tables. Raises ConfigError, naming the file, when it can't be read."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def convert(raw: Mapping[str, Any], kind: type[T], source: str = "") -> T:
    """`raw` as a `kind`; ConfigError for unknown keys, wrong types and values out of range.

    Numbers may be written as strings, as environment variables and options have them.
    """
    prefix = f"{source}: " if source else ""
    try:
        if issubclass(kind, msgspec.Struct):
            _check_keys(raw, kind, "")
        return msgspec.convert(raw, kind, strict=False)
    except (msgspec.ValidationError, ConfigError) as error:
        message = str(error).replace(" - at `$.", " at `").replace(" - at `$`", "")
        raise ConfigError(prefix + message) from error


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


class _Setting(NamedTuple):
    path: tuple[str, ...]
    is_list: bool  # written with commas


# Variables that aren't configuration: they belong to set-up or to the processes themselves, or are
# secrets, which no file should hold.
_NOT_CONFIGURATION = {
    "NANOGPT_RUN_DIR",
    "NANOGPT_CONFIG",
    "NANOGPT_OWNER_PID",
    "NANOGPT_API_KEYS",
    "NANOGPT_ADMIN_KEY",
}


def _variables(kind: type[Section], path: tuple[str, ...] = ()) -> dict[str, _Setting]:
    """Every setting that a variable can give, by the variable's name. Tables of free names (such
    as admission.keys) are for the file.
    """
    found: dict[str, _Setting] = {}
    for field in msgspec.structs.fields(kind):
        inner, here = field.type, (*path, field.name)
        if isinstance(inner, type) and issubclass(inner, Section):
            found |= _variables(inner, here)
        elif get_origin(inner) is not dict:
            name = "MODEL" if here == ("models",) else "_".join(here).upper()
            found[f"NANOGPT_{name}"] = _Setting(here, get_origin(inner) is tuple)
    return found


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """NANOGPT_PORT=8001, NANOGPT_ENGINE_BLOCK_SIZE=32, NANOGPT_MODEL=a,b=PATH as a raw table."""
    known = _variables(ServeConfig)
    raw: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith("NANOGPT_") or variable in _NOT_CONFIGURATION:
            continue
        setting = known.get(variable)
        if setting is None:
            raise ConfigError(f"unknown variable {variable}{nearest(variable, list(known))}")
        parts = [part.strip() for part in value.split(",")]
        table: Any = parts if setting.is_list else value
        for name in reversed(setting.path):
            table = {name: table}
        raw = _merge(raw, table)
    return raw


def load(
    options: Mapping[str, Any], environ: Mapping[str, str], file: str | None = None
) -> ServeConfig:
    """The configuration of this process: defaults < file < environment < options."""
    file = file or environ.get("NANOGPT_CONFIG")
    raw: dict[str, Any] = {}
    if file:
        raw = read_toml(file)
        convert(raw, ServeConfig, source=file)  # a mistake in the file is said of the file
    merged = _merge(_merge(raw, from_environment(environ)), options)
    return convert(merged, ServeConfig)
