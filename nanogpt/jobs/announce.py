"""Clusters tell in Redis which models they have, and that they are alive; web servers read it.

    P:clusters      set      names of clusters
    P:cluster:NAME  string   its ranks, for as long as it is alive
    P:models        set      names of models
    P:model:NAME    string   what a web server has to know of it
    P:tokenizer:ID  hash     the files of its vocabulary: web servers need no other

A model is offered for a while after its last cluster has gone: requests wait in the queue until
one is back.
"""

import hashlib
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from nanogpt.bpe_files import read_bpe_files
from nanogpt.jobs.redis_link import Link, pairs
from nanogpt.jobs.store import StoreUnavailable
from nanogpt.registry import ModelInfo
from nanogpt.tokenizer import Tokenizer, gpt2_files, load_tokenizer

EVERY_S = 3.0  # between two announcements
ALIVE_S = 12  # after the last one a cluster counts as gone
OFFERED_S = 600  # after the last one its models do: as long as requests wait (http.queue_timeout_s)


class _Offer(msgspec.Struct, frozen=True):
    """A model, and the id of the files of its vocabulary, if it has any."""

    info: ModelInfo
    vocabulary: str = ""


class Clusters(NamedTuple):
    """What is known of all clusters together."""

    models: dict[str, ModelInfo]
    alive: int
    ranks: int


class Announcer:
    """Tells of one cluster from `start` until `close`. `models` and `ranks` are asked each time;
    no models: the cluster can't take work now."""

    def __init__(
        self,
        link: Link,
        namespace: str,
        models: Callable[[], Mapping[str, ModelInfo]],
        ranks: Callable[[], int],
    ) -> None:
        self._link, self._models, self._ranks = link, models, ranks
        self._prefix, self._name = f"{{{namespace}}}", secrets.token_hex(8)
        self._vocabularies: dict[str, tuple[str, dict[str, bytes]]] = {}  # by directory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def is_offered(self, model: str) -> bool:
        """Whether any cluster has it, or had it less than OFFERED_S ago. Raises
        StoreUnavailable."""
        return bool(self._link.command("EXISTS", f"{self._prefix}:model:{model}"))

    def _run(self) -> None:
        told = False
        while not self._stop.is_set():
            models = self._models()
            try:
                if models:
                    self._tell(models.values())
                    told = True
            except StoreUnavailable:
                pass  # the dispatcher of jobs says so already; it is told again soon
            # Before the first time the cluster is starting: whoever waits for it is told at once.
            self._stop.wait(EVERY_S if told else 0.1)
        try:
            self._link.command("SREM", f"{self._prefix}:clusters", self._name)
        except StoreUnavailable:
            return  # it is forgotten by itself

    def _tell(self, models: Iterable[ModelInfo]) -> None:
        p = self._prefix
        commands: list[tuple[bytes | str | int, ...]] = []
        for info in models:
            offer = _Offer(info)
            if info.tokenizer.kind == "gpt2":
                offer = _Offer(info, self._tell_vocabulary(info.tokenizer.directory))
            text = msgspec.json.encode(offer)
            commands.append(("SET", f"{p}:model:{info.name}", text, "EX", OFFERED_S))
            commands.append(("SADD", f"{p}:models", info.name))
        commands.append(("SET", f"{p}:cluster:{self._name}", self._ranks(), "EX", ALIVE_S))
        commands.append(("SADD", f"{p}:clusters", self._name))
        self._link.each(*commands)

    def _tell_vocabulary(self, directory: str) -> str:
        if directory not in self._vocabularies:
            files = (read_bpe_files(directory) if directory else gpt2_files()).as_files()
            digest = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
            self._vocabularies[directory] = (digest[:16], files)
        name, files = self._vocabularies[directory]
        key = f"{self._prefix}:tokenizer:{name}"
        if not self._link.command("EXPIRE", key, 2 * OFFERED_S):
            fields = (part for file in files.items() for part in file)
            self._link.each(("HSET", key, *fields), ("EXPIRE", key, 2 * OFFERED_S))
        return name


class Listener:
    """Reads what the clusters tell. `look` is for one thread."""

    def __init__(self, link: Link, namespace: str) -> None:
        self._link, self._prefix = link, f"{{{namespace}}}"
        self._known: dict[str, _Offer] = {}
        self.tokenizers: dict[str, Tokenizer] = {}

    def look(self) -> Clusters:
        """As it is now; the tokenizers of its models are there. Raises StoreUnavailable;
        CheckpointError for a vocabulary that is none."""
        p = self._prefix
        names, clusters = self._link.each(
            ("SMEMBERS", f"{p}:models"), ("SMEMBERS", f"{p}:clusters")
        )
        models = self._existing("model", names)
        offers = [msgspec.json.decode(text, type=_Offer) for text in models]
        for offer in offers:
            if self._known.get(offer.info.name) != offer:
                self.tokenizers[offer.info.name] = self._load(offer)
                self._known[offer.info.name] = offer
        alive = self._existing("cluster", clusters)
        return Clusters({o.info.name: o.info for o in offers}, len(alive), sum(map(int, alive)))

    def _existing(self, kind: str, names: Iterable[bytes]) -> list[bytes]:
        """The values of those that are still there; the others are struck off."""
        names = sorted(names)
        if not names:
            return []
        values = self._link.command("MGET", *(f"{self._prefix}:{kind}:{n.decode()}" for n in names))
        gone = [name for name, value in zip(names, values, strict=True) if value is None]
        if gone:
            self._link.command("SREM", f"{self._prefix}:{kind}s", *gone)
        return [value for value in values if value is not None]

    def _load(self, offer: _Offer) -> Tokenizer:
        spec = offer.info.tokenizer
        if not offer.vocabulary:
            return load_tokenizer(spec)
        flat = self._link.command("HGETALL", f"{self._prefix}:tokenizer:{offer.vocabulary}")
        with tempfile.TemporaryDirectory(prefix="nanogpt-vocabulary-") as directory:
            for name, content in pairs(flat):
                (Path(directory) / Path(name).name).write_bytes(content)
            return load_tokenizer(msgspec.structs.replace(spec, directory=directory))
