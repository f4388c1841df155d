"""Every route's work, without a web framework: from bytes and strings to an Answer."""

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Protocol

from nanogpt.api import catalogue, client_socket, docs_page, errors, openapi
from nanogpt.api.admission import Admission
from nanogpt.api.answer import EVENT_STREAM, Answer
from nanogpt.api.assemble import Assembler
from nanogpt.api.backend import Cluster, LiveHandle
from nanogpt.api.caller import Caller
from nanogpt.api.client_socket import Peer
from nanogpt.api.decode import check_content_type, decode
from nanogpt.api.errors import ClientGone
from nanogpt.api.exchange import Exchange
from nanogpt.api.metrics import Metrics
from nanogpt.api.objects import (
    DetokenizeResponse,
    Health,
    ModelList,
    Readiness,
    TokenizeResponse,
)
from nanogpt.api.plan import (
    check_ids,
    encode_prompt,
    find_model,
    real_name,
)
from nanogpt.api.protocol import CompletionRequest, DetokenizeRequest, TokenizeRequest
from nanogpt.api.response import PING, Collected, Stream, encode, event, ranks_header
from nanogpt.api.stream_writer import StreamWriter
from nanogpt.api.tokens import token_text, tokenizer_info
from nanogpt.config import HttpConfig
from nanogpt.errors import ApiError, InvalidRequest, Unavailable
from nanogpt.registry import ModelCard, ModelInfo, find_card
from nanogpt.tokenizer import Tokenizer

CLIENT_GONE = 499  # for the log and the metrics: nobody reads this answer


SPARE_THREADS = 16  # that completions never take: /health answers also when the server is full


