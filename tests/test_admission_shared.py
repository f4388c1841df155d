"""Bans that several servers share through a real Redis."""

import time

import pytest
import redis

from nanogpt.admission_config import AdmissionConfig
from nanogpt.api.admission import Admission
from nanogpt.api.admission.bans import new_ban
from nanogpt.api.admission.shared_state import SharedState
from nanogpt.api.admission.subject import Subject
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

    def open_one(name: str) -> SharedState:
        client = redis.Redis.from_url(server.url, socket_timeout=0.25)
        opened.append(SharedState(str(tmp_path / f"{name}.sqlite"), client))
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
