"""The cluster's parts, without processes: messages, placement, handles, the watch, the client."""

import threading
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.cluster import lead, rank_loop, transport
from nanogpt.cluster.broadcast import Broadcast
from nanogpt.cluster.client import ClusterClient
from nanogpt.cluster.handle import RequestHandle
from nanogpt.cluster.intake import Place
from nanogpt.cluster.lead import Lead
from nanogpt.cluster.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Alive,
    Cancel,
    Decoder,
    EventBatch,
    Frame,
    FromRank,
    Hello,
    Introduce,
    ProtocolError,
    RankReady,
    Submit,
    Welcome,
    encode,
)
from nanogpt.cluster.placement import Placement
from nanogpt.cluster.rank_loop import RankLoop
from nanogpt.cluster.transport import ControlLink, EventLink, FrontEndSockets
from nanogpt.cluster.watch import Watch
from nanogpt.errors import InvalidRequest, Unavailable
from nanogpt.ranks import Ranks
from nanogpt.registry import ModelInfo, TokenizerSpec
from nanogpt.request import (
    EngineStats,
    GenerateRequest,
    PromptScored,
    RequestFailed,
    TokenEvent,
    TokenLogprobs,
)
from nanogpt.sampling_params import SamplingParams

INFO = ModelInfo(
    name="toy",
    context_length=64,
    vocab_size=3,
    eos_token_id=None,
    start_token_id=0,
    tokenizer=TokenizerSpec(kind="char", characters="abc"),
    dtype="float32",
    fingerprint="00",
    created=0,
    num_parameters=0,
)


ALONE = Ranks(0, 1, 0, 1, 0, "", 0)


def request(n=1, prompts=((0, 1),), **params) -> GenerateRequest:
    return GenerateRequest(
        request_id="r1", model="toy", prompts=prompts, n=n, params=SamplingParams(seed=7, **params)
    )


# Messages


def test_messages_round_trip():
    frame = Frame(3, (Welcome(9, "ipc://x"), Submit(9, request(n=2)), Cancel(9, "r1", 1)))
    assert Decoder(Frame)(encode(frame)) == frame
    batch = EventBatch.of(
        9,
        1,
        [
            TokenEvent("r1", 0, 0, (1, 2), (TokenLogprobs(-0.5, (1,), (-0.5,)),) * 2, "stop", 3),
            PromptScored("r1", 0, 1, (TokenLogprobs(-1.0, (), ()),)),
            RequestFailed("r1", "why"),
        ],
    )
    assert Decoder(FromRank)(encode(batch)) == batch


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        Decoder(FromRank)(b"\xc1" + data)  # 0xc1 is never used in msgpack


def test_message_of_another_kind_is_refused():
    with pytest.raises(ProtocolError, match="version"):
        Decoder(Frame)(encode(Introduce()))


def test_oversized_message_is_refused_unread():
    with pytest.raises(ProtocolError, match="limit"):
        Decoder(Frame)(bytes(MAX_MESSAGE_BYTES + 1))


# Placement


@given(st.integers(1, 8), st.lists(st.integers(1, 40), max_size=8))
def test_placement_is_even_and_gives_back_all(world_size, counts):
    placement = Placement(world_size)
    placed = [placement.place(count) for count in counts]
    assert max(placement.load) - min(placement.load) <= 1
    assert sum(placement.load) == sum(counts)
    for owners in placed:
        placement.release(owners)
    assert placement.load == (0,) * world_size


def test_idle_cluster_deals_choices_round():
    assert Placement(2).place(4) == (0, 1, 0, 1)
    assert Placement(4).place(2) == (0, 1)


def test_finished_choices_weigh_nothing():
    placement = Placement(2)
    placement.place(3, finished=(0, 2))
    assert sum(placement.load) == 1


# Handles


def handle_of(req: GenerateRequest) -> RequestHandle:
    return RequestHandle(req, Place(Placement(1), req.owners), lambda handle, index: None)


@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=8),
)
def test_handle_passes_each_position_once_across_incarnations(n, length, incarnations):
    """Whatever the seams: an incarnation resumes from what the handle has, or (a straggler of
    before) repeats itself from the start; the last one finishes the work."""
    handle = handle_of(request(n=n, max_tokens=length))
    seen = [[] for _ in range(n)]
    for repeats, steps in [*incarnations, (False, length)]:
        resumed = handle.remaining().resumed or ((),) * n
        for index in range(n):
            at = 0 if repeats else len(resumed[index])
            for position in range(at, min(at + steps, length)):
                last = position == length - 1
                event = TokenEvent(
                    "r1", index, position, (position,), (), "length" if last else None
                )
                accepted, finished = handle.accept(event)
                assert list(finished) == ([index] if accepted and last else [])
                if accepted is not None:
                    seen[index] += accepted.token_ids
    assert handle.done
    assert seen == [list(range(length))] * n


