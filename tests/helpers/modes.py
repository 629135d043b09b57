"""Flax's process-wide modes, which the suite can run under: `make test-modes`.

A mode is set as a user sets it, by Flax's own environment variable, or by `nnx.var_defaults` where there is none.  Two
things are done for the tests, never for Statewise:

- In tree mode and without graph updates, the transforms that a test itself calls (`nnx.jit` as the judge of a step)
  are those of `nnx.compat`, which mean the same in every mode.
- Where Flax alone refuses what a test does with it (`nnx.jit` on hijax Variables), the test is skipped with the reason.
  `REFUSALS` lists these errors, and tests/laws/test_modes.py shows each with Flax alone.  An error that is raised below
  Statewise's own code is never one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from flax import config, nnx

import plain_states

ROOT = Path(__file__).parents[2]
VARIABLE = "STATEWISE_TEST_MODE"


@dataclasses.dataclass(frozen=True)
class Mode:
    """A mode of Flax.

    Attributes:
      about: what it is, for the table.
      environment: Flax's own environment variables, or that of a Flax which the tests simulate.
      defaults: what `nnx.var_defaults` is called with, where no environment variable does it.
    """

    about: str
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    @property
    def exists(self) -> bool:
        """Returns whether the installed Flax has it, or the tests simulate it."""
        return all(name == plain_states.VARIABLE or hasattr(config, name.lower()) for name in self.environment)


MODES: dict[str, Mode] = {
    "graph": Mode("the default: graph mode, with graph updates, and plain Variables"),
    "tree": Mode("tree mode: `NNX_GRAPH_MODE=false`", {"NNX_GRAPH_MODE": "false"}),
    "no-updates": Mode("no graph updates: `NNX_GRAPH_UPDATES=false`", {"NNX_GRAPH_UPDATES": "false"}),
    "hijax": Mode("hijax Variables: `FLAX_HIJAX_VARIABLE=true`", {"FLAX_HIJAX_VARIABLE": "true"}),
    "ref": Mode("references: `nnx.var_defaults(ref=True)`", defaults={"ref": True}),
    "sow-noop": Mode(
        "`sow` does nothing outside of `nnx.capture`: `NNX_SOW_CAPTURE_NOOP=true`", {"NNX_SOW_CAPTURE_NOOP": "true"}
    ),
    "dict": Mode("plain dicts instead of `nnx.State`, simulated by the tests", {plain_states.VARIABLE: "dict"}),
}


# The same within a process, for a block; without those that need a Flax of their own.
CONTEXTS: dict[str, Callable[[], Any]] = {
    "tree": lambda: nnx.set_graph_mode(False),
    "no-updates": lambda: nnx.set_graph_updates(False),
    "hijax": lambda: nnx.var_defaults(hijax=True, ref=False),
    "ref": lambda: nnx.var_defaults(ref=True),
    "hijax and ref": lambda: nnx.var_defaults(hijax=True, ref=True),
}


def current() -> str:
    """Returns the name of the mode that this process runs in."""
    return os.environ.get(VARIABLE, "graph")


@contextlib.contextmanager
def classic() -> Iterator[None]:
    """Runs a block in graph mode, with graph updates and plain Variables: the judge of a step is written for these."""
    with nnx.set_graph_mode(True), nnx.set_graph_updates(True), nnx.var_defaults(hijax=False, ref=False):
        yield


def in_mode(call: str, graph: bool | None = None) -> str:
    """Returns a call of Flax as a hint has it in graph mode, or in tree mode; by default in the mode of this run."""
    graph = nnx.set_graph_mode.current_value() if graph is None else graph
    return call if graph else call.replace(")", ", graph=True)").replace("(, ", "(")


def start() -> None:
    """Sets what no environment variable sets, before any test file is imported."""
    mode = MODES[current()]
    for name, value in mode.environment.items():
        assert os.environ.get(name) == value, f"{VARIABLE}={current()} without {name}={value}"
    if mode.defaults:
        nnx.var_defaults(**mode.defaults)
    if current() in ("tree", "no-updates"):
        for name in dir(nnx.compat):
            if hasattr(nnx, name) and isinstance(getattr(nnx.compat, name), functools.partial):
                setattr(nnx, name, _for_tests(getattr(nnx, name), getattr(nnx.compat, name)))


def _for_tests(original: Callable[..., Any], pinned: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that is the pinned one for tests, and the original for Statewise and Flax."""

    @functools.wraps(original)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0]
        return (original if caller in ("statewise", "flax") else pinned)(*args, **kwargs)

    return chosen


