"""Everything that crosses a process border, as typed and frozen messages in msgpack.

    front end ──Welcome, Submit, Cancel──► rank 0 ──Frame (broadcast)──► every rank
    front end ──LoadModel, UnloadModel──► likewise
    front end ◄──Hello, Alive── rank 0
    front end ◄──RankReady, EventBatch, Beat── every rank
    front end ◄──ModelLoaded, ModelFailed, ModelUnloaded── every rank

`epoch` numbers one incarnation of the worker group as one front end knows it. The front end
grants it in answer to Hello; whatever carries an older one is out of date and dropped.
Sizes are bounded before decoding, so that a peer can't make a process allocate at will.
"""

from typing import Generic, TypeVar

import msgspec

from nanogpt.errors import NanogptError
from nanogpt.registry import ModelInfo
from nanogpt.request import (
    EngineEvent,
    EngineStats,
    GenerateRequest,
    PromptScored,
    RequestFailed,
    TokenEvent,
)

PROTOCOL_VERSION = 2
MAX_MESSAGE_BYTES = 64 * 2**20  # a full batch of prompts is under 20 MiB


class ProtocolError(NanogptError):
    """A peer sent what is not a message of this version."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Base of all messages: an array whose first element is the class's name."""


# Rank 0 to the front end


class Hello(Message, frozen=True):
    """A worker group has loaded what it begins with, and asks for an epoch.

    `models` are all that it can serve, in memory or not. `needs` are the bytes of weights and KV
    that each of them takes on a rank (empty: they are all there, and stay), and `budget` those for
    all that are in memory at once (0: there is no limit).
    """

    version: int
    world_size: int
    models: tuple[ModelInfo, ...]
    pid: int
    needs: tuple[int, ...] = ()
    budget: int = 0


class Alive(Message, frozen=True):
    """Rank 0 is there; `epoch` is the one it believes in (0: none yet)."""

    epoch: int


# The front end to rank 0


class Welcome(Message, frozen=True):
    """The epoch of the group, and where its ranks send events.

    `local_events` is an ipc endpoint. With several nodes there are a tcp endpoint and CURVE keys
    (Z85 text) for ranks on other nodes: the server's public key and a client key pair.
    """

    epoch: int
    local_events: str
    remote_events: str = ""
    server_key: str = ""
    client_public: str = ""
    client_secret: str = ""


class Submit(Message, frozen=True):
    epoch: int
    request: GenerateRequest


class Cancel(Message, frozen=True):
    """Stop one choice of a request, or all of them when `index` is None."""

    epoch: int
    request_id: str
    index: int | None = None


class LoadModel(Message, frozen=True):
    """Every rank is to have this model in memory, and answers when it has."""

    epoch: int
    model: str


class UnloadModel(Message, frozen=True):
    """No rank is to have this model in memory, and each answers when it has given that back."""

    epoch: int
    model: str


class Introduce(Message, frozen=True):
    """The front end doesn't know this worker group: say Hello (again)."""


Command = Welcome | Submit | Cancel | LoadModel | UnloadModel
ToRankZero = Command | Introduce
FromRankZero = Hello | Alive


class Frame(Message, frozen=True):
    """One broadcast from rank 0: all that was queued, in order, or as much of it as fits.

    The epoch of the group changes with a Welcome among the commands.
    """

    tick: int
    commands: tuple[Command, ...]


# Every rank to the front end


class RankReady(Message, frozen=True):
    """This rank has joined the epoch and takes requests.

    `before`: how the process ended whose place it took, as an exit code or the negative number of
    a signal; 0 when there was none. `models` are those that it has in memory.
    """

    epoch: int
    rank: int
    node: int
    pid: int
    before: int = 0
    models: tuple[str, ...] = ()


class ModelLoaded(Message, frozen=True):
    """This rank has the model in memory, after so many seconds of loading."""

    epoch: int
    rank: int
    info: ModelInfo
    seconds: float


class ModelFailed(Message, frozen=True):
    """This rank can't load the model."""

    epoch: int
    rank: int
    model: str
    message: str


class ModelUnloaded(Message, frozen=True):
    """This rank no longer has the model in memory."""

    epoch: int
    rank: int
    model: str


class EventBatch(Message, frozen=True):
    """What one engine step brought forth."""

    epoch: int
    rank: int
    tokens: tuple[TokenEvent, ...] = ()
    scored: tuple[PromptScored, ...] = ()
    failed: tuple[RequestFailed, ...] = ()

    @classmethod
    def of(cls, epoch: int, rank: int, events: list[EngineEvent]) -> "EventBatch":
        kinds: dict[type, list] = {TokenEvent: [], PromptScored: [], RequestFailed: []}
        for event in events:
            kinds[type(event)].append(event)
        return cls(epoch, rank, *map(tuple, kinds.values()))


class Beat(Message, frozen=True):
    """Sent each second by a thread of its own: the process is alive. Whether its loop turns is for
    its parent to see (respawn.py). `sent`: how many other messages the rank has sent in this epoch,
    so that one that is lost on its way is missed."""

    epoch: int
    rank: int
    stats: tuple[EngineStats, ...] = ()
    sent: int = 0


ModelAnswer = ModelLoaded | ModelFailed | ModelUnloaded
FromRank = RankReady | EventBatch | Beat | ModelAnswer

M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


class Decoder(Generic[M]):
    """Decodes one union of messages, and nothing else; ProtocolError for all that isn't one."""

    def __init__(self, kind: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(kind)

    def __call__(self, data: bytes | memoryview) -> M:
        if len(data) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"message of {len(data)} bytes, limit {MAX_MESSAGE_BYTES}")
        try:
            return self._decoder.decode(data)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"not a message of version {PROTOCOL_VERSION}: {error}") from error
