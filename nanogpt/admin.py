"""Keys and bans from the command line, whether or not a server runs; the models of one that does.

    python -m nanogpt.admin keys create team-a --requests-per-minute 600
    python -m nanogpt.admin users ban mallory --for 7d --reason "scraping"
    python -m nanogpt.admin users explain mallory
    python -m nanogpt.admin models list

A running server sees a change within a second. Where servers share their bans (a queue, or
admission.redis_url) they are changed there, for all: name the server's configuration file with
--config, or give its NANOGPT_QUEUE_URL. Exit codes: 0 done, 1 there is no such thing, 2 it can't be
done.
"""

import argparse
import getpass
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from nanogpt import admin_models
from nanogpt.admission_config import AdmissionConfig, KeyConfig, OwnLimits
from nanogpt.api.admission import keys
from nanogpt.api.admission.audit import Entry, open_audit
from nanogpt.api.admission.bans import Ban, new_ban
from nanogpt.api.admission.clock import utc
from nanogpt.api.admission.explain import Explanation, explain
from nanogpt.api.admission.redis_windows import connect
from nanogpt.api.admission.shared_bans import SharedBans
from nanogpt.api.admission.shared_state import OperatorState
from nanogpt.api.admission.state import State
from nanogpt.api.admission.subject import Subject, clean_user
from nanogpt.config import ServeConfig, convert, load
from nanogpt.errors import ConfigError, NanogptError

Run = Callable[[argparse.Namespace, State, AdmissionConfig], int]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.group == "models":
            return admin_models.run(args)
        server = _config(args, os.environ)
        config = server.shared_admission
        path = Path(config.state_path)
        if not args.makes_state and not path.exists():
            raise ConfigError(
                f"there is no state file {path}; name the server's with --state or --config"
            )
        with closing(_open_state(str(path), server)) as state:
            run: Run = args.run
            return run(args, state, config)
    except NanogptError as error:
        print(f"error: {error}", file=sys.stderr)
    except sqlite3.Error as error:  # a full disk, a server that writes all the time
        print(f"error: can't use the state file {path}: {error}", file=sys.stderr)
    return 2


def _config(args: argparse.Namespace, environ: Mapping[str, str]) -> ServeConfig:
    """The server's: --state, then its variables, then the configuration file."""
    options = {"admission": {"state": args.state}} if args.state else {}
    return load(options, environ, args.config)


def _open_state(path: str, server: ServeConfig) -> State:
    redis_url = server.shared_admission.redis_url
    if not redis_url:
        return State(path)
    return OperatorState(path, SharedBans(connect(redis_url), server.queue.name))


# users


def _users_ban(args: argparse.Namespace, state: State, config: AdmissionConfig) -> int:
    if args.key:
        _warn_of_unknown_key(args.key, state, config)
    return _ban(Subject(args.key, _user(args.user)), args, state, config)


def _users_unban(args: argparse.Namespace, state: State, config: AdmissionConfig) -> int:
    return _unban(Subject(args.key, _user(args.user)), state, config)


def _users_list(args: argparse.Namespace, state: State, _: AdmissionConfig) -> int:
    _print_bans(state.bans(time.time()))
    return 0


def _users_explain(args: argparse.Namespace, state: State, config: AdmissionConfig) -> int:
    found = explain(state, config, time.time(), _user(args.user), args.key or None)
    _say(found.blocked or f"nothing shuts {Subject(args.key, found.user)} out")
    _print_details(found)
    return 0


def _print_details(found: Explanation) -> None:
    _section("bans and cool-downs", map(str, found.bans))
    _section(
        "what rules did in the last day",
        (
            f"{utc(a.time)} {a.kind} of {Subject(a.key, a.user)} by rule {a.rule}: {a.reason}"
            + (" (dry run)" if a.dry_run else "")
            for a in found.actions
        ),
    )
    _section(
        "last decisions",
        (
            " ".join(filter(None, (utc(e.time), e.decision, e.code, e.reason, e.request_id)))
            for e in found.decisions
        ),
    )


def _section(title: str, lines: Iterable[str]) -> None:
    shown = list(lines)
    if shown:
        print(f"\n{title}:")
        for line in shown:
            _say(f"  {line}")


