"""Who may use the endpoint: keys, bans, rules, and the record of it."""

import json
import logging
import os
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.admission_config import KeyConfig
from nanogpt.api.admission import Admission
from nanogpt.api.admission import keys as api_keys
from nanogpt.api.admission.audit import MAX_CHARS, AuditLog, Entry, last_entries, line
from nanogpt.api.admission.bans import Ban, BanList
from nanogpt.api.admission.live import REFRESH_S
from nanogpt.api.admission.rules import MEMORY_S, Strikes
from nanogpt.api.admission.state import State
from nanogpt.api.admission.subject import Subject
from nanogpt.config import read_toml
from nanogpt.errors import (
    Banned,
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
    NotFound,
    RateLimited,
    ServerError,
    StartupError,
    Unauthorized,
)
from tests.admission_utils import (
    CATASTROPHE,
    PREY,
    Client,
    FakeClock,
    audit_lines,
    make_config,
)

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-test-0123456789abcdef"
OTHER = "sk-other-0123456789abcde"
ADMIN = "sk-admin-0123456789abcdef"
ENVIRON = {"NANOGPT_API_KEYS": f"team-a={KEY},team-b={OTHER}", "NANOGPT_ADMIN_KEY": ADMIN}


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def start(tmp_path, clock):
    """Starts an Admission on the same directory; all of them are closed in the end."""
    started = []

    def start(environ=None, **table):
        admission = Admission(make_config(tmp_path, **table), environ or {}, clock)
        started.append(admission)
        return admission

    yield start
    for admission in started:
        admission.close()


# Keys


def test_open_without_keys_and_closed_with_one(start, clock, tmp_path):
    """The first key closes a running server; revoking it does not open it again."""
    admission = start()
    assert Client(admission).principal.key_name == "anonymous"
    assert admission.authenticate("Bearer EMPTY").key_name == "anonymous"
    with closing(State(str(tmp_path / "state.sqlite"))) as state:
        state.add_key(api_keys.Key(name="a", settings=KeyConfig(sha256=api_keys.digest(KEY))))
        clock.advance(REFRESH_S)
        assert admission.authenticate(f"Bearer {KEY}").key_name == "a"
        with pytest.raises(Unauthorized):
            admission.authenticate(None)
        assert state.revoke_key("a", clock.now)
        clock.advance(REFRESH_S)
        for authorization in (None, f"Bearer {KEY}"):
            with pytest.raises(Unauthorized):
                admission.authenticate(authorization)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY} {KEY}",
        f"Bearer {KEY}\n",
        "Bearer " + "x" * 10_000,
        "Bearer \ud800",
        "Bearer é",
        "Bearer " + api_keys.digest(KEY),
    ],
)
def test_no_key_or_a_wrong_one(start, authorization):
    with pytest.raises(Unauthorized) as refused:
        start(ENVIRON).authenticate(authorization)
    assert refused.value.headers["WWW-Authenticate"].startswith("Bearer ")
    assert refused.value.code == "invalid_api_key"
    assert KEY not in refused.value.message


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER   {} "])
def test_the_right_key(start, form):
    assert start(ENVIRON).authenticate(form.format(KEY)).key_name == "team-a"


@pytest.mark.parametrize("environ", [{}, {"NANOGPT_API_KEYS": KEY}, ENVIRON])
def test_admin_routes_are_never_open(start, environ):
    admission = start(environ)
    for authorization in (None, f"Bearer {KEY}", "Bearer x"):
        with pytest.raises(Unauthorized, match="admin key"):
            admission.authenticate(authorization, admin=True)


def test_an_admin_key_alone_leaves_the_server_open(start):
    admission = start({"NANOGPT_ADMIN_KEY": ADMIN})
    assert admission.authenticate(f"Bearer {ADMIN}", admin=True).admin
    assert Client(admission).principal.key_name == "anonymous"


def test_keys_from_everywhere(start, tmp_path):
    digest = api_keys.digest(OTHER)
    keys = {"filed": {"sha256": digest, "weight": 2.5}, "team-a": {"models": ["gpt2"]}}
    admission = start({"NANOGPT_API_KEYS": f"team-a={KEY}"}, keys=keys)
    assert admission.authenticate(f"Bearer {OTHER}").weight == 2.5
    assert admission.authenticate(f"Bearer {KEY}").models == ("gpt2",)


