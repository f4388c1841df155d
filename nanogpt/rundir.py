"""The private directory of one server: its sockets, and who is running.

One directory belongs to one (user, host, port). It is made with mode 0700 and refused when
somebody else owns it or may enter it, so ipc sockets in it need no further protection.
"""

import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nanogpt.errors import StartupError

log = logging.getLogger(__name__)

MAX_SOCKET_PATH = 107  # bytes: sockaddr_un.sun_path less its final NUL
_LOOKS, _LOOK_S = 5, 0.01


def _mark(path: Path) -> None:
    """Make an empty file. On a full disk this fails in the log only: open requests go before."""
    try:
        path.touch()
    except OSError as error:
        log.error("can't make %s: %s", path, error.strerror)


class RunDir:
    """Paths and small facts that the processes of one server share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptions = path / "descriptions"  # see nanogpt/engine/descriptions.py
        self._fatal, self._stopping = path / "fatal", path / "stopping"
        self._started = path / "started"
        self._reload, self._held = path / "reload", path / "held"
        self._models = {"resident": path / "resident", "pinned": path / "pinned"}
        self._locks: list[int] = []

    @classmethod
    def open(cls, host: str, port: int) -> "RunDir":
        """The directory of the server on host:port, made if need be. Raises StartupError."""
        base = os.environ.get("NANOGPT_RUN_DIR")
        if base is None:
            parent = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
            name = host.replace(":", "_").replace("/", "_")
            base = os.path.join(parent, f"nanogpt-{os.getuid()}-{name}-{port}")
        path = Path(base).absolute()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.lstat()
        except OSError as error:
            raise StartupError(
                f"can't make the run directory {path}: {error.strerror}; "
                "set NANOGPT_RUN_DIR to a directory of your own"
            ) from error
        private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        if status.st_uid != os.getuid() or not private:
            raise StartupError(
                f"run directory {path} is not private to this user (mode 0700); "
                "remove it or set NANOGPT_RUN_DIR"
            )
        run_dir = cls(path)
        if len(os.fsencode(run_dir.control.removeprefix("ipc://"))) > MAX_SOCKET_PATH:
            raise StartupError(f"{path} is too long for a socket; set NANOGPT_RUN_DIR")
        return run_dir

    @property
    def control(self) -> str:
        """Endpoint between the front end and rank 0."""
        return f"ipc://{self.path}/control.sock"

    @property
    def events(self) -> str:
        """Endpoint to which the ranks of this node send their events."""
        return f"ipc://{self.path}/events.sock"

    # A fatal line: what makes another start pointless, such as weights that can't be read. Once all
    # ranks have been ready, nothing is: what was there may come back, and there are open requests.

    def set_fatal(self, message: str) -> bool:
        """Returns whether it is fatal."""
        if self._started.exists():
            return False
        self._fatal.write_text(message)
        return True

    def fatal(self) -> str | None:
        try:
            return self._fatal.read_text()
        except FileNotFoundError:
            return None

    def set_started(self) -> None:
        _mark(self._started)

    def is_started(self) -> bool:
        return self._started.exists()

    def begin_again(self) -> None:
        """The ranks start with another configuration: neither has happened."""
        self._started.unlink(missing_ok=True)
        self._fatal.unlink(missing_ok=True)

    # The configuration: an edit counts from a reload on, so all start with a copy.

    def keep_config(self, file: Path, node: int, number: int) -> Path:
        """The `number`-th copy of a node's configuration. Raises StartupError."""
        copy = self.path / f"config-{node}-{number}.toml"
        try:
            if not file.is_file():
                raise StartupError(f"{file} must be a file that can be read more than once")
            copy.write_bytes(file.read_bytes())
        except OSError as error:
            raise StartupError(f"can't keep a copy of {file}: {error.strerror}") from error
        return copy

    def forget_configs(self, node: int) -> None:
        for copy in self.path.glob(f"config-{node}-*.toml"):
            copy.unlink(missing_ok=True)

    # The stopping mark: an operator asked for the end, so nobody restarts anything.

    def set_stopping(self) -> None:
        _mark(self._stopping)

    def is_stopping(self) -> bool:
        return self._stopping.exists()

    # Models: what is in memory, and what operators pinned, for who takes a dead process's place.

    def set_models(self, kind: Literal["resident", "pinned"], names: Sequence[str]) -> None:
        new = self.path / f"{kind}.new"
        new.write_text("\n".join(names))
        new.replace(self._models[kind])

    def models(self, kind: Literal["resident", "pinned"]) -> list[str] | None:
        """None: nobody has said yet."""
        try:
            return self._models[kind].read_text().splitlines()
        except FileNotFoundError:
            return None

    # A reload: the launcher asks for it, the front end answers when nothing runs any more.

    def ask_reload(self) -> None:
        self._held.unlink(missing_ok=True)
        self._models["resident"].unlink(missing_ok=True)  # the new configuration says it
        _mark(self._reload)

    def is_reload_asked(self) -> bool:
        return self._reload.exists()

    def set_held(self) -> None:
        _mark(self._held)

    def is_held(self) -> bool:
        return self._held.exists()

    def end_reload(self) -> None:
        self._reload.unlink(missing_ok=True)

    def clear_marks(self) -> None:
        """Forget what an earlier run left."""
        marks = (self._fatal, self._started, self._stopping, self._reload, self._held)
        for path in (*marks, *self._models.values()):
            path.unlink(missing_ok=True)

    # Locks: held for as long as a process lives, whatever kills it.

    def lock(self, name: str) -> bool:
        """Take the lock until this process ends; False when another process holds it.

        The holder's pid is in the file, for `holder`. Children don't inherit the lock.
        """
        fd = os.open(self.path / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(_LOOKS):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOOK_S)  # it may be somebody who only looks: see `holder`
        else:
            os.close(fd)
            return False
        # Who clears old files away from a directory for temporary ones leaves locked ones alone.
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(directory, fcntl.LOCK_SH)
        self._locks.append(directory)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._locks.append(fd)
        return True

    def holder(self, name: str) -> int | None:
        """Pid of the live process that holds the lock, or None."""
        try:
            fd = os.open(self.path / f"{name}.lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(fd, 32, 0).decode()
            return int(text) if text.isdigit() else None
        finally:
            os.close(fd)
        return None
