"""Models of `statewise.examples.names` beside `transformers` on torch: the same folder, the same numbers.

Imported by tests of tests/names/torch alone: it needs torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.torch
import torch
import transformers
from flax import nnx

import statewise as sw

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))
CONFIG = "config.json"


def random_model(config: Any, seed: int = 0) -> Any:
    """A causal model of transformers with every weight random, those of norms and biases too; logits of about 1."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape)
            weight.copy_(weight + 0.3 * noise if weight.ndim == 1 else noise / weight.shape[1] ** 0.5)
    return model


def load(folder: Path, **options: Any) -> Any:
    """What transformers reads in a folder, complete."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def arrays_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every array in a folder, read by the package."""
    arrays: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        arrays |= safetensors.torch.load_file(file)
    return arrays


def check_equal_to_the_bit(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert torch.equal(found[name].view(torch.uint8), array.view(torch.uint8)), name


def plan_of(family: ModuleType, model_class: Any, folder: Path, **options: Any) -> tuple[Any, sw.Names, sw.Plan]:
    """The configuration, the names and the plan of one of our models, for a folder."""
    config = family.Config.read(folder)
    model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    return config, family.names(config), sw.plan(model, **options)


@sw.step
def forward(model: Any, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def our_logits(state: sw.State) -> np.ndarray:
    return np.asarray(forward(state, jnp.asarray(TOKENS)), np.float32)


def check_there_and_back(family: ModuleType, model_class: Any, theirs: Any, place: Path) -> None:
    """One folder: checked, read, compared, written, and loaded again by transformers."""
    folder, back = place / "theirs", place / "back"
    theirs.save_pretrained(folder)
    _, names, plan = plan_of(family, model_class, folder)
    report = names.check(plan, folder)
    assert report.ok, report
    assert report.counts == {"params": {"restored": len(plan.leaves)}}, "and nothing in the files is dropped"
    assert sw.preview(folder, plan.abstract(), names=names).ok
    state, _ = sw.restore(folder, plan.abstract(), names=names)
    expected = logits_of(theirs)
    assert expected.std() > 0.1
    np.testing.assert_allclose(our_logits(state), expected, rtol=0, atol=1e-4)
    assert sw.convert(state, back, names=names, extra_files=[folder / CONFIG]).ok
    check_equal_to_the_bit(arrays_in(back), arrays_in(folder))
    assert np.array_equal(logits_of(load(back)), expected)


def check_shards(family: ModuleType, model_class: Any, theirs: Any, place: Path) -> None:
    """Folders of several files, theirs and ours."""
    folder, back = place / "theirs", place / "back"
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    _, names, plan = plan_of(family, model_class, folder)
    state, report = sw.restore(folder, plan.abstract(), names=names)
    assert report.counts == {"params": {"restored": len(plan.leaves)}}
    sw.convert(state, back, names=names, max_shard_bytes=10_000, extra_files=[folder / CONFIG])
    assert len(list(back.glob("*.safetensors"))) > len(list(folder.glob("*.safetensors")))
    check_equal_to_the_bit(arrays_in(back), arrays_in(folder))
    assert np.array_equal(logits_of(load(back)), logits_of(theirs))


def check_bfloat16(family: ModuleType, model_class: Any, theirs: Any, place: Path) -> None:
    """Files in bfloat16: read into float32, and kept."""
    folder = place / "theirs"
    theirs.to(torch.bfloat16).save_pretrained(folder)
    _, names, plan = plan_of(family, model_class, folder)
    assert not sw.preview(folder, plan.abstract(), names=names).ok
    wide, _ = sw.restore(folder, plan.abstract(), names=names, cast=True)
    expected = logits_of(load(folder, dtype=torch.float32))
    np.testing.assert_allclose(our_logits(wide), expected, rtol=0, atol=1e-4)
    # The target decides: as it is in the files, and the model computes in it.
    half, _ = sw.restore(folder, plan.abstract().cast(params="bfloat16"), names=names)
    assert {str(leaf.dtype) for leaf in half.plan.leaves} == {"bfloat16"}
    assert forward(half, jnp.asarray(TOKENS)).dtype == jnp.bfloat16
    distance = lambda logits: np.linalg.norm(logits - expected) / np.linalg.norm(expected)  # noqa: E731
    assert distance(our_logits(half)) < 1.5 * distance(logits_of(theirs)) < 0.1
    for name, state in (("kept", half), ("cast", wide.cast(params="bfloat16"))):
        sw.convert(state, place / name, names=names, extra_files=[folder / CONFIG])
        check_equal_to_the_bit(arrays_in(place / name), arrays_in(folder))


def check_training(family: ModuleType, model_class: Any, theirs: Any, place: Path, rate: float = 0.1) -> None:
    """One step of gradient descent, beside torch's; its result is exported, and loaded by transformers."""
    folder, trained = place / "theirs", place / "trained"
    theirs.save_pretrained(folder)
    before = logits_of(theirs)
    _, names, plan = plan_of(family, model_class, folder, optimizers={"params": optax.sgd(rate)})
    state, _ = sw.restore(folder, plan.abstract(), names=names)

    @sw.train_step
    def train(model: Any, tokens: jax.Array) -> jax.Array:
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    state, loss = train(state, jnp.asarray(TOKENS))
    sw.convert(state, trained, names=names, extra_files=[folder / CONFIG])
    tokens = torch.tensor(TOKENS)
    theirs.train()
    their_loss = theirs(tokens, labels=tokens).loss
    their_loss.backward()
    torch.optim.SGD(theirs.parameters(), lr=rate).step()
    np.testing.assert_allclose(float(loss), their_loss.item(), rtol=1e-5)
    exported, expected = arrays_in(trained), dict(theirs.named_parameters())
    for name, weight in expected.items():
        np.testing.assert_allclose(exported[name], weight.detach(), rtol=0, atol=1e-5, err_msg=name)
    loaded = logits_of(load(trained))
    np.testing.assert_allclose(loaded, our_logits(state), rtol=0, atol=1e-4)
    assert np.abs(loaded - before).max() > 1e-2
