"""`names.infer`: how much of the names of six families it finds, judged by their own; what it leaves to a reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from named_models import NAMES, Net, folder_of, theirs
from refusals import refused
from statewise._src.checkpoint.interop.named import model_arrays
from statewise._src.common.problems import Problems
from statewise._src.names import infer
from statewise._src.names.layout import Layout
from statewise.examples.names import bert, gemma, gpt2, llama, qwen3, vit

SMALL = {"num_hidden_layers": 3, "num_attention_heads": 4}
HEADS = {
    "num_key_value_heads": 2,
    "head_dim": 4,
}  # 4 heads of 4 are the width of 16: the matrices of q and o are square
FAMILIES: dict[str, tuple[ModuleType, Callable[..., nnx.Module], Any]] = {
    "llama": (llama, llama.Llama, llama.Config(50, 16, 24, **SMALL, **HEADS)),
    "llama with biases": (
        llama,
        llama.Llama,
        llama.Config(50, 16, 24, **SMALL, **HEADS, attention_bias=True, mlp_bias=True),
    ),
    "qwen3": (qwen3, qwen3.Qwen3, qwen3.Config(50, 16, 24, **SMALL, **HEADS)),
    "gemma": (gemma, gemma.Gemma, gemma.Config(50, 16, 24, **SMALL, num_key_value_heads=1, head_dim=6)),
    "gpt2": (gpt2, gpt2.GPT2, gpt2.Config(50, n_positions=20, n_embd=16, n_layer=3, n_head=4, n_inner=64)),
    # Every matrix is square, so that only names say which is which, and whether it is transposed.
    "gpt2, square": (gpt2, gpt2.GPT2, gpt2.Config(40, n_positions=12, n_embd=12, n_layer=12, n_head=2, n_inner=12)),
    "bert": (bert, bert.Bert, bert.Config(50, 16, 24, **SMALL)),
    "bert, square": (bert, bert.Bert, bert.Config(50, 16, 16, **SMALL, prefix="bert.", norm=("gamma", "beta"))),
    "vit": (vit, vit.ViT, vit.Config(16, 24, **SMALL, image_size=6, patch_size=2)),
}


def layouts(names: sw.Names, plan: sw.Plan) -> dict[tuple[Any, ...], dict[str, np.ndarray]]:
    """For each of our arrays, theirs: the numbers of each of its elements."""
    found: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}
    for array in model_arrays(plan.abstract()):
        ours = np.arange(np.prod(array.shape, dtype=int)).reshape(array.shape)
        for _, layout in names.layouts(array.leaf, array.within, array.shape, Problems()):
            assert isinstance(layout, Layout)
            found.setdefault(array.leaf.path, {}).update(layout.to_theirs(ours))
    return found


def read(code: object) -> sw.Names:
    """What a reader who changes nothing pastes."""
    pasted: dict[str, Any] = {"sw": sw}
    exec(str(code), pasted)
    return pasted["names"]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_most_rows_of_a_family_are_proposed_right(family: str, tmp_path: Path) -> None:
    module, model_class, config = FAMILIES[family]
    plan = sw.plan(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))
    names = module.names(config)
    wanted = layouts(names, plan)
    arrays = {name: array.astype(np.float32) for each in wanted.values() for name, array in each.items()}
    folder = folder_of(tmp_path / "theirs", arrays, 2)
    proposal = sw.Names.infer(plan, folder)
    found = layouts(read(proposal), plan)
    rows = {path: names.rows_of(sw.format_path(path))[0][0] for path in wanted}
    wrong = {row for path, row in rows.items() if not same(found.get(path, {}), wanted[path])}
    right = len({*rows.values()} - wrong)
    assert right >= 0.8 * len({*rows.values()}), f"{right} of {len({*rows.values()})}; wrong: {wrong}\n{proposal}"
    # What is proposed fits, at least; and if every row is right, the names are a reader's.
    report = read(proposal).check(plan, folder)
    assert not [leaf for leaf in report.problems if "no row" not in leaf.note]
    assert report.ok is not bool(proposal.undecided)


def test_rows_that_are_known_are_kept(tmp_path: Path) -> None:
    arrays = theirs()
    folder = folder_of(tmp_path / "theirs", arrays | {"rotary.inv_freq": np.ones(3, np.float32)})
    plan = sw.plan(Net())
    proposal = sw.Names.infer(plan, folder)
    assert proposal.undecided == ("count",)
    assert "# 'count': None,  # not one array there fits; None says that they do not have it" in proposal.code
    assert proposal.unused == ("rotary.inv_freq",)
    known = sw.Names({"count": None, "norm/bias": "model.norm.weight", "norm/scale": "model.norm.bias"})
    proposal = known.infer(plan, folder)
    assert proposal.undecided == ()
    names = read(proposal)
    assert {row: names[row] for row in known} == dict(known)
    assert names == sw.Names({row: name for row, name in NAMES.items() if row != "head/embedding"} | dict(known))


def test_a_tied_leaf_gets_each_of_its_names(tmp_path: Path) -> None:
    arrays = theirs()
    folder = folder_of(tmp_path / "theirs", arrays | {"lm_head.weight": arrays["model.embed.weight"]})
    names = read(sw.Names.infer(sw.plan(Net()), folder))
    assert names == sw.Names({row: name for row, name in NAMES.items() if row != "count"})


class Attention(nnx.Module):
    """Layers as Flax has them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attn = nnx.MultiHeadAttention(4, 16, 32, rngs=rngs, decode=False)
        self.qkv = nnx.LinearGeneral(16, (3, 4, 4), rngs=rngs)
        self.features = nnx.List([nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.Conv(8, 16, (3, 3), rngs=rngs)])
        self.bn = nnx.BatchNorm(8, rngs=rngs)


