"""The command from its arguments to its exit code on a tiny model; that the demo model keeps its targets."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench.quality import Comparison, Reference, Subject, Task
from bench.solo import Solo
from bench.text import prompts, read_tokens, windows
from bench.w8a8 import main
from tests.quantized_checkpoints import compressed_tensors

ROOT = Path(__file__).parents[2]
MODEL, TEXT = ROOT / "demo" / "model", ROOT / "demo" / "held_out.txt"
SMALL = ("--positions", "6x8", "--prompt-len", "16", "--windows", "2", "--no-speed")


def told_to_nobody(name: str, total: int):
    return lambda num_done: None


def test_the_command_writes_what_it_found_and_answers_by_exit_code(tiny_moe: Path, text: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "result.json"
    code = main([*SMALL, "--model", str(tiny_moe), "--text", str(text), "--json", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert code == (0 if result["passed"] else 1)
    setup = result["setup"]
    assert (setup["model"], setup["w8a8_model"], setup["text"]) == (str(tiny_moe), str(tiny_moe), str(text))
    assert [setup[name] for name in ("num_prompts", "prompt_len", "num_positions", "num_windows", "window_len")] == [6, 16, 8, 2, 512]
    batch, exact, int8 = result["comparisons"]
    assert [found["name"] for found in (batch, exact, int8)] == ["bf16, batch 8", "float32, batch 64", "w8a8, batch 64"]
    assert {found["forced"]["total"] for found in result["comparisons"]} == {6 * 8}
    assert {found["text"]["total"] for found in result["comparisons"]} == {2 * 512}
    # Of any batch size a model says nearly the same; in another arithmetic it says it with other probabilities.
    assert batch["perplexity_ratio"] == pytest.approx(1, abs=1e-2)
    assert exact["perplexity_ratio"] != 1 != int8["perplexity_ratio"]
    wanted = [target["value"] for target in result["targets"]]
    assert wanted == [int8["forced"]["equal"] / (6 * 8), int8["perplexity_ratio"]]
    assert "teacher-forced top-1 agreement" in capsys.readouterr().out


def test_a_ready_checkpoint_can_take_the_place_of_one_made_while_loading(tiny_moe: Path, text: Path, tmp_path: Path) -> None:
    ready, out = compressed_tensors(tiny_moe, tmp_path / "ready"), tmp_path / "result.json"
    found = []
    for arguments in ([], ["--w8a8", str(ready)]):
        main([*SMALL, "--model", str(tiny_moe), "--text", str(text), "--json", str(out), *arguments])
        found.append(json.loads(out.read_text(encoding="utf-8")))
    assert [result["setup"]["w8a8_model"] for result in found] == [str(tiny_moe), str(ready)]
    assert found[0]["comparisons"] == found[1]["comparisons"]


def test_fed_its_own_answers_a_model_gives_them_again(tiny_moe: Path) -> None:
    solo = Solo(tiny_moe, "float32", "none", max_rows=3, max_len=40)
    asked = np.random.default_rng(0).integers(3, 512, (5, 16))
    free = solo.answers(asked, 12, 3, lambda num_done: None)
    assert (solo.answers(asked, 12, 2, lambda num_done: None, free) == free).all()
    # Scored in one go, the answers are what is most likely, too.
    logprobs, chosen = solo.scores(np.concatenate([asked, free], 1), 2, lambda num_done: None)
    assert (chosen[:, 15:] == free).all()
    assert ((logprobs < 0) & np.isfinite(logprobs)).all()


def test_what_is_fed_decides_what_comes_next(tiny_moe: Path) -> None:
    solo = Solo(tiny_moe, "float32", "none", max_rows=4, max_len=40)
    asked = np.random.default_rng(1).integers(3, 512, (4, 8))
    free = solo.answers(asked, 6, 4, lambda num_done: None)
    other = solo.answers(asked, 6, 4, lambda num_done: None, (free + 1) % 512)
    assert (other[:, 0] == free[:, 0]).all()
    assert (other[:, 1:] != free[:, 1:]).any()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--json", "nowhere/result.json"], "there is no folder nowhere"),
        (["--model", "nowhere"], "config.json is missing"),
        (["--positions", "6x2000"], "more than the model's 1024"),
        (["--positions", "5000x8"], "of 5000 prompts"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_computed(tiny_moe: Path, text: Path, arguments: list[str], says: str, capsys) -> None:
    assert main(["--model", str(tiny_moe), "--text", str(text), *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--positions", "200"], ["--positions", "0x64"], ["--positions", "axb"], ["--threads", "0"]])
def test_arguments_are_checked(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.demo
@pytest.mark.timeout(300)
def test_int8_keeps_what_the_demo_model_says() -> None:
    """Both targets on the issue's 200 x 64 positions, and on a tenth of the held-out text; the command takes it all."""
    tokens = read_tokens(TEXT, MODEL)
    task = Task(prompts(tokens, 200, 64, 128), 64, windows(tokens, 32, 512))
    bf16 = Subject("bf16", partial(Solo, MODEL, "bfloat16", "none", max_rows=64, max_len=512), 64, 4)
    w8a8 = Subject("w8a8", partial(Solo, MODEL, "bfloat16", "w8a8", max_rows=64, max_len=512), 64, 4)
    found = Comparison.of(w8a8, Reference.of(bf16, task, told_to_nobody), task, told_to_nobody)
    assert found.forced.total == 200 * 64
    assert found.forced.share >= 0.98
    assert found.perplexity_ratio <= 1.02