def test_a_key_has_its_own_limits(start):
    keys = {"team-a": {"limits": {"requests_per_minute": 1}}}
    admission = start(
        ENVIRON, keys=keys, key_limits={"requests_per_minute": 9, "tokens_per_minute": 50}
    )
    ours, theirs = Client(admission, f"Bearer {KEY}"), Client(admission, f"Bearer {OTHER}")
    theirs.ask()
    ours.ask()
    with pytest.raises(RateLimited):
        ours.ask()
    theirs.ask()
    headers = admission.headers(ours.principal, "alice")
    assert headers["x-ratelimit-limit-requests"] == "1"
    assert headers["x-ratelimit-limit-tokens"] == "50"


@pytest.mark.parametrize(
    "value",
    [
        "short",
        "x" * 600,
        f"a={KEY},a={OTHER}",
        f"a={KEY},b={KEY}",
        f"bad name={KEY}",
        f"anonymous={KEY}",
        "a=has a space in the middle",
        "SECRET+HALF==SECRET-OTHER-HALF-0123456789",
    ],
)
def test_keys_in_variables_that_cannot_be(start, value):
    with pytest.raises(ConfigError) as refused:
        start({"NANOGPT_API_KEYS": value})
    assert not any(secret in str(refused.value) for secret in (KEY, OTHER, "short", "HALF", "has"))


def test_a_key_without_its_secret(start):
    with pytest.raises(ConfigError, match=r"keys\.team-a has no sha256"):
        start(keys={"team-a": {}})


def test_keys_are_hashed_at_rest_and_never_written(start, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    admission = start(ENVIRON)
    client = Client(admission, f"Bearer {KEY}")
    client.ask()
    with pytest.raises(Unauthorized):
        admission.authenticate(f"Bearer {KEY[:-1]}")
    admission.close()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for secret in (KEY, OTHER, ADMIN, KEY[:-1]):
        assert secret.encode() not in written
        assert secret not in caplog.text
    assert b"team-a" in written


def test_a_new_key_is_long_and_new():
    made = {api_keys.generate() for _ in range(100)}
    assert len(made) == 100
    assert min(map(len, made)) >= 43


# Bans


def test_a_banned_user_gets_the_reason_and_the_end(start):
    admission = start(ENVIRON)
    admission.ban(user="mallory", reason="scraping", seconds=3600, by="ops")
    for key in (KEY, OTHER):
        with pytest.raises(Banned, match=r"until 2023-11-14T23:13:20Z: scraping") as refused:
            Client(admission, f"Bearer {key}").ask("mallory")
    assert refused.value.headers == {"x-should-retry": "false"}
    Client(admission, f"Bearer {KEY}").ask("alice")


def test_a_ban_ends(start, clock):
    admission = start()
    admission.ban(user="mallory", reason="x", seconds=60, by="ops")
    clock.advance(59)
    with pytest.raises(Banned):
        Client(admission).ask("mallory")
    clock.advance(1)
    Client(admission).ask("mallory")
    assert admission.bans() == []


def test_a_ban_of_a_user_of_one_key(start):
    admission = start(ENVIRON)
    admission.ban(user="u", key="team-a", reason="x", seconds=None, by="ops")
    with pytest.raises(Banned, match="for good"):
        Client(admission, f"Bearer {KEY}").ask("u")
    Client(admission, f"Bearer {OTHER}").ask("u")


def test_a_banned_key_gets_nowhere(start):
    admission = start(ENVIRON)
    admission.ban(key="team-a", reason="leaked", seconds=None, by="ops")
    with pytest.raises(Banned, match=r"this API key .*leaked"):
        admission.authenticate(f"Bearer {KEY}")
    Client(admission, f"Bearer {OTHER}").ask()


def test_unban(start):
    admission = start(ENVIRON)
    admission.ban(user="u", reason="x", seconds=None, by="ops")
    admission.ban(user="u", key="team-a", reason="y", seconds=None, by="ops")
    admission.ban(key="team-a", reason="z", seconds=None, by="ops")
    assert admission.unban(user="u", key="team-b", by="ops") == []
    assert [ban.reason for ban in admission.unban(user="u", by="ops")] == ["x", "y"]
    assert [ban.reason for ban in admission.bans()] == ["z"]
    assert len(admission.unban(key="team-a", by="ops")) == 1
    Client(admission, f"Bearer {KEY}").ask("u")


@pytest.mark.parametrize(
    ("ban", "error"),
    [
        ({}, InvalidRequest),
        ({"user": "u", "reason": ""}, InvalidRequest),
        ({"user": "u", "reason": "two\nlines"}, InvalidRequest),
        ({"user": "u", "reason": "x" * 201}, InvalidRequest),
        ({"user": "u", "seconds": 0}, InvalidRequest),
        ({"user": "u", "seconds": float("nan")}, InvalidRequest),
        ({"user": "u" * 257}, InvalidRequest),
        ({"key": "nobody"}, NotFound),
        ({"key": "admin"}, InvalidRequest),
    ],
)
def test_bans_that_make_no_sense(start, ban, error):
    admission = start(ENVIRON)
    with pytest.raises(error):
        admission.ban(**{"reason": "x", "seconds": None, "by": "ops", **ban})
    assert admission.bans() == []
    with pytest.raises(InvalidRequest):
        admission.unban(by="ops")


def test_a_ban_from_another_process_holds_within_a_moment(start, clock, tmp_path):
    admission = start()
    Client(admission).ask("mallory")
    command = [sys.executable, "-m", "nanogpt.admin", "--state", str(tmp_path / "state.sqlite")]
    run = {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*command, "users", "ban", "mallory", "--reason", "spam"], **run)
    clock.advance(REFRESH_S)
    with pytest.raises(Banned, match="spam"):
        Client(admission).ask("mallory")
    with pytest.raises(Banned, match="spam"):
        Client(start()).ask("mallory")  # and after a restart
    subprocess.run([*command, "users", "unban", "mallory"], **run)
    clock.advance(REFRESH_S)
    Client(admission).ask("mallory")


