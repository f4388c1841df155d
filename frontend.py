"""The front end: a Flask application under gunicorn, in a process of its own below rank 0."""

import ipaddress
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path

import flask
from werkzeug.exceptions import (
    ClientDisconnected,
    HTTPException,
    MethodNotAllowed,
    RequestEntityTooLarge,
)
from werkzeug.routing import BaseConverter, WebsocketMismatch

from nanogpt import log as logging_setup
from nanogpt import options
from nanogpt.api import cors, errors, metrics
from nanogpt.api.admission import Admission
from nanogpt.api.answer import JSON, Answer, new_request_id
from nanogpt.api.backend import Cluster, Residents
from nanogpt.api.caller import Caller
from nanogpt.api.client_socket import Peer
from nanogpt.api.decode import clip
from nanogpt.api.jobs import once
from nanogpt.api.jobs.batches import BatchRoutes
from nanogpt.api.jobs.files import FileRoutes
from nanogpt.api.jobs.remote import RemoteCluster
from nanogpt.api.jobs.stored import Stored
from nanogpt.api.jobs.upload import FRAME_BYTES
from nanogpt.api.listener import listen
from nanogpt.api.openapi import OPERATIONS
from nanogpt.api.operators import Operators
from nanogpt.api.residents import Command, ResidentRoutes
from nanogpt.api.server import allow_time, malformed_request, serve
from nanogpt.api.service import Service
from nanogpt.cluster.client import ClusterClient, ClusterStatus
from nanogpt.cluster.connect import connect
from nanogpt.cluster.keeper import LOCK, OWNER_VARIABLE
from nanogpt.config import EngineConfig, HttpConfig, Role, ServeConfig
from nanogpt.errors import ApiError, InvalidRequest, StartupError, UnsupportedMediaType
from nanogpt.jobs.announce import Announcer, Listener
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.shared import open_shared
from nanogpt.jobs.sqlite import SqliteStore, open_store
from nanogpt.jobs.store import Store, StoreUnavailable
from nanogpt.jobs_config import JobsConfig
from nanogpt.registry import ModelCard, ModelInfo, read_cards
from nanogpt.rundir import RunDir

log = logging.getLogger("frontend")

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


UPLOAD_BYTES_S = 100_000  # the slowest upload of a file that is waited for
KEYLESS = {"/health", "/ready"}  # routes for whoever watches the process
KEYED = frozenset(o.path for o in OPERATIONS if o.once)  # routes that take an Idempotency-Key


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
    jobs: tuple[Store, Path, JobsConfig] | None = None,
    role: Role = "all",
    announcer: Announcer | None = None,
    residents: Residents | None = None,
    max_num_seqs: int = EngineConfig().max_num_seqs,
) -> flask.Flask:
    """The application. `clock` gives the seconds since the epoch that answers carry; `jobs` is what
    keeps work for later, and is closed with the Service; `residents` are the cluster's models,
    where this process decides about them; `max_num_seqs`: choices that a rank runs at once."""
    app = flask.Flask("nanogpt", static_folder=None)
    # One byte more than allowed: a body in chunks is cut there in silence, so _body can see it.
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_mib * 2**20 + 1
    app.url_map.merge_slashes = False
    app.url_map.converters["any_text"] = _AnyText
    service = Service(cluster, settings, admission, cards, clock)
    app.extensions["nanogpt"] = service
    _add_watching(app, service)
    if role != "worker":
        _add_routes(app, service)
    if jobs is None:
        _add_completions(app, service)
    else:
        stored = Stored(
            service,
            *jobs,
            cluster=cluster,
            admission=admission,
            cards=cards,
            max_body_bytes=settings.max_body_mib * 2**20,
            max_num_seqs=max_num_seqs,
            clock=clock,
            announcer=announcer,
        )
        if role != "worker":
            _add_stored_completions(app, stored)
            _add_files(app, stored.files, jobs[2].max_file_mb * 10**6 + FRAME_BYTES)
            _add_batches(app, stored.batches)
        if role != "web":
            stored.start()
    if role != "worker":
        _add_admin_routes(app, Operators(admission))
    if residents is not None:
        _add_resident_routes(app, ResidentRoutes(residents, cards, clock))
    _add_errors(app)
    _add_headers(app, service, admission, settings, KEYED if jobs is not None else frozenset())
    return app


def _add_completions(app: flask.Flask, service: Service) -> None:
    @app.post("/v1/completions")
    def completions() -> flask.Response:
        caller = flask.g.caller
        asked = caller.read_completion(_body(), flask.request.content_type)
        return _response(service.complete(caller, asked, _peer(), flask.g.started))


