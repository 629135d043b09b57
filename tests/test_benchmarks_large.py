"""The workloads of large models, on tiny ones: every verb answers, and loops and twins compute what ours does."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # `benchmarks` is run from the checkout, not installed

from benchmarks import report, targets  # noqa: E402
from benchmarks.compare import WrongResultError  # noqa: E402
from benchmarks.measure import Settings  # noqa: E402
from benchmarks.plot import write_growth_plot  # noqa: E402
from benchmarks.workloads import growth, large, serve  # noqa: E402

pytestmark = pytest.mark.heavy

TINY = Settings.tiny()
needs_equinox = pytest.mark.skipif(importlib.util.find_spec("equinox") is None, reason="equinox is missing")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is missing")


@needs_equinox
def test_the_twin_of_the_decoder_decodes_and_caches_alike() -> None:
    case = serve.decode_wide_case(1, width=8, length=4)
    twin = case.programs["decode"].eqx
    assert twin is not None
    assert case.eqx is not None
    build_twin = case.eqx.build

    @jax.jit
    def two_tokens() -> tuple[list[Any], list[Any]]:
        model = case.build()
        mine, caches = build_twin(model)
        ours, theirs = [], []
        for token in (jnp.array([3]), jnp.array([5])):
            ours.append(model(token))
            out, caches = twin(mine, caches, token)
            theirs.append(out)
        return [ours, nnx.state(model, nnx.Cache)], [theirs, caches]

    ours, theirs = map(jax.tree.leaves, two_tokens())
    assert len(ours) == len(theirs) == 5
    ours, theirs = (sorted(side, key=lambda array: (array.shape, float(array.sum()))) for side in (ours, theirs))
    for mine, twins in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, twins, rtol=1e-4, atol=1e-5)


def test_loops_until_a_token_give_what_single_calls_give() -> None:
    table = serve.decode_loop(
        serve.decode_wide_case(1, width=8, length=8), TINY, "one layer", tokens=6
    )  # raises if not
    assert [row["key"] for row in table["rows"]] == list(serve.LOOPS)
    assert [row["difference"] for row in table["rows"]] == [0.0] * 5


@pytest.mark.parametrize("every", [pytest.param(True, marks=pytest.mark.slow), False])
def test_every_verb_is_called_at_every_size(every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not every:
        fast = [label for label, (group, _) in growth.VERBS.items() if group == "nnx" or "census" in label]
        monkeypatch.setattr(growth, "VERBS", {label: growth.VERBS[label] for label in fast})
    (table,) = growth.growth(TINY, counts=(10, 20))
    assert [row["key"] for row in table["rows"]] == list(growth.VERBS)
    assert all([*row["seconds_by_leaves"]] == ["10", "20"] for row in table["rows"])
    assert growth.exponent({"10": 0.5, "100": 5.0, "1000": 50.0}) == pytest.approx(1)
    assert growth.exponent({"10": 0.01, "100": 1.0}) == pytest.approx(2)
    text = report.markdown(table)
    assert text.startswith("| for one call | 10 leaves | 20 leaves | exponent |")
    assert "`nnx.split(model, ...)`" in text.splitlines()[2]
    value = next(target for target in targets.TARGETS if "every verb" in target.what).value
    others = [row["exponent"] for row in table["rows"] if row["group"] != "nnx"]
    assert value({"growth": {"tables": [table]}}) == max(others)


def test_a_model_that_is_nowhere_is_asked_everything(tmp_path: Path) -> None:
    assert large.write_checkpoint(tmp_path / "run", 64, 1) == 58368
    for verb in large.VERBS:
        found = large.child(verb, str(tmp_path / "run"), 64, 1)  # raises where there is no answer
        assert found["peak_bytes"] < 500e6
    with pytest.raises(WrongResultError, match=r"sw.preview"):
        large.child("`sw.preview(path, plan.abstract(mesh))`", str(tmp_path / "run"), 128, 1)


@needs_matplotlib
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib itself imports
def test_the_plot_of_growth_is_svg(tmp_path: Path) -> None:
    rows = [
        {"key": name, "label": name, "group": group, "seconds_by_leaves": {"10": 0.1, "100": 1.0}, "exponent": 1.0}
        for name, group in (("a", "nnx"), ("b", "plans"), ("c", "plans"))
    ]
    write_growth_plot({"tables": [{"rows": rows, "facts": {"counts": [10, 100]}}]}, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert xml.etree.ElementTree.fromstring(text).tag.endswith("svg")
    assert text.count(">plans<") == text.count(">nnx<") == 1
