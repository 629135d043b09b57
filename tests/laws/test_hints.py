"""What of a hint is code, what is prose, and what must fail.  The hints of the package are asked in conftest.py."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from hints import NotCodeError, as_python, code_in, code_of, parses

# A hint -> the code that it has.
CODE = {
    "a directory for each step: sw.save(f'run/{step}', state)": ["sw.save(f'run/{step}', state)"],
    "state = plan.take(model)": ["state = plan.take(model)"],
    "@sw.step(writes=('stats',))\nor, if the function only evaluates: model.eval() as its first line": [
        "@sw.step(writes=('stats',))",
        "model.eval()",
    ],
    "@sw.step\ndef f(model, x): ...": ["@sw.step\ndef f(model, x): ..."],
    "with sw.watch(model) as watch:\n    train(model, x)\nprint(watch)": [
        "with sw.watch(model) as watch:\n    train(model, x)\nprint(watch)"
    ],
    "kinds = kinds | sw.Kinds(a=b)\nor, for all of them at once: kinds = kinds | sw.Kinds(rest=sw.Kind(...))": [
        "kinds = kinds | sw.Kinds(a=b)",
        "kinds = kinds | sw.Kinds(rest=sw.Kind(...))",
    ],
    "how='mean', how='first', or a function of the values: how=lambda array: array.max(axis=0)": [
        "how='mean', how='first'",
        "how=lambda array: array.max(axis=0)",
    ],
    "leave key= out, or take it: restart=lambda array, key: jax.random.normal(key, array.shape)": [
        "restart=lambda array, key: jax.random.normal(key, array.shape)"
    ],
    "sw.restore(path, plan.take(model)), or plan.abstract(); then plan.put(state, model)": [
        "sw.restore(path, plan.take(model))",
        "plan.abstract()",
        "plan.put(state, model)",
    ],
    "plan.stacked(8, params=0)  # without ema=\nor one for each": ["plan.stacked(8, params=0)  # without ema="],
    "the layer that the step returned: layer, x = step(layer, x)": ["layer, x = step(layer, x)"],
    "state['params'] gives a kind's arrays, sw.census(state) counts them": ["state['params']", "sw.census(state)"],
    "take it out of the dict: rename={name: None} leaves out arrays only": ["rename={name: None}"],
    "use `m`, the step's argument, instead of `self.others['a b'].net`": ["m", "self.others['a b'].net"],
    "set self.table[('a', 1)] = value where the model's table is made": ["self.table[('a', 1)] = value"],
    "return loss, {'logits': logits}": ["return loss, {'logits': logits}"],
}
PROSE = [
    "restore another checkpoint",
    "leave key= out of the call",
    "the path of a checkpoint's directory, or of a .safetensors file",
    "an array (of 3 numbers), or none",
    "pass a module, an optimizer, or a list or dict of them",
    "passing it to the function as an argument",
]
# Looks like code, and is none.
REFUSED = [
    "sw.Where(__main__:<lambda>)",
    "sw.Kind(sw.Where(__main__:<lambda>), missing='keep')",
    "kinds = kinds.replace(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(<filter>))))",
    "self[('kernel',)] = nnx.Param(jnp.ones(3))",
    "self[0] = nnx.Variable(...)",
    "in the constructor: self['kernel'] = value",
    "plan.take(model",
    "plan.take(model))",
    "or, of states: jax.vmap(lambda key: plan.take(...)(keys)",
    "declare it: sw.Kinds(my kind=sw.Kind(nnx.Param))",
    "axis=Mesh('data': 8)",
    "x = <object>",
    "@sw.step(writes=(stats,)",
    "@sw.step(writes=stats rng)",
    "with sw.watch(model) as a b:",
    "def step(model, 3): ...",
    "import statewise as",
    "use `model.layers[0.kernel`, which is given",
    "model.layers/0[...]) of it",
    "plan.stacked(8, params=0, ...)",
]


@pytest.mark.parametrize("hint", CODE)
def test_the_code_in_a_hint_is_found(hint: str) -> None:
    assert list(code_in(hint)) == CODE[hint]


@pytest.mark.parametrize("hint", PROSE)
def test_prose_is_left_alone(hint: str) -> None:
    assert code_in(hint) == ()
    with pytest.raises(AssertionError, match="no code in"):
        parses(hint)


@pytest.mark.parametrize("hint", REFUSED)
def test_what_looks_like_code_and_is_none_is_refused(hint: str) -> None:
    with pytest.raises(NotCodeError, match="in the hint"):
        code_in(hint)


def test_all_that_is_found_is_python() -> None:
    for hint in CODE:
        for code in code_in(hint):
            assert as_python(code) is not None, code


@given(
    st.recursive(
        st.sampled_from(["a", "b.c", "'x, or y: z'", "3", "lambda p, q: p"]),
        lambda inner: st.builds(
            lambda name, args: f"{name}({', '.join(args)})",
            st.sampled_from(["f", "sw.Kind"]),
            st.lists(inner, max_size=3),
        ),
        max_leaves=6,
    )
)
def test_any_call_is_found_among_words_and_refused_without_its_last_bracket(call: str) -> None:
    called = f"sw.f({call})"
    assert code_in(f"or, where it is meant: {called} as the first line") == (called,)
    with pytest.raises(NotCodeError):
        code_in(f"or, where it is meant: {called[:-1]} as the first line")


def test_an_error_and_a_warning_are_asked_where_they_are_made() -> None:
    for made in (sw.StatewiseError, sw.StructureError, sw.StatewiseWarning):
        with pytest.raises(NotCodeError):
            made("It is so.", hint="sw.Where(__main__:<lambda>)")
        assert code_of(made("It is so.", hint="one of them: sw.step, or sw.step(f)"), "(") == "sw.step(f)"


def test_the_check_itself_reads_python_alone() -> None:
    assert isinstance(as_python("wrt='params'"), ast.Module)
    assert isinstance(as_python("a=1, b=2"), ast.Module)
    assert as_python("a b") is None
