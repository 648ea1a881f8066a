"""Accepting goes on after an error that may pass, without spinning."""

import resource
import socket
import threading

from baton.deadline import Deadline
from kv_transfer.listener import Listener
from kv_transfer.thread import TransferThread

SOON = 10.0


def test_no_descriptors_left_is_waited_out(thread: TransferThread) -> None:
    came: list[socket.socket] = []
    accepted = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as peer:
        listener = thread.run(
            lambda: Listener(thread, server, lambda sock: (came.append(sock), accepted.set()), pause_s=0.05), Deadline.after(SOON)
        )
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (peer.fileno() + 1, hard))  # none above those that are open
        try:
            peer.connect(server.getsockname())
            thread.run(lambda: None, Deadline.after(SOON))
            assert not accepted.is_set()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert accepted.wait(SOON)
        came[0].close()
        thread.run(listener.close, Deadline.after(SOON))
