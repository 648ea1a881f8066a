"""Sockets of other processes: found in /proc, borrowed for a moment with pidfd_getfd(2), cut, made deaf, or healed. Linux, as root.

A descriptor is closed again at once: while a copy of it is open here, its connection would outlive the process it belongs to.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

# <asm-generic/unistd.h>; the same on every architecture, since it is younger than 2019.
_PIDFD_GETFD = 438
# <asm-generic/socket.h>
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
# One instruction of classic BPF (<linux/filter.h>): return 0, that is, keep no byte of any packet.
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Connection:
    """A TCP connection between two processes of a cluster, seen from one of its ends. here, there: names of the processes."""

    pid: int
    fd: int
    here: str
    there: str
    local: tuple[str, int]
    remote: tuple[str, int]

    def __str__(self) -> str:
        return f"{self.here} to {self.there}, port {self.local[1]} to {self.remote[1]}"


def connections(processes: Mapping[int, str]) -> list[Connection]:
    """Every TCP connection between two different ones of these (pid -> name), from both ends, in an order that names decide."""
    ends = [(pid, found) for pid in processes for found in _established(pid)]
    owners = {found.laddr: pid for pid, found in ends}
    between = [(pid, found) for pid, found in ends if owners.get(found.raddr, pid) != pid]
    listed = [
        Connection(pid, found.fd, processes[pid], processes[owners[found.raddr]], tuple(found.laddr), tuple(found.raddr))
        for pid, found in between
    ]
    return sorted(listed, key=lambda link: (link.here, link.there, link.local, link.remote))


def _established(pid: int) -> list[Any]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [found for found in psutil.Process(pid).net_connections("tcp") if found.status == psutil.CONN_ESTABLISHED]
    return []


def refusal(pid: int) -> str:
    """Why the kernel does not let this process borrow descriptors of that one, "" if it does."""
    try:
        os.close(_duplicate(pid, 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            _deafen(own)
    except (OSError, AttributeError) as error:
        return f"sockets of other processes cannot be touched here: {error}"
    return ""


def cut(link: Connection) -> bool:
    """Shut it down in both directions, as a middlebox does that resets it. Whether it was still there."""
    with _borrowed(link) as channel:
        if channel is not None:
            channel.shutdown(socket.SHUT_RDWR)
        return channel is not None


def deafen(link: Connection) -> bool:
    """From now on this end hears nothing, not even acknowledgements; what it says still arrives. Whether it was still there."""
    with _borrowed(link) as channel:
        if channel is not None:
            _deafen(channel)
        return channel is not None


def heal(link: Connection) -> bool:
    """The end of `deafen`: what was dropped is sent again by the kernels. Whether it was still there."""
    with _borrowed(link) as channel:
        if channel is not None:
            channel.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        return channel is not None


@contextlib.contextmanager
def _borrowed(link: Connection) -> Iterator[socket.socket | None]:
    """The socket itself, shared with its process; None if the process or the connection is gone, whoever has the number now."""
    try:
        channel = socket.socket(fileno=_duplicate(link.pid, link.fd))
    except OSError:
        yield None
        return
    with channel:
        yield channel if _is(channel, link) else None


def _is(channel: socket.socket, link: Connection) -> bool:
    try:
        return (tuple(channel.getsockname()[:2]), tuple(channel.getpeername()[:2])) == (link.local, link.remote)
    except OSError:
        return False


def _duplicate(pid: int, fd: int) -> int:
    process = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        own = libc.syscall(_PIDFD_GETFD, process, fd, 0)
        if own < 0:
            raise OSError(ctypes.get_errno(), f"pidfd_getfd of process {pid}: {os.strerror(ctypes.get_errno())}")
        return int(own)
    finally:
        os.close(process)


def _deafen(channel: socket.socket) -> None:
    code = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
    channel.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HxxxxxxP", 1, ctypes.addressof(code)))
