"""Any model of `statewise.examples.names` beside its class of `transformers`: the same folder, the same outputs.

Imported by tests of tests/names/torch alone: it needs torch and transformers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx

import statewise as sw
from beside_torch import arrays_in, check_equal_to_the_bit

Outputs = Mapping[str, Any]


def random_model(model_class: Any, config: Any, seed: int = 0) -> Any:
    """A model of transformers with every weight random, those of norms and biases too."""
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape)
            weight.copy_(weight + 0.3 * noise if weight.ndim == 1 else noise / weight.shape[-1] ** 0.5)
    return model


def check_refused(family: ModuleType, config: Any, given: Mapping[str, Any], folder: Path) -> None:
    """Asserts that a configuration with one field that the model does not follow is refused, by file and field."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    ((field, value),) = given.items()
    with pytest.raises(ValueError, match="and this model has") as caught:
        family.Config.read(folder)
    assert f"{file} has {field}={value!r}, and this model has " in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One of our models and one of theirs.

    Attributes:
      family: the file of ours.
      model_class: the class in it.
      theirs: the model of transformers.
      their_outputs: what theirs computes, by name.
      our_outputs: the same, computed by a model of ours.
      dropped: names that their files have and our model has not.
    """

    family: ModuleType
    model_class: Any
    theirs: Any
    their_outputs: Callable[[Any], Outputs]
    our_outputs: Callable[[Any], Outputs]
    dropped: tuple[str, ...] = ()

    def names_and_plan(self, folder: Path) -> tuple[sw.Names, sw.Plan]:
        """The names and the plan of our model, for a folder."""
        config = self.family.Config.read(folder)
        model = nnx.eval_shape(lambda: self.model_class(config, rngs=nnx.Rngs(0)))
        return self.family.names(config), sw.plan(model)

    def expected(self, model: Any | None = None) -> dict[str, np.ndarray]:
        """What transformers computes."""
        with torch.no_grad():
            outputs = self.their_outputs(self.theirs if model is None else model)
        return {name: array.float().numpy() for name, array in outputs.items()}

    def load(self, folder: Path, **options: Any) -> Any:
        """What transformers reads in a folder, complete."""
        model, info = type(self.theirs).from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True, **options
        )
        missing = {name for name in info["missing_keys"] if name not in self.dropped}
        assert not missing, info
        assert not info["unexpected_keys"], info
        assert not info["mismatched_keys"], info
        return model.eval()

    def found(self, state: sw.State) -> dict[str, np.ndarray]:
        """What our model computes."""
        outputs = sw.step(self.our_outputs)(state)
        return {name: np.asarray(array, np.float32) for name, array in outputs.items()}

    def check_there_and_back(self, place: Path, their_shards: str = "5GB", our_shards: int = 5 * 2**30) -> None:
        """One folder: checked, read, compared, written, and loaded again by transformers."""
        folder, back = place / "theirs", place / "back"
        self.theirs.save_pretrained(folder, max_shard_size=their_shards)
        names, plan = self.names_and_plan(folder)
        report = names.check(plan, folder)
        assert report.ok, report
        dropped = {"dropped": len(self.dropped)} if self.dropped else {}
        counts = {outcome: count for kind in report.counts.values() for outcome, count in kind.items()}
        assert counts == {"restored": len(plan.leaves)} | dropped
        assert sw.preview(folder, plan.abstract(), names=names).ok
        state, _ = sw.restore(folder, plan.abstract(), names=names)
        expected = self.expected()
        self.compare(self.found(state), expected)
        assert sw.convert(state, back, names=names, max_shard_bytes=our_shards, extra_files=[folder / "config.json"]).ok
        self.check_equal_to_the_bit(back, folder)
        if not self.dropped:
            again = self.expected(self.load(back))
            assert all(np.array_equal(again[name], array) for name, array in expected.items())

    def check_bfloat16(self, place: Path) -> None:
        """Files in bfloat16: read into float32; and kept, and given back to the bit."""
        folder, back = place / "theirs", place / "back"
        self.theirs.to(torch.bfloat16).save_pretrained(folder)
        names, plan = self.names_and_plan(folder)
        assert not sw.preview(folder, plan.abstract(), names=names).ok
        wide, _ = sw.restore(folder, plan.abstract(), names=names, cast=True)
        expected = self.expected(self.load(folder, dtype=torch.float32))
        self.compare(self.found(wide), expected)
        half, _ = sw.restore(folder, plan.abstract().cast(params="bfloat16"), names=names)
        assert {str(leaf.dtype) for leaf in half.plan.leaves} == {"bfloat16"}
        for name, array in self.found(half).items():  # the model computes in it
            assert 1e-4 < np.linalg.norm(array - expected[name]) / np.linalg.norm(expected[name]) < 0.1, name
        sw.convert(half, back, names=names, extra_files=[folder / "config.json"])
        self.check_equal_to_the_bit(back, folder)

    def compare(self, found: Outputs, expected: Outputs) -> None:
        """Compares outputs, which are not all alike."""
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert array.std() > 0.1, name
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-4, err_msg=name)

    def check_equal_to_the_bit(self, back: Path, folder: Path) -> None:
        """Compares two folders, array by array."""
        expected = {name: array for name, array in arrays_in(folder).items() if name not in self.dropped}
        check_equal_to_the_bit(arrays_in(back), expected)
