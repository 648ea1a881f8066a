"""A fingerprint is the contents and not the place: any change of configuration, tokenizer or sampled weights changes it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.engine.fingerprint import fingerprint
from baton.errors import ConfigError

Tiny = Callable[[str], Path]
MIB = 1 << 20
LARGE = 40 * MIB
BETWEEN_WINDOWS = 1 * MIB + MIB // 2  # windows of a file of 40 MiB lie 39 / 15 = 2.6 MiB apart


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "copy"))


@pytest.mark.parametrize("full", [False, True])
def test_it_is_the_contents_and_not_the_place(tiny: Tiny, copy: Path, full: bool) -> None:
    assert fingerprint(copy, full) == fingerprint(str(tiny("llama")), full) != fingerprint(tiny("llama_tied"), full)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        original = (copy / name).read_bytes()
        (copy / name).write_bytes(original[:-2] + bytes([original[-2] ^ 1]) + original[-1:])
        if name == "config.json":
            (copy / name).write_text(json.dumps({**json.loads(original), "rms_norm_eps": 1e-5}))
        assert fingerprint(copy, full) != fingerprint(tiny("llama"), full), name
        (copy / name).write_bytes(original)
    assert fingerprint(copy, full) == fingerprint(tiny("llama"), full)


def test_the_full_one_is_another_number(copy: Path) -> None:
    assert fingerprint(copy, full=True) != fingerprint(copy)


def test_it_sees_names_sizes_and_what_modelslim_says(tiny: Tiny, copy: Path) -> None:
    seen = {fingerprint(copy)}
    (copy / "quant_model_description.json").write_text("{}")
    seen.add(fingerprint(copy))
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    seen.add(fingerprint(copy))
    with (copy / "model-00001-of-00001.safetensors").open("ab") as file:
        file.write(b"\0")
    seen.add(fingerprint(copy))
    assert len(seen) == 4


def large(copy: Path, flipped: int | None) -> Path:
    """Zeros but for one byte; a sparse file, which takes no time to write."""
    with (copy / "model.safetensors").open("wb") as file:
        file.truncate(LARGE)
        if flipped is not None:
            file.seek(flipped)
            file.write(b"\1")
    return copy


def test_it_sees_the_header_and_every_window_of_a_large_file(copy: Path) -> None:
    places = [None, 0, 20, MIB - 1, LARGE - 1, *(window * (LARGE - MIB) // 15 + 12345 for window in range(1, 15))]
    assert len({fingerprint(large(copy, at)) for at in places}) == len(places)


def test_only_the_full_one_sees_what_lies_between_the_windows(copy: Path) -> None:
    sampled, full = fingerprint(large(copy, None)), fingerprint(copy, full=True)
    assert fingerprint(large(copy, BETWEEN_WINDOWS)) == sampled
    assert fingerprint(copy, full=True) != full


@pytest.mark.parametrize("full", [False, True])
def test_progress_ends_at_what_was_announced(copy: Path, full: bool) -> None:
    calls: list[tuple[int, int]] = []
    without = fingerprint(large(copy, None), full)
    assert fingerprint(copy, full, lambda done, total: calls.append((done, total))) == without
    assert calls == sorted(calls) and len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1] == (LARGE if full else 16 * MIB)


@pytest.mark.parametrize("content", [b"", b"\xff", b"\xff" * 64])
def test_a_broken_file_has_a_fingerprint_like_any_other(copy: Path, content: bytes) -> None:
    before = fingerprint(copy)
    (copy / "model.safetensors").write_bytes(content)
    assert fingerprint(copy) != before


def test_no_checkpoint_has_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        fingerprint(tmp_path)
