"""Bans that several servers share through a real Redis."""

import time
from contextlib import closing

import pytest
import redis

from nanogpt import admin
from nanogpt.admission_config import AdmissionConfig
from nanogpt.api.admission import Admission, redis_windows
from nanogpt.api.admission.bans import new_ban
from nanogpt.api.admission.shared_bans import SharedBans
from nanogpt.api.admission.shared_state import LOOK_S, SharedState
from nanogpt.api.admission.state import Action, State
from nanogpt.api.admission.subject import Subject
from nanogpt.api.admission.windows import WINDOW_S, Claim, Full, MemoryWindows, Name
from nanogpt.config import convert
from nanogpt.errors import Banned
from tests.jobs_utils import wait_for
from tests.redis_server import redis_server

ALICE, KEY = Subject("team", "alice"), Subject("team", "")


@pytest.fixture
def server(tmp_path):
    with redis_server(tmp_path / "redis") as running:
        yield running


@pytest.fixture
def open_state(server, tmp_path):
    opened = []

    def open_one(name: str, queue: str = "nanogpt") -> SharedState:
        client = redis.Redis.from_url(server.url, socket_timeout=0.25)
        opened.append(SharedState(str(tmp_path / f"{name}.sqlite"), SharedBans(client, queue)))
        return opened[-1]

    yield open_one
    for state in opened:
        state.close()


def ban(subject: Subject, seconds: float | None = None):
    return new_ban(subject, "spam", "operator", time.time(), seconds)


def subjects(state: SharedState) -> list[Subject]:
    return sorted(found.subject for found in state.bans(time.time()))


def test_bans_and_their_ends_reach_all(open_state):
    one, two = open_state("one"), open_state("two")
    before = two.version()
    one.put_ban(ban(ALICE), replace=True)
    two.put_ban(ban(KEY), replace=True)
    wait_for(lambda: subjects(one) == subjects(two) == [KEY, ALICE])
    assert two.version() != before  # or nobody would look
    two.lift(ALICE, time.time())
    wait_for(lambda: subjects(one) == subjects(two) == [KEY])


def test_who_comes_later_learns_what_counts_now(open_state):
    one = open_state("one")
    one.put_ban(ban(ALICE), replace=True)
    one.lift(ALICE, time.time())
    one.put_ban(ban(Subject("team", "brief"), 0.01), replace=True)
    one.put_ban(ban(KEY), replace=True)
    time.sleep(0.05)
    two = open_state("two")
    wait_for(lambda: subjects(two) == [KEY])
    three = open_state("two")  # another process with the same file
    time.sleep(1.0)
    assert subjects(three) == subjects(two) == subjects(one) == [KEY]


def test_a_lift_does_not_undo_a_later_ban(open_state):
    one = open_state("one")
    one.put_ban(ban(ALICE), replace=True)
    one.lift(ALICE, time.time())
    one.put_ban(ban(ALICE), replace=True)
    two = open_state("two")
    wait_for(lambda: subjects(two) == [ALICE])


def test_what_was_lifted_elsewhere_leaves_nothing_that_led_to_it(open_state):
    one, two = open_state("one"), open_state("two")
    two.add_action(Action(time.time(), *ALICE, "refusals", "cooldown", "spam"), 0.0)
    two.put_ban(ban(ALICE), replace=True)
    wait_for(lambda: subjects(one) == [ALICE])
    one.lift(ALICE, time.time())
    wait_for(lambda: two.actions(0.0, None) == [])


def test_a_ban_counts_in_its_own_queue_only(open_state):
    production, staging = open_state("one"), open_state("two", queue="staging")
    staging.put_ban(ban(ALICE), replace=True)
    production.put_ban(ban(KEY), replace=True)
    elsewhere = open_state("three", queue="staging")
    wait_for(lambda: subjects(elsewhere) == [ALICE])
    assert (subjects(production), subjects(staging)) == ([KEY], [ALICE])
    elsewhere.close()
    moved = open_state("three")  # the same file, of which the bans of staging are left
    wait_for(lambda: subjects(moved) == [KEY])
    assert subjects(production) == [KEY]


def test_limits_of_a_queue_are_its_own(server):
    config = convert({"state": ":memory:", "redis_url": server.url}, AdmissionConfig)
    claims = [Claim(Name("requests", "team", ""), 1, 1)]
    shared = [
        redis_windows.make_shared(config, queue, MemoryWindows(time, WINDOW_S, 100), time)
        for queue in ("production", "staging", "staging")
    ]
    assert [isinstance(one.take(claims), Full) for one in shared] == [False, False, True]
    for one in shared:
        one.close()


