"""Files in Redis: content is there whole, once, and as long as its job, whoever is stopped or
killed in between."""

import os
import time

import pytest

from nanogpt.errors import NotFound, Unavailable
from nanogpt.jobs.redis import RedisStore
from nanogpt.jobs.redis_files import ORPHAN_S, RedisFiles
from nanogpt.jobs.runner import Lease, LeaseLost
from nanogpt.jobs.store import Job, Lane, StoreUnavailable
from tests.redis_server import redis_server

CONTENT = os.urandom(2_500_000)  # in three pieces


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def store(server):
    store = RedisStore(server.url, max_queued=100, max_bytes=10**9, namespace=os.urandom(4).hex())
    yield store
    store.close()


@pytest.fixture
def files(tmp_path, store):
    return RedisFiles(tmp_path, store, max_file_bytes=10**7, max_bytes=10**8, clock=time.time)


def add(files, content=CONTENT, **more):
    upload = files.upload()
    try:
        upload.write(content)
        fields = {"owner": "a", "filename": "f", "purpose": "batch", "keep_s": 1e6, **more}
        return files.add(upload, **fields)
    finally:
        upload.close()


def content_of(files, file_id: str) -> bytes:
    with files.open(file_id) as file:
        return file.read()


def keys(store, kind: str) -> list[str]:
    """Of one kind: content, or parts of it."""
    return store.link.command("KEYS", f"{{{store.namespace}}}:{kind}:*")


def counted(store) -> tuple[int, int]:
    """Bytes of files, and of jobs."""
    names = (f"{{{store.namespace}}}:{name}" for name in ("file-bytes", "bytes"))
    return tuple(int(store.link.command("GET", name) or 0) for name in names)


def claim(store, name="batch", lease_s=30.0) -> Lease:
    store.put(
        Job(id=name, kind="batch", owner="a", created=0.0, request=b"", keep_s=1e6, lane=Lane.BATCH)
    )
    return Lease(store, store.claim(Lane.BATCH, lease_s, 0.0), lambda: False)


def in_between(store, monkeypatch, action, after: int = 1) -> None:
    """Do something once so many pieces of the next file have been sent."""
    each, sent = store.link.each, [0]

    def interrupted(*commands):
        answers = each(*commands)
        if commands[0][0] == "RPUSH":
            sent[0] += 1
            if sent[0] == after:
                action()
        return answers

    monkeypatch.setattr(store.link, "each", interrupted)


def test_content_is_kept_for_ever_and_gone_with_its_file(store, files):
    empty, full = add(files, b""), add(files)
    assert (content_of(files, empty.id), content_of(files, full.id)) == (b"", CONTENT)
    (key,) = keys(store, "content")
    assert store.link.command("TTL", key) == -1
    assert counted(store)[0] == len(CONTENT)
    files.delete(full.id)
    files.delete(empty.id)
    assert keys(store, "content") == keys(store, "part") == []
    assert counted(store) == (0, 0)


def test_an_upload_that_is_known_or_refused_leaves_nothing(store, files):
    first = add(files, once="name")
    assert add(files, b"again", once="name") == first
    assert keys(store, "part") == []
    assert counted(store)[0] == len(CONTENT)
    store._max_bytes = 0
    with pytest.raises(Unavailable, match="delete some"):
        add(files)
    assert keys(store, "part") == []
    assert len(keys(store, "content")) == 1
    assert counted(store)[0] == len(CONTENT)


def test_what_expires_is_gone_whoever_dies_after_that(store, files):
    """Nothing is left to do for the process that swept."""
    add(files, keep_s=-1.0)
    assert len(store.sweep()) == 1
    assert keys(store, "content") == []
    assert counted(store) == (0, 0)


def test_a_server_that_is_killed_in_between_leaves_what_goes_by_itself(store, files, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "put_file", killed)
    with pytest.raises(KeyboardInterrupt):
        add(files)
    assert counted(store) == (0, 0)
    assert keys(store, "content") == []
    (part,) = keys(store, "part")
    assert 0 < store.link.command("TTL", part) <= ORPHAN_S


def test_who_lost_the_lease_while_sending_changes_nothing(store, files, monkeypatch):
    """The owner's file was doubled."""
    late = claim(store, lease_s=0.0)

    def take_over():
        monkeypatch.undo()
        owner = Lease(store, store.claim(Lane.BATCH, 30.0, 0.0), lambda: False)
        add(files, file_id="file-out", lease=owner)
        owner.complete("completed", b"", forget_records=True)

    in_between(store, monkeypatch, take_over)
    add(files, CONTENT[:2_000_000], file_id="file-out", lease=late)
    assert content_of(files, "file-out") == CONTENT
    assert counted(store)[0] == len(CONTENT)
    assert keys(store, "part") == []


def test_who_lost_the_lease_does_not_bring_back_what_was_deleted(store, files):
    late = claim(store)
    late.complete("completed", b"")
    with pytest.raises(LeaseLost):
        add(files, file_id="file-out", lease=late)
    assert store.get("file-out") is None
    assert keys(store, "content") == keys(store, "part") == []
    assert counted(store)[0] == 0


def test_a_part_that_ran_out_on_its_way_is_no_file(store, files, monkeypatch):
    """As after a pause that was longer than its life: its rest would be there, and be all."""
    in_between(store, monkeypatch, lambda: store.link.command("DEL", *keys(store, "part")))
    with pytest.raises(StoreUnavailable, match="took too long"):
        add(files)
    assert keys(store, "content") == keys(store, "part") == []
    assert counted(store) == (0, 0)


def test_what_an_earlier_attempt_has_made_stays_and_counts_once(store, files):
    lease = claim(store)
    first = add(files, file_id="file-out", lease=lease)
    assert add(files, file_id="file-out", lease=lease) == first
    assert content_of(files, "file-out") == CONTENT
    assert counted(store)[0] == len(CONTENT)
    assert keys(store, "part") == []


def test_a_file_that_is_deleted_while_it_is_read_has_no_early_end(store, files):
    file_id = add(files).id
    with files.open(file_id) as file:
        assert file.read(1000) == CONTENT[:1000]
        files.delete(file_id)
        with pytest.raises(NotFound):
            file.read()


def test_uploads_of_killed_servers_are_removed(files, tmp_path):
    """But not those that others are still writing."""
    mine = files.upload()
    for name, age_s in (("dead.partial", ORPHAN_S + 60), ("alive.partial", ORPHAN_S - 60)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    files.upload().close()
    assert {path.name for path in tmp_path.iterdir()} == {mine.path.name, "alive.partial"}
    mine.close()
