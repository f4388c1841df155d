"""A rank's parent, and how forked ranks find each other again."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from nanogpt import process
from nanogpt.cluster import departure, respawn
from nanogpt.cluster.broadcast import Broadcast, PeerLost
from nanogpt.cluster.departure import SETTLE_S, Departure
from nanogpt.cluster.process_group import Group, join_generation
from nanogpt.errors import StartupError
from nanogpt.ranks import Ranks
from tests.server import ROOT


def test_pauses_grow_only_after_several_deaths():
    pauses = [respawn.pause_after(deaths) for deaths in range(1, 12)]
    assert pauses[: respawn.FREE_DEATHS] == [0.0] * respawn.FREE_DEATHS
    later = pauses[respawn.FREE_DEATHS :]
    assert all(0 < a <= b for a, b in itertools.pairwise(later))
    assert later[-1] == respawn.LONGEST_PAUSE_S


# What the children do, one after another: a file tells how many there were.
SCRIPT = """
import os, signal, sys, time
from nanogpt.cluster import respawn
respawn.MOST_DEATHS = 3
if "oom" in sys.argv[2]:
    respawn.process.oom_kills = iter(range(99)).__next__
life = respawn.Life()
def work():
    with open(sys.argv[1], "a") as file:
        file.write("x")
    number = os.path.getsize(sys.argv[1])
    act = sys.argv[2].split(",")[number - 1]
    if act == "token":
        life.mark()
        return 1
    if act == "2 if oom":
        return 2 if life.before == respawn.OUT_OF_MEMORY else 1
    if act == "2 if stuck":
        return 2 if life.before == respawn.STUCK else 1
    if act.startswith("joined"):
        life.join()
        act = act.removeprefix("joined")
    if act == "hang":
        life.turn()
        time.sleep(60)
    if act == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if act == "2 if killed":
        return 2 if life.before == -signal.SIGKILL else 1
    if act == "raise":
        raise RuntimeError("why")
    if act.startswith("signal"):
        os.kill(os.getpid(), int(act[6:]))
    return int(act)
patience = respawn.Patience(stuck_s=1.0, stopped_s=1.0)
sys.exit(respawn.keep_alive(life, patience, work, lambda: False))
"""


def run_children(tmp_path, acts: str) -> tuple[int, int]:
    """(exit code of the parent, number of children)."""
    count = tmp_path / "count"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(count), acts], cwd=ROOT, timeout=60, capture_output=True
    )
    return done.returncode, count.stat().st_size


def test_every_end_but_a_useless_start_is_followed_by_another(tmp_path):
    """Also exit code 0, which torchrun would take for success."""
    assert run_children(tmp_path, "0,signal9,raise,2") == (2, 4)


def test_too_many_deaths_without_a_token_start_everything_anew(tmp_path):
    assert run_children(tmp_path, "1,1,1,1,1") == (1, 4)


def test_a_token_in_between_starts_the_count_again(tmp_path):
    assert run_children(tmp_path, "1,1,token,1,1,1") == (1, 6)


def test_a_loop_that_does_not_turn_is_ended_and_known_as_a_fault(tmp_path):
    """Also without a front end that remembers the rank. Found by the chaos command: a rank hung,
    and before that was noticed the front end was killed; then nobody was left to notice."""
    assert run_children(tmp_path, "joinedhang,2 if stuck") == (2, 2)


def test_a_stopped_child_is_ended_and_no_fault(tmp_path):
    assert run_children(tmp_path, "joinedstop,2 if killed") == (2, 2)


def test_a_kill_for_want_of_memory_is_a_fault(tmp_path):
    """The kernel counts its kills; an operator's has the same signal, and must cost nothing."""
    assert run_children(tmp_path, "joinedsignal9,2 if oom") == (2, 2)


def test_a_start_that_comes_to_nothing_is_not_what_the_rank_before_died_of(tmp_path):
    """A request would take the blame for weights that could not be read for a while, say."""
    assert run_children(tmp_path, "joinedsignal9,1,2 if killed") == (2, 3)


def test_kills_of_a_rank_that_was_well_are_no_reason_to_wait(tmp_path):
    """An idle cluster that was killed again and again came back later and later: found by the
    chaos command."""
    assert run_children(tmp_path, ",".join(["joinedsignal9"] * 8 + ["2"])) == (2, 9)