def test_handle_trims_prompt_scores_that_overlap():
    score = tuple(TokenLogprobs(-float(i), (), ()) for i in range(5))
    handle = handle_of(request(prompts=((0,) * 6,), logprobs=0, prompt_logprobs=True))
    first, _ = handle.accept(PromptScored("r1", 0, 1, score[:3]))
    assert handle.remaining().params.prompt_logprobs
    again, _ = handle.accept(PromptScored("r1", 0, 1, score[:3]))
    rest, _ = handle.accept(PromptScored("r1", 0, 3, score[2:]))
    assert first.logprobs == score[:3]
    assert again is None
    assert (rest.position, rest.logprobs) == (4, score[3:])
    assert not handle.remaining().params.prompt_logprobs


def test_failure_ends_every_open_choice():
    handle = handle_of(request(n=3))
    handle.accept(TokenEvent("r1", 1, 0, (0,), (), "length"))
    assert list(handle.fail("why")) == [0, 2]
    assert handle.done
    assert handle.events(0) == [RequestFailed("r1", "why")]


# The watch


class Killed(list):
    ended: frozenset[int] = frozenset()

    def watch(self) -> Watch:
        return Watch(
            watchdog_s=3,
            open_pid=lambda pid: pid,
            has_ended=lambda pid: pid in self.ended,
            kill=self.append,
        )


def looks(watch: Watch, until: float, *beats: int) -> list[int]:
    """Check once a second up to this time; the ranks of `beats` beat each time."""
    found = []
    for second in range(1, int(until) + 1):
        for rank in beats:
            watch.beat(rank, 0, float(second))
        found += watch.check(float(second))
    return found


def test_watch_kills_a_silent_rank_once():
    killed = Killed()
    watch = killed.watch()
    watch.join(0, 0, 100, now=0.0)
    watch.join(1, 0, 101, now=0.0)
    assert looks(watch, 3.0, 0) == []
    assert looks(watch, 9.0, 0) == [1]
    assert killed == [101]


def test_watch_ends_the_group_for_a_rank_on_another_node():
    killed = Killed()
    watch = killed.watch()
    watch.begin(100)
    watch.join(0, 0, 100, now=0.0)
    watch.join(1, 1, 101, now=0.0)
    assert looks(watch, 5.0, 0) == [1]
    assert killed == [100]


def test_watch_leaves_the_dead_alone_but_not_who_hangs_beside_them():
    """A stopped rank does not notice that another one died: nothing went on until it was killed.
    Found by the chaos command: SIGSTOP of one rank, and another one exits before the watchdog's
    time."""
    killed = Killed()
    watch = killed.watch()
    watch.join(0, 0, 100, now=0.0)
    watch.join(1, 0, 101, now=0.0)
    killed.ended = frozenset({101})
    assert looks(watch, 9.0) == [0]
    assert killed == [100]


def test_watch_does_not_count_the_time_in_which_it_was_stopped_itself():
    """After a SIGSTOP of the front end the beats of that time are still to be read."""
    killed = Killed()
    watch = killed.watch()
    watch.join(0, 0, 100, now=0.0)
    assert watch.check(now=1.0) == []
    assert watch.check(now=31.0) == []
    assert watch.check(now=31.5) == []
    assert watch.check(now=32.9) == []
    assert watch.check(now=33.2) == [0]


def test_watch_takes_no_notice_of_the_silence_of_who_has_not_joined():
    """It may have died before it told that it was ready. The front end died of its beats."""
    killed = Killed()
    watch = killed.watch()
    watch.begin(100)
    watch.join(0, 0, 100, now=0.0)
    watch.beat(1, 0, now=0.5)
    assert looks(watch, 9.0, 0) == []


@pytest.mark.parametrize("has_joined", [True, False])
def test_watch_ends_the_group_when_messages_are_lost(has_joined):
    """Also the word that a rank is ready: nothing would ever run."""
    killed = Killed()
    watch = killed.watch()
    watch.begin(100)
    if has_joined:
        watch.join(0, 0, 100, now=0.0)
        watch.receive(0)
    watch.beat(0, 1 + has_joined, now=0.0)
    found = [rank for second in range(1, 20) for rank in beat_and_check(watch, 2, float(second))]
    assert found == [0]
    assert killed == [100]


