"""LoRA adapters in a model: which kernel each belongs to, and the model without them.

A low-rank adapter adds `x @ lora_a @ lora_b` to the output of a linear layer `x @ kernel + bias`: the output of a layer
with the kernel `kernel + lora_a @ lora_b` (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1).  That holds
only if the layer is linear, and if each use of the kernel has the same adapters; everything else is refused.

Only abstract objects that were built for this are changed here, never a user's model.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ONE, read_graph
from statewise._src.common.paths import Leaf, format_shape, format_type
from statewise._src.common.problems import Problems
from statewise._src.plan.tables import PlanTables
from statewise.errors import StructureError

__all__ = ["PlainObjects", "without_adapters"]

# The numbers of `lora_a` and `lora_b` of each adapter of a kernel, in the order of the plan's leaves.
Pairs = tuple[tuple[int, int], ...]

# What Flax's adapters do to their matrices before the product: a cast.
_PROMOTE = inspect.signature(nnx.LoRA.__init__).parameters["promote_dtype"].default

_IN_THE_WAY = "{n} leaves are in the way of merging the adapters. Nothing was merged."
_ALONE = "nnx.LoRA(..., base_module=linear), or nnx.LoRALinear, so that it is known what it is added to"
# What Flax's linear layers multiply with if nothing else is given.
_PRODUCTS = {"dot_general": (jax.lax.dot_general, None), "dot_general_cls": (None,), "promote_dtype": (_PROMOTE,)}

_LINEAR = "adapters of nnx.Linear alone; fold any other by hand: kernel + lora_a @ lora_b"
_TIED = "untie the kernel in the model, so that the merged one has a place of its own"


@dataclasses.dataclass(frozen=True, slots=True)
class PlainObjects:
    """Objects without adapters.

    Attributes:
      objects: the objects, abstract; no optimizer is among them.
      names: their names, if they were planned by name.
      numbers: the number that each of their leaves has in the plan with the adapters, in order.
      adapters: by the number of a kernel, its adapters.
    """

    objects: tuple[Any, ...]
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    adapters: dict[int, Pairs]


def without_adapters(plan: PlanTables, objects: Sequence[Any]) -> PlainObjects:
    """Returns the objects of a plan without their adapters, and without the optimizers among them.

    Args:
      plan: the plan.
      objects: abstract objects of this plan; they are changed.

    Raises:
      StructureError: there are no adapters, or some that cannot be folded: all are listed.
    """
    number_of = {id(leaf): number for number, leaf in enumerate(read_graph(objects, plan.names).leaves)}
    objects, names = _without_optimizers(objects, plan.names)
    before = [number_of[id(leaf)] for leaf in read_graph(objects, names).leaves] if objects else []
    graph = _Graph(objects)
    problems = Problems()
    adapters = _Adapters(plan, graph, number_of, problems)
    pairs_of = adapters.by_kernel()
    problems.raise_as(StructureError, _IN_THE_WAY)
    changed = _Plain().of(list(objects))
    numbers = tuple(number_of[id(leaf)] for leaf in read_graph(changed, names).leaves) if changed else ()
    folded = {number for pairs in pairs_of.values() for pair in pairs for number in pair}
    _check_rest(plan, before, numbers, folded, problems)
    problems.raise_as(StructureError, _IN_THE_WAY)
    if not pairs_of:
        raise StructureError(
            "There are no adapters to merge: no nnx.LoRA and no nnx.LoRALinear is in the model.",
            hint="the state is of the plain model already, or the adapters are of a class of your own",
        )
    return PlainObjects(tuple(changed), names, numbers, pairs_of)


def _without_optimizers(objects: Sequence[Any], names: tuple[str, ...]) -> tuple[list[Any], tuple[str, ...]]:
    """Returns the objects that are not optimizers, and the model of an optimizer that holds the only path to it."""
    kept: list[Any] = []
    labels: list[str] = []
    for label, each in zip(names or map(str, range(len(objects))), objects, strict=True):
        if isinstance(each, nnx.Optimizer):
            each = getattr(each, "model", None)
            if each is None or any(each is other for other in objects):
                continue
        kept.append(each)
        labels.append(label)
    return kept, tuple(labels) if names else ()


def _check_rest(
    plan: PlanTables, before: Sequence[int], after: Sequence[int], folded: set[int], problems: Problems
) -> None:
    """Checks that no adapter is left over, and that nothing but adapters is lost."""
    for number in after:
        if issubclass(plan.leaves[number].type, nnx.LoRAParam):
            note = "is not the lora_a or lora_b of an nnx.LoRA or nnx.LoRALinear that is merged"
            problems.add(plan.leaves[number], note, _LINEAR)
    accounted = folded.union(after)
    for number in before:
        if number not in accounted:
            note = "would be lost: it belongs to an adapter, and is neither lora_a nor lora_b"
            problems.add(plan.leaves[number], note, "take it out of the nnx.LoRA")


# --- objects and their parts -----------------------------------------------------------------------------------------


def _attributes(node: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(node).items() if not name.startswith("_pytree__")}


def _is_part(value: Any) -> bool:
    return isinstance(value, nnx.Pytree) or compat.is_variable(value)


def _parts(value: Any) -> Iterator[Any]:
    """Yields the objects and Variables in an attribute: itself, or those in its tuples, lists and dicts."""
    return (part for part in jax.tree.leaves(value, is_leaf=_is_part) if _is_part(part))


class _Graph:
    """All objects in some objects, each once, and which objects hold each."""

    def __init__(self, objects: Sequence[Any]) -> None:
        self.nodes: list[Any] = []
        # By identity; None stands for the caller, who holds the objects themselves.
        self._holders: dict[int, list[Any]] = {}
        for each in _parts(list(objects)):
            self._visit(each, None)

    def _visit(self, part: Any, holder: Any) -> None:
        is_known = id(part) in self._holders
        self._holders.setdefault(id(part), []).append(holder)
        if is_known or compat.is_variable(part):
            return
        self.nodes.append(part)
        for value in _attributes(part).values():
            for inner in _parts(value):
                self._visit(inner, part)

    def holders(self, part: Any) -> list[Any]:
        """Returns the objects that hold a part."""
        return self._holders[id(part)]


# --- which kernel has which adapters ---------------------------------------------------------------------------------


class _Adapters:
    """The adapters of a model; `problems` gets those that cannot be folded."""

    def __init__(self, plan: PlanTables, graph: _Graph, number_of: Mapping[int, int], problems: Problems) -> None:
        self._plan, self._graph, self._number_of, self._problems = plan, graph, number_of, problems

    def by_kernel(self) -> dict[int, Pairs]:
        """Returns the adapters of each kernel that has some."""
        for node in self._graph.nodes:
            if isinstance(node, nnx.Optimizer):
                for part in jax.tree.leaves(vars(node), is_leaf=compat.is_variable):
                    if id(part) in self._number_of:
                        note = "belongs to an nnx.Optimizer inside an object, which is made for the adapters"
                        self._refuse(part, note, "plan it beside the model: kinds.plan(model, optimizer)")
            elif isinstance(node, nnx.LoRA | nnx.LoRALinear):
                self._check(node)
        if self._problems:
            return {}
        kernels = {id(base.kernel): base.kernel for base in self._graph.nodes if self._is_base(base)}
        found: dict[int, Pairs] = {}
        for kernel in kernels.values():
            uses = {pairs for holder in self._graph.holders(kernel) for pairs in self._pairs(holder, kernel)}
            if len(uses) > 1:
                self._refuse(kernel, "is used with the adapter in one place, and without it in another", _TIED)
            elif uses != {()}:
                number = self._number_of[id(kernel)]
                found[number] = uses.pop()
                self._check_arrays(number, found[number])
        return found

    def _refuse(self, variable: Any, note: str, hint: str) -> None:
        self._problems.add(self._plan.leaves[self._number_of[id(variable)]], note, hint)

    def _check(self, module: Any) -> None:
        """Checks that an adapter computes what Flax's own do, and has a base that is linear."""
        name = type(module).__name__
        if isinstance(module, nnx.LoRALinear):
            if type(module) is not nnx.LoRALinear or type(module.lora) is not nnx.LoRA or module.lora.base_module:
                self._refuse(module.kernel, f"is of {name}, which is not Flax's own nnx.LoRALinear", _LINEAR)
            self._check_product(module)
            return
        if module.promote_dtype is not _PROMOTE:
            self._refuse(module.lora_a, "has a promote_dtype of its own, which may change more than dtypes", _LINEAR)
        inner = [holder for holder in self._graph.holders(module) if _holds_as_adapter(holder, module)]
        if type(module).__call__ is not nnx.LoRA.__call__:
            self._refuse(module.lora_a, f"is of {name}, which computes something else", _LINEAR)
        elif module.base_module is None:
            if len(inner) < len(self._graph.holders(module)):
                self._refuse(module.lora_a, "is of an nnx.LoRA without a base_module", _ALONE)
        elif not isinstance(module.base_module, nnx.LoRA | nnx.LoRALinear) and not _is_linear(module.base_module):
            base = format_type(type(module.base_module))
            self._refuse(module.lora_a, f"is added to {base}, which is not an nnx.Linear", _LINEAR)
        elif _is_linear(module.base_module):
            self._check_product(module.base_module)

    def _check_product(self, linear: Any) -> None:
        """Checks that a layer multiplies by its kernel itself."""
        own = [name for name, usual in _PRODUCTS.items() if getattr(linear, name, usual[0]) not in usual]
        if own:
            note = f"is of a layer with a {own[0]} of its own, which may compute something other than the product"
            self._refuse(linear.kernel, note, _LINEAR)

    def _is_base(self, node: Any) -> bool:
        under = (isinstance(holder, nnx.LoRA) for holder in self._graph.holders(node))
        return isinstance(node, nnx.LoRALinear) or (_is_linear(node) and any(under))

    def _pairs(self, holder: Any, kernel: Any) -> set[Pairs]:
        """Returns the adapters with which a kernel is used by an object that holds it: one set for each use."""
        is_kernel = isinstance(holder, nnx.Linear | nnx.LinearGeneral) and holder.kernel is kernel
        return self._around(holder) if is_kernel else {()}

    def _around(self, module: Any) -> set[Pairs]:
        own = (self._pair(module.lora),) if isinstance(module, nnx.LoRALinear) else ()
        uses: set[Pairs] = set()
        for holder in self._graph.holders(module):
            if isinstance(holder, nnx.LoRA) and holder.base_module is module:
                uses |= {(self._pair(holder), *outer) for outer in self._around(holder)}
            else:
                uses.add(())
        return {own + pairs for pairs in uses}

    def _pair(self, module: Any) -> tuple[int, int]:
        return self._number_of[id(module.lora_a)], self._number_of[id(module.lora_b)]

    def _check_arrays(self, number: int, pairs: Pairs) -> None:
        """Checks that the product of an adapter has the shape of the kernel, perhaps of one of a stack."""
        leaves = self._plan.leaves
        for at in (number, *(each for pair in pairs for each in pair)):
            if self._plan.rows[at].structure is not ONE or not jnp.issubdtype(leaves[at].dtype, jnp.inexact):
                shown = "several arrays" if leaves[at].dtype is None else leaves[at].dtype
                self._problems.add(leaves[at], f"is {shown}, to which no product is added", "dequantize it first")
                return
        for a, b in pairs:
            note = _misfit(leaves[number], leaves[a], leaves[b])
            if note:
                self._problems.add(leaves[number], note, "layers that are stacked along the first axis")
            wider = next((leaves[each] for each in (a, b) if _is_complex(leaves[each])), None)
            if wider is not None and not _is_complex(leaves[number]):
                note = f"is {leaves[number].dtype}, and its adapter {wider.dtype}"
                self._problems.add(leaves[number], note, "a kernel of the adapter's dtype")