printable = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=20)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(max_examples=30, deadline=None)
@given(
    bans=st.lists(
        st.builds(
            Ban,
            key=st.sampled_from(["", "team-a"]),
            user=names,
            kind=st.sampled_from(["ban", "cooldown"]),
            reason=printable,
            by=names,
            created=st.floats(0, 1e9),
            until=st.none() | st.floats(1e9 + 1, 4e9),
        ),
        unique_by=lambda ban: (ban.key, ban.user, ban.kind),
        max_size=5,
    )
)
def test_bans_come_back_as_they_were(tmp_path_factory, bans):
    path = str(tmp_path_factory.mktemp("state") / "state.sqlite")
    with closing(State(path)) as state:
        for ban in bans:
            state.put_ban(ban, replace=True)
    with closing(State(path)) as state:
        loaded = state.bans(1e9)
    assert sorted(loaded, key=str) == sorted(bans, key=str)
    found = BanList(loaded)
    for ban in bans:
        assert found.find(ban.key or "whichever", ban.user, 1e9) is not None


def test_no_rule_shortens_an_operators_ban(tmp_path):
    with closing(State(str(tmp_path / "s"))) as state:
        for until, replace, expected in [
            (None, True, None),
            (50.0, False, None),
            (50.0, True, 50.0),
            (40.0, False, 50.0),
            (60.0, False, 60.0),
            (None, False, None),
        ]:
            state.put_ban(Ban("", "u", "ban", "r", "b", 1.0, until), replace=replace)
            assert [ban.until for ban in state.bans(2.0)] == [expected]


# The state file


def test_the_files_are_private(tmp_path, clock):
    below = tmp_path / "new" / "deeper"
    admission = Admission(make_config(below), {}, clock)
    Client(admission).ask()
    for path in below.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(below.stat().st_mode) == 0o700
    admission.close()


@pytest.mark.parametrize("make", ["directory", "text", "newer", "foreign", "no parent"])
def test_a_state_file_that_is_none(tmp_path, make):
    path = tmp_path / "state.sqlite"
    if make == "directory":
        path.mkdir()
    elif make == "text":
        path.write_text("this is no database" * 100)
    elif make == "no parent":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "state.sqlite"
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 99" if make == "newer" else "CREATE TABLE other (a)")
    with pytest.raises(StartupError, match=str(path)):
        State(str(path))