def test_bans_of_a_file_of_its_own_are_shared_from_then_on(open_state, tmp_path):
    with closing(State(str(tmp_path / "one.sqlite"))) as state:
        state.put_ban(ban(ALICE), replace=True)
    two = open_state("two")
    two.put_ban(ban(KEY), replace=True)
    one = open_state("one")
    wait_for(lambda: subjects(one) == subjects(two) == [KEY, ALICE])


def test_a_redis_that_lost_its_data_gets_the_bans_of_the_files(open_state, server):
    one, two = open_state("one"), open_state("two")
    one.put_ban(ban(ALICE), replace=True)
    two.put_ban(ban(KEY), replace=True)
    wait_for(lambda: subjects(one) == subjects(two) == [KEY, ALICE])
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    one.put_ban(ban(Subject("", "bob")), replace=True)  # the first that the new one hears of
    wait_for(lambda: len(subjects(one)) == len(subjects(two)) == 3)
    four = open_state("four")
    wait_for(lambda: subjects(four) == subjects(one))


def test_what_redis_was_not_told_survives_the_process(open_state, server):
    one, two = open_state("one"), open_state("two")
    one.put_ban(ban(KEY), replace=True)
    wait_for(lambda: subjects(two) == [KEY])
    server.kill()
    one.put_ban(ban(ALICE), replace=True)
    one.lift(KEY, time.time())
    one.close()
    one = open_state("one")
    assert subjects(one) == [ALICE]
    server.start()
    wait_for(lambda: subjects(one) == subjects(two) == [ALICE])


@pytest.fixture
def admin_config(server, tmp_path, monkeypatch):
    """The configuration file of a server whose state file is one.sqlite."""
    for name in ("NANOGPT_CONFIG", "NANOGPT_ADMISSION_STATE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "serve.toml"
    tables = f'[admission]\nstate = "{tmp_path}/one.sqlite"\n[queue]\nurl = "{server.url}"\n'
    path.write_text(tables)
    return path


def test_what_the_command_line_changes_lasts_and_is_known_everywhere(open_state, admin_config):
    """Each server that was started again carried out the changes of all time, and so a ban that
    the command line had lifted."""
    command = ["--config", str(admin_config), "users"]
    one, two = open_state("one"), open_state("two")
    one.put_ban(ban(ALICE), replace=True)
    assert admin.main([*command, "ban", "bob", "--reason", "spam"]) == 0
    wait_for(lambda: subjects(one) == subjects(two) == [Subject("", "bob"), ALICE])
    assert admin.main([*command, "unban", "alice"]) == 0
    wait_for(lambda: subjects(one) == subjects(two) == [Subject("", "bob")])
    one.close()
    one, three = open_state("one"), open_state("three")
    wait_for(lambda: subjects(three) == [Subject("", "bob")])
    time.sleep(2 * LOOK_S)
    assert subjects(one) == subjects(three) == subjects(two)


def test_the_command_line_says_what_it_can_not_change(open_state, admin_config, server, capsys):
    one = open_state("one")
    one.put_ban(ban(ALICE), replace=True)
    unban = ["users", "unban", "alice"]
    assert admin.main(["--state", one.path, *unban]) == 2
    said = capsys.readouterr().err
    assert "a copy of those that the servers of the queue 'nanogpt' share" in said
    server.kill()
    assert admin.main(["--config", str(admin_config), *unban]) == 2
    assert "the bans in Redis can't be used" in capsys.readouterr().err
    assert subjects(one) == [ALICE]


def test_a_server_that_shares_no_longer_has_its_bans_for_itself(open_state, tmp_path):
    one = open_state("one")
    one.put_ban(ban(ALICE), replace=True)
    one.close()
    path = str(tmp_path / "one.sqlite")
    Admission(convert({"state": path, "audit": False}, AdmissionConfig), {}).close()
    assert admin.main(["--state", path, "users", "unban", "alice"]) == 0


def test_bans_hold_here_while_redis_is_away_and_are_told_later(open_state, server):
    one, two = open_state("one"), open_state("two")
    server.kill()
    one.put_ban(ban(ALICE), replace=True)
    assert subjects(one) == [ALICE]
    server.start()
    wait_for(lambda: subjects(two) == [ALICE])


def test_a_ban_shuts_out_at_another_server(server):
    table = {"state": ":memory:", "redis_url": server.url}
    environ = {"NANOGPT_API_KEYS": "team=" + "k" * 24}
    config = convert(table, AdmissionConfig)
    one, two = Admission(config, environ), Admission(config, environ)
    try:
        one.ban(user="alice", key="team", reason="spam", seconds=None, by="operator")
        known = two.authenticate("Bearer " + "k" * 24, request_id="r")

        def is_banned() -> bool:
            try:
                two.precheck(known, user="alice", request_id="r", model="m")
            except Banned:
                return True
            return False

        wait_for(is_banned)
        two.unban(user="alice", by="operator")
        wait_for(lambda: not one.bans() and not is_banned())
    finally:
        one.close()
        two.close()
