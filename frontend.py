"""The front end: a Flask application under gunicorn, in a process of its own below rank 0.

One gunicorn worker with many threads serves all connections; the master keeps the listening
socket when the worker dies. The application, with its cluster client and threads, is made in the
worker, since neither sockets of ZeroMQ nor threads survive a fork.
"""

import contextlib
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import flask
from gunicorn import glogging
from gunicorn.app.base import BaseApplication
from gunicorn.http import errors as malformed
from gunicorn.workers.gthread import ThreadWorker
from werkzeug.exceptions import (
    ClientDisconnected,
    HTTPException,
    MethodNotAllowed,
    RequestEntityTooLarge,
)
from werkzeug.routing import BaseConverter

from nanogpt import log as logging_setup
from nanogpt import options
from nanogpt.api import cors, errors, metrics
from nanogpt.api.admission import Admission
from nanogpt.api.answer import JSON, Answer
from nanogpt.api.backend import Cluster
from nanogpt.api.caller import Caller
from nanogpt.api.decode import clip
from nanogpt.api.listener import allow_files, listen
from nanogpt.api.operators import Operators
from nanogpt.api.service import Service
from nanogpt.cluster.client import ClusterStatus
from nanogpt.cluster.connect import connect
from nanogpt.cluster.keeper import LOCK, OWNER_VARIABLE
from nanogpt.config import HttpConfig
from nanogpt.errors import ApiError, InvalidRequest, StartupError
from nanogpt.registry import ModelCard, ModelInfo, read_cards
from nanogpt.rundir import RunDir

log = logging.getLogger("frontend")

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


KEYLESS = {"/health", "/ready"}  # routes for whoever watches the process


class _AnyText(BaseConverter):
    """What a percent-encoded piece of a path may stand for: also slashes and line ends."""

    regex = "(?s:.+)"
    part_isolating = False


def create_app(
    cluster: Cluster,
    settings: HttpConfig,
    admission: Admission,
    cards: Mapping[str, ModelCard],
    clock: Callable[[], float] = time.time,
) -> flask.Flask:
    """The application. `clock` gives the seconds since the epoch that answers carry."""
    app = flask.Flask("nanogpt", static_folder=None)
    # One byte more than allowed: a body in chunks is cut there in silence, so _body can see it.
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_mib * 2**20 + 1
    app.url_map.merge_slashes = False
    app.url_map.converters["any_text"] = _AnyText
    service = Service(cluster, settings, admission, cards, clock)
    app.extensions["nanogpt"] = service
    _add_routes(app, service)
    _add_admin_routes(app, Operators(admission))
    _add_errors(app)
    _add_headers(app, service, admission, settings)
    return app


def _add_routes(app: flask.Flask, service: Service) -> None:
    request = flask.request

    @app.post("/v1/completions")
    def completions() -> flask.Response:
        peer = request.environ.get("gunicorn.socket")
        g = flask.g
        return _response(service.complete(g.caller, _body(), request.content_type, peer, g.started))

    @app.get("/v1/models")
    def models() -> flask.Response:
        return _response(service.models(flask.g.caller))

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> flask.Response:
        return _response(service.model(flask.g.caller, name))

    @app.post("/tokenize")
    def tokenize() -> flask.Response:
        return _response(service.tokenize(flask.g.caller, _body(), request.content_type))

    @app.post("/detokenize")
    def detokenize() -> flask.Response:
        return _response(service.detokenize(flask.g.caller, _body(), request.content_type))

    @app.get("/tokenizer_info")
    def tokenizer_info() -> flask.Response:
        return _response(service.tokenizer_info(flask.g.caller, request.args.get("model")))

    @app.get("/health")
    def health() -> flask.Response:
        return _response(service.health())

    @app.get("/ready")
    def ready() -> flask.Response:
        return _response(service.ready())

    @app.get("/metrics")
    def metrics_text() -> flask.Response:
        return _response(Answer(service.metrics.render(), content_type=metrics.CONTENT_TYPE))

    @app.get("/openapi.json")
    def openapi() -> flask.Response:
        return _response(service.openapi())

    @app.get("/docs")
    def docs() -> flask.Response:
        return _response(service.docs())