@pytest.mark.parametrize(
    "damage", ["DROP TABLE bans", "INSERT INTO keys VALUES ('00', 'a', '{\"wat\": 1}', 0, NULL)"]
)
def test_a_state_that_breaks_leaves_the_bans_in_force(start, clock, tmp_path, caplog, damage):
    admission = start()
    admission.ban(user="mallory", reason="x", seconds=None, by="ops")
    with closing(sqlite3.connect(tmp_path / "state.sqlite")) as db, db:
        db.execute(damage)
    for _ in range(3):
        clock.advance(REFRESH_S)
        with pytest.raises(Banned):
            Client(admission).ask("mallory")
    assert len(caplog.messages) == 1
    assert "stay as they are" in caplog.text


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_state_file_that_another_takes_the_place_of(start, clock, tmp_path, caplog, how):
    """A server went on with the file that nobody else could see any more, and said nothing: what
    the command line changed in the new one had no effect."""
    admission = start()
    admission.ban(user="mallory", reason="x", seconds=None, by="ops")
    (tmp_path / "state.sqlite").rename(tmp_path / "elsewhere.sqlite")
    if how == "replaced":
        State(str(tmp_path / "state.sqlite")).close()
    for _ in range(3):
        clock.advance(REFRESH_S)
        with pytest.raises(Banned):
            Client(admission).ask("mallory")
    assert len(caplog.messages) == 1
    assert "start the server again" in caplog.text


def break_writing(admission):
    """As with a full disk, or one that went read-only."""
    admission._state._db.execute("PRAGMA query_only = ON")


def test_rules_act_also_when_nothing_can_be_written(start, clock, caplog):
    """What could not be written did not hold, so a full disk let everybody go on for ever."""
    admission = start(refusals=RULE)
    break_writing(admission)
    refuse(admission, times=3)
    for _ in range(3):
        with pytest.raises(RateLimited, match="rule refusals"):
            Client(admission).ask()
        clock.advance(REFRESH_S)  # looking for changes in the file forgets nothing
    assert [ban.user for ban in admission.bans()] == ["alice"]
    assert "holds until this process ends" in caplog.text
    clock.advance(RULE["cooldown_s"])
    Client(admission).ask()


def test_a_rule_acts_also_when_the_keys_can_not_be_read(start, tmp_path, clock):
    """The request that reached a rule's number was a 500, and the rule did nothing."""
    admission = start(refusals=RULE)
    with closing(sqlite3.connect(tmp_path / "state.sqlite")) as db, db:
        db.execute("INSERT INTO keys VALUES ('00', 'a', '{\"wat\": 1}', 0, NULL)")
    refuse(admission, times=3)
    with pytest.raises(RateLimited, match="rule refusals"):
        Client(admission).ask()


@pytest.mark.parametrize("what", ["ban", "unban"])
def test_an_operator_is_told_of_a_state_that_can_not_be_written(start, what):
    """It was a 500 that said nothing."""
    admission = start()
    admission.ban(user="alice", reason="x", seconds=None, by="ops")
    break_writing(admission)
    arguments = {"reason": "spam", "seconds": None} if what == "ban" else {}
    with pytest.raises(ServerError, match="readonly"):
        getattr(admission, what)(user="alice", by="ops", **arguments)


