"""A disk that is full and memory that runs out, for real: a small file system, and a control group.

Both need a user who may mount and make control groups; elsewhere these tests are skipped.
"""

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.poison.sitecustomize import GLUTTON, MARK
from tests.server import serving
from tests.test_e2e import complete
from tests.test_failures import QUICK, Victim
from tests.test_jobs_e2e import create, poll

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> Path:
    """A file that takes all that is left."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (MIB, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return filler


def test_a_full_disk_refuses_what_must_be_kept_and_nothing_else(small_disk):
    """What was accepted before is completed when there is room again."""
    with serving("--ranks", "1", environ={"NANOGPT_JOBS_PATH": str(small_disk)}) as server:
        client = server.client()
        want = complete(client, n=2, max_tokens=200, seed=7).choices
        accepted = create(client, background=True, n=2, max_tokens=200)
        filler = fill(small_disk)
        refusals = []
        bulky = {f"key{i}": "x" * 500 for i in range(16)}
        for _ in range(20):  # the first may find room in pages that the store has already
            try:
                create(client, background=True, max_tokens=1, metadata=bulky)
            except openai.InternalServerError as error:
                refusals.append(error)
        assert refusals
        for refused in refusals:
            assert refused.status_code == 503
            assert refused.response.headers["Retry-After"].isdigit()
            assert "disk" in refused.message
        assert complete(client, n=2, max_tokens=200, seed=7).choices == want
        filler.unlink()
        done = poll(client, accepted.id)
        assert done.status == "completed"
        assert [c.text for c in done.choices] == [c.text for c in want]
        assert poll(client, create(client, background=True).id).status == "completed"


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group whose memory can be bounded."""
    name = f"nanogpt-test-{os.getpid()}"
    for base in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        path = base / name
        with contextlib.suppress(OSError):
            path.mkdir()
            if bound_file(path).exists():
                break
            path.rmdir()
    else:
        pytest.skip("this user may not make control groups")
    yield path
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            path.rmdir()  # once its processes are gone
            return
        time.sleep(0.05)


def bound_file(group: Path) -> Path:
    first = group / "memory.limit_in_bytes"
    return first if first.exists() else group / "memory.max"


def used_bytes(group: Path) -> int:
    first = group / "memory.usage_in_bytes"
    return int((first if first.exists() else group / "memory.current").read_text())


def test_a_request_that_the_kernel_kills_for_its_memory_is_given_up(memory_group):
    """Its rank is killed, twice; then it has its 500, and an open stream goes on."""
    enter = f'echo $$ > {memory_group}/cgroup.procs && exec "$@"'
    with serving("--ranks", "2", environ=QUICK, within=("/bin/sh", "-c", enter, "sh")) as server:
        bound_file(memory_group).write_text(str(used_bytes(memory_group) + 600 * MIB))
        victim = Victim(server)
        with pytest.raises(openai.InternalServerError) as failed:
            complete(server.client(timeout=120), prompt=[*MARK, GLUTTON], max_tokens=5)
        assert failed.value.status_code == 500
        victim.check()
        assert "the machine is out of memory" in server.output
        assert complete(server.client()).choices[0].text