def _add_admin_routes(app: flask.Flask, operators: Operators) -> None:
    request = flask.request

    @app.get("/admin/users")
    def blocked() -> flask.Response:
        _only_key(allowed=False)
        return _response(operators.blocked())

    @app.post("/admin/users/<any_text:user>/ban")
    def ban_user(user: str) -> flask.Response:
        by, key = flask.g.caller.name, _only_key()
        return _response(operators.ban(_body(), request.content_type, user=user, key=key, by=by))

    @app.post("/admin/users/<any_text:user>/unban")
    def unban_user(user: str) -> flask.Response:
        key = _only_key()
        return _response(operators.unban(_body(), user=user, key=key, by=flask.g.caller.name))

    @app.get("/admin/users/<any_text:user>/explain")
    def explain_user(user: str) -> flask.Response:
        return _response(operators.explain(user=user, key=_only_key()))

    @app.post("/admin/keys/<key>/ban")
    def ban_key(key: str) -> flask.Response:
        _only_key(allowed=False)
        by = flask.g.caller.name
        return _response(operators.ban(_body(), request.content_type, key=key, by=by))

    @app.post("/admin/keys/<key>/unban")
    def unban_key(key: str) -> flask.Response:
        _only_key(allowed=False)
        return _response(operators.unban(_body(), key=key, by=flask.g.caller.name))

    @app.get("/admin/keys/<key>/explain")
    def explain_key(key: str) -> flask.Response:
        _only_key(allowed=False)
        return _response(operators.explain(key=key))


def _only_key(*, allowed: bool = True) -> str:
    """The parameter `key` of the query; a wrong one would ban, or free, more than was meant."""
    known = {"key"} if allowed else set()
    for name in flask.request.args:
        if name not in known:
            hint = "; known is: key" if known else ""
            raise InvalidRequest(f"unknown query parameter {clip(name)!r}{hint}", param=clip(name))
    return flask.request.args.get("key", "")


def _body() -> bytes:
    body = flask.request.get_data(cache=False)
    if len(body) >= flask.current_app.config["MAX_CONTENT_LENGTH"]:
        raise RequestEntityTooLarge
    return body


def _response(answer: Answer) -> flask.Response:
    response = flask.Response(
        answer.body, answer.status, answer.headers, content_type=answer.content_type
    )
    if answer.exchange is not None:
        response.call_on_close(answer.exchange.close)
        flask.g.exchange = answer.exchange
    return response


def _error_response(error: ApiError) -> flask.Response:
    flask.g.caller.refused(error)
    return flask.Response(errors.body(error), error.status, error.headers, content_type=JSON)


def _add_errors(app: flask.Flask) -> None:
    request = flask.request

    @app.errorhandler(ApiError)
    def api_error(error: ApiError) -> flask.Response:
        return _error_response(error)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> flask.Response:
        description = error.description or "the request could not be served"
        if isinstance(error, ClientDisconnected):
            error.code = HTTPStatus.REQUEST_TIMEOUT
            description = "the body did not arrive in time; send it without pauses"
        if isinstance(error, RequestEntityTooLarge):
            limit = app.config["MAX_CONTENT_LENGTH"] // 2**20
            description = f"the body is over {limit} MiB; send less, or split the request"
        allowed = ""
        if isinstance(error, MethodNotAllowed):
            allowed = ", ".join(sorted(error.valid_methods or ()))
        return _error_response(
            errors.from_status(
                error.code or 500,
                description,
                method=request.method,
                path=request.path,
                allowed=allowed,
            )
        )

    @app.errorhandler(Exception)
    def other_error(error: Exception) -> flask.Response:
        return _error_response(errors.unexpected(error))