def test_a_rank_that_crashes_by_itself_is_a_reason_to_wait(tmp_path):
    assert run_children(tmp_path, ",".join(["joinedsignal11"] * 9)) == (1, 4)


def test_an_oom_kill_of_long_ago_is_not_what_a_rank_died_of(monkeypatch):
    """An operator's kill must never cost a request."""
    count = 0
    monkeypatch.setattr(respawn.process, "oom_kills", lambda: count)
    kills = respawn._OomKills()
    now = time.monotonic()
    count = 1  # somebody else's
    assert kills.have_risen()
    for second in range(25):
        kills.look(now + second)
    assert not kills.have_risen()
    count = 2
    kills.look(now + 26)
    assert kills.have_risen()


def start_parent(child: str, patience_s: float) -> tuple[subprocess.Popen, int]:
    """A rank's parent, and the pid of its child, which runs this code for ever."""
    code = (
        "import os, time; from nanogpt.cluster import respawn\n"
        "life = respawn.Life()\n"
        "def work():\n"
        "    print(os.getpid(), flush=True)\n"
        f"    while True: {child}\n"
        f"patience = respawn.Patience({patience_s}, {patience_s})\n"
        "respawn.keep_alive(life, patience, work, lambda: False)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    return parent, int(parent.stdout.readline())


def test_a_machine_that_was_frozen_is_no_hang():
    """Parent and child wake at once: it was taken for stuck, and a lone request for guilty."""
    parent, child = start_parent("life.turn(); time.sleep(0.1)", 1.0)
    os.kill(parent.pid, signal.SIGSTOP)
    os.kill(child, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(parent.pid, signal.SIGCONT)
    time.sleep(0.3)
    os.kill(child, signal.SIGCONT)
    time.sleep(1.5)
    assert process.stat(child)[:1] in (["S"], ["R"])
    parent.kill()
    parent.communicate()


def test_child_dies_with_its_parent():
    parent, pid = start_parent("time.sleep(60)", 60)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    pidfd = process.open_pidfd(pid)
    assert pidfd is None or process.has_ended(pidfd, 10.0)
    if pidfd is not None:
        os.close(pidfd)


class Locked:
    """A store that one thread at a time uses, as processes use torchrun's."""

    def __init__(self) -> None:
        self._store, self._lock = dist.HashStore(), threading.Lock()

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            return self._store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        with self._lock:
            return self._store.check(keys)

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self._store.set(key, value)

    def get(self, key: str) -> bytes:
        with self._lock:
            return self._store.get(key)


def joining(pool, store, rank: int, world_size: int, wait_s: float = float("inf")):
    return pool.submit(join_generation, store, rank, world_size, wait_s)


def test_all_who_start_together_join_one_generation():
    store = Locked()
    with ThreadPoolExecutor(4) as pool:
        joined = [f.result(10) for f in [joining(pool, store, rank, 4) for rank in range(4)]]
    assert len({generation for generation, _ in joined}) == 1
    assert [members for _, members in joined] == [[0, 1, 2, 3]] * 4


def test_a_replaced_process_takes_those_who_wait_with_it():
    """One of three dies while it waits: no generation that it was in may be complete."""
    store = Locked()
    with ThreadPoolExecutor(4) as pool:
        waiting = [joining(pool, store, 0, 3)]
        doomed = store.add("generation", 1)  # as the one does that dies
        store.set(f"member {doomed} 1", "")
        waiting += [joining(pool, store, rank, 3) for rank in (1, 2)]
        joined = {f.result(10)[0] for f in waiting}
    assert len(joined) == 1
    assert joined.pop() > doomed


def test_a_group_that_was_complete_is_not_joined_again():
    store = Locked()
    with ThreadPoolExecutor(4) as pool:
        first = {f.result(10)[0] for f in [joining(pool, store, rank, 2) for rank in range(2)]}
        again = [joining(pool, store, 1, 2)]
        time.sleep(0.1)
        assert not again[0].done()
        again.append(joining(pool, store, 0, 2))
        second = {f.result(10)[0] for f in again}
    assert len(first) == len(second) == 1
    assert not first & second


def test_nodes_that_are_missing_are_gone_without_and_taken_in_later():
    store = Locked()
    with ThreadPoolExecutor(4) as pool:
        few = [joining(pool, store, rank, 4, wait_s=0.2) for rank in (0, 1, 3)]
        assert {str(f.result(10)[1]) for f in few} == {"[0, 1, 3]"}
        generation = few[0].result()[0]
        late = joining(pool, store, 2, 4)
        while store.add("generation", 0) == generation:  # by which the others know
            time.sleep(0.01)
        rest = [joining(pool, store, rank, 4, wait_s=5.0) for rank in (0, 1, 3)]
        assert {str(f.result(10)) for f in [late, *rest]} == {str(late.result())}
        assert late.result()[1] == [0, 1, 2, 3]


def test_a_group_has_one_set_of_weights():
    """Else the choices of a request could be of different ones."""
    store, alone = dist.HashStore(), Broadcast(0, 1, None)
    groups = [Group(Ranks(rank, 3, 0, 1, rank, "", 0), alone, store) for rank in range(3)]
    groups[0].agree({"a": "1", "b": "2"}, "kernels")
    groups[1].agree({"a": "1", "b": "2"}, "kernels")
    with pytest.raises(StartupError, match=r"node 2 has other .*: b$"):
        groups[2].agree({"a": "1", "b": "3"}, "kernels")
    with pytest.raises(StartupError, match=r": b$"):
        groups[2].agree({"a": "1"}, "kernels")
    with pytest.raises(StartupError, match=r"rank 2 .* computes with torch, rank 0 with kernels"):
        groups[2].agree({"a": "1", "b": "2"}, "torch")


def test_a_rank_that_waits_for_the_models_of_a_dead_one_moves_on():
    """It waited for ever, and its successor for it: found by the chaos command, with a second kill
    while the ranks were loading after the first."""
    store = Locked()
    generation = store.add("generation", 1)
    waiting = Group(Ranks(1, 2, 1, 2, 0, "", 0), Broadcast(0, 1, None), store, generation)
    with ThreadPoolExecutor(1) as pool:
        agreed = pool.submit(waiting.agree, {"a": "1"}, "kernels")
        time.sleep(0.1)
        assert not agreed.done()
        store.add("generation", 1)  # as the process does that takes the dead one's place
        with pytest.raises(PeerLost):
            agreed.result(10)


# SIGTERM under a bare torchrun


@pytest.fixture
def front_end():
    code = "import signal, time; signal.signal(15, lambda *_: time.sleep(0.5) or exit()); print(1)"
    child = subprocess.Popen(
        [sys.executable, "-uc", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE
    )
    child.stdout.readline()
    yield child
    child.kill()
    child.communicate()


def becomes_due(departed: Departure) -> float:
    """Seconds from the signal until it is time to go."""
    started = time.monotonic()
    departed.ask(15, None)
    while not departed.is_due():
        assert time.monotonic() - started < 20
        time.sleep(0.02)
    departed.finish()
    return time.monotonic() - started


def test_a_rank_that_lost_its_group_goes_at_once(front_end):
    departed = Departure(lambda: False, lambda: front_end.pid, 30.0)
    assert not departed.is_due()
    becomes_due(departed)
    assert front_end.poll() is None  # nobody asked the front end to drain


def test_a_rank_with_a_group_waits_for_the_front_end(front_end):
    becomes_due(Departure(lambda: True, lambda: front_end.pid, 30.0))
    assert front_end.wait(1) == 0


def test_a_front_end_that_does_not_end_is_killed(front_end):
    os.kill(front_end.pid, signal.SIGSTOP)
    becomes_due(Departure(lambda: True, lambda: front_end.pid, 0.1))
    assert front_end.wait(5) == -signal.SIGKILL


def test_a_rank_without_a_front_end_stays_as_long_as_its_group():
    departed = Departure(lambda: True, lambda: None, 1.0)
    departed.ask(15, None)
    time.sleep(SETTLE_S + 0.1)
    assert not departed.is_due()
    assert not departed.is_due()


def test_a_rank_whose_front_end_has_died_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(departure, "MARGIN_S", 0.2)
    becomes_due(Departure(lambda: True, lambda: None, 1.0))