def _say(text: str) -> None:
    """Print one line, in which text of others can't steer the terminal."""
    print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


# keys


def _keys_create(args: argparse.Namespace, state: State, config: AdmissionConfig) -> int:
    keys.check_name(args.name)
    secret = keys.generate()
    settings = convert(
        {
            "sha256": keys.digest(secret),
            "admin": args.admin,
            "weight": args.weight,
            "models": args.model,
            "limits": {
                "requests_per_minute": args.requests_per_minute,
                "tokens_per_minute": args.tokens_per_minute,
            },
            "user_limits": {
                "requests_per_minute": args.user_requests_per_minute,
                "tokens_per_minute": args.user_tokens_per_minute,
            },
        },
        KeyConfig,
    )
    with _audited(config) as note:
        state.add_key(keys.Key(name=args.name, settings=settings, created=time.time()))
        note(Entry(decision="create", key=args.name))
    print(secret)
    print(
        f"This is the key {args.name!r}: keep it now, only its digest is stored.", file=sys.stderr
    )
    return 0


def _keys_list(args: argparse.Namespace, state: State, _: AdmissionConfig) -> int:
    for key in state.api_keys():
        status = "valid" if key.revoked is None else f"revoked {utc(key.revoked)}"
        created = f"created {utc(key.created)}"
        _say(f"{key.name}: {status}, {created}; {_abilities(key.settings)}")
    return 0


def _abilities(settings: KeyConfig) -> str:
    if settings.admin:
        return "admin"
    models = ",".join(settings.models) or "all models"
    limits = _limits_text("", settings.limits) + _limits_text("user ", settings.user_limits)
    return f"weight {settings.weight:g}; {models}{limits}"


def _limits_text(whose: str, limits: OwnLimits) -> str:
    own = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
    shown = {kind: n or "unlimited" for kind, n in own.items() if n is not None}
    return "".join(f"; {whose}{kind}/min {n}" for kind, n in shown.items())


def _keys_revoke(args: argparse.Namespace, state: State, config: AdmissionConfig) -> int:
    with _audited(config) as note:
        if not state.revoke_key(args.name, time.time()):
            print(f"there is no valid key {args.name!r} in {state.path}", file=sys.stderr)
            return 1
        note(Entry(decision="revoke", key=args.name))
    print(f"revoked {args.name}")
    return 0


def _keys_ban(args: argparse.Namespace, state: State, config: AdmissionConfig) -> int:
    keys.check_name(args.name)
    stored = [key for key in state.api_keys() if key.name == args.name and key.revoked is None]
    if any(key.settings.admin for key in stored):
        raise ConfigError("an admin key can't be banned; revoke it")
    _warn_of_unknown_key(args.name, state, config)
    return _ban(Subject(args.name, ""), args, state, config)


def _keys_unban(args: argparse.Namespace, state: State, config: AdmissionConfig) -> int:
    keys.check_name(args.name)
    return _unban(Subject(args.name, ""), state, config)


# Both


def _ban(subject: Subject, args: argparse.Namespace, state: State, config: AdmissionConfig) -> int:
    _check_truth(state)
    ban = new_ban(subject, args.reason, _operator(), time.time(), args.seconds)
    with _audited(config) as note:
        state.put_ban(ban, replace=True)
        note(Entry(decision="ban", key=ban.key, user=ban.user, reason=ban.reason))
    _say(str(ban))
    return 0


def _unban(subject: Subject, state: State, config: AdmissionConfig) -> int:
    _check_truth(state)
    with _audited(config) as note:
        lifted = state.lift(subject, time.time())
        for ban in lifted:
            note(Entry(decision="unban", key=ban.key, user=ban.user))
    for ban in lifted:
        _say(f"lifted: {ban}")
    if not lifted:
        print(f"nothing shuts {subject} out; see: users list", file=sys.stderr)
        return 1
    return 0


def _check_truth(state: State) -> None:
    """Raises ConfigError when the server would undo a change of this file."""
    if state.copy_of and not isinstance(state, OperatorState):
        raise ConfigError(
            f"the bans in {state.path} are a copy of those that the servers of the queue "
            f"{state.copy_of!r} share in Redis: name the server's configuration with --config, or "
            "its Redis with NANOGPT_QUEUE_URL (or NANOGPT_ADMISSION_REDIS_URL) and "
            "NANOGPT_QUEUE_NAME, or use /admin"
        )


