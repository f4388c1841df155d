"""A stand-in for the Hugging Face hub on loopback: one repository, faults on order."""

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves the files of a directory as the repository `repo`; weights count as large files.

    `cut_at`: answers for large files end after so many bytes, as long as `cuts` lasts; with `stall`
    they don't end, but nothing more comes. `damage`: their bytes are not what their checksums say.
    `gone`: nothing is answered any more.
    `ranges`: what was asked for of large files.
    """

    daemon_threads = True

    def __init__(self, repo: str, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo, self.directory = repo, directory
        self.cut_at, self.cuts, self.stall, self.damage = 0, 0, False, False
        self.gone = False
        self.stalled = threading.Event()
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, *, with_body):
        hub = self.server
        if hub.gone:
            self.close_connection = True
            return
        path = self.path.partition("?")[0]
        if path in (f"/api/models/{hub.repo}", f"/api/models/{hub.repo}/revision/main"):
            files = [{"rfilename": f.name} for f in sorted(hub.directory.iterdir())]
            body = json.dumps({"id": hub.repo, "sha": COMMIT, "siblings": files}).encode()
            self._send(200, body, {"Content-Type": "application/json"}, with_body)
        elif path.startswith(f"/api/models/{hub.repo}/tree/"):
            entries = [_entry(f) for f in sorted(hub.directory.iterdir())]
            headers = {"Content-Type": "application/json"}
            self._send(200, json.dumps(entries).encode(), headers, with_body)
        elif path.startswith(f"/{hub.repo}/resolve/"):
            self._file(hub.directory / path.rpartition("/")[2], with_body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)

    def _file(self, file, with_body):
        hub = self.server
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
            return
        body, is_large = file.read_bytes(), _is_large(file)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_checksum(file)}"'}
        if not with_body or not is_large:
            self._send(200, body, headers, with_body)
            return
        if hub.damage:
            body = body[:-1] + bytes([body[-1] ^ 1])
        asked = self.headers.get("Range")
        hub.ranges.append(asked)
        status, start = 200, 0
        if asked:
            status, start = 206, int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        part = body[start:]
        if hub.cuts or hub.stall:
            self._head(status, len(part), headers)
            self.wfile.write(part[: hub.cut_at])
            self.wfile.flush()
            hub.cuts = max(0, hub.cuts - 1)
            while hub.stall:
                hub.stalled.set()
                time.sleep(0.05)
            self.close_connection = True
            return
        self._send(status, part, headers, with_body)

    def _send(self, status, body, headers, with_body):
        self._head(status, len(body), headers)
        if with_body:
            self.wfile.write(body)

    def _head(self, status, length, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def _is_large(file):
    return file.suffix == ".safetensors"


def _checksum(file):
    content = file.read_bytes()
    if _is_large(file):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(file):
    entry = {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
    if _is_large(file):
        entry["lfs"] = {"oid": _checksum(file), "size": entry["size"], "pointerSize": 100}
    return entry


@contextmanager
def serving(repo: str, directory: Path):
    hub = Hub(repo, directory)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