def _add_stored_completions(app: flask.Flask, stored: Stored) -> None:
    request, route = flask.request, "/v1/completions/<id>"

    @app.post("/v1/completions")
    def completions() -> flask.Response:
        caller, started, key = flask.g.caller, flask.g.started, request.headers.get(once.HEADER)
        kind, body = request.content_type, _body()
        return _response(stored.completions.create(caller, body, kind, _peer(), started, key))

    @app.get(route)
    def stored_completion(id: str) -> flask.Response:
        arguments = _query({"stream", "starting_after"})
        return _response(
            stored.completions.show(
                flask.g.caller,
                id,
                stream=arguments.get("stream"),
                starting_after=arguments.get("starting_after"),
                peer=_peer(),
            )
        )

    @app.delete(route)
    def delete_completion(id: str) -> flask.Response:
        return _response(stored.completions.delete(flask.g.caller, id))

    @app.post(f"{route}/cancel")
    def cancel_completion(id: str) -> flask.Response:
        return _response(stored.completions.cancel(flask.g.caller, id))


def _add_files(app: flask.Flask, files: FileRoutes, max_bytes: int) -> None:
    request = flask.request

    @app.post("/v1/files")
    def create_file() -> flask.Response:
        request.max_content_length = max_bytes
        size = min(request.content_length or max_bytes, max_bytes)
        allow_time(request.environ.get("gunicorn.socket"), size / UPLOAD_BYTES_S)
        kind, key = request.content_type, request.headers.get(once.HEADER)
        return _response(files.create(flask.g.caller, request.stream, kind, key))

    @app.get("/v1/files")
    def list_files() -> flask.Response:
        query = _query({"after", "limit", "order", "purpose"})
        return _response(files.list(flask.g.caller, query))

    @app.get("/v1/files/<id>")
    def get_file(id: str) -> flask.Response:
        return _response(files.get(flask.g.caller, id))

    @app.get("/v1/files/<id>/content")
    def file_content(id: str) -> flask.Response:
        return _response(files.content(flask.g.caller, id))

    @app.delete("/v1/files/<id>")
    def delete_file(id: str) -> flask.Response:
        return _response(files.delete(flask.g.caller, id))


def _add_batches(app: flask.Flask, batches: BatchRoutes) -> None:
    request = flask.request

    @app.post("/v1/batches")
    def create_batch() -> flask.Response:
        key = request.headers.get(once.HEADER)
        return _response(batches.create(flask.g.caller, _body(), request.content_type, key))

    @app.get("/v1/batches")
    def list_batches() -> flask.Response:
        return _response(batches.list(flask.g.caller, _query({"after", "limit"})))

    @app.get("/v1/batches/<id>")
    def get_batch(id: str) -> flask.Response:
        return _response(batches.get(flask.g.caller, id))

    @app.post("/v1/batches/<id>/cancel")
    def cancel_batch(id: str) -> flask.Response:
        return _response(batches.cancel(flask.g.caller, id))


def _peer() -> Peer | None:
    """The client, where the server shows its socket."""
    environ = flask.request.environ
    socket = environ.get("gunicorn.socket")
    return None if socket is None else Peer(socket, environ["SERVER_PROTOCOL"] == "HTTP/1.1")


def _add_watching(app: flask.Flask, service: Service) -> None:
    @app.get("/health")
    def health() -> flask.Response:
        return _response(service.health())

    @app.get("/ready")
    def ready() -> flask.Response:
        return _response(service.ready())

    @app.get("/metrics")
    def metrics_text() -> flask.Response:
        return _response(Answer(service.metrics.render(), content_type=metrics.CONTENT_TYPE))


def _add_routes(app: flask.Flask, service: Service) -> None:
    request = flask.request

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


def _add_resident_routes(app: flask.Flask, residents: ResidentRoutes) -> None:
    @app.get("/admin/models")
    def resident_models() -> flask.Response:
        _only_key(allowed=False)
        return _response(residents.listed())

    commands: tuple[Command, ...] = ("load", "unload", "pin", "unpin")
    for command in commands:

        def order(id: str, command: Command = command) -> flask.Response:
            _only_key(allowed=False)
            return _response(residents.order(command, id, _body(), flask.g.caller.name))

        rule = f"/admin/models/<any_text:id>/{command}"
        app.add_url_rule(rule, f"{command}_model", order, methods=["POST"])


def _only_key(*, allowed: bool = True) -> str:
    """The parameter `key` of the query; a wrong one would ban, or free, more than was meant."""
    return _query({"key"} if allowed else set()).get("key", "")


def _query(known: set[str]) -> dict[str, str]:
    """The parameters of the query. Raises InvalidRequest for one that isn't known, or is there
    twice."""
    for name, values in flask.request.args.lists():
        if len(values) > 1:
            raise InvalidRequest(f"{clip(name)} is there twice", param=clip(name))
        if name not in known:
            hint = f"; known: {', '.join(sorted(known))}" if known else ""
            raise InvalidRequest(f"unknown query parameter {clip(name)!r}{hint}", param=clip(name))
    return flask.request.args.to_dict()


def _body() -> bytes:
    encoding = flask.request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(
            f"Content-Encoding {clip(encoding, 40)!r} is not supported; send the body as it is"
        )
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
        if isinstance(error, WebsocketMismatch):
            description = "there are no WebSockets here; for tokens as they come set stream to true"
        if isinstance(error, RequestEntityTooLarge):
            limit = (request.max_content_length or 0) // 2**20
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
        return _error_response(malformed_request(error) or errors.unexpected(error))