@contextmanager
def _audited(config: AdmissionConfig) -> Iterator[Callable[[Entry], None]]:
    """What notes an entry in the log that the server writes, too. Raises StartupError, before
    anything is changed, when that can't be opened.
    """
    audit = open_audit(config)
    if audit is None:
        yield lambda entry: None
        return
    with closing(audit):
        now, by = round(time.time(), 3), _operator()
        yield lambda entry: audit.write(msgspec.structs.replace(entry, time=now, by=by))


def _warn_of_unknown_key(name: str, state: State, config: AdmissionConfig) -> None:
    """Not an error: a key may stand in the server's NANOGPT_API_KEYS."""
    known = {key.name for key in state.api_keys() if key.revoked is None} | config.keys.keys()
    if name not in known:
        print(f"note: {name!r} is no key of {state.path}", file=sys.stderr)


def _print_bans(bans: Iterable[Ban]) -> None:
    for ban in bans:
        _say(f"{ban}: {ban.reason}")


def _operator() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in many containers
        return f"uid {os.getuid()}"


def _user(text: str) -> str:
    if not text:
        raise ConfigError("the user is empty")
    return clean_user(text)


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 30m, 12h, 7d or 2w")
    return float(int(match[1]) * _UNITS[match[2]])


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanogpt.admin", description="API keys and banned users of a server."
    )
    parser.add_argument("--state", metavar="FILE", help="the server's admission.state")
    parser.add_argument("--config", metavar="FILE", help="the server's configuration file")
    groups = parser.add_subparsers(required=True, metavar="users|keys|models", dest="group")
    users = groups.add_parser("users", help="ban and unban users, and say why")
    _add_users(users.add_subparsers(required=True, metavar="COMMAND"))
    keys_parser = groups.add_parser("keys", help="create, list, revoke and ban API keys")
    _add_keys(keys_parser.add_subparsers(required=True, metavar="COMMAND"))
    admin_models.add_to(groups.add_parser("models", help="which models are in memory"))
    return parser


def _add_users(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    ban = _command(commands, "ban", _users_ban, "shut a user out", makes_state=True)
    unban = _command(commands, "unban", _users_unban, "lift bans and cool-downs of a user")
    _command(commands, "list", _users_list, "the bans and cool-downs in force, also of keys")
    why = _command(commands, "explain", _users_explain, "why is this user blocked?")
    for command in (ban, unban, why):
        command.add_argument("user", metavar="USER", help="as in the request's field 'user'")
        command.add_argument("--key", default="", metavar="NAME", help="only under this API key")
    _add_ban_options(ban)


def _add_keys(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    create = _command(commands, "create", _keys_create, "a new key, shown once", makes_state=True)
    create.add_argument("--admin", action="store_true", help="for the routes of operators")
    create.add_argument(
        "--weight", type=float, default=1.0, help="its share when the server is full"
    )
    create.add_argument("--model", action="append", default=[], help="only this one; repeatable")
    for kind in ("requests", "tokens"):
        for option, whose in ((f"--{kind}", "the key's"), (f"--user-{kind}", "each user's")):
            create.add_argument(
                f"{option}-per-minute",
                type=int,
                metavar="N",
                help=f"{whose} limit, instead of the server's; 0: none",
            )
    _command(commands, "list", _keys_list, "the keys that were created here")
    revoke = _command(commands, "revoke", _keys_revoke, "make a key invalid, for good")
    ban = _command(commands, "ban", _keys_ban, "shut a key out for a time", makes_state=True)
    unban = _command(commands, "unban", _keys_unban, "lift a key's ban or cool-down")
    for command in (create, revoke, ban, unban):
        command.add_argument("name", metavar="NAME")
    _add_ban_options(ban)


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Run,
    text: str,
    *,
    makes_state: bool = False,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run, makes_state=makes_state)
    return parser


def _add_ban_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--reason", required=True, help="the banned will read it")
    command.add_argument(
        "--for",
        dest="seconds",
        type=_duration,
        metavar="TIME",
        help="30m, 12h, 7d, …; left out: for good",
    )


if __name__ == "__main__":
    sys.exit(main())