def test_in_memory_nothing_is_kept(clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    admission = Admission(make_config(tmp_path, state=":memory:"), {}, clock)
    admission.ban(user="mallory", reason="x", seconds=None, by="ops")
    with pytest.raises(Banned):
        Client(admission).ask("mallory")
    admission.close()
    assert list(tmp_path.iterdir()) == []


def test_the_example_is_valid_and_says_the_defaults():
    example = read_toml(ROOT / "configs" / "serve" / "admission.example.toml")["admission"]
    config = make_config(Path(), **example)
    assert (config.refusals, config.bursts) == (
        make_config(Path()).refusals,
        make_config(Path()).bursts,
    )
    assert config.content == make_config(Path()).content


# Limits, through the whole way


def test_an_admitted_request_settles(start):
    admission = start(user_limits={"tokens_per_minute": 100})
    client = Client(admission)
    ticket = client.ask(tokens=(4, 90))
    with pytest.raises(RateLimited):
        client.ask(tokens=(4, 90))
    ticket.settle(4, 6)
    client.ask(tokens=(4, 86))
    headers = admission.headers(client.principal, "alice")
    assert headers["x-ratelimit-remaining-tokens"] == "0"


def test_a_blocked_prompt_costs_no_tokens(start):
    admission = start(user_limits={"tokens_per_minute": 100}, content={"terms": ["bomb"]})
    client = Client(admission)
    with pytest.raises(InvalidRequest) as refused:
        client.ask(prompt="a Bomb!", tokens=(4, 90))
    assert (refused.value.code, refused.value.param) == ("content_blocked", "prompt")
    assert "bomb" not in refused.value.message.lower()
    client.ask(tokens=(4, 96))


def test_an_admin_key_is_never_held_back(start):
    admission = start(
        ENVIRON,
        key_limits={"requests_per_minute": 1, "tokens_per_minute": 1},
        user_limits={"requests_per_minute": 1},
        content={"terms": ["bomb"]},
        bursts={"requests": 2},
    )
    admission.ban(user="alice", reason="x", seconds=None, by="ops")
    for _ in range(20):
        Client(admission, f"Bearer {ADMIN}").ask(prompt="bomb")


# Rules


def refuse(admission, user="alice", error=None, times=1):
    client = Client(admission)
    for _ in range(times):
        admission.refused(
            client.principal,
            user=user,
            request_id="req_2",
            error=error or ContextLengthExceeded("too long"),
        )


RULE = {"strikes": 3, "window_s": 10, "cooldown_s": 60, "ban_after": 2, "ban_s": 600}


def test_strikes_then_a_cooldown_then_a_ban(start, clock):
    admission = start(refusals=RULE)
    client = Client(admission)
    refuse(admission, times=2)
    client.ask()
    refuse(admission)
    with pytest.raises(RateLimited, match="has to pause") as pause:
        client.ask()
    assert pause.value.headers["Retry-After"] == "60"
    client.ask("bob")
    clock.advance(60)
    client.ask()
    refuse(admission, times=3)
    with pytest.raises(Banned, match="rule refusals: 2 cool-downs within a day"):
        client.ask()
    clock.advance(600)
    client.ask()
    refuse(admission, times=3)
    with pytest.raises(RateLimited):  # a ban wipes the slate
        client.ask()


def test_strikes_and_cooldowns_are_forgotten(start, clock):
    admission = start(refusals=RULE)
    for _ in range(4):
        refuse(admission, times=2)
        clock.advance(10)
    assert admission.bans() == []
    for _ in range(3):
        refuse(admission, times=3)
        assert [ban.kind for ban in admission.bans()] == ["cooldown"]
        clock.advance(MEMORY_S + 1)


def test_a_cooldown_survives_a_restart_and_counts(start, clock):
    refuse(start(refusals=RULE), times=3)
    again = start(refusals=RULE)
    with pytest.raises(RateLimited):
        Client(again).ask()
    clock.advance(60)
    refuse(again, times=3)
    with pytest.raises(Banned):
        Client(again).ask()


@pytest.mark.parametrize(
    "error",
    [
        Unauthorized("x"),
        Banned("x"),
        RateLimited("x", code="requests"),
        ServerError("x"),
        InvalidRequest("x", code="content_blocked"),
    ],
)
def test_answers_that_are_no_strikes(start, error):
    admission = start(refusals=RULE)
    refuse(admission, error=error, times=10)
    Client(admission).ask()


def test_a_request_that_could_be_anybodys_is_not_judged(start):
    admission = start(refusals={**RULE, "key_strikes": 3})
    refuse(admission, user=None, times=10)
    refuse(admission, user="u", times=3)
    Client(admission).ask(None)
    with pytest.raises(RateLimited):
        Client(admission).ask("u")


def test_a_key_answers_for_requests_without_user(start):
    admission = start(ENVIRON, refusals=RULE)
    ours = Client(admission, f"Bearer {KEY}")
    for _ in range(3):
        error = InvalidRequest("x")
        admission.refused(ours.principal, user=None, request_id="r", error=error)
    with pytest.raises(RateLimited):
        ours.ask()
    Client(admission, f"Bearer {OTHER}").ask()


def test_changing_the_user_helps_only_without_key_strikes(start):
    for key_strikes, number_of_bans in ((0, 0), (5, 1)):
        admission = start(ENVIRON, refusals={**RULE, "key_strikes": key_strikes})
        principal = admission.authenticate(f"Bearer {KEY}")
        for user in "abcde":
            error = InvalidRequest("x")
            admission.refused(principal, user=user, request_id="r", error=error)
        assert [ban.user for ban in admission.bans()] == [""] * number_of_bans


def test_one_keys_users_are_not_anothers(start):
    """The owner of one key must not get a user of another into trouble."""
    admission = start(ENVIRON, refusals=RULE)
    principal = admission.authenticate(f"Bearer {OTHER}")
    for _ in range(3):
        error = InvalidRequest("x")
        admission.refused(principal, user="victim", request_id="r", error=error)
    Client(admission, f"Bearer {KEY}").ask("victim")


def test_bursts(start, clock):
    admission = start(bursts={"requests": 5, "seconds": 1, "strikes": 2, "window_s": 60})
    client = Client(admission)
    for _ in range(11):
        client.ask()
    with pytest.raises(RateLimited, match="rule bursts"):
        client.ask()
    for _ in range(100):
        clock.advance(0.25)
        client.ask("steady")


def test_blocked_prompts_are_strikes(start):
    admission = start(content={"terms": ["bomb"], **RULE})
    client = Client(admission)
    for _ in range(3):
        with pytest.raises(InvalidRequest):
            client.ask(prompt="bomb")
    with pytest.raises(RateLimited, match="rule content"):
        client.ask()


def test_a_pattern_that_is_given_up_is_noted(start, tmp_path):
    """It counted as no match, and only one line of the server's own log ever said so."""
    admission = start(
        content={"patterns": {"slow": CATASTROPHE, "other": "z$"}, "pattern_timeout_ms": 5}
    )
    Client(admission).ask(prompt=PREY)
    given_up, admitted = audit_lines(tmp_path)
    assert (given_up["decision"], given_up["reason"]) == ("gave_up", "pattern slow")
    assert given_up["request_id"] == admitted["request_id"]
    assert admitted["decision"] == "admitted"
    assert admission.stats().decisions["gave_up", "content"] == 1
    assert admission.stats().pattern_timeouts == 1


def test_a_ban_ends_what_runs_and_a_cooldown_does_not(start):
    admission = start(refusals=RULE)
    principal = Client(admission).principal
    who = {"user": "alice", "request_id": "r"}
    refuse(admission, times=3)
    with pytest.raises(RateLimited):
        admission.check_bans(principal, **who)
    admission.check_running(principal, **who)
    admission.ban(user="alice", reason="x", seconds=None, by="ops")
    with pytest.raises(Banned):
        admission.check_running(principal, **who)


def test_dry_run_only_reports(start, tmp_path):
    admission = start(
        dry_run=True, refusals=RULE, content={"terms": ["bomb"], **RULE}, bursts={"requests": 2}
    )
    client = Client(admission)
    for _ in range(6):
        client.ask(prompt="bomb")
        refuse(admission)
    assert admission.bans() == []
    reported = [(e["decision"], e["rule"]) for e in audit_lines(tmp_path) if e.get("dry_run")]
    assert reported.count(("refused", "content")) == 6
    for rule in ("content", "refusals"):
        assert [d for d, r in reported if r == rule and d != "refused"] == ["cooldown", "ban"]
    assert admission.stats().decisions["dry_run_refused", "content_blocked"] == 6


def test_a_million_users_do_not_grow_the_strikes():
    strikes = Strikes(max_subjects=100)
    for number in range(5000):
        strikes.add(Subject("k", f"user {number}"), "refusals", 0.0, 60.0, 10)
    assert len(strikes) == 100


def test_racing_strikes_are_one_cooldown(start, tmp_path):
    admission = start(refusals={**RULE, "strikes": 50})
    principal = Client(admission).principal

    def race(_):
        error = InvalidRequest("x")
        admission.refused(principal, user="alice", request_id="r", error=error)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(race, range(99)))
    assert [e["decision"] for e in audit_lines(tmp_path)].count("cooldown") == 1