def _add_headers(
    app: flask.Flask, service: Service, admission: Admission, settings: HttpConfig
) -> None:
    request = flask.request

    @app.before_request
    def begin() -> None:
        flask.g.started = time.monotonic()
        given = request.headers.get("x-request-id", "")
        sane = _SANE_ID.fullmatch(given)
        flask.g.request_id = given if sane else _new_id()
        flask.g.caller = Caller(admission, flask.g.request_id)
        if request.method != "OPTIONS" and request.path not in KEYLESS:
            admin = request.path == "/admin" or request.path.startswith("/admin/")
            flask.g.caller.authenticate(request.headers.get("Authorization"), admin=admin)

    @app.after_request
    def finish(response: flask.Response) -> flask.Response:
        elapsed_ms = (time.monotonic() - flask.g.started) * 1000
        response.headers["x-request-id"] = flask.g.request_id
        response.headers["openai-processing-ms"] = str(round(elapsed_ms))
        response.headers["X-Content-Type-Options"] = "nosniff"
        for name, value in flask.g.caller.headers().items():
            response.headers[name] = value
        _allow_origin(response, settings.cors_origins)
        route = request.url_rule.rule if request.url_rule else "none"
        service.metrics.requests.labels(route, str(response.status_code)).inc()
        _log_when_sent(response)
        return response


def _new_id() -> str:
    return f"req_{secrets.token_hex(16)}"


def _allow_origin(response: flask.Response, origins: tuple[str, ...]) -> None:
    request = flask.request
    found = cors.headers(
        origins,
        request.headers.get("Origin"),
        preflight=request.method == "OPTIONS",
        methods=response.headers.get("Allow", ""),
        asked=request.headers.get("Access-Control-Request-Headers"),
    )
    for name, value in found.items():
        response.headers[name] = value


def _log_when_sent(response: flask.Response) -> None:
    """One line for each request, when its answer has been sent."""
    g, request = flask.g, flask.request
    started, request_id, exchange = g.started, g.request_id, g.get("exchange")
    head = f"{request.method} {request.path[:200]} {response.status_code}"
    level = logging.DEBUG if request.method == "GET" else logging.INFO

    def write() -> None:
        elapsed_ms = (time.monotonic() - started) * 1000
        tail = f" {exchange.summary()}" if exchange is not None else ""
        log.log(level, "%s %.0f ms request_id=%s%s", head, elapsed_ms, request_id, tail)

    response.call_on_close(write)


# gunicorn

KEEPALIVE_S = 75  # above the 60 s of common proxies, so that they close first
MAX_IDLE_CONNECTIONS = 2048  # beyond those that are served; they cost no thread
# All threads that wait for the interpreter lock wake up this often to ask for it. Ours hold it for
# microseconds between system calls, so asking is only work: at 512 streams of 20 events a second
# the default of 5 ms takes a third more CPU time, and falls behind where 20 ms keeps up.
SWITCH_INTERVAL_S = 0.02
GRACE_S = 3.0  # beyond drain_s, for the last answers to go out; the launcher waits 5


SPARE_FILES = 512  # for all that is not a connection


