"""The language models of `statewise.examples.names` without torch: folders made by hand, there and back.

That they compute what transformers computes is tested in tests/names/torch.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import statewise as sw
from named_models import folder_of
from statewise.examples.names import gemma, llama, qwen3

# `config.json` as transformers writes it, shortened: two layers, the width 8, inner 12, 4 heads of which 2 are shared.
COMMON = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "float32",
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "quantization_config": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    "qwen3": {"model_type": "qwen3", "hidden_act": "silu", "head_dim": 6, "use_sliding_window": False},
    "gemma": {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "head_dim": 6},
}
FAMILIES: dict[str, tuple[ModuleType, Any]] = {
    "llama": (llama, llama.Llama),
    "qwen3": (qwen3, qwen3.Qwen3),
    "gemma": (gemma, gemma.Gemma),
}


def config_file(place: Path, family: str, **changed: Any) -> Path:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(COMMON | CONFIGS[family] | changed))
    return place


def shapes_of(family: str, biases: bool = False) -> dict[str, tuple[int, ...]]:
    """The arrays of a published folder, written down here from transformers' classes."""
    head = 2 if family == "llama" else 6
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,)}
    if family != "gemma":
        shapes["lm_head.weight"] = (20, 8)
    for layer in ("model.layers.0", "model.layers.1"):
        attention = {"q": (4 * head, 8), "k": (2 * head, 8), "v": (2 * head, 8), "o": (8, 4 * head)}
        mlp = {"gate": (12, 8), "up": (12, 8), "down": (8, 12)}
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": shape for part, shape in attention.items()}
        shapes |= {f"{layer}.mlp.{part}_proj.weight": shape for part, shape in mlp.items()}
        shapes |= {f"{layer}.{norm}_layernorm.weight": (8,) for norm in ("input", "post_attention")}
        if family == "qwen3":
            shapes |= {f"{layer}.self_attn.{part}_norm.weight": (6,) for part in "qk"}
        if biases:
            shapes |= {f"{layer}.self_attn.{part}_proj.bias": shape[:1] for part, shape in attention.items()}
        if biases and family == "llama":
            shapes |= {f"{layer}.mlp.{part}_proj.bias": shape[:1] for part, shape in mlp.items()}
    return shapes


