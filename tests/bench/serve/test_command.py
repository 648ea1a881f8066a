"""`baton bench serve` as people start it, against the real router: HTTP and gRPC, files, failures, Ctrl-C, wrong options."""

from __future__ import annotations

import asyncio
import json
import xml.etree.ElementTree as ElementTree

import pytest

from baton.__main__ import main

SHORT = ("--num-prompts", 12, "--random-input-len", 20, "--random-output-len", 6)


async def test_completions(running, bench, tmp_path):
    files = ("--save-result", "--result-dir", tmp_path / "new", "--result-filename", "r.json", "--plot", tmp_path / "p.svg")
    async with running(step_s=0.01) as (_, http):
        ended = await bench(
            "--base-url", f"http://{http}", *SHORT, "--max-concurrency", 4, "--goodput", "ttft:60000", *files, "--metadata", "a=b"
        )
    assert ended.code == 0, ended.err
    assert f"{'Successful requests:':<40} 12" in ended.out and f"{'Request goodput (req/s):':<40}" in ended.out
    found = json.loads((tmp_path / "new" / "r.json").read_text())
    assert (found["completed"], found["failed"], found["model_id"], found["a"]) == (12, 0, "echo", "b")
    assert found["total_input_tokens"] == 12 * 20, "the server counted what was asked for"
    assert found["total_output_tokens"] == 12 * 6 and found["max_concurrent_requests"] == 4
    assert found["median_itl_ms"] >= 10 and found["mean_ttft_ms"] <= found["mean_e2el_ms"]
    assert "itls" not in found
    assert ElementTree.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")


async def test_chat_with_details(running, bench, tmp_path):
    files = ("--save-result", "--save-detailed", "--result-dir", tmp_path, "--result-filename", "r.json")
    async with running() as (_, http):
        ended = await bench(
            "--backend", "openai-chat", "--base-url", f"http://{http}", "--model", "echo", *SHORT, "--num-warmups", 2, *files
        )
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["output_lens"] == [6] * 12 and [len(itl) for itl in found["itls"]] == [5] * 12
    assert all(found["generated_texts"]) and found["errors"] == [""] * 12


async def test_grpc_at_a_rate(running, bench):
    async with running() as (grpc, _):
        ended = await bench("--backend", "baton", "--base-url", grpc, *SHORT, "--request-rate", 100, "--dataset-name", "prefix")
    assert ended.code == 0, ended.err
    assert f"{'Total input tokens:':<40} {12 * 512}" in ended.out
    assert f"{'Request rate configured (RPS):':<40} 100.00" in ended.out


async def test_a_trace_by_its_own_clock(running, bench, tmp_path):
    lines = [{"timestamp": 100 * i, "input_length": 20, "output_length": 3, "hash_ids": [0, i]} for i in range(5)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    async with running() as (_, http):
        ended = await bench(
            *("--base-url", f"http://{http}", "--dataset-name", "mooncake-trace", "--dataset-path", tmp_path / "t.jsonl"),
            *("--mooncake-block-size", 16, "--mooncake-slowdown-factor", 2),
        )
    assert ended.code == 0, ended.err
    assert f"{'Successful requests:':<40} 5" in ended.out and f"{'Total input tokens:':<40} 100" in ended.out
    duration = float(ended.out.partition("Benchmark duration (s):")[2].split()[0])
    assert duration >= 0.8, "the last one arrives after four times 200 ms"


async def test_failures_are_counted_shown_and_end_with_1(running, bench):
    async with running(max_queue=0, max_running=1, no_node_s=0) as (_, http):
        ended = await bench("--base-url", f"http://{http}", *SHORT)
    assert ended.code == 1
    assert "failed: " in ended.err and "HTTP 429" in ended.err
    assert f"{'Successful requests:':<40} 1" in ended.out


async def test_a_wrong_model_is_told_in_the_servers_words(running, bench):
    async with running() as (_, http):
        ended = await bench("--base-url", f"http://{http}", "--model", "other", *SHORT)
    assert ended.code == 1 and "12 x HTTP 404" in ended.err and "serves 'echo'" in ended.err


async def test_ctrl_c_prints_what_there_is(running, bench):
    async with running(step_s=0.05) as (_, http):
        ended = await bench("--base-url", f"http://{http}", *SHORT, "--request-rate", 2, interrupt_after_s=4)
    assert ended.code == 130
    assert "Serving Benchmark Result" in ended.out and "WARNING: interrupted" in ended.err
    assert 1 <= int(ended.out.partition("Successful requests:")[2].split()[0]) < 12


def test_nobody_listens(model_dir, capsys):
    words = ["bench", "serve", "--port", "9", "--tokenizer", str(model_dir), *map(str, SHORT)]
    assert main(words) == 1
    assert "http://127.0.0.1:9/v1/models" in capsys.readouterr().err
    assert main([*words, "--model", "m"]) == 1
    assert "12 x cannot connect" in capsys.readouterr().err


async def test_a_server_that_is_none(bench):
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(rude, "127.0.0.1", 0)
    async with server:
        ended = await bench("--port", server.sockets[0].getsockname()[1], "--model", "m", *SHORT)
    assert ended.code == 1 and "12 x this is no HTTP/1.1 response" in ended.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--goodput", "ttft"), "is not like ttft:500"),
        (("--goodput", "speed:5"), "is not like ttft:500"),
        (("--request-rate", "0"), "no number over 0"),
        (("--num-prompts", "0"), "no whole number from 1"),
        (("--percentile-metrics", "ttft,foo"), "foo is not known"),
        (("--metric-percentiles", "101"), "is not like 50,90,99"),
        (("--dataset-name", "sharegpt"), "--dataset-path FILE"),
        (("--dataset-path", "x"), "reads no --dataset-path"),
        (("--dataset-name", "mooncake-trace", "--dataset-path", "/nowhere"), "/nowhere cannot be read"),
        (("--backend", "openai-chat", "--tokenize-prompt"), "a chat takes text"),
        (("--base-url", "ftp://x"), "http://host:port"),
        (("--plot", "x.png"), ".svg"),
        (("--random-range-ratio", "1.5"), "--random-range-ratio"),
        (("--extra-body", "[1]"), "no JSON object"),
        (("--tokenizer", "/nowhere"), "--tokenizer DIR"),
    ],
)
def test_wrong_options_end_with_2_and_one_clear_line(words, said, model_dir, capsys):
    try:
        code = main(["bench", "serve", "--model", "m", "--tokenizer", str(model_dir), *words])
    except SystemExit as ended:  # what argparse itself finds wrong
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err


async def test_help_is_instant_and_complete(bench):
    ended = await bench("--help")
    assert ended.code == 0
    for option in ("--request-rate", "--goodput", "--random-input-len", "--max-concurrency", "--mooncake-slowdown-factor"):
        assert option in ended.out
