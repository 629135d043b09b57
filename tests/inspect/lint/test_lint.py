"""`lint` itself: what it takes, what it refuses, and how findings show themselves."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from rich.console import Console

import statewise as sw
from linted import clean, codes
from refusals import refused
from statewise._src.inspect.lint.lint import RULES
from statewise._src.inspect.lint.read_values import read


def zeros(number: int = 1) -> nnx.Dict:
    return nnx.Dict({f"var_{at}": nnx.BatchStat(jnp.zeros(3)) for at in range(number)})


def test_there_are_many_traps_each_with_a_name_and_a_reason() -> None:
    names = [rule.code for rule in RULES]
    assert len(names) == len(set(names)) >= 15
    assert all(name == name.lower() and " " not in name for name in names)
    assert all(rule.why and not rule.why.endswith(".") for rule in RULES)


def test_nothing_found_is_an_empty_list() -> None:
    found = sw.lint(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert found == []
    assert isinstance(found, list)
    assert str(found) == "no findings"
    assert found.to_dict() == {"findings": []}
    assert sw.lint(nnx.Dict()) == []


def test_several_objects_are_seen_together() -> None:
    model = zeros()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for given in ((model, optimizer), ((model, optimizer),), ([model, optimizer],)):
        (found,) = sw.lint(*given)
        assert found.leaves[0].path == (0, "var_0")


def test_kinds_are_the_second_argument_or_named() -> None:
    model, kinds = zeros(), sw.Kinds(mine=sw.Kind(nnx.BatchStat))
    for found in (sw.lint(model, kinds), sw.lint(model, kinds=kinds)):
        assert [leaf.kind for leaf in found[0].leaves] == ["mine"]
    assert sw.lint(model)[0].leaves[0].kind == "stats"


def test_a_state_has_values_and_a_plan_has_none() -> None:
    plan = sw.plan(zeros())
    clean(plan)
    clean(plan.abstract())
    assert codes(plan.take(zeros())) == ["statistic-starts-at-zero"]
    assert codes(plan.take(zeros(), pack=True)) == ["statistic-starts-at-zero"]


@pytest.mark.parametrize("pack", [False, True])
def test_of_values_that_each_device_has_the_first_is_looked_at(pack: bool, devices: list[jax.Device]) -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data")))
    model = nnx.Dict(stats=zeros(3), layers=nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(8)]))
    model.layers[3].bias[...] = jnp.full(2, jnp.nan)
    mesh = jax.make_mesh((8,), ("data",))
    plan = kinds.plan(model)
    state = plan.take(model, mesh=mesh, pack=pack)
    assert bool(state.tables.packing) == pack
    assert codes(state) == ["statistic-starts-at-zero", "not-finite"]
    clean(plan.abstract(mesh))


def test_looking_changes_nothing() -> None:
    model = nnx.Dict(norm=nnx.BatchNorm(3, rngs=nnx.Rngs(0)), drop=nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    state = sw.plan(model).take(model)
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model)))
    graphdef = nnx.graphdef(model)
    sw.lint(model)
    sw.lint(state)
    assert nnx.graphdef(model) == graphdef
    same = jax.tree.map(lambda a, b: bool((a == b).all()), nnx.as_pure(nnx.state(model)), before)
    assert all(jax.tree.leaves(same))
    assert jax.tree.leaves(state)[0].shape == (3,)


def test_kinds_of_another_plan() -> None:
    with refused(
        sw.DeclarationError, "A plan, or the plan of a state, has its own kinds.", hint="sw.lint(model, kinds=kinds)"
    ):
        sw.lint(sw.plan(zeros()), kinds=sw.Kinds(rest=sw.Kind(...)))
    clean(sw.plan(zeros()), kinds=sw.Kinds.standard())


@pytest.mark.parametrize("take", [False, True])
def test_a_plan_or_a_state_among_other_objects(take: bool) -> None:
    plan = sw.plan(zeros())
    given = plan.take(zeros()) if take else plan
    with pytest.raises(sw.StructureError) as caught:
        sw.lint(given, zeros())
    name = "state" if take else "plan"
    assert caught.value.message == f"A {name} is inspected alone: it contains all of its objects."
    assert caught.value.hint == "sw.lint(plan)"


@pytest.mark.parametrize("given", [3, jnp.ones(2), nnx.Linear, None])
def test_what_is_no_model(given: Any) -> None:
    with pytest.raises(sw.StructureError, match="Object 0 is"):
        sw.lint(given)


def test_no_object_at_all() -> None:
    with pytest.raises(sw.StructureError, match="There is no object to look at"):
        sw.lint()


def test_kinds_that_are_none() -> None:
    with refused(
        sw.DeclarationError, "dict is not a Kinds.", hint="sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))"
    ):
        sw.lint(zeros(), kinds={})


def test_a_spent_state() -> None:
    model = zeros()
    kinds = sw.Kinds(stats=sw.Kind(nnx.BatchStat, restart=jnp.ones_like))
    state = kinds.plan(model).take(model)
    clean(state.restart())
    with pytest.raises(sw.StructureError, match="This state was donated"):
        sw.lint(state)


def test_traps_can_be_left_out_by_name() -> None:
    model = nnx.Dict(var=nnx.BatchStat(jnp.zeros(3)), raw=jnp.ones(2))
    assert codes(model) == ["statistic-starts-at-zero", "raw-array"]
    assert codes(model, ignore="raw-array") == ["statistic-starts-at-zero"]
    clean(model, ignore=("raw-array", "statistic-starts-at-zero"))
    hint = f"one of: {', '.join(rule.code for rule in RULES)}"
    with refused(sw.DeclarationError, "There is no rule 'raw-arrays'.", hint=hint):
        sw.lint(model, ignore="raw-arrays")


def test_a_finding_is_plain_data() -> None:
    findings = sw.lint(zeros())
    assert json.loads(findings.to_json()) == findings.to_dict()
    assert findings.to_dict()["findings"] == [
        {
            "code": "statistic-starts-at-zero",
            "message": "1 statistic of spread is all zeros.",
            "leaves": [
                {
                    "path": "var_0",
                    "kind": "stats",
                    "type": "BatchStat",
                    "shape": [3],
                    "dtype": "float32",
                    "aliases": [],
                    "size": 3,
                    "nbytes": 12,
                }
            ],
            "why": "dividing by its square root gives infinities or huge numbers until enough batches were seen",
            "hint": "self.var_0 = BatchStat(jnp.ones(...))",
        }
    ]
    assert pickle.loads(pickle.dumps(findings)) == findings
    assert pickle.loads(pickle.dumps(findings)).to_dict() == findings.to_dict()


def test_a_finding_is_one_line_and_findings_are_shown_in_full() -> None:
    findings = sw.lint(zeros(12))
    assert str(findings[0]) == (
        "statistic-starts-at-zero: 12 statistics of spread are all zeros. (var_0, var_1, var_10 and 9 more)"
    )
    lines = str(findings).splitlines()
    assert lines[0] == "statistic-starts-at-zero: 12 statistics of spread are all zeros."
    assert lines[1] == "  var_0: BatchStat(3,) float32  kind=stats"
    assert lines[-3:] == [
        "  ... and 2 more (all in .leaves)",
        "  why: dividing by its square root gives infinities or huge numbers until enough batches were seen",
        "  hint: self.var_0 = BatchStat(jnp.ones(...))",
    ]


def test_findings_show_as_a_table_and_as_html() -> None:
    findings = sw.lint(zeros())
    out = io.StringIO()
    Console(file=out, width=60).print(findings)
    assert "1 finding" in out.getvalue()
    assert "var_0" in out.getvalue()
    assert "<td" in findings._repr_html_()
    assert "why: dividing" in findings._repr_html_()
    Console(file=out, width=60).print(sw.lint(nnx.Dict()))
    assert "no findings" in out.getvalue()
    assert "no findings" in sw.lint(nnx.Dict())._repr_html_()


def test_a_path_with_odd_characters_stays_on_one_line() -> None:
    model = nnx.Dict({"var_\n\x1b[31m": nnx.BatchStat(jnp.zeros(3))})
    findings = sw.lint(model)
    assert "\\n\\x1b[31m" in str(findings[0])
    assert "\x1b" not in str(findings)
    assert findings[0].hint == "model['var_\\n\\x1b[31m'] = BatchStat(jnp.ones(...))"


def test_values_are_fetched_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda arrays: calls.append(len(arrays)) or fetch(arrays))
    model = nnx.List([nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(50)])
    clean(model)
    assert len(calls) <= 2


def test_facts_of_values_that_are_there() -> None:
    gone = jnp.ones(2)
    gone.delete()
    facts = read({"a": jnp.array([0.0, jnp.inf]), "b": jnp.zeros(2, int), "c": gone, "d": 3, "e": "text"})
    assert {key: (one.finite, one.zero) for key, one in facts.items()} == {"a": (False, False), "b": (True, True)}