def beat_and_check(watch: Watch, sent: int, now: float) -> list[int]:
    watch.beat(0, sent, now)
    return watch.check(now)


def test_watch_waits_for_messages_that_a_beat_has_overtaken():
    """Each comes nine seconds late; those of the time in which it was stopped itself, later."""
    killed = Killed()
    watch = killed.watch()
    watch.begin(100)
    watch.join(0, 0, 100, now=0.0)
    for second in range(1, 60):
        assert beat_and_check(watch, second, float(second)) == []
        if second > 9:
            watch.receive(0)
    assert beat_and_check(watch, 60, 90.0) == []
    assert beat_and_check(watch, 60, 91.0) == []


# The client, over real sockets, with ranks that the test plays


class Workers:
    """Plays the worker group of `world_size` ranks."""

    def __init__(
        self, control: str, world_size: int = 1, models: tuple[ModelInfo, ...] = (INFO,)
    ) -> None:
        self.world_size, self.models = world_size, models
        self.control = ControlLink(control)
        self.links: list[EventLink] = []
        self.epoch = 0

    def join(self, before: int = 0, pid: int = 1) -> None:
        """Come up in the places of ranks that ended so."""
        self.control.send(Hello(PROTOCOL_VERSION, self.world_size, self.models, pid))
        welcome = self.receive(Welcome)
        self.epoch = welcome.epoch
        for rank in range(self.world_size):
            self.links.append(EventLink(welcome, is_local=True))
            self.links[-1].send(RankReady(self.epoch, rank, 0, pid, before))

    def receive(self, kind):
        """The next message, which must be of this kind."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for message in self.control.receive(100):
                assert isinstance(message, kind), message
                return message
        raise AssertionError(f"no {kind.__name__} came")

    def events(self, *events, epoch=None) -> None:
        self.links[0].send(EventBatch.of(epoch or self.epoch, 0, list(events)))

    def close(self) -> None:
        self.control.close()
        for link in self.links:
            link.close()


@pytest.fixture
def endpoints(tmp_path):
    return f"ipc://{tmp_path}/c", f"ipc://{tmp_path}/e"


@pytest.fixture
def ready():
    return threading.Semaphore(0)


@pytest.fixture
def client(endpoints, ready):
    client = ClusterClient(
        lambda: FrontEndSockets(*endpoints),
        watch=Watch(watchdog_s=60, open_pid=lambda pid: None),
        max_outstanding=8,
        on_ready=lambda status, models: ready.release(),
    )
    client.start()
    yield client
    client.close()


@pytest.fixture
def workers(endpoints, client, ready):
    workers = Workers(endpoints[0])
    workers.join()
    assert ready.acquire(timeout=10)
    yield workers
    workers.close()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_refuses_until_the_first_group_has_come(client):
    with pytest.raises(Unavailable) as refused:
        client.submit(request())
    assert refused.value.code == "starting"
    assert not client.ready()


def test_request_and_events_pass_through(client, workers):
    handle = client.submit(request(n=2))
    assert workers.receive(Submit).request.owners == (0, 0)
    token = TokenEvent("r1", 0, 0, (2,))
    workers.events(token)
    assert handle.events(10) == [token]
    handle.cancel(1)
    assert workers.receive(Cancel) == Cancel(workers.epoch, "r1", 1)
    workers.events(TokenEvent("r1", 1, 0, (2,)), TokenEvent("r1", 0, 1, (), (), "stop"))
    assert handle.events(10) == [TokenEvent("r1", 0, 1, (), (), "stop")]
    assert handle.done


def test_a_later_attempt_under_the_same_id_takes_the_place_of_the_first(client, workers):
    """The first one's cancel, which is late, does nothing to it."""
    first = client.submit(request())
    assert workers.receive(Submit).request.request_id == "r1"
    second = client.submit(request())
    (told,) = first.events(10)
    assert isinstance(told, RequestFailed)
    received = []
    wait_for(lambda: received.extend(workers.control.receive(100)) or len(received) == 2)
    assert [type(message) for message in received] == [Cancel, Submit]
    first.cancel()
    token = TokenEvent("r1", 0, 0, (2,), (), "length")
    workers.events(token)
    assert second.events(10) == [token]
    wait_for(lambda: client._intake.outstanding == 0)


def test_events_of_an_old_epoch_and_stray_positions_are_dropped(client, workers):
    handle = client.submit(request())
    workers.events(TokenEvent("r1", 0, 0, (1,)), epoch=workers.epoch - 1)
    workers.events(TokenEvent("r1", 0, 5, (1,)))
    workers.events(TokenEvent("nobody", 0, 0, (1,)))
    workers.events(TokenEvent("r1", 0, 0, (2,)))
    assert handle.events(10) == [TokenEvent("r1", 0, 0, (2,))]