def test_convolutions_heads_statistics_and_matrices_that_are_joined(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"bn1.num_batches_tracked": (), "mha.out_proj.weight": (16, 32)}
    shapes |= {f"bn1.{name}": (8,) for name in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"mha.out_proj.bias": (16,), "features.0.weight": (8, 3, 3, 3), "features.0.bias": (8,)}
    shapes |= {"features.3.weight": (16, 8, 3, 3), "features.3.bias": (16,)}
    for part in ("query", "key", "value"):
        shapes |= {f"mha.{part}.weight": (32, 16), f"mha.{part}.bias": (32,)}
    for part in "qkv":
        shapes |= {f"fused.{part}_proj.weight": (16, 16), f"fused.{part}_proj.bias": (16,)}
    folder = folder_of(tmp_path / "theirs", {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    proposal = sw.Names.infer(sw.plan(Attention(nnx.Rngs(0))), folder)
    of_heads = {
        f"attn/{part}/{key}": sw.Name(f"mha.{part}.{other}", pattern)
        for part in ("query", "key", "value")
        for key, other, pattern in (("kernel", "weight", "(n h) d -> d n h"), ("bias", "bias", "(n h) -> n h"))
    }
    fused = [[f"fused.{part}_proj.{key}" for part in "qkv"] for key in ("weight", "bias")]
    assert read(proposal) == sw.Names(
        of_heads
        | {
            "attn/out/kernel": sw.Name("mha.out_proj.weight", "d (n h) -> n h d"),
            "attn/out/bias": "mha.out_proj.bias",
            "qkv/kernel": sw.Name(fused[0], "(c n h) d -> d c n h", join=0),
            "qkv/bias": sw.Name(fused[1], "(c n h) -> c n h", join=0),
            "features/0/kernel": sw.Name("features.0.weight", "o i h w -> h w i o"),
            "features/0/bias": "features.0.bias",
            "features/1/kernel": sw.Name("features.3.weight", "o i h w -> h w i o"),
            "features/1/bias": "features.3.bias",
            "bn/scale": "bn1.weight",
            "bn/bias": "bn1.bias",
            "bn/mean": "bn1.running_mean",
            "bn/var": "bn1.running_var",
        }
    )
    assert proposal.unused == ("bn1.num_batches_tracked",)
    assert "# several arrays that are joined; check their order:" in proposal.code


class Twins(nnx.Module):
    def __init__(self) -> None:
        self.first_thing = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
        self.other_thing = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
        self.merged = nnx.Param(jnp.zeros((6, 2)))


def test_what_the_names_do_not_say_is_left_to_a_reader(tmp_path: Path) -> None:
    arrays = {"abc.weight": np.ones((4, 4), np.float32), "xyz.weight": np.ones((4, 4), np.float32)}
    # A name that cannot be one in code, nor a comment that ends.
    arrays |= {"merged": np.ones((2, 3, 2), np.float32), "a\n}) # \"'{i}": np.ones(3, np.float32)}
    folder = folder_of(tmp_path / "theirs", arrays)
    proposal = sw.Names.infer(sw.plan(Twins()), folder)
    assert proposal.undecided == ("first_thing/kernel", "other_thing/kernel")
    assert proposal.decided == ("merged",)
    assert read(proposal) == sw.Names({"merged": sw.Name("merged", "a b c -> (a b) c", b=3)})
    assert (
        "# 'first_thing/kernel': ?  # their names do not say which: one of 'xyz.weight', 'abc.weight'" in proposal.code
        or "# 'first_thing/kernel': ?  # their names do not say which: one of 'abc.weight', 'xyz.weight'"
        in proposal.code
    )
    assert proposal.to_dict()["undecided"] == proposal.undecided
    assert str(proposal) == proposal.code


def test_arrays_of_a_shape_are_candidates_whatever_their_numbers(tmp_path: Path) -> None:
    model = nnx.Dict(block4_1=nnx.Conv(2, 3, (3, 3), use_bias=False, rngs=nnx.Rngs(0)), none=nnx.Param(jnp.ones(7)))
    arrays = {f"layer4.{i}.conv{i}.weight": np.ones((3, 2, 3, 3), np.float32) for i in range(2)}
    proposal = sw.Names.infer(sw.plan(model), folder_of(tmp_path / "theirs", arrays))
    listed = "'layer4.1.conv1.weight', 'layer4.0.conv0.weight'"  # the more similar first
    assert f"# 'block4_1/kernel': ?  # one of {listed}\n" in proposal.code
    assert "# 'none': None,  # not one array there fits; None says that they do not have it\n" in proposal.code
    assert proposal.undecided == ("block4_1/kernel", "none")


def test_arrays_without_elements(tmp_path: Path) -> None:
    model = nnx.Dict(same=nnx.Param(jnp.ones((0, 3))), other=nnx.Param(jnp.ones((0, 5))))
    arrays = {"same": np.ones((0, 3), np.float32), "other": np.ones((5, 0), np.float32)}
    proposal = sw.Names.infer(sw.plan(model), folder_of(tmp_path / "theirs", arrays))
    assert read(proposal) == sw.Names({"same": "same"})
    assert proposal.undecided == ("other",)


def test_a_square_matrix_is_as_the_other_kernels_of_the_files_are(tmp_path: Path) -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.up = nnx.Linear(4, 6, use_bias=False, rngs=nnx.Rngs(0))
            self.square = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))

    for turned in (False, True):
        arrays = {"up.weight": np.ones((6, 4) if turned else (4, 6), np.float32)}
        arrays["square.weight"] = np.ones((4, 4), np.float32)
        proposal = sw.Names.infer(sw.plan(Two()), folder_of(tmp_path / str(turned), arrays))
        pattern = "o i -> i o" if turned else None
        assert read(proposal)["square/kernel"] == sw.Name("square.weight", pattern)
        why = "transposed, as torch's Linear has it" if turned else "as it is, like the other kernels there"
        assert f"# its shape fits both ways; {why}:\n" in proposal.code