def _add_headers(
    app: flask.Flask,
    service: Service,
    admission: Admission,
    settings: HttpConfig,
    taking_keys: frozenset[str],
) -> None:
    request = flask.request

    @app.before_request
    def begin() -> None:
        flask.g.started = time.monotonic()
        given = request.headers.get("x-request-id", "")
        sane = _SANE_ID.fullmatch(given)
        flask.g.request_id = given if sane else new_request_id()
        flask.g.caller = Caller(admission, flask.g.request_id)
        if request.method != "OPTIONS" and request.path not in KEYLESS:
            admin = request.path == "/admin" or request.path.startswith("/admin/")
            flask.g.caller.authenticate(request.headers.get("Authorization"), admin=admin)
        if request.method == "POST" and request.path not in taking_keys:
            once.refuse(request.path, request.headers.get(once.HEADER))

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


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _store(config: ServeConfig) -> SqliteStore | RedisStore:
    """Where jobs are kept. Raises StartupError, ConfigError."""
    if config.queue.url:
        return open_shared(config.queue, config.jobs)
    return open_store(config.jobs, config.jobs.directory(config.port))


def _admission(config: ServeConfig) -> Admission:
    return Admission(config.shared_admission, os.environ, queue=config.queue.name)


def _check(config: ServeConfig) -> None:
    """Open for a moment what the application will: a mistake is told here, and nothing open
    survives a fork. A queue that is away may come back."""
    _admission(config).close()
    store = _store(config)
    try:
        store.check()
    except StoreUnavailable as error:
        log.error("%s", error)
    finally:
        store.close()


def _announcer(
    config: ServeConfig, store: SqliteStore | RedisStore, cluster: Cluster
) -> Announcer | None:
    if isinstance(store, SqliteStore) or config.role == "web":
        return None

    def models() -> Mapping[str, ModelInfo]:
        return cluster.models() if cluster.ready() else {}

    return Announcer(store.link, config.queue.name, models, lambda: cluster.status().ranks)


def _remote(config: ServeConfig, store: RedisStore) -> Cluster:
    """The clusters behind the queue."""
    listener = Listener(store.link, config.queue.name)
    cluster = RemoteCluster(store, listener, max_outstanding=config.cluster.max_outstanding)
    cluster.start()
    return cluster


def _local(config: ServeConfig, run_dir: RunDir, host: str) -> ClusterClient:
    """The cluster on this machine."""

    def ready(status: ClusterStatus, models: dict[str, ModelInfo]) -> None:
        names = ", ".join(sorted(models))
        where = "worker" if config.role == "worker" else f"http://{host}:{config.port}"
        run_dir.set_started()
        print(f"ready: {where}  models: {names}  ranks: {status.ranks}", flush=True)

    def orphaned() -> None:
        log.error("the launcher is gone: leaving too")
        os.killpg(0, signal.SIGKILL)  # the master as well, also when it is stopped

    owner_pid = int(os.environ[OWNER_VARIABLE])
    return connect(config, run_dir, owner_pid=owner_pid, on_ready=ready, on_orphaned=orphaned)


def main(argv: list[str]) -> int:
    """What rank 0 starts, with its own options (see nanogpt/cluster/keeper.py); for a web server
    what the launcher becomes."""
    config = options.parse_or_exit(argv)
    is_web = config.role == "web"
    logging_setup.set_up(config.log_level, "web server" if is_web else "front end")
    run_dir = RunDir.open(config.host, config.port)
    if not run_dir.lock(LOCK):
        if is_web:
            print(
                f"error: another server is running on {config.host}:{config.port}", file=sys.stderr
            )
            return 2
        log.info("another front end is alive: leaving it to that one")
        return 0
    if not is_web and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # whoever ends this server ends its process group
    host = f"[{config.host}]" if ":" in config.host else config.host

    def make_app() -> flask.Flask:
        admission = _admission(config)
        if admission.is_open and not _is_loopback(config.host) and config.role != "worker":
            log.warning(
                "anybody who reaches %s may use this server: make a key to close it "
                "(python -m nanogpt.admin keys create NAME)",
                config.host,
            )
        store = _store(config)
        cluster: Cluster
        residents: Residents | None = None
        if isinstance(store, RedisStore) and is_web:
            cluster = _remote(config, store)
        else:
            local = _local(config, run_dir, host)
            cluster, residents = local, local.orders
        directory = run_dir.path if config.queue.url else config.jobs.directory(config.port)
        return create_app(
            cluster,
            config.http,
            admission,
            cards,
            jobs=(store, directory, config.jobs),
            role=config.role,
            announcer=_announcer(config, store, cluster),
            residents=residents,
            max_num_seqs=config.engine.max_num_seqs,
        )

    try:
        cards = read_cards()
        _check(config)
        listener = listen(config.host, config.port)
        workers = 1
        if is_web:
            workers = config.http.workers or min(4, len(os.sched_getaffinity(0)))
            print(f"ready: http://{host}:{config.port}  processes: {workers}", flush=True)
        serve(listener, make_app, config.http, workers)
    except StartupError as error:
        run_dir.set_fatal(str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
