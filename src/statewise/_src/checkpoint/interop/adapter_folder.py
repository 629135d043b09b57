"""Folders of a LoRA adapter as the package peft has them: `adapter_model.safetensors` and `adapter_config.json`.

There a layer adds `scale * x @ A.T @ B.T`, and the configuration gives the scale: `lora_alpha / r`, or `lora_alpha /
sqrt(r)` for rank-stabilized adapters (https://huggingface.co/docs/peft/package_reference/lora).  Flax's layers have no
scale.  So B is multiplied by it when it is read, and divided by it when it is written: exact for a power of two, and
otherwise rounded once.  A configuration with which a layer computes anything else is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from statewise._src.checkpoint.interop.sources import Source, SourceArray
from statewise.errors import RestoreError, SaveError, StatewiseError

__all__ = ["ADAPTER_FILE", "AdapterConfig", "adapter_config", "as_read", "as_written", "is_of_adapter"]

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# What peft writes in front of the name of a module.
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.*)\.lora_(embedding_)?(?P<which>[AB])(?P<adapter>\.(?!weight$)[^.]+)?(\.weight)?")

# Options with which a layer computes something else, or whose arrays are not of the form of A and B.
_OTHER_LAYERS = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Ways to make the first A and B that leave the base as it is; others change it whenever the adapter is loaded.
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")


def is_of_adapter(name: str) -> bool:
    """Returns whether a name is one that an adapter's file has."""
    return name.startswith(_PREFIX)


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterConfig:
    """An `adapter_config.json`.

    Attributes:
      place: where it is, for messages.
      data: its content.
      error: the class of the errors about it.
    """

    place: FilePath
    data: Mapping[str, Any]
    error: type[StatewiseError]

    @classmethod
    def read(cls, place: FilePath, error: type[StatewiseError]) -> AdapterConfig:
        """Reads a configuration.

        Raises:
          StatewiseError: of the class `error`: it cannot be read, or is of adapters that `nnx.LoRA` does not compute.
        """
        try:
            data = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as cause:
            raise error(f"{place} cannot be read as JSON.", hint="the adapter_config.json that peft wrote") from cause
        if not isinstance(data, Mapping) or data.get("peft_type") != "LORA":
            kind = data.get("peft_type") if isinstance(data, Mapping) else None
            raise error(f"{place} is of the adapter type {kind!r}, and not 'LORA'.", hint="a LoRA adapter")
        others = [f"{name}={data[name]!r}" for name in _OTHER_LAYERS if data.get(name)]
        if data.get("init_lora_weights") not in _INITIAL:
            others.append(f"init_lora_weights={data['init_lora_weights']!r}")
        if others:
            raise error(
                f"{place} has {', '.join(others)}: its layers compute something other than nnx.LoRA.",
                hint="in peft: model.merge_and_unload().save_pretrained(folder), and no adapter here",
            )
        config = cls(place, data, error)
        for name in ("r", "lora_alpha"):
            config._number(name, data.get(name))
        return config

    def _number(self, name: str, value: Any) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (math.isfinite(value) and value > 0):
            raise self.error(f"{self.place} has {name}={value!r}, which is not a positive number.", hint=f'"{name}": 8')
        return float(value)

    def _of_module(self, option: str, default: str, module: str) -> float:
        """Returns a number that the configuration may give for single modules, by the end of their names."""
        patterns = self.data.get(option) or {}
        if not isinstance(patterns, Mapping):
            raise self._wrong(option)
        found = next((key for key in patterns if self._fits(option, rf"(.*\.)?({key})", module)), None)
        return self._number(default, self.data.get(default) if found is None else patterns[found])

    def scale(self, name: str, shape: Sequence[int]) -> float:
        """Returns what a matrix is multiplied by in the layers: 1 for all but B.

        Raises:
          StatewiseError: the configuration gives another rank.
        """
        found = _MATRIX.fullmatch(name)
        if found is None or len(shape) < 2:
            return 1.0
        module = found["module"].removeprefix(_PREFIX)
        rank = shape[1] if found["which"] == "B" else shape[0]
        given = self._of_module("rank_pattern", "r", module)
        if given != rank:
            raise self.error(
                f"{name} is of rank {rank}, and {self.place} says r={given:g}.",
                hint=f'"r": {rank}, or "rank_pattern": {{"{module}": {rank}}}',
            )
        alpha = self._of_module("alpha_pattern", "lora_alpha", module)
        return alpha / (math.sqrt(rank) if self.data.get("use_rslora") else rank) if found["which"] == "B" else 1.0

    def targets(self, name: str) -> bool:
        """Returns whether peft looks for the matrices of a module, and would find this one."""
        found = _MATRIX.fullmatch(name)
        if found is None:
            return True
        # In a file of peft the names are without that of the adapter, `default`.
        return found["adapter"] is None and self._has_adapter(found["module"].removeprefix(_PREFIX))

    def _has_adapter(self, module: str) -> bool:
        """Returns what peft's `check_target_module_exists` does."""
        wanted, excluded = self.data.get("target_modules"), self.data.get("exclude_modules")
        if excluded and self._is_one_of("exclude_modules", excluded, module):
            return False
        saved = self._texts("modules_to_save", self.data.get("modules_to_save") or [])
        if any(self._fits("modules_to_save", rf"(|.*\.){each}(|\..*)", module) for each in saved):
            return False
        if wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
            return True
        if isinstance(wanted, str) or module in self._texts("target_modules", wanted):
            return self._is_one_of("target_modules", wanted, module)
        return self._is_one_of("target_modules", wanted, module) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        """Returns whether a module is in one of the layers that the configuration lists, if it lists some."""
        layers = self.data.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        listed = [layers] if isinstance(layers, int) else layers
        if not isinstance(listed, list) or not all(isinstance(layer, int) for layer in listed):
            raise self._wrong("layers_to_transform")
        given = self.data.get("layers_pattern") or []
        names = [given] if isinstance(given, str) else self._texts("layers_pattern", given)
        # Without a pattern peft finds no number in `layers.0.q`, but in `model.layers.0.q`.
        patterns = [rf"(?:^|.*?\.){name}" for name in names] or [r".*?\.[^.]*"]
        for pattern in patterns:
            found = self._match("layers_pattern", rf"{pattern}\.(?P<number>\d+)\.", module)
            if found is not None:
                return int(found["number"]) in listed
        return False

    def _is_one_of(self, option: str, modules: Any, module: str) -> bool:
        if isinstance(modules, str):
            return self._fits(option, modules, module)
        return any(module == each or module.endswith(f".{each}") for each in self._texts(option, modules))

    def _texts(self, option: str, values: Any) -> list[str]:
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self._wrong(option)
        return values

    def _fits(self, option: str, pattern: str, module: str) -> bool:
        return self._match(option, f"(?:{pattern})$", module) is not None

    def _match(self, option: str, pattern: str, module: str) -> re.Match[str] | None:
        try:
            return re.match(pattern, module)
        except re.error as cause:
            raise self._wrong(option) from cause

    def _wrong(self, option: str) -> StatewiseError:
        shown = f"{self.place} has {option}={self.data.get(option)!r}, which peft does not read."
        return self.error(shown, hint=f"the {option} that peft wrote")


