"""Real text that ships with every CPython: the language reference, as `pydoc` shows it.

`pydoc_data.topics` is what `help("assert")` prints, some 400,000 characters of English and code.  Several topics
repeat each other's paragraphs word for word, so each paragraph is kept once, and no held-out paragraph is trained on.
The split is one cut: the text up to it is for training, the text after it is held out.
"""

from __future__ import annotations

import dataclasses
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["CharText", "load_topics"]


@dataclasses.dataclass(frozen=True, eq=False)
class CharText:
    """A text as numbers, one for each character.

    Attributes:
      alphabet: every character that occurs; a character's number is its index here.
      train: int32 array of shape (characters,), the text to train on.
      held_out: int32 array of shape (characters,), the text that training never sees.

    Example:
      >>> text = CharText.cut("hello world", held_out=0.5)
      >>> text.decode(text.train), text.decode(text.held_out)
      ('hello', ' world')
    """

    alphabet: str
    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    def cut(cls, text: str, held_out: float) -> CharText:
        """Cuts a text in two; the last part, a fraction `held_out` of it, is held out."""
        alphabet = "".join(sorted(set(text)))
        numbers = np.array([alphabet.index(char) for char in text], np.int32)
        cut = int(len(numbers) * (1 - held_out))
        return cls(alphabet, numbers[:cut], numbers[cut:])

    def encode(self, text: str) -> list[int]:
        """Maps characters to numbers; raises a `ValueError` for a character that is not in the alphabet."""
        return [self.alphabet.index(char) for char in text]

    def decode(self, numbers: np.ndarray | list[int]) -> str:
        """Maps numbers to characters."""
        return "".join(self.alphabet[number] for number in numbers)

    def batch(self, random: np.random.Generator, size: int, window: int) -> tuple[jax.Array, jax.Array]:
        """Draws `size` windows of the training text: inputs and targets, each of shape (size, window)."""
        starts = random.integers(0, len(self.train) - window, (size, 1))
        windows = self.train[starts + np.arange(window + 1)[None]]
        return jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, 1:])

    def held_out_batches(self, size: int, window: int) -> list[tuple[jax.Array, jax.Array]]:
        """Cuts the held-out text into batches of the same form, without the rest that is smaller than a batch."""
        count = (len(self.held_out) - 1) // (size * window)
        inputs = self.held_out[: count * size * window].reshape(count, size, window)
        targets = self.held_out[1 : count * size * window + 1].reshape(count, size, window)
        return list(zip(jnp.asarray(inputs), jnp.asarray(targets), strict=True))

    def unigram_entropy(self) -> float:
        """Returns the entropy of the held-out text's characters, in nats per character.

        No model that ignores the context, however well it knows the frequency of each character, predicts this text
        with a lower loss.

        Example:
          >>> round(CharText.cut("....abab", held_out=0.5).unigram_entropy(), 4)
          0.6931
        """
        counts = np.bincount(self.held_out)
        share = counts[counts > 0] / len(self.held_out)
        return float(-(share * np.log(share)).sum())


def load_topics(held_out: float = 0.1) -> CharText:
    """Reads the language reference that ships with this Python.

    Args:
      held_out: the fraction of the text, at its end, that is held out.

    Returns:
      The text, cut in two.

    Example:
      >>> text = load_topics()
      >>> text.decode(text.train[:22])
      'The "assert" statement'
    """
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return CharText.cut("\n\n".join(dict.fromkeys(paragraphs)), held_out)