def test_next_group_gets_the_request_with_its_tokens(client, workers, endpoints, ready):
    handle = client.submit(request(n=2, max_tokens=4))
    workers.receive(Submit)
    workers.events(TokenEvent("r1", 0, 0, (1, 2)), TokenEvent("r1", 1, 0, (), (), "stop"))
    assert len(handle.events(10)) == 2
    heirs = Workers(endpoints[0], world_size=2)
    heirs.join()
    assert ready.acquire(timeout=10)
    resumed = heirs.receive(Submit).request
    assert resumed.resumed == ((1, 2), ())
    assert resumed.finished == (1,)
    assert heirs.epoch > workers.epoch
    workers.events(TokenEvent("r1", 0, 2, (0,)))  # too late: its epoch is over
    heirs.events(TokenEvent("r1", 0, 2, (2, 2), (), "length"))
    assert handle.events(10) == [TokenEvent("r1", 0, 2, (2, 2), (), "length")]
    wait_for(lambda: client._intake.outstanding == 0)
    heirs.close()


@pytest.mark.parametrize(
    ("heir", "begun", "unbegun"),
    [
        ("fingerprint", "were replaced while this request ran", "have just been replaced"),
        ("name", "no longer there", "no longer there"),
    ],
    ids=["other weights", "no such model"],
)
def test_what_outlasts_a_reload_of_other_models_is_told_so(
    client, workers, endpoints, ready, heir, begun, unbegun
):
    """500 for what has tokens of the weights before (given_up makes it of no retry_after), 503 for
    what has none; 500 for both without the model."""
    handles = [
        client.submit(msgspec.structs.replace(request(), request_id=name)) for name in ("r1", "r2")
    ]
    workers.events(TokenEvent("r1", 0, 0, (1,)))
    assert handles[0].events(10)
    other = msgspec.structs.replace(INFO, **{heir: "another"})
    heirs = Workers(endpoints[0], models=(other,))
    heirs.join()
    assert ready.acquire(timeout=10)
    (of_begun,), (of_unbegun,) = handles[0].events(10), handles[1].events(10)
    assert begun in of_begun.message
    assert not of_begun.retry_after
    assert unbegun in of_unbegun.message
    again = ("starting", 1) if heir == "fingerprint" else ("", 0)
    assert (of_unbegun.code, of_unbegun.retry_after) == again
    heirs.close()


def test_unknown_workers_are_asked_to_introduce_themselves(client, endpoints):
    control = ControlLink(endpoints[0])
    control.send(Alive(5))
    assert control.receive(10_000) == [Introduce()]
    control.close()


def test_too_much_outstanding_is_overloaded_and_recovers(client, workers):
    handle = client.submit(request(n=8))
    with pytest.raises(Unavailable) as refused:
        client.submit(request())
    assert refused.value.code == "overloaded"
    assert refused.value.headers["Retry-After"]
    handle.cancel()
    wait_for(lambda: client._intake.outstanding == 0)
    client.submit(request())


def test_a_request_that_can_never_fit_is_the_clients_mistake(client, workers):
    """Else it would be told to try again, for ever."""
    with pytest.raises(InvalidRequest, match="at most 8"):
        client.submit(request(n=9))
    client.submit(request(n=8))


def test_draining_takes_nothing_new_and_finishes_the_rest(client, workers):
    handle = client.submit(request())
    client.drain()
    with pytest.raises(Unavailable) as refused:
        client.submit(request())
    assert refused.value.code == "draining"
    workers.events(TokenEvent("r1", 0, 0, (1,), (), "length"))
    assert handle.events(10)


def test_a_wrong_curve_key_connects_to_nothing(tmp_path):
    """Events between nodes: the right key passes, another or none does not."""
    sockets = FrontEndSockets(f"ipc://{tmp_path}/c", f"ipc://{tmp_path}/e", "127.0.0.1")
    other = FrontEndSockets(f"ipc://{tmp_path}/c2", f"ipc://{tmp_path}/e2", "127.0.0.1")
    right, stranger = sockets.welcome(1), other.welcome(1)
    wrong = Welcome(
        1,
        "",
        right.remote_events,
        right.server_key,
        stranger.client_public,
        stranger.client_secret,
    )
    keyless = Welcome(1, right.remote_events)
    bad, good = EventLink(wrong, is_local=False), EventLink(right, is_local=False)
    none = EventLink(keyless, is_local=True)  # connects without CURVE
    bad.send(RankReady(1, 1, 1, 1))
    none.send(RankReady(1, 2, 1, 1))
    good.send(RankReady(1, 0, 1, 1))
    got = []
    deadline = time.monotonic() + 10
    while not got and time.monotonic() < deadline:
        sockets.poll(50)
        got += sockets.event_messages()
    for _ in range(10):
        sockets.poll(50)
        got += sockets.event_messages()
    assert [m.rank for m in got] == [0]
    for thing in (bad, none, good, sockets, other):
        thing.close()