def test_unban_lifts_cooldowns_and_strikes(start, clock):
    admission = start(refusals=RULE)
    refuse(admission, times=5)
    admission.unban(user="alice", by="ops")
    Client(admission).ask()
    refuse(admission, times=2)
    assert admission.bans() == []
    refuse(admission)
    assert [ban.kind for ban in admission.bans()] == ["cooldown"]  # not the second: no ban


def test_racing_requests_and_bans(start, clock):
    """No call fails in a way of its own while bans change under it."""
    admission = start(refusals={**RULE, "strikes": 5}, user_limits={"requests_per_minute": 500})

    def client(number):
        user = f"u{number % 4}"
        for step in range(30):
            try:
                Client(admission).ask(user).settle(1, 1)
            except (Banned, RateLimited):
                admission.unban(user=user, by="ops")
            if step % 10 == 0:
                admission.ban(user=user, reason="x", seconds=10, by="ops")
            refuse(admission, user)
            clock.advance(0.1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))


# Explaining


def test_explain_says_why(start, clock):
    admission = start(
        ENVIRON, refusals=RULE, user_limits={"requests_per_minute": 60, "tokens_per_minute": 900}
    )
    client = Client(admission, f"Bearer {KEY}")
    client.ask("u", request_id="req_ok")
    assert admission.explain("u").blocked == ""
    principal = client.principal
    for _ in range(4):
        error = InvalidRequest("x")
        admission.refused(principal, user="u", request_id="req_bad", error=error)
    with pytest.raises(RateLimited):
        client.ask("u")
    found = admission.explain("u")
    assert "cooling down until" in found.blocked
    assert "3 times within 10 s" in found.blocked
    assert [(s.key, s.user, s.rule, len(s.times)) for s in found.strikes] == [
        ("team-a", "u", "refusals", 1)
    ]
    assert [(a.rule, a.kind) for a in found.actions] == [("refusals", "cooldown")]
    assert {(level.kind, level.used) for level in found.limits} == {("requests", 1), ("tokens", 20)}
    assert [d.decision for d in found.decisions][-1] == "admitted"
    assert found.decisions[0].code == "requests"
    assert admission.explain("u", "team-b").blocked == ""
    admission.ban(key="team-a", reason="leaked", seconds=None, by="ops")
    assert "leaked" in admission.explain("u", "team-a").blocked
    clock.advance(11)
    assert admission.explain("u").strikes == []
    msgspec.json.encode(found)


