"""What a name is about, in words that code bases share: how alike two names of different programs are.

`layers/{i}/attention_norm` and `model.layers.{i}.input_layernorm` are about the same array.  That is not in the
letters, but a convention; the conventions are the tables here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

__all__ = ["Similarity", "has_inputs_first", "role_of", "words_of_name"]

# The last word of a name: what the array is to its module.
_ROLES = {
    "weight": ("kernel", "weight", "w", "scale", "gamma", "embedding", "g"),
    "bias": ("bias", "b", "beta"),
    "mean": ("mean", "running_mean", "moving_mean"),
    "var": ("var", "running_var", "moving_variance"),
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words}

# One part of a name, between dots or slashes, that means something as a whole.
_PARTS = {
    "input_layernorm": "attention norm",
    "post_attention_layernorm": "mlp norm",
    "pre_feedforward_layernorm": "mlp norm",
    "ln_1": "attention norm",
    "ln_2": "mlp norm",
    "norm1": "attention norm",
    "norm2": "mlp norm",
    "layer_norm1": "attention norm",
    "layer_norm2": "mlp norm",
    "layernorm_before": "attention norm",
    "layernorm_after": "mlp norm",
    "ln_f": "norm",
    "c_attn": "qkv",
    "in_proj": "qkv",
    "wqkv": "qkv",
    "query_key_value": "qkv",
    "c_proj": "o",
    "c_fc": "up",
    "fc1": "up",
    "fc_in": "up",
    "fc2": "down",
    "fc_out": "down",
    "intermediate": "up",
    "w1": "gate",
    "w2": "down",
    "w3": "up",
    "wq": "q",
    "wk": "k",
    "wv": "v",
    "wo": "o attention",
    "wte": "embed",
    "wpe": "position",
    "embed_tokens": "embed",
    "tok_embeddings": "embed",
    "word_embeddings": "embed word",
    "position_embeddings": "position",
    "pos_embed": "position",
    "token_type_embeddings": "type",
    "cls_token": "first",
    "lm_head": "head",
    "self": "attention",
    "h": "layer",
    "ff": "mlp",
}
_WORDS = {
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "o",
    "output": "o",
    "attn": "attention",
    "ln": "norm",
    "layernorm": "norm",
    "rmsnorm": "norm",
    "batchnorm": "norm",
    "bn": "norm",
    "embedding": "embed",
    "embedder": "embed",
    "emb": "embed",
    "pos": "position",
    "ffn": "mlp",
    "feedforward": "mlp",
    "block": "layer",
    "cls": "first",
    "fc": "linear",
    "conv": "convolution",
}
# What is a part of which block.
_WITHIN = {"attention": frozenset(("q", "k", "v", "qkv")), "mlp": frozenset(("up", "gate", "down"))}
# https://github.com/huggingface/transformers has a layer `Conv1D` of these names.
_INPUTS_FIRST = frozenset(("c_attn", "c_proj", "c_fc"))
# Words that say nothing about which array it is.
_NOISE = frozenset(("model", "transformer", "proj", "projection", "dense", "module", "base", "params", "net", "lm"))


def role_of(key: str) -> str | None:
    """Returns what an array of this last key is to its module: weight, bias, mean or var; None if it does not say."""
    return _ROLE_OF.get(key.lower())


def words_of_name(parts: Iterable[str], *, has_own: bool = False) -> frozenset[str]:
    """Returns what a name is about.

    Args:
      parts: its keys, without numbers.
      has_own: whether the layers have a norm before their MLP besides the one that is named after the attention.
    """
    found: set[str] = set()
    for part in parts:
        plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part).lower()
        if plain in ("layer_norm", "rms_norm"):
            plain = "norm"
        if plain == "post_attention_layernorm" and has_own:
            plain = "attention_after_norm"
        if plain in _PARTS:
            found |= {*_PARTS[plain].split()}
            continue
        for word in re.findall(r"[a-z]+|\d+", plain.replace("feed_forward", "mlp").replace("layer_norm", "norm")):
            found.add(_singular(word))
            found |= {"attention"} if word == "o" else set()  # `output` may be of anything
    for context, words in _WITHIN.items():
        found |= {context} if found & words else set()
    return frozenset(found - _NOISE)


def has_inputs_first(parts: Iterable[str | None]) -> bool:
    """Returns whether a module's name is one of those that GPT-2's code gives to layers with their inputs first."""
    return not _INPUTS_FIRST.isdisjoint(part for part in parts if part is not None)


def _singular(word: str) -> str:
    for end, instead in (("ches", "ch"), ("ss", "ss"), ("s", "")):
        if len(word) > 3 and word.endswith(end):
            word = word.removesuffix(end) + instead
            break
    return _WORDS.get(word, word)


class Similarity:
    """How alike names are, where a word counts the less the more names have it.

    Args:
      names: the words of all names.
    """

    def __init__(self, names: Collection[frozenset[str]]) -> None:
        counts = Counter(word for words in names for word in words)
        self._weights: Mapping[str, float] = {word: math.log(1 + len(names) / count) for word, count in counts.items()}

    def of(self, one: frozenset[str], other: frozenset[str]) -> float:
        """Returns 1 for equal words, 0 if none is in both."""
        sizes = [math.sqrt(sum(self._weights[word] ** 2 for word in words)) for words in (one, other)]
        return sum(self._weights[word] ** 2 for word in one & other) / (math.prod(sizes) or 1)