# --- reading -------------------------------------------------------------------------------------------------------


def as_read(path: object, source: Source) -> Source:
    """Returns a source as the layers of Flax have it: the scale of an adapter is in its B.

    Args:
      path: what was opened: a folder, a file, or several.
      source: its arrays.

    Raises:
      RestoreError: the adapter has no configuration, or one of layers that are not Flax's.
    """
    if source.format != "safetensors":
        return source
    places = [FilePath(os.fsdecode(each)) for each in (path if isinstance(path, (list, tuple)) else [path])]  # type: ignore[arg-type]
    files = [place / ADAPTER_FILE if place.is_dir() else place for place in places]
    folders = [file.parent for file in files if file.name == ADAPTER_FILE and file.is_file()]
    matrices = [entry for entry in source.entries if is_of_adapter(entry.name) and _MATRIX.fullmatch(entry.name)]
    if not folders:
        _check_no_adapter(files if matrices else ())
        return source
    if len(folders) > 1:
        raise RestoreError("There are several adapters, each with its own scale.", hint="restore one after another")
    if matrices and not (folders[0] / CONFIG).is_file():
        raise RestoreError(
            f"{folders[0] / ADAPTER_FILE} has no {CONFIG} beside it, which gives the scale of the adapter.",
            hint=f"fetch {CONFIG} as well",
        )
    config = AdapterConfig.read(folders[0] / CONFIG, RestoreError) if matrices else None
    return source if config is None else _scaled(source, _scales(config, matrices), np.multiply, RestoreError)