# The audit log


def test_every_decision_is_one_line(start, tmp_path):
    limits = {"requests_per_minute": 5, "tokens_per_minute": 100}
    admission = start(ENVIRON, user_limits=limits, content={"terms": ["bomb"]})
    client = Client(admission, f"Bearer {KEY}")
    client.ask("u", request_id="req_ok")
    for prompt, tokens in (("a bomb", (4, 4)), ("fine", (4, 90))):
        with pytest.raises((InvalidRequest, RateLimited)):
            client.ask("u", prompt, tokens)
    admission.ban(user="u", reason="x", seconds=None, by="ops")
    with pytest.raises(Banned):
        client.ask("u")
    admission.unban(user="u", by="ops")
    with pytest.raises(Unauthorized):
        admission.authenticate(None, request_id="req_no")
    lines = audit_lines(tmp_path)
    assert [(e["decision"], e.get("code")) for e in lines] == [
        ("admitted", None),
        ("refused", "content_blocked"),
        ("refused", "tokens"),
        ("ban", None),
        ("refused", "user_banned"),
        ("unban", None),
        ("refused", "invalid_api_key"),
    ]
    assert lines[0] == {
        "time": 1_700_000_000.25,
        "decision": "admitted",
        "request_id": "req_ok",
        "key": "team-a",
        "user": "u",
        "model": "gpt2",
        "prompt_tokens": 4,
        "remaining_requests": 4,
        "remaining_tokens": 80,
    }
    assert lines[1]["reason"] == "term bomb"


