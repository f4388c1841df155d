"""nanogpt admin models: the commands, against an application on a real socket."""

import threading
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest

from nanogpt import admin
from tests.app_utils import ADMIN_KEY, CLOSED, make_app
from tests.fake_cluster import INFO, FakeCluster


class _Silent(WSGIRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def cluster():
    return FakeCluster()


@pytest.fixture
def url(cluster):
    server = make_server("127.0.0.1", 0, make_app(cluster, environ=CLOSED), handler_class=_Silent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(monkeypatch, capsys, url):
    monkeypatch.setenv("NANOGPT_ADMIN_KEY", ADMIN_KEY)

    def run(*arguments):
        code = admin.main(["models", *arguments, "--url", url])
        return code, *capsys.readouterr()

    return run


def test_list(run):
    code, said, _ = run("list")
    assert code == 0
    assert said.startswith(f"{INFO.name}: loaded, 0.00 GiB, 1 running, 0 waiting")
    assert said.endswith("in memory on each rank: 0.00 GiB\n")


def test_pin_and_what_that_forbids(run):
    code, said, _ = run("pin", INFO.name)
    assert (code, "pinned" in said) == (0, True)
    code, _, said = run("unload", INFO.name)
    assert (code, said) == (2, f"error: the model {INFO.name!r} is pinned: unpin it first\n")
    assert run("unpin", INFO.name)[0] == 0


def test_load_waits_until_the_model_is_there(run, cluster):
    cluster.states[INFO.name] = cluster.states[INFO.name]._replace(state="absent")

    def arrive():
        cluster.states[INFO.name] = cluster.states[INFO.name]._replace(state="open")

    timer = threading.Timer(0.3, arrive)
    timer.start()
    code, said, _ = run("load", INFO.name)
    timer.join()
    assert (code, f"{INFO.name}: loaded" in said) == (0, True)


def test_a_load_that_fails_is_told(run, cluster):
    def fail():
        status = cluster.states[INFO.name]
        cluster.states[INFO.name] = status._replace(state="absent", failures=1, problem="corrupt")

    timer = threading.Timer(0.3, fail)
    timer.start()
    code, _, said = run("load", INFO.name)
    timer.join()
    assert (code, said) == (2, f"error: {INFO.name} could not be loaded: corrupt\n")


def test_an_unloaded_model_may_be_back_at_once(run, cluster):
    """A request waited for it: the command waited for ever."""

    def come_back():
        status = cluster.states[INFO.name]
        cluster.states[INFO.name] = status._replace(state="open", loads=status.loads + 1)

    timer = threading.Timer(0.3, come_back)
    timer.start()
    code, said, _ = run("unload", INFO.name)
    timer.join()
    assert (code, f"{INFO.name}: loaded" in said) == (0, True)


def test_mistakes_are_told(run, monkeypatch):
    code, _, said = run("load", "nothing")
    assert (code, "'nothing' does not exist" in said) == (2, True)
    monkeypatch.delenv("NANOGPT_ADMIN_KEY")
    code, _, said = run("list")
    assert (code, "NANOGPT_ADMIN_KEY is not set" in said) == (2, True)


def test_no_server(monkeypatch, capsys):
    monkeypatch.setenv("NANOGPT_ADMIN_KEY", ADMIN_KEY)
    assert admin.main(["models", "list", "--url", "http://127.0.0.1:1"]) == 2
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err