# A full queue


def test_a_full_queue_loses_nothing_and_stops_generation(tmp_path, monkeypatch):
    """The front end is stopped, say: what it does not take waits in order, and a rank generates no
    more once enough of it does."""
    monkeypatch.setattr(transport, "MANY", 5)
    monkeypatch.setattr(rank_loop, "MAX_BACKLOG", 20)
    sockets = FrontEndSockets(f"ipc://{tmp_path}/c", f"ipc://{tmp_path}/e")
    engine = CountingEngine()
    loop = RankLoop(ALONE, {"toy": engine}, Broadcast(0, 1, None), None, 60.0)
    loop._enter(sockets.welcome(1))
    loop._submit(msgspec.structs.replace(request(), owners=(0,)))
    for _ in range(3000):
        loop.turn()
    steps = engine.steps
    assert 20 < steps < 3000
    for _ in range(10):
        loop.turn()
    assert engine.steps == steps  # nothing goes on while nobody listens
    engine.has_work = False  # and so the last events wait, with no step to send them
    got: list[int] = []
    deadline = time.monotonic() + 20
    while len(got) < steps:
        assert time.monotonic() < deadline
        sockets.poll(1)
        for message in sockets.event_messages():
            if isinstance(message, EventBatch):
                got += [event.position for event in message.tokens]
        loop.turn()
    assert got == list(range(steps))
    loop._heart.stop()
    loop._link.close()
    sockets.close()


def test_what_is_too_much_for_one_broadcast_goes_in_several(tmp_path, monkeypatch):
    """Many long requests go on after a crash at once. Rank 0 died of them, and its successor."""
    monkeypatch.setattr(lead, "MAX_MESSAGE_BYTES", 500)
    sockets = FrontEndSockets(f"ipc://{tmp_path}/c", f"ipc://{tmp_path}/e")
    broadcast = Broadcast(0, 1, None)
    first = Lead(ControlLink(f"ipc://{tmp_path}/c"), broadcast, Lead.hello(1, (INFO,)), 60.0)
    deadline = time.monotonic() + 10
    while not (said := list(sockets.control_messages())):
        assert time.monotonic() < deadline
        sockets.poll(10)
    ((identity, _), *_) = said
    wanted = [Submit(0, msgspec.structs.replace(request(), request_id=f"r{i}")) for i in range(40)]
    for submit in wanted:
        sockets.send(identity, submit)
    got, ticks = [], []
    while len(got) < len(wanted):
        assert time.monotonic() < deadline
        first.turn(10)
        for payload in broadcast.poll():
            assert len(payload) <= 500
            frame = Decoder(Frame)(payload)
            ticks.append(frame.tick)
            got += frame.commands
    assert got == wanted
    assert ticks == list(range(1, len(ticks) + 1))
    assert len(ticks) > 5
    first._control.close()
    sockets.close()


def test_the_last_request_may_be_cancelled_between_two_steps(tmp_path):
    """The rank had chosen whose turn it was among no engines, and died of it."""
    sockets = FrontEndSockets(f"ipc://{tmp_path}/c", f"ipc://{tmp_path}/e")
    engine, broadcast = CountingEngine(), Broadcast(0, 1, None)
    loop = RankLoop(ALONE, {"toy": engine}, broadcast, None, 60.0)
    loop._enter(sockets.welcome(1))
    loop._submit(msgspec.structs.replace(request(), owners=(0,)))
    loop.turn()
    assert engine.steps == 1
    broadcast.send(encode(Frame(1, (Cancel(1, "r1"),))))
    loop.turn()
    assert engine.steps == 1
    loop._heart.stop()
    loop._link.close()
    sockets.close()


class CountingEngine:
    """A token in each step, for ever."""

    def __init__(self) -> None:
        self.steps, self.has_work = 0, True

    def add(self, request) -> None: ...
    def abort(self, request_id, index=None) -> None:
        self.has_work = False

    def abort_all(self) -> None: ...
    def stats(self) -> EngineStats:
        return EngineStats(model="toy")

    def step(self):
        self.steps += 1
        return [TokenEvent("r1", 0, self.steps - 1, (0,))]