class _Logger(glogging.Logger):
    """Leaves gunicorn's messages to the handlers of this process."""

    def exception(self, msg: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(sys.exc_info()[1], BlockingIOError):  # one of the two timeouts
            log.info("closed the connection of a client that stalled")
        else:
            super().exception(msg, *args, **kwargs)

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


class Worker(ThreadWorker):
    """Drains on SIGTERM, and answers in JSON when a request is not even HTTP."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.alive and self.app.service is not None:
            self.app.service.drain()
        super().handle_exit(sig, frame)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        ours = (malformed.InvalidResponseHeader, malformed.InvalidResponseHeaderName)
        if isinstance(exc, malformed.ParseException) and not isinstance(exc, ours):
            text = f"the request is not valid HTTP/1.1: {clip(str(exc))}"
            error = errors.from_status(_PARSE_STATUS.get(type(exc), 400), text)
        else:
            error = errors.unexpected(exc)
        body = errors.body(error)
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            f"Content-Type: {JSON}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
            f"x-request-id: {_new_id()}\r\nopenai-processing-ms: 0\r\n\r\n"
        )
        log.info("malformed request from %s: %s", addr[0] if addr else "-", exc)
        with contextlib.suppress(OSError):  # the client may be gone, and that is all right
            client.settimeout(1.0)
            client.sendall(head.encode("latin-1") + body)


_PARSE_STATUS = {
    malformed.LimitRequestLine: 414,
    malformed.LimitRequestHeaders: 431,
    malformed.UnsupportedTransferCoding: 501,
    malformed.ExpectationFailed: 417,
}


class _Application(BaseApplication):
    """gunicorn with our settings; the worker makes the application."""

    def __init__(
        self, listener: socket.socket, make_app: Callable[[], flask.Flask], settings: HttpConfig
    ) -> None:
        self._listener, self._make_app, self._settings = listener, make_app, settings
        self.service: Service | None = None
        super().__init__()

    def load_config(self) -> None:
        threads = self._settings.threads
        connections = allow_files(threads + MAX_IDLE_CONNECTIONS + SPARE_FILES) - SPARE_FILES
        values = {
            "bind": f"fd://{self._listener.detach()}",
            "worker_class": Worker,
            "workers": 1,
            "threads": threads,
            "worker_connections": max(connections, threads),
            "keepalive": KEEPALIVE_S,
            "timeout": 60,  # of silence of the worker's main thread
            "graceful_timeout": math.ceil(self._settings.drain_s + GRACE_S),
            "limit_request_line": 8190,
            "limit_request_fields": 100,
            "limit_request_field_size": 16384,
            "worker_tmp_dir": "/dev/shm" if os.path.isdir("/dev/shm") else None,
            "logger_class": _Logger,
            "loglevel": "warning",
            "control_socket_disable": True,
            "proc_name": "nanogpt-frontend",
            "worker_exit": lambda server, worker: self._close(),
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> flask.Flask:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        app = self._make_app()
        self.service = app.extensions["nanogpt"]
        return app

    def _close(self) -> None:
        if self.service is not None:
            self.service.close()


def serve(
    listener: socket.socket, make_app: Callable[[], flask.Flask], settings: HttpConfig
) -> None:
    """Answer on this socket until SIGTERM. `make_app` is called in the worker process."""
    _Application(listener, make_app, settings).run()


def main(argv: list[str]) -> int:
    """What rank 0 starts, with its own options: see nanogpt/cluster/keeper.py."""
    config = options.parse_or_exit(argv)
    logging_setup.set_up(config.log_level, "front end")
    run_dir = RunDir.open(config.host, config.port)
    if not run_dir.lock(LOCK):
        log.info("another front end is alive: leaving it to that one")
        return 0
    owner_pid = int(os.environ[OWNER_VARIABLE])

    def ready(status: ClusterStatus, models: dict[str, ModelInfo]) -> None:
        host = f"[{config.host}]" if ":" in config.host else config.host
        names = ", ".join(sorted(models))
        print(
            f"ready: http://{host}:{config.port}  models: {names}  ranks: {status.ranks}",
            flush=True,
        )

    def orphaned() -> None:
        log.error("the launcher is gone: leaving too")
        os.kill(os.getppid(), signal.SIGQUIT)  # the master: at once, since nobody generates

    def make_app() -> flask.Flask:
        admission = Admission(config.admission, os.environ)
        cluster = connect(
            config, run_dir, owner_pid=owner_pid, on_ready=ready, on_orphaned=orphaned
        )
        return create_app(cluster, config.http, admission, cards)

    try:
        cards = read_cards()
        # Opened for a moment only: a mistake is told here, and nothing open survives a fork.
        Admission(config.admission, os.environ).close()
        serve(listen(config.host, config.port), make_app, config.http)
    except StartupError as error:
        run_dir.set_fatal(str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
