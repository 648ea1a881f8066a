"""What a killed keeper leaves behind is found, whoever its parent is by then."""

from __future__ import annotations

import os
import subprocess

import psutil

from cluster.kept import session_of


def test_orphans_of_a_session_are_found_after_its_leader_was_killed() -> None:
    program = ["sh", "-c", "(sleep 60 > /dev/null & echo $!); read end"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True) as leader:
        assert leader.stdout is not None
        orphan = psutil.Process(int(leader.stdout.readline()))
        assert session_of(leader.pid) == [], "it has not ended"
        leader.kill()
        leader.wait()
        assert orphan.ppid() != leader.pid
        assert session_of(leader.pid) == [orphan]
        orphan.kill()
        psutil.wait_procs([orphan], timeout=20)
        assert session_of(leader.pid) == []
    assert os.getsid(0) != leader.pid