def arrays_of(family: str, biases: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes_of(family, biases).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_docstring_reads_a_folder_and_gives_it_back(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = FAMILIES[family]
    arrays = arrays_of(family)
    folder = config_file(folder_of(tmp_path / "theirs", arrays, files=3), family)
    monkeypatch.chdir(tmp_path)
    assert module.__doc__
    code = "\n".join(line for line in module.__doc__.splitlines() if line.startswith("    "))
    used = {**vars(module), "folder": str(folder), "tokens": jnp.arange(10).reshape(2, 5)}
    exec(textwrap.dedent(code), used)
    assert used["logits"].shape == (2, 5, 20)
    assert np.isfinite(used["logits"]).all()
    assert used["report"].counts == {"params": {"restored": len(used["plan"].leaves)}}
    back = safetensors.numpy.load_file("back/model.safetensors")
    assert sorted(back) == sorted(arrays)
    assert all(back[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert Path("back/config.json").read_bytes() == (folder / "config.json").read_bytes()
    # Causal: a token changes nothing before it.
    changed = used["forward"](used["state"], used["tokens"].at[:, 3].add(1))
    np.testing.assert_allclose(changed[:, :3], used["logits"][:, :3], atol=1e-5)
    assert not np.allclose(changed[:, 3], used["logits"][:, 3], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_has_a_row_and_every_row_a_leaf(family: str, tmp_path: Path) -> None:
    module, model_class = FAMILIES[family]
    folder = folder_of(tmp_path / "theirs", arrays_of(family, biases=True))
    config = module.Config.read(config_file(folder, family, attention_bias=True, mlp_bias=True))
    names = module.names(config)
    plan = sw.plan(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))
    report = names.check(plan, folder)
    assert report.ok, report
    assert report.counts == {"params": {"restored": len(plan.leaves)}}
    matched = {row for leaf in plan.leaves for row, _ in names.rows_of("/".join(map(str, leaf.path)))}
    assert matched == set(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_model_has_no_head(family: str, tmp_path: Path) -> None:
    module, model_class = FAMILIES[family]
    arrays = {name: array for name, array in arrays_of(family).items() if name != "lm_head.weight"}
    folder = config_file(folder_of(tmp_path / "theirs", arrays), family, tie_word_embeddings=True)
    config = module.Config.read(folder)
    plan = sw.plan(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))
    assert module.names(config).check(plan, folder).ok
    # Some published files repeat the embedding: the report says that it is not read.
    repeated = folder_of(tmp_path / "repeated", arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"].copy()})
    report = module.names(config).check(plan, repeated)
    assert report.ok
    assert [str(leaf.leaf.path[0]) for leaf in report.leaves if leaf.outcome == "dropped"] == ["lm_head.weight"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mapping_is_short(family: str) -> None:
    module, _ = FAMILIES[family]
    (rows,) = (node for node in ast.walk(ast.parse(inspect.getsource(module.names))) if isinstance(node, ast.Dict))
    assert rows.end_lineno is not None
    assert len(rows.keys) == rows.end_lineno - rows.lineno - 1, "each row is a line"
    assert len(inspect.getsource(module.names).splitlines()) <= 30


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("llama", {"model_type": "mistral"}, "model_type='mistral', and this model has 'llama'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', and this model has 'silu'"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic', and this model has 'default' or 'llama3'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5, and this model has 1.0",
        ),
        ("qwen3", {"model_type": "qwen2"}, "model_type='qwen2', and this model has 'qwen3'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True, and this model has False"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            "rope_type='yarn', and this model has 'default'",
        ),
        ("gemma", {"model_type": "gemma2"}, "model_type='gemma2', and this model has 'gemma'"),
        (
            "gemma",
            {"hidden_activation": "gelu"},
            "hidden_activation='gelu', and this model has 'gelu_pytorch_tanh'",
        ),
        (
            "gemma",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True, and this model has False",
        ),
    ],
)
def test_configurations_of_other_models_are_refused(
    family: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module, _ = FAMILIES[family]
    folder = config_file(tmp_path, family, **changed)
    with pytest.raises(ValueError, match=re.escape(f"{folder}/config.json has {message}.")):
        module.Config.read(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_without_sizes_is_refused(family: str, tmp_path: Path) -> None:
    module, _ = FAMILIES[family]
    config_file(tmp_path, family, vocab_size=None, hidden_act=CONFIGS[family]["hidden_act"])
    with pytest.raises(TypeError, match="'vocab_size'"):
        module.Config.read(tmp_path)


def test_sizes_that_a_configuration_leaves_out(tmp_path: Path) -> None:
    """What the classes of transformers take for them."""
    sizes = {"num_key_value_heads": None, "head_dim": None}
    read = {family: FAMILIES[family][0].Config.read(config_file(tmp_path, family, **sizes)) for family in FAMILIES}
    assert {family: config.num_key_value_heads for family, config in read.items()} == dict.fromkeys(FAMILIES, 4)
    assert {family: config.head_dim for family, config in read.items()} == {"llama": 2, "qwen3": 128, "gemma": 256}
    assert {family: config.rope_theta for family, config in read.items()} == {
        "llama": 500000.0,
        "qwen3": 10000.0,
        "gemma": 10000.0,
    }
    assert [config.tie_word_embeddings for config in read.values()] == [False, False, True]


def test_positions_of_llama_3(tmp_path: Path) -> None:
    """Old and new files say the same; the lengths of waves are as published: kept, blended, and divided by 8."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 64}
    old = config_file(tmp_path / "old", "llama", head_dim=8, rope_scaling={"rope_type": "llama3", **scaling})
    positions = {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}
    new = config_file(tmp_path / "new", "llama", head_dim=8, rope_theta=None, rope_parameters=positions)
    config = llama.Config.read(old)
    assert config == llama.Config.read(new)
    assert config.rope_scaling == (8.0, 1.0, 4.0, 64)
    # Only the first half of a head is 1: after the rotation it is the cosine, and the second half the sine.
    x = jnp.zeros((1, 3, 1, 8)).at[..., :4].set(1)
    rotated = np.asarray(llama.rotate(x, config))[0, :, 0]
    plain = 500000.0 ** -(np.arange(4) / 4)
    wave = 2 * np.pi / plain
    blend = (64 / wave - 1) / (4 - 1)
    expected = np.select([wave < 64 / 4, wave > 64 / 1], [plain, plain / 8], (1 - blend) * plain / 8 + blend * plain)
    assert wave[0] < 16 < wave[1]
    np.testing.assert_allclose(rotated[2], [*np.cos(2 * expected), *np.sin(2 * expected)], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_decides_the_dtype(family: str, tmp_path: Path) -> None:
    module, model_class = FAMILIES[family]
    config = module.Config.read(config_file(tmp_path, family))
    plan = sw.plan(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))
    forward = sw.step(lambda model, tokens: model(tokens))
    half = plan.abstract().cast(params="bfloat16")
    assert jax.eval_shape(forward, half, jnp.zeros((1, 3), int)).dtype == jnp.bfloat16


def test_the_page_has_what_check_says() -> None:
    """Every text in the table of docs/howto/load-llama.md is what `check` says when it refuses that."""
    page = (Path(__file__).parents[2] / "docs" / "howto" / "load-llama.md").read_text(encoding="utf-8")
    table = page.split("## What do I do when `check` refuses?")[1].split("##")[0]
    texts = [
        text.replace("24, 16", "12, 8").replace("16, 24", "8, 12")
        for text in re.findall(r"^\| `(.*?)` \|", table, re.M)
    ]
    assert len(texts) == 7
    said = list(_refusals())
    assert len(said) == len(texts)
    for text, notes in zip(texts, said, strict=True):
        pattern = ".*".join(map(re.escape, text.split("...")))
        assert any(re.fullmatch(f"{pattern}.*", note) for note in notes), (text, notes)


def _refusals() -> Iterator[list[str]]:
    """Yields what is said of a folder and names that do not fit, in the order of the table."""
    arrays = {name: array for name, array in arrays_of("llama").items() if "layers.1" not in name}
    config = llama.Config(20, 8, 12, 1, num_attention_heads=4, num_key_value_heads=2, head_dim=2)
    plan = sw.plan(nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0))))
    rows = dict(llama.names(config))
    up = "model.layers.{i}.mlp.up_proj.weight"
    changed: list[tuple[dict[str, Any], dict[str, np.ndarray]]] = [
        ({"norm/scale": ...}, {}),
        ({"norm/scale": "model.norm.weights"}, {}),
        ({"layers/{i}/up/kernel": up}, {}),
        ({}, {"model.layers.1.mlp.up_proj.weight": arrays["model.layers.0.mlp.up_proj.weight"]}),
        ({"layers/0/up/kernel": "model.layers.0.mlp.up_proj.weight"}, {}),
        ({"layers/{i}/gate/kernel": rows["layers/{i}/up/kernel"]}, {}),
        ({"norm/scale": sw.Name("model.norm.weight", "n h -> (n h)", h=3)}, {}),
    ]
    for names, more in changed:
        given = {path: name for path, name in (rows | names).items() if name is not ...}
        with tempfile.TemporaryDirectory() as place:
            safetensors.numpy.save_file(arrays | more, f"{place}/model.safetensors")
            report = sw.Names(given).check(plan, place)
        assert not report.ok
        yield [problem.note for problem in report.problems]