def _is_complex(leaf: Leaf) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.complexfloating))


def _misfit(kernel: Leaf, a: Leaf, b: Leaf) -> str:
    """Returns how the shapes of a kernel and of its adapter do not fit; empty if they do."""
    shape, left, right = kernel.shape or (), a.shape or (), b.shape or ()
    fits = min(len(shape), len(left), len(right)) >= 2
    # A stack has further axes in front, in all three, or in the kernel alone if its layers share the adapter.
    fits = fits and left[:-2] in ((), shape[:-2]) and right[:-2] in ((), shape[:-2])
    if fits and (left[-2], right[-1], left[-1]) == (*shape[-2:], right[-2]):
        return ""
    return f"is {format_shape(shape)}, and its adapter {format_shape(left)} and {format_shape(right)}"


def _holds_as_adapter(holder: Any, module: Any) -> bool:
    return isinstance(holder, nnx.LoRALinear) and holder.lora is module


def _is_linear(module: Any) -> bool:
    """Returns whether a module computes `x @ kernel`, and perhaps adds a bias, over the last axis."""
    if isinstance(module, nnx.LinearGeneral):
        flat = module.axis == (-1,) and not module.batch_axis and len(module.out_features) == 1
        return flat and type(module).__call__ is nnx.LinearGeneral.__call__
    return isinstance(module, nnx.Linear) and type(module).__call__ is nnx.Linear.__call__