def _check_no_adapter(files: Sequence[FilePath]) -> None:
    """Checks that no configuration is beside matrices of an adapter whose file has another name."""
    place = next((file.parent / CONFIG for file in files if (file.parent / CONFIG).is_file()), None)
    if place is not None:
        raise RestoreError(
            f"{place} is beside the matrices of an adapter that are not in {ADAPTER_FILE}: it is not known "
            "whether they have its scale.",
            hint=f"call the file {ADAPTER_FILE} if peft wrote it; or read it from a folder without {CONFIG}",
        )


def _scales(config: AdapterConfig, entries: Collection[SourceArray]) -> dict[str, float]:
    scales = {entry.name: config.scale(entry.name, entry.shape) for entry in entries}
    return {name: scale for name, scale in scales.items() if scale != 1}


def _scaled(
    source: Source, scales: Mapping[str, float], by: Callable[[Any, float], Any], error: type[StatewiseError]
) -> Source:
    """Returns a source whose arrays are multiplied, or divided, by their scales."""

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        arrays = source.read(names)
        return {name: scaled(name, array) if name in scales else array for name, array in arrays.items()}

    def scaled(name: str, array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            # In float64, and rounded once.
            result: np.ndarray = by(array.astype(np.float64), scales[name]).astype(array.dtype)
        if not np.isfinite(result.astype(np.float64)).all() and np.isfinite(array.astype(np.float64)).all():
            raise error(f"{name} has numbers that {array.dtype} cannot represent with the scale {scales[name]:g}.")
        return result

    def read_part(name: str, index: Sequence[slice], into: np.ndarray) -> None:
        if name in scales:  # these are small, and are read as a whole
            into[...] = read((name,))[name][tuple(index)].reshape(into.shape)
        else:
            source.fill(name, index, into)

    return dataclasses.replace(source, read=read, read_part=read_part)


# --- writing -------------------------------------------------------------------------------------------------------


def adapter_config(files: Sequence[FilePath]) -> AdapterConfig | None:
    """Returns the configuration of the adapter to write, if one is among the files that go along."""
    place = next((file for file in files if file.name == CONFIG), None)
    return None if place is None else AdapterConfig.read(place, SaveError)


def as_written(source: Source, config: AdapterConfig) -> Source:
    """Returns the arrays of a source that are an adapter's, as its file has them.

    Raises:
      SaveError: there are none; or the configuration gives another rank, or does not name the modules.
    """
    entries = tuple(entry for entry in source.entries if is_of_adapter(entry.name))
    if not any(_MATRIX.fullmatch(entry.name) for entry in entries):
        raise SaveError(
            f"No array is called as {config.place} needs it: {_PREFIX}... and .lora_A.weight or .lora_B.weight.",
            hint="sw.Names({'q/lora_a': sw.Name('base_model.model.q_proj.lora_A.weight', 'r i -> i r')})  # and lora_b",
        )
    missed = [entry.name for entry in entries if not config.targets(entry.name)]
    if missed:
        raise SaveError(
            f"peft would not read {missed[0]}{f' and {len(missed) - 1} more' if len(missed) > 1 else ''}: the "
            f"target_modules of {config.place} are {config.data.get('target_modules')!r}.",
            hint="the names of the modules with adapters as target_modules",
        )
    only = dataclasses.replace(source, entries=entries)
    return _scaled(only, _scales(config, entries), np.divide, SaveError)
