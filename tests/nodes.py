"""Machines that a test pretends to have: network namespaces on a bridge, where this user may make
them; else loopback addresses, which can't be cut off from each other."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple


class Node(NamedTuple):
    """One machine. `within`: what runs a command there; `link`: its cable, or nothing."""

    address: str
    within: tuple[str, ...] = ()
    link: str = ""

    def cut(self) -> None:
        """Pull the cable: packets vanish, and no connection is told."""
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        _ip("link", "set", self.link, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def nodes(count: int) -> Iterator[list[Node]]:
    """Machines that reach each other, and that this process reaches."""
    try:
        with contextlib.ExitStack() as stack:
            made = _namespaces(stack, count)
            yield made
    except _NotPermitted:
        yield [Node(f"127.0.0.{2 + i}") for i in range(count)]


class _NotPermitted(Exception):
    """No namespaces here."""


def _namespaces(stack: contextlib.ExitStack, count: int) -> list[Node]:
    tag = f"ng{os.getpid() % 10**6}"
    net = f"198.18.{os.getpid() % 256}"  # for tests between machines: RFC 2544
    found = []
    try:
        _ip("link", "add", tag, "type", "bridge")
        stack.callback(_ip, "link", "del", tag)
        _ip("address", "add", f"{net}.254/24", "dev", tag)
        _ip("link", "set", tag, "up")
        for i in range(count):
            name = f"{tag}n{i}"
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            # A namespace goes when its last connection has; its cable need not wait for that.
            stack.callback(_ip, "link", "del", name)
            _ip("link", "set", name, "master", tag, "up")
            _ip("-n", name, "address", "add", f"{net}.{1 + i}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            found.append(Node(f"{net}.{1 + i}", ("ip", "netns", "exec", name), name))
    except (OSError, subprocess.CalledProcessError) as error:
        raise _NotPermitted from error
    return found
