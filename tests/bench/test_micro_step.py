"""A decode step is taken apart into kinds of work that add up to it, for every kind of model."""

import pytest

from bench.micro.limits import Limits
from bench.micro.step import rows
from tests.tiny_models import make_tiny


@pytest.mark.parametrize(("arch", "kinds"), [("qwen3", {"elementwise"}), ("deepseek_v2", {"elementwise", "experts"})])
def test_kinds_add_up(tmp_path, arch, kinds):
    found = {row.what: row for row in rows(Limits(), make_tiny(arch, tmp_path / arch), "float32", (2,))}
    whole = found.pop("2 rows: whole step")
    assert kinds | {"attention", "matrix products", "sampling", "attention's plan"} <= {what.removeprefix("2 rows: ") for what in found}
    assert sum(row.value for row in found.values()) == pytest.approx(whole.value)
    assert all(row.limit == whole.value for row in found.values())