class Places:
    """Threads for completions. An exchange has one from submit to close."""

    def __init__(self, threads: int) -> None:
        self._total = threads - min(SPARE_THREADS, threads // 4)
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def are_free(self) -> bool:
        """Whether nobody has one."""
        return self._taken == 0

    def take(self) -> None:
        """Raises Unavailable when all are taken."""
        with self._lock:
            if self._taken >= self._total:
                raise Unavailable(
                    f"{self._total} requests are in progress, and no more are taken; try again soon"
                )
            self._taken += 1

    def give_back(self) -> None:
        with self._lock:
            self._taken -= 1


class Companion(Protocol):
    """What has to drain and close with the service."""

    def drain(self, grace_s: float) -> None:
        """Who waits has so many seconds left. For a signal handler."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in progress there."""

    def close(self) -> None: ...


class Service:
    """Thread-safe: a request's state is its own. The `cards` know other names of models."""

    def __init__(
        self,
        cluster: Cluster,
        settings: HttpConfig,
        admission: Admission,
        cards: Mapping[str, ModelCard],
        clock: Callable[[], float],
    ) -> None:
        self._cluster, self._settings, self._clock = cluster, settings, clock
        self._admission, self._cards = admission, cards
        self.places = Places(settings.threads)
        self.metrics = Metrics(cluster, admission)
        self._end_at = float("inf")  # time.monotonic() after which nobody waits any longer
        self.companion: Companion | None = None  # works on the same cluster, and ends before it

    def drain(self) -> None:
        """Take no new requests; those in progress have `drain_s` left. For a signal handler."""
        if self.companion is not None:
            self.companion.drain(self._settings.drain_s)
        self._cluster.drain()
        self._end_at = min(self._end_at, time.monotonic() + self._settings.drain_s)

    def must_end(self) -> bool:
        """Whether nobody may wait any longer."""
        return time.monotonic() > self._end_at

    def is_drained(self) -> bool:
        """Whether this process may end: all who were accepted, here or by a web server, have their
        answers, or no time."""
        idle = self.places.are_free and (self.companion is None or self.companion.is_idle)
        return idle or self.must_end()

    def close(self) -> None:
        """Close cluster and admission as well."""
        if self.companion is not None:
            self.companion.close()
        self._cluster.close()
        self._admission.close()

    # POST /v1/completions

    def complete(
        self, caller: Caller, request: CompletionRequest, peer: Peer | None, started: float
    ) -> Answer:
        """`peer`: the client, when the server shows it; `started`: time.monotonic()."""
        if request.background:
            raise InvalidRequest(
                "background is not available: this server keeps no jobs; leave it out",
                param="background",
            )
        exchange, handle = self._begin(caller, request, peer, started)
        if not exchange.plan.completion.stream:
            return self._whole(exchange)
        shown = ranks_header(exchange.handle.owners, range(len(exchange.handle.owners)))
        return Answer(
            _stream(exchange, self._pieces(exchange, handle, peer)),
            content_type=EVENT_STREAM,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **_ranks(shown)},
            exchange=exchange,
        )

    def _begin(
        self, caller: Caller, request: CompletionRequest, peer: Peer | None, started: float
    ) -> tuple[Exchange, LiveHandle]:
        """From cheap to dear, so that whoever is turned away costs little."""
        models = self._cluster.models()
        name = real_name(models, request.model, self._cards)
        caller.precheck(request.user, name, request.priority)
        info = caller.find_model(models, name, self._cards)
        tokenizer = self._cluster.tokenizer(info.name)
        with ExitStack() as undo:
            self.places.take()
            undo.callback(self.places.give_back)
            plan = caller.plan(request, info, tokenizer, self._clock)
            assembler = Assembler(plan, tokenizer)
            ticket = caller.admit(plan)
            undo.callback(ticket.settle, 0, 0)
            handle = self._cluster.submit(plan.request)
            undo.pop_all()

        def must_end() -> bool:
            caller.check_still_allowed()
            return self.must_end()

        def on_close(prompt_tokens: int, completion_tokens: int) -> None:
            self.places.give_back()
            ticket.settle(prompt_tokens, completion_tokens)

        exchange = Exchange(
            plan,
            handle,
            assembler,
            self.metrics,
            started=started,
            is_client_gone=client_socket.watch(peer),
            must_end=must_end,
            on_close=on_close,
            queue_timeout_s=self._settings.queue_timeout_s,
        )
        return exchange, handle

    def _pieces(self, exchange: Exchange, handle: LiveHandle, peer: Peer | None) -> Iterator[bytes]:
        """The events that the caller has to send itself; none where the socket may be written to
        by the thread that does so for all streams."""
        stream = Stream(exchange.plan)
        if peer is not None and peer.is_chunked:
            self._writer.follow(exchange, handle, stream, peer.socket)
            return
        for deltas in exchange.deltas():
            if deltas is None:
                yield PING
            elif deltas:
                yield stream.chunks(deltas)
        yield stream.end(exchange.assembler)

    @functools.cached_property
    def _writer(self) -> StreamWriter:
        return StreamWriter()

    def _whole(self, exchange: Exchange) -> Answer:
        try:
            collected = Collected(exchange.plan)
            for deltas in exchange.deltas():
                collected.add(deltas or ())
        except ClientGone:
            return Answer(b"", CLIENT_GONE, exchange=exchange)
        finally:
            exchange.close()
        chosen = exchange.assembler.best(exchange.plan.completion.n)
        completion = collected.completion(exchange.assembler, chosen)
        shown = ranks_header(exchange.handle.owners, chosen)
        return Answer(encode(completion), headers=_ranks(shown), exchange=exchange)

    # Models and their tokenizers

    def models(self, caller: Caller) -> Answer:
        loaded = self._cluster.models()
        known, states = self._known(caller, loaded), self._cluster.model_states()
        return Answer(encode(ModelList(catalogue.listed(*known, loaded, states))))

    def model(self, caller: Caller, name: str) -> Answer:
        loaded = self._cluster.models()
        infos, cards = self._known(caller, loaded)
        real = real_name(loaded, name, self._cards)
        card = find_card(real, cards)
        if real not in infos and card is not None:
            return Answer(encode(catalogue.not_offered(card)))
        info, states = find_model(infos, real), self._cluster.model_states()
        return Answer(encode(catalogue.offered(info, self._cards, states)))

    def _known(
        self, caller: Caller, loaded: Mapping[str, ModelInfo]
    ) -> tuple[dict[str, ModelInfo], dict[str, ModelCard]]:
        """What the key may use of what is served, and of what could be."""
        visible = caller.visible
        return visible(loaded, self._cards), visible(self._cards, self._cards)

    def tokenize(self, caller: Caller, body: bytes, content_type: str | None) -> Answer:
        check_content_type(content_type)
        request = decode(body, TokenizeRequest)
        info, tokenizer = self._model_or_only(caller, request.model)
        caller.count_request(info.name)
        ids = list(encode_prompt(request.prompt, info, tokenizer)) if request.prompt else []
        strings = [token_text(tokenizer, i) for i in ids] if request.return_token_strs else None
        return Answer(encode(TokenizeResponse(len(ids), info.context_length, ids, strings)))

    def detokenize(self, caller: Caller, body: bytes, content_type: str | None) -> Answer:
        check_content_type(content_type)
        request = decode(body, DetokenizeRequest)
        info, tokenizer = self._model_or_only(caller, request.model)
        caller.count_request(info.name)
        check_ids(request.tokens, info, "tokens")
        return Answer(encode(DetokenizeResponse(tokenizer.decode(request.tokens))))

    def tokenizer_info(self, caller: Caller, name: str | None) -> Answer:
        return Answer(encode(tokenizer_info(*self._model_or_only(caller, name))))

    def _model_or_only(self, caller: Caller, name: str | None) -> tuple[ModelInfo, Tokenizer]:
        models = caller.visible(self._cluster.models(), self._cards)
        if name is None and len(models) > 1:
            raise InvalidRequest(
                f"model is missing, and there are several: {', '.join(sorted(models))}",
                param="model",
            )
        info = self._find(caller, name if name is not None else next(iter(models), ""))
        return info, self._cluster.tokenizer(info.name)

    def _find(self, caller: Caller, name: str) -> ModelInfo:
        models = self._cluster.models()
        return caller.find_model(models, real_name(models, name, self._cards), self._cards)

    # Operations

    def health(self) -> Answer:
        """This process answers; whether a model does is `ready`."""
        return Answer(encode(Health()))

    def ready(self) -> Answer:
        status = self._cluster.status()
        body = Readiness(
            ready=status.ready,
            draining=status.draining,
            epoch=status.epoch,
            ranks=status.ranks,
            detail=status.detail,
            models=sorted(self._cluster.models()),
        )
        return Answer(encode(body), 200 if status.ready else 503)

    def openapi(self) -> Answer:
        return Answer(self._openapi)

    def docs(self) -> Answer:
        headers = {"Content-Security-Policy": docs_page.SECURITY_POLICY}
        return Answer(self._docs, content_type="text/html; charset=utf-8", headers=headers)

    @functools.cached_property
    def _openapi(self) -> bytes:
        return encode(openapi.document())

    @functools.cached_property
    def _docs(self) -> bytes:
        return docs_page.render(openapi.document()).encode()


def _ranks(shown: str | None) -> dict[str, str]:
    return {} if shown is None else {"x-nanogpt-ranks": shown}


def _stream(exchange: Exchange, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The body of an event stream. After its first byte an error can only be an event."""
    yield b""  # has the headers sent at once
    try:
        yield from pieces
    except ClientGone:
        return
    except (BlockingIOError, ConnectionError):  # nothing more can be told on this connection
        raise
    except ApiError as error:
        yield event(error.body())
    except Exception as error:
        yield event(errors.unexpected(error).body())
    finally:
        exchange.close()
