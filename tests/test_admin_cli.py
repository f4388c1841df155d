"""python -m nanogpt.admin: keys and bans from the command line."""

import re
import sqlite3
import stat
from contextlib import closing

import pytest

from nanogpt import admin
from nanogpt.api.admission import Admission
from nanogpt.api.admission.bans import Ban
from nanogpt.api.admission.live import REFRESH_S
from nanogpt.api.admission.state import State
from nanogpt.errors import Banned, InvalidRequest, RateLimited, Unauthorized
from tests.admission_utils import Client, FakeClock, audit_lines, make_config


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """No variable of this machine, and a home of its own."""
    for name in ("NANOGPT_CONFIG", "NANOGPT_ADMISSION_STATE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a command on this directory's state: (exit code, stdout, stderr)."""

    def run(*arguments, state=str(tmp_path / "state.sqlite")):
        before = ("--state", state) if state else ()
        try:
            code = admin.main([*before, *arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def server(tmp_path):
    """One that runs all the while, and sees changes when its clock moves."""
    admission = Admission(make_config(tmp_path), {}, FakeClock())
    yield admission
    admission.close()


def later(server):
    server._clock.advance(REFRESH_S)
    return server


def test_a_created_key_works_and_is_shown_once(run, server, tmp_path):
    code, secret, said = run("keys", "create", "team-a", "--weight", "3", "--model", "gpt2")
    assert code == 0
    assert re.fullmatch(r"sk-ngpt-\S{43}\n", secret)
    assert "team-a" in said
    assert secret.strip() not in said
    principal = later(server).authenticate(f"Bearer {secret.strip()}")
    assert (principal.key_name, principal.weight, principal.models) == ("team-a", 3.0, ("gpt2",))
    assert not principal.admin
    listed = run("keys", "list")[1]
    assert "team-a" in listed
    assert secret.strip() not in listed
    assert all(secret.strip().encode() not in p.read_bytes() for p in tmp_path.glob("state*"))


def test_a_revoked_key_is_refused(run, server):
    secret = run("keys", "create", "team-a")[1].strip()
    later(server).authenticate(f"Bearer {secret}")
    assert run("keys", "revoke", "team-a")[0] == 0
    with pytest.raises(Unauthorized):
        later(server).authenticate(f"Bearer {secret}")
    assert "revoked" in run("keys", "list")[1]
    code, _, said = run("keys", "revoke", "team-a")
    assert code == 1
    assert "no valid key" in said
    assert run("keys", "create", "team-a")[1].strip() != secret


def test_an_admin_key(run, server):
    secret = run("keys", "create", "ops", "--admin")[1].strip()
    assert later(server).authenticate(f"Bearer {secret}", admin=True).admin
    assert run("keys", "ban", "ops", "--reason", "x")[0] == 2


def test_limits_of_a_key_leave_the_others_as_they_are(run, tmp_path):
    secret = run(
        "keys", "create", "a", "--requests-per-minute", "7", "--user-tokens-per-minute", "0"
    )[1].strip()
    config = make_config(
        tmp_path, key_limits={"tokens_per_minute": 900}, user_limits={"tokens_per_minute": 90}
    )
    with closing(Admission(config, {}, FakeClock())) as server:
        principal = server.authenticate(f"Bearer {secret}")
    assert principal.limits.requests_per_minute == 7
    assert principal.limits.tokens_per_minute == 900
    assert principal.user_limits.tokens_per_minute == 0


def test_ban_list_unban(run, server):
    code, said, _ = run("users", "ban", "mallory", "--reason", "scraping", "--for", "7d")
    assert code == 0
    assert "user 'mallory' is banned until" in said
    with pytest.raises(Banned, match="scraping"):
        Client(later(server)).ask("mallory")
    assert run("users", "list")[1].count("\n") == 1
    assert run("users", "unban", "mallory")[0] == 0
    Client(later(server)).ask("mallory")
    code, said, error = run("users", "unban", "mallory")
    assert (code, said) == (1, "")
    assert "nothing shuts user 'mallory' out" in error


def test_ban_of_a_key(run, server):
    secret = run("keys", "create", "team-a")[1].strip()
    assert run("keys", "ban", "team-a", "--reason", "leaked")[2] == ""
    with pytest.raises(Banned, match="leaked"):
        later(server).authenticate(f"Bearer {secret}")
    assert run("keys", "unban", "team-a")[0] == 0
    later(server).authenticate(f"Bearer {secret}")
    code, _, note = run("keys", "ban", "typo", "--reason", "x")
    assert code == 0
    assert "is no key of" in note  # it may be one of the configuration


def test_ban_of_a_user_of_a_key(run, server):
    keys = [run("keys", "create", name)[1].strip() for name in ("a", "b")]
    run("users", "ban", "u", "--key", "a", "--reason", "x")
    later(server)
    with pytest.raises(Banned):
        Client(server, f"Bearer {keys[0]}").ask("u")
    Client(server, f"Bearer {keys[1]}").ask("u")
    assert run("users", "unban", "u", "--key", "b")[0] == 1
    assert run("users", "unban", "u")[0] == 0


def test_what_operators_do_is_in_the_audit_log(run, tmp_path):
    """Only what came over HTTP was."""
    run("keys", "create", "team-a")
    run("users", "ban", "mallory", "--reason", "spam")
    run("users", "unban", "mallory")
    run("users", "unban", "nobody")
    run("keys", "revoke", "team-a")
    entries = audit_lines(tmp_path)
    assert [entry["decision"] for entry in entries] == ["create", "ban", "unban", "revoke"]
    assert all(entry["by"] and entry["time"] for entry in entries)
    assert entries[1]["reason"] == "spam"
    assert [entry.get("user") for entry in entries] == [None, "mallory", "mallory", None]
    assert [entry.get("key") for entry in entries] == ["team-a", None, None, "team-a"]


def test_nothing_is_changed_when_the_audit_log_can_not_be_written(run, tmp_path):
    (tmp_path / "audit.jsonl").mkdir()
    code, _, problem = run("users", "ban", "mallory", "--reason", "spam")
    assert code == 2
    assert "audit log" in problem
    assert run("users", "list")[1] == ""


def test_a_key_that_nobody_has_is_pointed_out(run):
    """A mistyped name banned nobody, in silence."""
    run("keys", "create", "team-a")
    for arguments in (("users", "ban", "bob", "--key", "taem-a"), ("keys", "ban", "taem-a")):
        code, _, note = run(*arguments, "--reason", "spam")
        assert code == 0  # it may stand in NANOGPT_API_KEYS
        assert "'taem-a' is no key" in note
    assert "note" not in run("users", "ban", "bob", "--key", "team-a", "--reason", "x")[2]


def test_a_state_that_others_write_all_the_time(run, tmp_path, monkeypatch):
    """It was a traceback."""
    monkeypatch.setattr("nanogpt.api.admission.state.BUSY_S", 0.05)
    run("keys", "create", "team-a")
    with closing(sqlite3.connect(tmp_path / "state.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        code, _, problem = run("users", "ban", "mallory", "--reason", "spam")
    assert code == 2
    assert "locked" in problem


def test_explain(run, tmp_path):
    config = make_config(tmp_path, refusals={"strikes": 1})
    with closing(Admission(config, {}, FakeClock())) as server:
        Client(server).ask("mallory", request_id="req_first")
    code, said, _ = run("users", "explain", "mallory")
    assert code == 0
    assert "nothing shuts user 'mallory' out" in said
    assert "admitted req_first" in said
    run("users", "ban", "mallory", "--reason", "scraping")
    assert run("users", "explain", "mallory")[1].startswith("user 'mallory' is banned for good")
    assert "nothing" in run("users", "explain", "alice")[1]


def test_nothing_of_others_steers_the_terminal(run, tmp_path):
    with closing(State(str(tmp_path / "state.sqlite"))) as state:
        ban = Ban("", "\x1b[2J\nevil\u202e", "ban", "x\x1b[31m", "\x07", 0.0, None)
        state.put_ban(ban, replace=True)
    for command in (("users", "list"), ("users", "explain", "\x1b[2J\nevil\u202e")):
        said = run(*command)[1]
        assert "evil" in said
        assert all(c.isprintable() or c == "\n" for c in said)
        assert "\nevil" not in said


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("users", "ban", "", "--reason", "x"), "user is empty"),
        (("users", "ban", "u" * 257, "--reason", "x"), "at most 256"),
        (("users", "ban", "u"), "--reason"),
        (("users", "ban", "u", "--reason", "x", "--for", "soon"), "30m, 12h"),
        (("users", "ban", "u", "--reason", "x", "--for", "0s"), "more than 0 seconds"),
        (("users", "ban", "u", "--reason", "x", "--for", "999999999w"), "100 years"),
        (("users", "ban", "u", "--reason", "a\nb"), "printable"),
        (("keys", "create", "bad name"), "up to 64 letters"),
        (("keys", "create", "anonymous"), "anonymous"),
        (("keys", "create", "a", "--weight", "0"), "weight"),
        (("keys", "create", "a", "--requests-per-minute", "-1"), "requests_per_minute"),
        (("keys",), "COMMAND"),
        ((), "users|keys"),
        (("users", "list"), "no state file"),
        (("keys", "revoke", "a"), "no state file"),
    ],
)
def test_mistakes_are_told_with_exit_code_2(run, arguments, problem):
    code, said, error = run(*arguments)
    assert (code, said) == (2, "")
    assert problem in error
    assert "Traceback" not in error


def test_the_name_is_taken(run):
    run("keys", "create", "team-a")
    code, said, error = run("keys", "create", "team-a")
    assert (code, said) == (2, "")
    assert "revoke it first" in error


def test_a_state_that_can_not_be_used(run, tmp_path):
    (tmp_path / "state.sqlite").write_text("no database " * 100)
    code, _, error = run("users", "list")
    assert code == 2
    assert "can't use the state file" in error


def test_where_the_state_is(run, tmp_path, monkeypatch):
    """--state, then the variable, then the configuration, then the home."""
    made = [tmp_path / name for name in ("option", "variable", "file", "other-file")]
    configs = []
    for state in made[2:]:
        configs.append(state.with_suffix(".toml"))
        configs[-1].write_text(f'port = 8001\n[admission]\nstate = "{state}"\n')
    create = ("keys", "create", "a")
    run(*create, state=None)
    assert (tmp_path / "home" / "nanogpt" / "admission.sqlite").exists()
    monkeypatch.setenv("NANOGPT_CONFIG", str(configs[0]))
    run(*create, state=None)
    assert made[2].exists()
    run("--config", str(configs[1]), *create, state=None)
    assert made[3].exists()
    monkeypatch.setenv("NANOGPT_ADMISSION_STATE", str(made[1]))
    run(*create, state=None)
    assert made[1].exists()
    run(*create, state=str(made[0]))
    assert made[0].exists()
    assert stat.S_IMODE(made[0].stat().st_mode) == 0o600


def test_a_mistake_in_the_configuration(run, tmp_path):
    config = tmp_path / "serve.toml"
    config.write_text("[admission]\nstaet = 'x'\n")
    code, _, error = run("--config", str(config), "users", "list", state=None)
    assert code == 2
    assert "did you mean 'state'" in error


def test_unban_ends_a_rules_cooldown(run, tmp_path):
    clock = FakeClock(2_000_000_000.0)  # later than now, as the command line sees it
    config = make_config(tmp_path, refusals={"strikes": 1})
    with closing(Admission(config, {}, clock)) as server:
        principal = Client(server).principal
        error = InvalidRequest("a mistake")
        server.refused(principal, user="u", request_id="r", error=error)
        with pytest.raises(RateLimited):
            Client(server).ask("u")
        assert "lifted: user 'u' of key 'anonymous'" in run("users", "unban", "u")[1]
        Client(later(server)).ask("u")