# --- the model without them ------------------------------------------------------------------------------------------


class _Plain:
    """Replaces adapters by what they are around, in all objects that hold them; what is shared stays shared."""

    def __init__(self) -> None:
        # An object is entered before its attributes are visited, because it may hold itself.
        self._plain: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """Returns a value without adapters: itself if it had none."""
        parts = list(_parts(value))
        if not any(self._of_object(part) is not part for part in parts):
            return value
        return jax.tree.map(lambda part: self._of_object(part) if _is_part(part) else part, value, is_leaf=_is_part)

    def _of_object(self, part: Any) -> Any:
        if compat.is_variable(part):
            return part
        if id(part) in self._plain:
            return self._plain[id(part)]
        if isinstance(part, nnx.LoRA) and part.base_module is not None:
            self._plain[id(part)] = plain = self._of_object(part.base_module)
            return plain
        self._plain[id(part)] = plain = _linear(part) if type(part) is nnx.LoRALinear else part
        for name, value in _attributes(plain).items():
            new = self.of(value)
            if new is not value:
                # What is neither an object nor a Variable says itself that it holds some.
                setattr(plain, name, new if _is_part(new) else nnx.data(new))
        return plain


@functools.cache
def _template() -> Any:
    """Returns an abstract `nnx.Linear`, whose attributes are replaced: tracing one for each layer would take long."""
    with nnx.var_defaults(hijax=False, ref=False):
        return nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)), graph=True)


def _linear(module: Any) -> Any:
    """Returns an `nnx.Linear` with the attributes of an `nnx.LoRALinear`."""
    plain = nnx.clone(_template(), graph=True)
    for name, value in _attributes(module).items():
        if name != "lora":
            setattr(plain, name, value)
    return plain
