"""A request that kills the engines is found and given up; those beside it live on."""

import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.cluster import client as cluster_client
from nanogpt.cluster.client import ClusterClient
from nanogpt.cluster.hold import Hold
from nanogpt.cluster.messages import Cancel, Submit
from nanogpt.cluster.respawn import OUT_OF_MEMORY, STUCK
from nanogpt.cluster.suspicion import PEER_LOST, Suspicion, is_fault, is_suspect
from nanogpt.cluster.transport import FrontEndSockets
from nanogpt.cluster.watch import Watch
from nanogpt.errors import Unavailable
from nanogpt.request import GenerateRequest, RequestFailed, TokenEvent
from nanogpt.sampling_params import SamplingParams
from tests.test_cluster import Workers, wait_for

FAULT, KILL = 1, -int(signal.SIGKILL)


@dataclass
class Request:
    blame: int = 0
    done: bool = False


def test_what_is_a_ranks_own_fault():
    assert is_fault(1)
    assert is_fault(-signal.SIGSEGV)
    assert is_fault(OUT_OF_MEMORY)
    assert is_fault(STUCK)
    assert not any(map(is_fault, (0, PEER_LOST, KILL, -signal.SIGTERM)))


def test_two_faults_alone_are_guilt():
    suspicion, request = Suspicion(), Request()
    for expected in (None, request):
        suspicion.died([request])
        assert suspicion.judge([FAULT, PEER_LOST]) is expected


def test_kills_convict_only_after_ten_without_a_token():
    suspicion, request = Suspicion(), Request()
    for _ in range(9):
        suspicion.died([request])
        assert suspicion.judge([KILL]) is None
    suspicion.died([request])
    assert suspicion.judge([KILL]) is request


def test_nobody_is_guilty_in_company_or_after_its_end():
    suspicion, requests = Suspicion(), [Request(), Request()]
    for _ in range(5):
        suspicion.died(requests)
        assert suspicion.judge([FAULT]) is None
    suspicion.died(requests[:1])
    requests[0].done = True
    assert suspicion.judge([FAULT]) is None


@given(st.integers(1, 12), st.data())
def test_only_the_guilty_one_is_given_up(count, data):
    """The whole procedure, with one request that kills at every step: whatever the order, it is
    found after few deaths and no other one is."""
    requests = [Request() for _ in range(count)]
    guilty = data.draw(st.sampled_from(requests))
    suspicion, deaths = Suspicion(), 0
    while not guilty.done:
        assert deaths < 6
        present: list[Request] = []
        waiting = sorted(requests, key=lambda r: -r.blame)
        while any(map(is_suspect, waiting)) and guilty not in present:
            tried = waiting.pop(0)
            present.append(tried)
            if tried is not guilty:
                tried.blame = 0  # a token
        if guilty not in present:
            present += waiting
        suspicion.died(present)
        deaths += 1
        found = suspicion.judge([FAULT])
        if found is not None:
            assert found is guilty
            guilty.done = True


# The same through the client, with ranks that the test plays


@pytest.fixture
def ready():
    return threading.Semaphore(0)


@pytest.fixture
def endpoints(tmp_path):
    return f"ipc://{tmp_path}/c", f"ipc://{tmp_path}/e"


@pytest.fixture
def hold():
    is_asked = threading.Event()
    hold = Hold(is_asked.is_set)
    hold.is_asked = is_asked
    return hold


@pytest.fixture
def client(endpoints, ready, hold):
    client = ClusterClient(
        lambda: FrontEndSockets(*endpoints),
        watch=Watch(watchdog_s=60),
        max_outstanding=8,
        on_ready=lambda status, models: ready.release(),
        hold=hold,
    )
    client.start()
    yield client
    client.close()


class Group(Workers):
    """Workers with a process that can die; they notice nothing, since the test plays them."""

    def __init__(self, endpoints, ready, before: int = 0) -> None:
        super().__init__(endpoints[0])
        code = "import sys; sys.stdin.read()"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        self.join(before, self.process.pid)
        assert ready.acquire(timeout=10)

    def token(self, request_id: str, position: int = 0) -> None:
        self.events(TokenEvent(request_id, 0, position, (1,)))

    def submitted(self) -> list[str]:
        """Ids of the requests that come, until none comes for a while."""
        found: list[str] = []
        while messages := self.control.receive(300):
            found += [m.request.request_id for m in messages if isinstance(m, Submit)]
        return found

    def die(self, client) -> None:
        self.process.kill()
        wait_for(lambda: not client.ready())
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        super().close()


def request(request_id: str) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        model="toy",
        prompts=((0, 1),),
        n=1,
        params=SamplingParams(seed=7, max_tokens=9),
    )


