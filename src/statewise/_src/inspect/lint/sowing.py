"""Rules of `sow` and `perturb`, which record values inside `nnx.capture`, and outside of it only by a setting of Flax.

That a model sows is fine: whoever wants the values captures them.  A finding is only what shows that the model's own
code relies on values being recorded outside of a capture: a leaf that `sow` is meant to write, or an `nnx.pop`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flax import nnx

from statewise._src.common import compat
from statewise._src.common.paths import Path, format_path
from statewise._src.common.problems import counted
from statewise._src.common.variable_forms import out_of_model
from statewise._src.filters.explain import as_code
from statewise._src.inspect.lint.class_code import Call, FunctionCode, functions_of
from statewise._src.inspect.lint.finding import Found, Rules
from statewise._src.inspect.lint.subject import Subject

__all__ = ["RULES", "never_written", "taken_out"]

RULES = Rules()

_BY_STEP = "  # or @sw.step(capture='intermediates')"
_AS_BEFORE = "or, as in earlier versions: flax.config.update('nnx_sow_capture_noop', False)"


@RULES.rule(
    "sow-without-capture",
    "nothing is recorded, and nothing fails: a loss or a gradient made of these values has no effect",
)
def sow_without_capture(subject: Subject) -> Iterator[Found]:
    """Finds modules that read what they sow outside of `nnx.capture`, if Flax is set to record nothing there."""
    if not compat.sow_needs_capture():
        return
    held = never_written(subject)
    if held:
        type_ = subject.types[held[0]]
        yield Found(
            f"{counted(len(held), 'leaf is', 'leaves are')} held for sow or perturb, which do not write to the model.",
            subject.rows(held),
            f"{taken_out(subject, held, f'nnx.pop(model, {as_code(type_)})', 'once: take it out of the model')}\n"
            f"{_capture('model', type_)}{_BY_STEP if issubclass(type_, nnx.Intermediate) else ''}\n{_AS_BEFORE}",
        )
    for path, function, type_ in _popping(subject):
        where = f", in the module at {format_path(path)}," if path else ""
        yield Found(
            f"{function}{where} pops {type_.__name__}, but nothing records it outside of nnx.capture.",
            (),
            f"{_capture('module', type_)}  # instead of nnx.pop\n{_AS_BEFORE}",
        )


def taken_out(subject: Subject, numbers: Sequence[int], pop: str, when: str) -> str:
    """Returns the code that takes leaves which were sown out of a model: `pop`, where that finds them."""
    hijax = next((number for number in numbers if compat.is_hijax(subject.graph.leaves[number])), None)
    return out_of_model(pop, None if hijax is None else subject.target(hijax), when)


def _capture(model: str, type_: type) -> str:
    """Returns the code that captures what a model sows."""
    call = f"output, sown = nnx.capture({model}, {as_code(type_)})(x)"
    # It collects plain Variables only.
    return f"with nnx.var_defaults(hijax=False): {call}" if nnx.var_defaults().hijax else call


def never_written(subject: Subject) -> list[int]:
    """Returns the leaves that `sow` or `perturb` is meant to write, if Flax is set to write nothing there."""
    if not compat.sow_needs_capture():
        return []
    numbers = {id(leaf): number for number, leaf in enumerate(subject.graph.leaves)}
    calls = {cls: [call for code in codes for call in _recording(code)] for cls, codes in _classes(subject).items()}
    held = dict[int, None]()
    for _, node in subject.nodes:
        for call in calls.get(type(node), ()):
            number = numbers.get(id(vars(node).get(call.text)))
            if number is not None and _is_written(call, subject.types[number]):
                held[number] = None
    return sorted(held)


def _classes(subject: Subject) -> dict[type, tuple[FunctionCode, ...]]:
    """Returns the code of the classes of the modules; Flax's own layers read nothing that they sow."""
    classes = dict.fromkeys(type(node) for _, node in subject.nodes if isinstance(node, nnx.Module))
    own = (cls for cls in classes if cls.__module__.partition(".")[0] != "flax")
    return {cls: functions_of(cls, ("sow", "perturb", nnx.pop)) for cls in own}


def _recording(code: FunctionCode) -> list[Call]:
    """Returns the calls that follow Flax's setting: one that passes `capture_noop` decides for itself."""
    return [] if "capture_noop" in code.texts else [call for call in code.calls if call.name != nnx.pop.__name__]


def _default(call: Call) -> type:
    return nnx.Perturbation if call.name == "perturb" else nnx.Intermediate


def _is_written(call: Call, type_: type) -> bool:
    """Returns whether a call would write a Variable of this type; a type that is passed by its name is unknown."""
    return issubclass(type_, _default(call)) if call.type is None else type_ is call.type


def _popping(subject: Subject) -> Iterator[tuple[Path, str, type]]:
    """Yields the functions of modules that pop what the model sows: a module that has it, its name, and the type."""
    classes = _classes(subject)
    codes = [code for functions in classes.values() for code in functions]
    if any(value is nnx.capture for code in codes for value in code.objects):  # the model captures by itself
        return
    recorded = {call.type or _default(call) for code in codes for call in _recording(code)}
    if any("sow_weights" in code.texts for code in codes):  # Flax's attention sows for those who ask it to
        recorded.add(nnx.Intermediate)
    first = {type(node): path for path, node in reversed(subject.nodes)}
    popped = {
        code.name: (first[cls], code.name, call.type)
        for cls, functions in classes.items()
        for code in functions
        for call in code.calls
        if call.name == nnx.pop.__name__ and call.type and any(issubclass(type_, call.type) for type_ in recorded)
    }
    yield from popped.values()
