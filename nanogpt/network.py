"""Addresses, ports and interfaces of this machine. Linux only."""

import fcntl
import ipaddress
import socket
import struct
from urllib.parse import urlsplit

_SIOCGIFADDR = 0x8915
_IFREQ = struct.Struct("16s24x")  # a name, and room for an address: struct ifreq
_ADDRESS_AT = 20  # of the IPv4 address in it


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[ADDRESS]:PORT". Raises ValueError."""
    parts = urlsplit(f"//{endpoint}")
    if not parts.hostname or parts.port is None:
        raise ValueError(f"{endpoint!r} is not HOST:PORT")
    return parts.hostname, parts.port


def interface_towards(host: str) -> str | None:
    """The interface through which this machine speaks with `host`, or which has that address; None
    when the address is a further one of its interface. Raises OSError when there is no way."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        own = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    if own.is_loopback:
        return "lo"
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if own in _addresses(name)), None)


def _addresses(interface: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    request = _IFREQ.pack(interface.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            found.append(ipaddress.IPv4Address(answer[_ADDRESS_AT : _ADDRESS_AT + 4]))
        except OSError:
            pass  # it has no IPv4 address
    try:
        with open("/proc/net/if_inet6") as file:
            rows = [line.split() for line in file]
    except FileNotFoundError:  # a kernel without IPv6
        return found
    found += [ipaddress.IPv6Address(int(row[0], 16)) for row in rows if row[5] == interface]
    return found