def test_nothing_but_a_plan_gets_a_proposal(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", theirs())
    with refused(
        sw.StructureError,
        "Names are proposed for a plan, not Net.",
        hint="sw.Names.infer(sw.plan(model), path)",
    ):
        sw.Names.infer(Net(), folder)  # type: ignore[arg-type]


def test_modules_of_equal_names_are_pairs_and_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(*_: object) -> float:
        raise AssertionError("a module was scored")

    monkeypatch.setattr(infer.Similarity, "of", scored)
    paths = [(f"part{number}x", key) for number in range(200) for key in ("kernel", "bias")]
    shapes = {"kernel": (4, 4), "bias": (4,)}
    ours = [(path, shapes[path[1]]) for path in paths]
    rows, unused = infer.propose(ours, [(".".join(path), shape) for path, shape in reversed(ours)])
    assert unused == []
    assert {row.row for row in rows} == {"/".join(path) for path in paths}
    assert all(row.name is not None and row.name.names == (row.row.replace("/", "."),) for row in rows)


def test_a_module_of_the_same_name_with_another_shape_is_not_its_pair() -> None:
    ours = [(("head", "kernel"), (4, 6)), (("body", "kernel"), (4, 8))]
    rows, unused = infer.propose(ours, [("head.weight", (5, 5)), ("body.weight", (8, 4)), ("top.weight", (6, 4))])
    named = {row.row: row.name and row.name.names for row in rows}
    assert named == {"head/kernel": ("top.weight",), "body/kernel": ("body.weight",)}
    assert unused == ["head.weight"]