# --- what Flax itself refuses ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An error of Flax, or of JAX about Flax's objects, in a mode.

    Attributes:
      mode: the mode.
      error: a regular expression for `Type: text`.
      reason: what is refused.
      until: the first version of Flax that does it; None if none does yet.
    """

    mode: str
    error: str
    reason: str
    until: str | None = None

    @property
    def stands(self) -> bool:
        """Returns whether the installed Flax still refuses it."""
        return self.until is None or _numbers(metadata.version("flax")) < _numbers(self.until)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3]]


REFUSALS: tuple[Refusal, ...] = (
    Refusal("tree", "Tree mode .graph=False. does not support shared references", "tied weights in a call of its own"),
    Refusal(
        "hijax",
        "has no attribute _can_update|Cannot update a non-ref HijaxVariable",
        "hijax Variables are not written inside nnx.jit",
    ),
    Refusal("hijax", "jvp not implemented for 'get_variable'", "nnx.grad of hijax Variables", "0.12.12"),
    Refusal("hijax", "'aval_property' object is not callable", "hijax Variables as an output of jax.jit", "0.12.12"),
    Refusal("hijax", "'NoneType' object has no attribute 'treedef'", "hijax Variables carried by a scan", "0.12.12"),
    Refusal(
        "hijax",
        "'aval_property' object has no attribute 'mesh'|must implement `batch`|Batching rule for 'new_variable' not",
        "nnx.vmap does not make hijax Variables",
    ),
    Refusal("hijax", "'AbstractVariable' object has no attribute 'shape'", "nnx.vmap does not take hijax Variables"),
    Refusal("hijax", "Tracer has no attribute (dtype|ndim|shape|size)", "hijax Variables in jax.jit have no shape"),
    Refusal(
        "hijax",
        "implement the `vspace_add` method|jvp not implemented for 'get_variable'",
        "nnx.grad of hijax Variables that are read twice",
    ),
    Refusal("hijax", "HijaxVariable'> is not registered", "the bridge to Linen has no collection for hijax Variables"),
    Refusal("hijax", "RecursionError: maximum recursion depth", "nnx.EMA of hijax Variables"),
    Refusal(
        "hijax",
        "different numbers of pytree children",
        "nnx.Optimizer.update takes no gradients from jax.tree.map of hijax Variables",
    ),
    Refusal(
        "hijax",
        "argument to new_variable as a JAX value|of type <class 'str'> is not a valid JAX type",
        "a hijax Variable holds arrays only",
    ),
    Refusal("ref", "argument to new_ref as a JAX value", "a reference holds one array, not text, None or a tuple"),
    Refusal("ref", "mutable array references cannot be returned", "references are not returned from jax.jit"),
    Refusal(
        "ref",
        "differentiate with respect to a Ref-typed argument|Expected cotangent type Ref",
        "nnx.grad makes no references",
    ),
    Refusal(
        "ref",
        "of type <class 'jax.ShapeDtypeStruct'> is not a valid JAX type",
        "nnx.eval_shape of references",
        "0.12.12",
    ),
    Refusal("ref", "only one reference to a mutable array may be passed", "tied references as arguments of jax.jit"),
    Refusal("ref", "'Ref' object has no attribute", "a reference has no methods of arrays, as is_deleted"),
    Refusal("ref", r"matmul requires .*\bTransformedRef", "nnx.SpectralNorm of references"),
    Refusal("ref", r"input carry component .* is a <class '[\w.]+\.AbstractRef'>", "nnx.RNN of references"),
    Refusal("ref", r"Invalid shape for `swap`. Ref shape: \(\)", "nnx.split_rngs writes other shapes into references"),
)

# Tests of what a mode changes in Flax itself, without an error that says so: by mode, what changes, and the names of
# the tests (with their parameters, or for all of them).
CHANGED: dict[str, dict[str, tuple[str, ...]]] = {
    "hijax": {
        "nnx.pop and nnx.capture do not find hijax Variables": (
            "test_capture.py::test_captured_values_of_an_evaluation",
            "test_capture.py::test_each_captured_kind_comes_apart[RematerialisedSower]",
            "test_filters.py::test_split_pop_and_merge",
            "test_graphdef.py::test_without_leaves_is_what_is_left_when_they_are_popped",
        ),
        "hijax Variables are not written inside jax.jit": ("test_update.py::test_update_under_jit",),
        "the moments of hijax Variables are known by the nnx.State that they are in": (
            "test_optimizers.py::test_an_optimizer_that_masks_the_frozen_leaves_is_fine[dict]",
        ),
        "jax.tree.map gives hijax Variables themselves, not their arrays": (
            "test_arrays.py::test_a_copy_of_the_module_alone_shares_its_arrays",
            "test_convert.py::test_what_people_save_of_an_nnx_model_is_taken[True]",
        ),
        "a hijax Variable says so in its metadata": (
            "test_positions.py::test_each_leaf_is_what_its_own_variable_says",
        ),
        "hijax Variables are not written inside nnx.jit": (
            "test_grads.py::test_aux_comes_back_beside_the_loss[jit]",
            "test_grads.py::test_loss_gradients_and_writes_are_those_of_nnx[batchnorm_dropout-nnx.jit]",
            "test_grads.py::test_loss_gradients_and_writes_are_those_of_nnx[by_operators-nnx.jit]",
            "test_grads.py::test_loss_gradients_and_writes_are_those_of_nnx[by_path-nnx.jit]",
            "test_grads.py::test_loss_gradients_and_writes_are_those_of_nnx[own_type-nnx.jit]",
            "test_grads.py::test_loss_gradients_and_writes_are_those_of_nnx[rematerialised-nnx.jit]",
            "test_grads.py::test_loss_gradients_and_writes_are_those_of_nnx[statistics-nnx.jit]",
            "test_several_objects.py::test_kinds_of_the_users_own",
        ),
        "nnx.Optimizer has moments of another type for hijax Variables": (
            "test_placement.py::test_init_takes_several_objects",
        ),
        "a hijax Variable narrows the numbers of Python and NumPy that it is made of": (
            "test_arrays.py::test_wide_numbers_of_numpy",
            "test_false_alarms.py::test_each_wide_leaf_has_its_own_dtype",
            "test_narrowing.py::test_a_difference_sees_what_a_state_would_not_hold",
            "test_narrowing.py::test_a_taken_numpy_array_gives_its_values_or_is_refused",
            "test_narrowing.py::test_numbers_of_numpy_and_python_in_a_model_are_not_narrowed",
            "test_narrowing.py::test_scan_layers_refuses_numpys_numbers",
            "test_narrowing_gradients.py::test_gradients_of_numbers_that_jax_would_lose_are_refused",
        ),
    },
    "ref": {
        "reading a reference copies it": (
            "test_audit_plain.py::test_a_plain_function_of_several_objects_is_audited",
            "test_model_io.py::test_without_copying_the_model_shares_until_a_step_donates",
        ),
        "what is read of a reference is committed": (
            "test_placement.py::test_jax_takes_the_shardings_as_they_are",
            "test_transforms.py::test_shard_map",
        ),
        "JAX 0.12 makes no references in jax.jvp": ("test_transforms.py::test_derivatives_by_an_argument",),
        "nnx.scan does not write the counts of RNG streams": (
            "test_scan_layers.py::test_a_module_runs_as_under_nnx_scan",
            "test_scan_layers.py::test_with_rematerialised_layers_where_nnx_scan_stacks_everything",
        ),
        "a reference that is made inside jax.vmap has its axis": (
            "test_scan_layers.py::test_what_is_shared_is_carried_where_it_is_written",
            "test_vmap_axes.py::test_a_kind_that_is_written_without_an_axis_is_named",
        ),
        "a reference holds one array": ("test_positions.py::test_each_leaf_is_what_its_own_variable_says",),
        "references have no weak types in JAX 0.12": ("test_model_io.py::test_weak_types_stay_weak",),
        "Optax reads an array of each parameter, and NNX gives it references": (
            "test_annotations.py::test_factored_moments_follow_the_axes_that_are_left_of_their_parameter",
            "test_false_alarms.py::test_models_without_a_fault[optimized]",
            "test_microbatch_models.py::test_the_statistics_of_a_resnet_are_those_of_the_loop_by_hand[adafactor]",
            "test_microbatches.py::test_parts_equal_the_whole_batch_and_a_loop_by_hand[adafactor]",
            "test_optimizers.py::test_the_optimizers_of_optax_are_fine[adafactor]",
            "test_optimizers.py::test_the_optimizers_of_optax_are_fine[hyperparams]",
        ),
        "JAX does not let several threads read one reference at once": ("test_intern.py::test_threads_get_one_plan",),
    },
    "dict": {
        "the moments of hijax Variables are known by the nnx.State that they are in": (
            "test_optimizers.py::test_each_optimizer_is_matched_with_its_own_model[True]",
            "test_optimizers.py::test_moments_of_leaves_that_are_gone[True]",
        ),
    },
    "sow-noop": {
        "sow outside of nnx.capture leaves nothing": (
            "test_capture_assigned.py::test_sown_onto_what_an_earlier_call_left",
            "test_graphdef.py::test_graph_with_a_shared_module_is_not_a_tree",
            "test_graphdef.py::test_plan_of_a_model_with_sown_leaves_is_that_of_one_without",
            "test_leaf_specs.py::test_a_kind_that_is_saved_keeps_what_was_sown",
            "test_leaf_specs.py::test_at_whatever_path_it_can_be_reached",
            "test_leaf_specs.py::test_dropped_leaves_are_told",
            "test_leaf_specs.py::test_what_an_earlier_sow_left_is_dropped",
            "test_leaf_types.py::test_what_an_earlier_sow_left",
            "test_scan_layers_made.py::test_a_model_has_afterwards_what_nnx_scan_leaves_in_it",
            "test_scan_layers_made.py::test_uncaptured_the_refusal_names_the_path_in_the_model",
        ),
    },
}


def hijax_is_written_in_traces() -> bool:
    """Returns whether the installed Flax writes hijax Variables in traces: 0.12.8 does, and the newest refuses it."""
    return _numbers(metadata.version("flax")) < _numbers("0.12.9")


def changed_by_flax(nodeid: str) -> str:
    """Returns why a test does not hold in this mode, if it is about what the mode changes; else an empty text."""
    path, bracket, parameters = nodeid.partition("[")
    name = path.rpartition("/")[2]
    for reason, tests in CHANGED.get(current(), {}).items():
        if name in tests or f"{name}{bracket}{parameters}" in tests:
            return f"flax in mode {current()}: {reason}"
    return ""


def refused_by_flax(error: BaseException) -> str:
    """Returns why a test cannot run in this mode, if Flax alone refuses what it does; else an empty text."""
    if current() == "graph" or _raised_below_statewise(error):
        return ""
    text = f"{type(error).__name__}: {error}"
    for refusal in REFUSALS:
        if current() == refusal.mode and refusal.stands and re.search(refusal.error, text):
            return f"flax in mode {current()}: {refusal.reason}"
    return ""


def _raised_below_statewise(error: BaseException) -> bool:
    """Returns whether the last frame that belongs to this repository is one of Statewise's; in mode hijax, any frame.

    Functions that Statewise calls get plain Variables, so Flax refuses nothing of them because they are hijax ones.
    """
    ours, trace = False, error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        # The environments that `make` makes are in the repository too, with Flax and JAX in them.
        # The models in `examples` are written as users write theirs.
        if file.is_relative_to(ROOT / "tests") or file.is_relative_to(ROOT / "src" / "statewise" / "examples"):
            ours = ours and current() == "hijax"
        elif file.is_relative_to(ROOT / "src"):
            ours = True
        trace = trace.tb_next
    return ours