HOSTILE = [
    'x"}\n{"decision":"admitted"}',
    "\x1b[31mred\x07",
    "a\u2028b\u202ec\x7f\x9b",
    "%s %d %(message)s {0} {user}",
    "../../etc/passwd\x00",
    "'; DROP TABLE bans; --",
    "\ud800",
    "u" * 256,
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_client_sends_can_not_forge_a_line(start, tmp_path, hostile, caplog):
    admission = start(user_limits={"requests_per_minute": 100}, refusals={"strikes": 1})
    client = Client(admission)
    client.ask(hostile, prompt="the prompt", request_id=hostile)
    refuse(admission, user=hostile)
    with pytest.raises(RateLimited):
        client.ask(hostile, model=hostile * 10)
    raw = (tmp_path / "audit.jsonl").read_bytes()
    assert raw.count(b"\n") == 4 == len(audit_lines(tmp_path))
    assert all(byte == 10 or 32 <= byte < 127 for byte in raw)
    assert b"the prompt" not in raw
    expected = hostile.encode("utf-8", "replace").decode()
    assert {entry["user"] for entry in audit_lines(tmp_path)} == {expected}
    assert [ban.user for ban in admission.bans()] == [expected]
    assert admission.explain(hostile).decisions
    assert {p.name for p in tmp_path.iterdir()} >= {"audit.jsonl", "state.sqlite"}


@given(st.builds(Entry, request_id=st.text(), user=st.text(max_size=256), reason=st.text()))
def test_an_entry_is_one_ascii_line(entry):
    text = line(entry)
    assert text.isascii()
    assert text.isprintable()
    assert all(len(value) <= MAX_CHARS for value in json.loads(text).values() if value != 0.0)


def test_a_user_that_is_too_long_is_refused_and_noticed(start):
    admission = start(ENVIRON, user_limits={"requests_per_minute": 5})
    client = Client(admission, f"Bearer {KEY}")
    with pytest.raises(InvalidRequest) as refused:
        client.ask("u" * 257)
    admission.refused(client.principal, user="u" * 257, request_id="r", error=refused.value)
    assert admission.explain("").strikes[0].key == "team-a"
    assert admission.headers(client.principal, "u" * 257) == {}


def test_processes_share_a_rotating_file(tmp_path):
    """Two handlers stand for two processes: no line is lost or torn when either rotates."""
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(path, max_bytes=2000, backups=50) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: logs[n % 2].write(Entry(request_id=str(n))), range(400)))
    for log in logs:
        log.close()
    files = [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]
    assert len(files) > 3
    written = [json.loads(text) for p in files for text in p.read_text().splitlines()]
    assert sorted(int(entry["request_id"]) for entry in written) == list(range(400))
    assert max(p.stat().st_size for p in files) < 2100


def test_old_files_go(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=1000, backups=2)
    for number in range(200):
        log.write(Entry(user="u", request_id=str(number)))
    log.close()
    assert len(list(tmp_path.glob("audit.jsonl*"))) == 4  # two old ones, and the lock
    newest = last_entries(log.path, "u", None, 25)
    assert [int(entry.request_id) for entry in newest] == list(range(199, 174, -1))


def test_a_full_disk_stops_no_request(tmp_path, clock, caplog):
    admission = Admission(make_config(tmp_path, audit_file="/dev/full"), {}, clock)
    for _ in range(5):
        Client(admission).ask()
    assert admission.stats().audit_failures == 5
    admission.close()
    assert len(caplog.messages) == 1


def test_an_audit_log_that_can_be_written_again_is(tmp_path, clock):
    """One failure to open it anew, and nothing was written until the server was restarted."""
    log = AuditLog(tmp_path / "audit.jsonl", 10**6, 1)
    log.write(Entry(request_id="1"))
    (tmp_path / "audit.jsonl").rename(tmp_path / "moved")
    (tmp_path / "audit.jsonl").mkdir()
    log.write(Entry(request_id="2"))
    assert log.failures == 1
    (tmp_path / "audit.jsonl").rmdir()
    log.write(Entry(request_id="3"))
    log.close()
    assert [entry["request_id"] for entry in audit_lines(tmp_path)] == ["3"]
    assert log.failures == 1


def test_an_audit_log_that_can_not_be(tmp_path, clock):
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="audit_file"):
        Admission(make_config(tmp_path, audit_file=str(tmp_path / "file" / "a")), {}, clock)


def test_no_audit_log(start, tmp_path):
    Client(start(audit=False)).ask()
    assert not (tmp_path / "audit.jsonl").exists()


def test_nothing_heavy_is_imported():
    code = (
        "import sys, nanogpt.admin; print(sorted({'torch','flask','zmq','numpy'} & {*sys.modules}))"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stdout.strip() == "[]", done.stderr
