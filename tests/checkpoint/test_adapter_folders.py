"""Folders of a LoRA adapter, in and out, beside safetensors and NumPy; by peft: `names/torch/test_peft.py`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import statewise as sw
from refusals import refused

R, ALPHA = 2, 4  # the scale is 2
NAMES = sw.Names(
    {
        "layers/{i}/lora/lora_a": sw.Name("base_model.model.layers.{i}.proj.lora_A.weight", "r i -> i r"),
        "layers/{i}/lora/lora_b": sw.Name("base_model.model.layers.{i}.proj.lora_B.weight", "o r -> r o"),
    }
)


def net(dtype: Any = jnp.float32) -> nnx.Module:
    options: dict[str, Any] = {"lora_rank": R, "lora_param_dtype": dtype, "b_initializer": nnx.initializers.normal(1.0)}
    rngs = nnx.Rngs(0)
    return nnx.Dict(layers=nnx.List([nnx.LoRALinear(3, 4, rngs=rngs, **options) for _ in range(2)]))


def matrices(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (R, 3), "lora_B": (4, R)}
    return {
        f"base_model.model.layers.{layer}.proj.{name}.weight": rng.normal(size=shape).astype(dtype)
        for layer in range(2)
        for name, shape in shapes.items()
    }


def config(**options: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["proj"], **options}


def folder_of(place: Path, arrays: dict[str, np.ndarray], options: dict[str, Any] | None) -> Path:
    place.mkdir()
    safetensors.numpy.save_file(arrays, place / "adapter_model.safetensors", {"format": "pt"})
    if options is not None:
        (place / "adapter_config.json").write_text(json.dumps(options))
    return place


def restored(place: Any, model: nnx.Module | None = None, **options: Any) -> sw.State:
    model = net() if model is None else model
    state, report = sw.restore(place, sw.plan(model).take(model), names=NAMES, only="lora", **options)
    assert report.ok
    return state


def read(state: sw.State, layer: int) -> tuple[np.ndarray, np.ndarray]:
    lora = state["lora"]["layers"][layer]["lora"]
    return np.asarray(lora["lora_a"][...]), np.asarray(lora["lora_b"][...])


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (ALPHA / math.sqrt(R),) * 2),
        ({"alpha_pattern": {"layers.1.proj": 16}}, (2.0, 8.0)),
        ({"alpha_pattern": {r"layers\.0\..*": 1}}, (0.5, 2.0)),
        ({"r": 8, "rank_pattern": {"proj": R}}, (2.0, 2.0)),
    ],
)
def test_read_with_the_scale_in_b(tmp_path: Path, options: dict[str, Any], scales: tuple[float, float]) -> None:
    arrays = matrices()
    place = folder_of(tmp_path / "adapter", arrays, config(**options))
    for path in (place, place / "adapter_model.safetensors"):
        state = restored(path)
        for layer, scale in enumerate(scales):
            a, b = read(state, layer)
            name = f"base_model.model.layers.{layer}.proj"
            assert np.array_equal(a, arrays[f"{name}.lora_A.weight"].T)
            expected = (arrays[f"{name}.lora_B.weight"].astype(np.float64) * scale).astype(np.float32).T
            assert np.array_equal(b, expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_to_the_bit_by_a_power_of_two(tmp_path: Path, dtype: Any) -> None:
    arrays = matrices(dtype)
    place = folder_of(tmp_path / "adapter", arrays, config(lora_alpha=0.25))
    state = restored(place, net(dtype))
    extra = place / "adapter_config.json"
    conversion = sw.convert(state, tmp_path / "back", names=NAMES, extra_files=[extra])
    assert conversion.ok
    assert len(conversion.matched) == 4
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (tmp_path / "back" / "adapter_config.json").read_bytes() == extra.read_bytes()
    found = safetensors.numpy.load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert found.keys() == arrays.keys()
    assert all(found[name].tobytes() == arrays[name].tobytes() for name in arrays)


def test_by_another_scale_b_is_rounded_once(tmp_path: Path) -> None:
    arrays = matrices()
    place = folder_of(tmp_path / "adapter", arrays, config(use_rslora=True))
    sw.convert(restored(place), tmp_path / "back", names=NAMES, extra_files=[place / "adapter_config.json"])
    found = safetensors.numpy.load_file(tmp_path / "back" / "adapter_model.safetensors")
    for name, array in arrays.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-7 if "lora_B" in name else 0)


def test_the_base_keeps_its_values_and_needs_no_row(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "adapter", matrices(), config())
    model = net()
    state = restored(place, model)
    assert np.array_equal(state["params"]["layers"][0]["kernel"][...], model.layers[0].kernel[...])  # type: ignore[attr-defined]
    rows = NAMES | sw.Names({"layers/{i}/kernel": sw.Name("layers.{i}.proj.weight", "o i -> i o")})
    sw.convert(state, tmp_path / "back", names=rows, extra_files=[place / "adapter_config.json"])
    assert len(safetensors.numpy.load_file(tmp_path / "back" / "adapter_model.safetensors")) == 4


def test_by_every_way_of_reading_by_names(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "adapter", matrices(), config())
    expected = read(restored(place), 1)
    several = restored([place / "adapter_model.safetensors"])
    assert all(map(np.array_equal, read(several, 1), expected))
    model = nnx.Dict(layers=nnx.List([nnx.Dict(lora=each.lora) for each in net().layers]))  # type: ignore[attr-defined]
    state = sw.plan(model).take(model)
    sw.convert(place, tmp_path / "ours", target=state, names=NAMES)
    assert all(map(np.array_equal, read(sw.restore(tmp_path / "ours", state)[0], 1), expected))


def test_previewed(tmp_path: Path) -> None:
    model = net()
    place = folder_of(tmp_path / "adapter", matrices(), config())
    report = sw.preview(place, sw.plan(model).take(model), names=NAMES, only="lora")
    assert report.ok
    assert [leaf.outcome for leaf in report.leaves].count("restored") == 4


def test_checked_without_reading(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "adapter", matrices(), config(r=3))
    with pytest.raises(sw.RestoreError, match="is of rank 2, and"):
        NAMES.check(sw.plan(net()), place)


FACTS: list[tuple[dict[str, Any] | None, str, str]] = [
    (None, "has no adapter_config.json beside it, which gives the scale of the adapter.", "fetch adapter_config.json"),
    (config(peft_type="LOHA"), "is of the adapter type 'LOHA', and not 'LORA'.", "a LoRA adapter"),
    (config(use_dora=True), "has use_dora=True: its layers compute something other than nnx.LoRA.", "merge_and_unload"),
    (config(init_lora_weights="pissa"), "has init_lora_weights='pissa': its layers compute", "merge_and_unload"),
    (config(lora_alpha="4"), "has lora_alpha='4', which is not a positive number.", '"lora_alpha": 8'),
    (config(r=4), "is of rank 2, and", '"r": 2, or "rank_pattern": {"layers.0.proj": 2}'),
]


@pytest.mark.parametrize(("options", "fact", "hint"), FACTS)
def test_configurations_that_are_refused(tmp_path: Path, options: dict[str, Any] | None, fact: str, hint: str) -> None:
    place = folder_of(tmp_path / "adapter", matrices(), options)
    with pytest.raises(sw.RestoreError) as caught:
        restored(place)
    assert fact in caught.value.message
    assert hint.replace('"lora_alpha": 8', '"lora_alpha": 8') in str(caught.value.hint)
    if options is not None:
        state = sw.plan(net()).take(net())
        with pytest.raises(sw.SaveError) as refused_too:
            sw.convert(state, tmp_path / "out", names=NAMES, extra_files=[place / "adapter_config.json"])
        assert fact in refused_too.value.message
        assert not (tmp_path / "out").exists()


def test_a_configuration_that_is_not_json(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "adapter", matrices(), None)
    (place / "adapter_config.json").write_text("{")
    message = f"{place / 'adapter_config.json'} cannot be read as JSON."
    with refused(sw.RestoreError, message, hint="the adapter_config.json that peft wrote"):
        restored(place)


def test_a_scale_that_the_dtype_cannot_represent(tmp_path: Path) -> None:
    arrays = {name: np.full_like(array, 6e4) for name, array in matrices(np.float16).items()}
    place = folder_of(tmp_path / "adapter", arrays, config())
    with pytest.raises(sw.RestoreError, match=r"that float16 cannot represent with the scale 2\."):
        restored(place, net(np.float16))


def written(tmp_path: Path, names: sw.Names, options: dict[str, Any], **more: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    model = net()
    sw.convert(
        sw.plan(model).take(model),
        tmp_path / "out",
        names=names,
        extra_files=[tmp_path / "adapter_config.json"],
        **more,
    )


def test_what_peft_would_not_read_is_not_written(tmp_path: Path) -> None:
    place = tmp_path / "adapter_config.json"
    with refused(
        sw.SaveError,
        f"peft would not read base_model.model.layers.0.proj.lora_A.weight and 3 more: the target_modules of {place} "
        "are ['q_proj'].",
        hint="the names of the modules with adapters as target_modules",
    ):
        written(tmp_path, NAMES, config(target_modules=["q_proj"]))
    with pytest.raises(sw.SaveError, match=r"the target_modules of .* are '\.\*q_proj'"):
        written(tmp_path, NAMES, config(target_modules=".*q_proj"))
    with pytest.raises(sw.SaveError, match="The file of an adapter is one file, and max_shard_bytes is of several"):
        written(tmp_path, NAMES, config(), max_shard_bytes=100)
    with pytest.raises(sw.SaveError, match="No array is called as"):
        written(tmp_path, sw.Names({"layers/{i}/lora/{ab}": None}), config())
    with pytest.raises(sw.RestoreError, match="which is not the name of a matrix in the file of an adapter"):
        written(tmp_path, sw.Names({"layers/{i}/lora/{ab}": "{i}.{ab}"}), config())
    with pytest.raises(sw.RestoreError, match="has no row in the names"):
        written(tmp_path, sw.Names({"layers/{i}/lora/lora_a": NAMES["layers/{i}/lora/lora_a"]}), config())
    assert not (tmp_path / "out").exists()
    written(tmp_path, NAMES, config(target_modules="all-linear"))


@pytest.mark.parametrize(
    ("options", "is_of_writing"),
    [
        ({"alpha_pattern": {"layers.[": 3}}, False),
        ({"rank_pattern": ["proj"]}, False),
        ({"target_modules": "("}, True),
        ({"target_modules": 3}, True),
        ({"exclude_modules": [3]}, True),
        ({"layers_to_transform": "0", "target_modules": ["proj"]}, True),
        ({"layers_to_transform": 0, "target_modules": ["proj"], "layers_pattern": "("}, True),
    ],
)
def test_options_that_peft_does_not_read(tmp_path: Path, options: dict[str, Any], is_of_writing: bool) -> None:
    option = "layers_pattern" if "layers_pattern" in options else next(iter(options))
    place = folder_of(tmp_path / "adapter", matrices(), config(**options))
    fact = f" has {option}={options[option]!r}, which peft does not read."
    hint = f"the {option} that peft wrote"
    if not is_of_writing:
        with refused(sw.RestoreError, f"{place / 'adapter_config.json'}{fact}", hint=hint):
            restored(place)
    with refused(sw.SaveError, f"{tmp_path / 'adapter_config.json'}{fact}", hint=hint):
        written(tmp_path, NAMES, config(**options))


@pytest.mark.parametrize(
    ("options", "is_written"),
    [
        ({"exclude_modules": ["layers.1.proj"]}, False),
        ({"exclude_modules": r".*\.1\..*"}, False),
        ({"exclude_modules": ["other"]}, True),
        ({"target_modules": ["proj"], "layers_to_transform": [0]}, False),
        ({"target_modules": ["proj"], "layers_to_transform": [0, 1]}, False),  # in `model.layers.0`, not in `layers.0`
        ({"target_modules": ["proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}, True),
        ({"target_modules": ["proj"], "layers_to_transform": 0, "layers_pattern": ["layers"]}, False),
        ({"target_modules": ["proj"], "layers_to_transform": [0, 1], "layers_pattern": "blocks"}, False),
        ({"target_modules": ["layers.0.proj", "layers.1.proj"], "layers_to_transform": [0]}, True),
        ({"modules_to_save": ["layers"]}, False),
        ({"target_modules": "ALL-linear"}, True),
    ],
)
def test_modules_without_an_adapter_by_other_options(tmp_path: Path, options: dict[str, Any], is_written: bool) -> None:
    if is_written:
        written(tmp_path, NAMES, config(**options))
    else:
        with pytest.raises(sw.SaveError, match="peft would not read base_model"):
            written(tmp_path, NAMES, config(**options))
    assert (tmp_path / "out").exists() == is_written


def test_matrices_under_the_name_of_an_adapter(tmp_path: Path) -> None:
    # As a state_dict has them; peft's own files are without it.
    named = {name.replace(".weight", ".default.weight"): array for name, array in matrices().items()}
    names = sw.Names.from_dict(json.loads(json.dumps(NAMES.to_dict()).replace(".weight", ".default.weight")))
    place = folder_of(tmp_path / "adapter", named, config())
    state, _ = sw.restore(place, sw.plan(net()).take(net()), names=names, only="lora")
    _, b = read(state, 0)
    assert np.array_equal(b, 2 * named["base_model.model.layers.0.proj.lora_B.default.weight"].T)
    with pytest.raises(sw.SaveError, match=r"peft would not read base_model\.model\.layers\.0\.proj\.lora_A\.default"):
        written(tmp_path, names, config())


def test_matrices_in_a_file_of_another_name(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "adapter", matrices(), config())
    file = (place / "adapter_model.safetensors").rename(place / "model.safetensors")
    for path in (place, file, [file]):
        with refused(
            sw.RestoreError,
            f"{place / 'adapter_config.json'} is beside the matrices of an adapter that are not in "
            "adapter_model.safetensors: it is not known whether they have its scale.",
            hint="call the file adapter_model.safetensors if peft wrote it; or read it from a folder without "
            "adapter_config.json",
        ):
            restored(path)
    (place / "adapter_config.json").unlink()  # the hint: as sw.convert writes a state without a configuration
    assert np.array_equal(read(restored(place), 0)[1], matrices()["base_model.model.layers.0.proj.lora_B.weight"].T)


def test_the_file_of_an_adapter_is_not_written_alone(tmp_path: Path) -> None:
    with refused(
        sw.SaveError,
        "adapter_model.safetensors is of an adapter, and its adapter_config.json gives the scale of its matrices.",
        hint="sw.convert(state, 'folder', names=names, extra_files=['adapter_config.json'])",
    ):
        sw.convert(sw.plan(net()).take(net()), tmp_path / "adapter_model.safetensors", names=NAMES)
