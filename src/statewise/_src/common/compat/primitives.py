"""The names of JAX's primitives, by what they do: the only place where a primitive has a name.

JAX renames primitives and adds new ones between versions.  A set has the names of all supported versions; a name that
the installed JAX does not have never occurs.  `tests/common/compat/test_primitives.py` checks that each name belongs to
the installed JAX or to a list of those that do not, so that a new name is a finding there and not a wrong answer here.
"""

from __future__ import annotations

__all__ = [
    "CALLS",
    "CAST",
    "COLLECTIVE_JOINS",
    "COND",
    "CUSTOM_DERIVATIVES",
    "CUSTOM_JVP",
    "DRAWS",
    "ELEMENTWISE",
    "PLAIN_CALLS",
    "PRODUCTS",
    "RANDOM_UNWRAP",
    "RANDOM_WRAP",
    "RESHAPE",
    "RESHAPES",
    "SAME_VALUE",
    "SCAN",
    "SELECT",
    "SET_VARIABLE",
    "SHARD_MAP",
    "SIGN",
    "SUMS",
    "TRANSPOSE",
    "WHILE",
    "ZERO_DERIVATIVE",
    "ZERO_OF_ZERO",
    "uses_keys",
]

# --- those that the walks know one by one -----------------------------------------------------------------------

SCAN, WHILE, COND, SELECT, SHARD_MAP = "scan", "while", "cond", "select_n", "shard_map"
SET_VARIABLE = "set_variable"  # of a hijax Variable, in flax 0.12.8; later ones refuse it in a trace
CAST, TRANSPOSE, RESHAPE, SIGN = "convert_element_type", "transpose", "reshape", "sign"
# From the words of a key to the key, and back.
RANDOM_WRAP, RANDOM_UNWRAP = "random_wrap", "random_unwrap"
CUSTOM_JVP = "custom_jvp_call"

# --- what comes out is what went in -----------------------------------------------------------------------------

# Where a leaf is placed is declared by its kind, not decided by a step.
_PLACES = frozenset({"device_put", "layout_constraint", "reshard", "sharding_constraint"})
# Each output is the operand at the same position: these primitives change its derivative, name or placement, not its
# value.
SAME_VALUE = _PLACES | {"copy", "name", "optimization_barrier", "random_clone", "stop_gradient"}
# The same elements in the same order, with another shape (`jaxprs.keeps_order` checks the order).
RESHAPES = frozenset({"broadcast_in_dim", "expand_dims", RESHAPE, "squeeze"})

# --- calls of one body, once, on the equation's own operands ----------------------------------------------------

# They return what the body returns, and nothing else.
PLAIN_CALLS = frozenset({"checkpoint", "closed_call", "core_call", "jit", "pjit", "remat", "remat2"})
# Their gradients are defined by the user, not by their bodies.
CUSTOM_DERIVATIVES = frozenset({CUSTOM_JVP, "custom_vjp_call"})
CALLS = PLAIN_CALLS | CUSTOM_DERIVATIVES | {"composite", "compute_on", "custom_vmap_call", SHARD_MAP}

# --- arithmetic -------------------------------------------------------------------------------------------------

_ELEMENTWISE = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt
    integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow reduce_precision rem round
    rsqrt select_n sign sin sqrt square sub tan tanh xor
"""
# An element of the result is computed from the elements of the operands at the same place.
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
# The result is zero if one factor is.
PRODUCTS = frozenset({"mul", "dot_general"})
# The result is zero if both terms are.
SUMS = frozenset({"add", "add_any", "sub"})
# The result is zero if the operand is.
ZERO_OF_ZERO = frozenset({"broadcast_in_dim", CAST, "copy", "copy_p", "neg", RESHAPE, "squeeze", TRANSPOSE})
# The derivative is zero everywhere, except that of the sign of a complex number.
ZERO_DERIVATIVE = frozenset({"ceil", "floor", "round", SIGN, "stop_gradient"})

# --- devices, random numbers ------------------------------------------------------------------------------------

# These give all devices along their axes the same value.
COLLECTIVE_JOINS = frozenset({"psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"})
# These make or use a key.
DRAWS = frozenset({"random_bits", "random_seed", RANDOM_WRAP, "random_fold_in", "rng_bit_generator", "threefry2x32"})


def uses_keys(name: str) -> bool:
    """Returns whether a primitive takes keys: drawing from a key makes another key or numbers, not a new value."""
    return name.startswith("random_")
