"""GPT-2, BERT and ViT of `statewise.examples.names`, without torch: folders written by hand, read, and given back.

That the models compute what those of transformers do is in tests/names/torch.
"""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import statewise as sw
from family_folders import FOLDERS, GPT2_CONFIG, VIT_CONFIG, gpt2_shapes, vit_shapes, written
from statewise.examples.names import bert, gpt2, vit


def read(family: Any, model_class: Any, folder: Path) -> tuple[sw.Names, sw.State]:
    """Does what the docstrings of the families show."""
    config = family.Config.read(folder)
    names, plan = family.names(config), sw.plan(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))
    report = names.check(plan, folder)
    assert report.ok, report
    assert report.counts == {"params": {"restored": len(plan.leaves)}}, "and nothing in the files is dropped"
    return names, sw.restore(folder, plan.abstract(), names=names)[0]


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_there_and_back(tmp_path: Path, case: str) -> None:
    family, model_class, config, shapes = FOLDERS[case]
    arrays = written(tmp_path / "theirs", config, shapes)
    names, state = read(family, model_class, tmp_path / "theirs")
    sw.convert(state, tmp_path / "back", names=names, extra_files=[tmp_path / "theirs" / "config.json"])
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert sorted(back) == sorted(arrays)
    assert all(back[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert family.Config.read(tmp_path / "back") == family.Config.read(tmp_path / "theirs")


def test_layers_of_gpt2_are_stacked_by_number_and_split_into_heads(tmp_path: Path) -> None:
    arrays = written(tmp_path / "theirs", GPT2_CONFIG, gpt2_shapes(""))
    _, state = read(gpt2, gpt2.GPT2, tmp_path / "theirs")
    layers = state["params"]["layers"]
    weights = [arrays[f"h.{number}.attn.c_attn.weight"] for number in range(11)]
    for part in range(3):  # q, k and v: 8 columns each, 4 of each head
        expected = [weight[:, 8 * part : 8 * part + 8].reshape(8, 2, 4) for weight in weights]
        assert np.array_equal(layers["qkv"]["kernel"][...][:, :, part], np.stack(expected))
    ups = np.stack([arrays[f"h.{number}.mlp.c_fc.weight"] for number in range(11)])
    assert np.array_equal(layers["up"]["kernel"][...], ups)


def test_kernels_of_patches_have_their_channels_last(tmp_path: Path) -> None:
    arrays = written(tmp_path / "theirs", VIT_CONFIG, vit_shapes("", True, 0))
    _, state = read(vit, vit.ViT, tmp_path / "theirs")
    weight = arrays["embeddings.patch_embeddings.projection.weight"]
    assert np.array_equal(state["params"]["patches"]["kernel"][...], weight.transpose(2, 3, 1, 0))


@pytest.mark.parametrize("family", [gpt2, bert, vit], ids=lambda family: family.__name__.rpartition(".")[2])
def test_a_mapping_has_at_most_30_lines(family: Any) -> None:
    (function,) = ast.parse(inspect.getsource(family.names)).body
    lines = [node.end_lineno - node.lineno + 1 for node in ast.walk(function) if isinstance(node, ast.Dict)]
    assert 10 < sum(lines) <= 30
    assert len(inspect.getsource(family).splitlines()) < 200


@pytest.mark.parametrize(
    ("case", "given", "message"),
    [
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings=False, and this model has True."),
        ("gpt2", {"model_type": "gptj"}, "model_type='gptj', and this model has 'gpt2'."),
        ("bert", {"hidden_act": "silu"}, "hidden_act='silu', and this model has 'gelu' or 'gelu_new' or 'relu'."),
        ("vit", {"image_size": [6, 4]}, "image_size=[6, 4], and this model has one number: squares."),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, case: str, given: dict[str, Any], message: str
) -> None:
    family, _, config, _ = FOLDERS[case]
    (tmp_path / "config.json").write_text(json.dumps(config | given))
    with pytest.raises(ValueError, match="and this model has") as caught:
        family.Config.read(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'} has {message}"


def test_what_the_files_lack_is_said(tmp_path: Path) -> None:
    _, model_class, given, shapes = FOLDERS["bert, prefix, no pooler"]
    written(tmp_path / "theirs", given, shapes)
    config = bert.Config.read(tmp_path / "theirs")
    model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    with pytest.raises(AssertionError, match="the files have no pooler"):
        model.pool(jnp.zeros((1, 3, 8)))