def test_the_guilty_one_fails_and_the_other_lives(client, endpoints, ready):
    group = Group(endpoints, ready)
    handles = {name: client.submit(request(name)) for name in ("good", "bad")}
    for _ in range(2):
        assert sorted(group.submitted()) == ["bad", "good"]
        group.die(client)
        group = Group(endpoints, ready, FAULT)
    alone = group.submitted()
    assert len(alone) == 1
    if alone == ["good"]:
        group.token("good")
        assert group.submitted() == ["bad"]
        group.die(client)  # not alone: no verdict yet
        group = Group(endpoints, ready, FAULT)
        assert group.submitted() == ["bad"]
    group.die(client)
    group = Group(endpoints, ready, FAULT)
    assert group.submitted() == ["good"]
    assert isinstance(handles["bad"].events(5)[-1], RequestFailed)
    group.events(TokenEvent("good", 0, len(handles["good"].remaining().resumed), (1,), (), "stop"))
    wait_for(lambda: client._intake.outstanding == 0)
    group.close()


def test_new_requests_wait_while_a_suspect_runs_alone(client, endpoints, ready):
    group = Group(endpoints, ready)
    suspect = client.submit(request("suspect"))
    other = client.submit(request("other"))
    for _ in range(2):
        group.submitted()
        group.die(client)
        group = Group(endpoints, ready, FAULT)
    (alone,) = group.submitted()
    client.submit(request("new"))
    assert group.submitted() == []
    (suspect if alone == "suspect" else other).cancel()  # its client left: that ends the trial, too
    (second,) = group.submitted()
    group.token(second)
    assert group.submitted() == ["new"]
    group.close()


def test_a_killed_group_costs_no_request(client, endpoints, ready):
    group = Group(endpoints, ready)
    handle = client.submit(request("r"))
    for _ in range(5):
        assert group.submitted() == ["r"]
        group.die(client)
        group = Group(endpoints, ready, KILL)
    assert group.submitted() == ["r"]
    group.token("r")
    assert handle.events(5) == [TokenEvent("r", 0, 0, (1,))]
    group.close()


def test_a_dead_rank_shows_at_once_and_its_last_events_count(client, endpoints, ready):
    group = Group(endpoints, ready)
    handle = client.submit(request("r"))
    group.submitted()
    assert client.ready()
    group.process.kill()
    wait_for(lambda: not client.ready())
    assert "restarting" in client.status().detail
    group.token("r")
    assert handle.events(5) == [TokenEvent("r", 0, 0, (1,))]
    client.submit(request("meanwhile"))
    heirs = Group(endpoints, ready, KILL)
    assert sorted(heirs.submitted()) == ["meanwhile", "r"]
    heirs.close()
    group.close()


def test_a_group_that_does_not_come_back_refuses_what_is_new(client, endpoints, ready, monkeypatch):
    monkeypatch.setattr(cluster_client, "RESTART_PATIENCE_S", 0.2)
    group = Group(endpoints, ready)
    accepted = client.submit(request("r"))
    group.submitted()
    group.die(client)
    client.submit(request("patient"))
    time.sleep(0.25)
    with pytest.raises(Unavailable) as refused:
        client.submit(request("late"))
    assert refused.value.code == "starting"
    assert int(refused.value.headers["Retry-After"]) > 1
    group = Group(endpoints, ready, FAULT)
    with pytest.raises(Unavailable):
        client.submit(request("late"))  # it is back, but has not brought a token yet
    group.token("r")
    assert accepted.events(5)
    client.submit(request("late"))
    group.close()


def test_a_group_whose_last_client_leaves_takes_requests(client, endpoints, ready, monkeypatch):
    """No token could ever come again, and everybody was refused for ever."""
    monkeypatch.setattr(cluster_client, "RESTART_PATIENCE_S", 0.0)
    group = Group(endpoints, ready)
    accepted = client.submit(request("r"))
    assert group.submitted() == ["r"]
    group.die(client)
    group = Group(endpoints, ready, KILL)
    assert group.submitted() == ["r"]
    accepted.cancel()
    group.receive(Cancel)
    wait_for(lambda: client._down_since is None)
    client.submit(request("next"))
    assert group.submitted() == ["next"]
    group.close()


def test_a_group_that_stays_takes_requests_though_no_token_has_come(
    client, endpoints, ready, monkeypatch
):
    monkeypatch.setattr(cluster_client, "RESTART_PATIENCE_S", 0.0)
    monkeypatch.setattr(cluster_client, "STEADY_S", 0.2)
    group = Group(endpoints, ready)
    client.submit(request("r"))
    group.submitted()
    group.die(client)
    group = Group(endpoints, ready, KILL)
    wait_for(lambda: client._down_since is None)
    client.submit(request("next"))
    assert group.submitted() == ["r", "next"]
    group.close()


def test_an_idle_group_that_comes_back_takes_requests_at_once(
    client, endpoints, ready, monkeypatch
):
    monkeypatch.setattr(cluster_client, "RESTART_PATIENCE_S", 0.0)
    Group(endpoints, ready).die(client)
    group = Group(endpoints, ready, KILL)
    client.submit(request("r"))
    assert group.submitted() == ["r"]
    group.close()


def test_who_may_not_block_is_refused_during_a_reload(client, endpoints, ready, hold):
    group = Group(endpoints, ready)
    hold.is_asked.set()
    wait_for(lambda: not hold.is_open)
    with pytest.raises(Unavailable):
        client.submit(request("line"), may_block=False)
    hold.is_asked.clear()
    client.submit(request("waits"))
    client.submit(request("line"), may_block=False)
    assert group.submitted() == ["waits", "line"]
    group.close()
