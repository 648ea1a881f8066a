"""Sockets of another process can be found, cut, made deaf and healed; and what is gone is noticed instead of being mistaken for another."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bench.chaos import stolen

ECHO = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    channel, _ = server.accept()
    while content := channel.recv(100):
        channel.sendall(content)
    channel.recv(1)
    print("ended", flush=True)
    import sys; sys.stdin.read()
"""


class Pair:
    """This process with a connection to another one, which sends back what it gets."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.names = {os.getpid(): "here", process.pid: "there"}
        self.channel = socket.create_connection(("127.0.0.1", int(process.stdout.readline())))
        self.channel.settimeout(20)

    def says(self, content: bytes) -> bytes:
        self.channel.sendall(content)
        return self.channel.recv(100)


@pytest.fixture
def pair() -> Iterator[Pair]:
    command = [sys.executable, "-c", ECHO]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if why := stolen.refusal(process.pid):
            process.kill()
            pytest.skip(why)
        pair = Pair(process)
        yield pair
        pair.channel.close()
        process.stdin.close()


def test_a_connection_is_found_from_both_ends(pair):
    here, there = stolen.connections(pair.names)
    assert (here.here, here.there, there.here, there.there) == ("here", "there", "there", "here")
    assert here.local == there.remote == pair.channel.getsockname()
    assert here.fd == pair.channel.fileno()
    assert str(there).startswith("there to here, port ")
    assert not stolen.connections({pair.process.pid: "there"}), "one end alone is no connection between two"


def test_a_cut_connection_ends_at_both_ends(pair):
    _, there = stolen.connections(pair.names)
    assert pair.says(b"one") == b"one"
    assert stolen.cut(there)
    assert pair.channel.recv(1) == b""
    assert pair.process.stdout.readline() == "ended\n"


def test_a_deaf_end_hears_nothing_until_it_is_healed(pair):
    _, there = stolen.connections(pair.names)
    assert stolen.deafen(there)
    pair.channel.settimeout(0.5)
    with pytest.raises(TimeoutError):
        pair.says(b"two")
    assert stolen.heal(there)
    pair.channel.settimeout(20)
    assert pair.channel.recv(100) == b"two", "the kernel sends again what was not acknowledged"


def test_what_is_gone_is_not_touched(pair):
    here, there = stolen.connections(pair.names)
    pair.channel.close()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as other:
        assert other.fileno() == here.fd or server.fileno() == here.fd, "the number is somebody else's by now"
        assert not stolen.cut(here)
    pair.process.kill()
    pair.process.wait(20)
    assert not stolen.heal(there)


def test_no_copy_of_a_descriptor_stays(pair):
    here, there = stolen.connections(pair.names)
    before = os.listdir("/proc/self/fd")
    assert stolen.deafen(there) and stolen.heal(there) and stolen.cut(here)
    assert os.listdir("/proc/self/fd") == before


def test_a_process_that_is_not_there_is_a_reason():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(20)
    assert "cannot be touched" in stolen.refusal(process.pid)
