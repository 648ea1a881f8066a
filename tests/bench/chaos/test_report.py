"""What a run found fits a narrow terminal, says which promise was broken and how, and can be written as JSON."""

import io
import json
from dataclasses import asdict

from rich.console import Console

from bench.chaos.faults import Fault, Kind, Record
from bench.chaos.judge import Findings, Promise
from bench.chaos.pauses import Row
from bench.chaos.report import Result, Setup, print_result
from bench.machine import Machine

SETUP = Setup(
    Machine("a processor", "AVX2", 2, 1, "3.11", "2.13"),
    "demo/model",
    "float32",
    {"kv_memory": "24MiB"},
    9,
    1,
    ("kill",),
    16,
    60.0,
    1,
    0.1,
    False,
)
ROW = Row("kill prefill", 12, 0, 1234, 0.25, 12.25, 3.5, 10.5, 100.5, 3.0, (12.25,))
RETRIES = {"node_lost": 1234, "handshake": 3, "lease_lost": 5, "suspended": 30, "unknown_attempt": 7}
PROMISES = (Promise("every request ended", 0), Promise("no answer differs", 2, ("request 7: wrong tokens", "request 8: doubled tokens")))
FINDINGS = Findings(
    2000, 1999, 55, 1279, 16, 4, 3, 1, {"wrong tokens": 2}, {"unavailable (the connection)": 16}, RETRIES, (ROW,), ("12.25 s",), PROMISES
)
FAULT = Fault(0, Kind.KILL, "prefill-0/0", 0.5, 0.5, 0.1, 0.0, False)
RESULT = Result(SETUP, 10.0, 20.0, None, (Record(FAULT, 5.0, "prefill-0/0", whole_s=10.5),), FINDINGS)


def test_it_is_printed():
    console = Console(width=80, file=io.StringIO())
    print_result(console, RESULT)
    text = console.file.getvalue()
    assert "…" not in text, "something was cut off"
    for part in ("kill prefill", "12.25", "100.5", "1279", "5 lease_lost", "holds: every request ended", "not judged"):
        assert part in text, part
    assert "BROKEN (2): no answer differs\n  request 7: wrong tokens\n  request 8: doubled tokens\n" in text
    assert not FINDINGS.passed


def test_it_is_json():
    found = json.loads(json.dumps(asdict(RESULT)))
    assert found["records"][0]["fault"]["kind"] == "kill" and found["findings"]["rows"][0]["over_limit"] == [12.25]
