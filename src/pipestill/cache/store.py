"""Reads a teacher cache: what the teacher said becomes targets of the samples that it was said of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipestill.arguments import hinted, raise_problems, real_number
from pipestill.cache.datasets import extended
from pipestill.cache.fingerprint import teacher_hash, tokenizer_hash
from pipestill.cache.keys import Key, key_of
from pipestill.cache.manifest import Manifest
from pipestill.cache.parts import SUFFIX, Part
from pipestill.errors import ConfigError, DataError

VALUES = "teacher_values"
IDS = "teacher_ids"
TAIL = "teacher_tail"
FACTS = "teacher_facts"


@hinted
class TeacherCache:
    """What a teacher said of each sample, on disk; opened for reading.

    Args:
        folder: the cache's folder.
        teacher: the teacher that it must be of, or its hash; None where that is not there to compare.
        tokenizer: the tokenizer that it must be of; None where samples are no text, or are known to be the same.
        verify: compare all files with their hashes now, instead of each one when it is first read.

    Raises:
        ConfigError: the cache is of another teacher or tokenizer.
        DataError: there is none, or a file is damaged.
    """

    def __init__(
        self, folder: str | Path, *, teacher: nn.Module | str | None = None, tokenizer: Any = None, verify: bool = False
    ) -> None:
        self.folder = Path(folder)
        found = Manifest.load(self.folder)
        if found is None:
            raise DataError(
                f"there is no teacher cache in '{folder}' (no cache.json); write one with ps.cache.Writer or 'pipestill cache'"
            )
        self.manifest = found
        self._check_origin(teacher, tokenizer)
        self.parts: list[Part] = [Part(path) for path in sorted(self.folder.glob(f"*{SUFFIX}"))]
        if not self.parts:
            raise DataError(
                f"the teacher cache '{folder}' holds no samples; write some with ps.cache.Writer or 'pipestill cache'"
            )
        keys = np.concatenate([part.keys for part in self.parts])
        sizes = [len(part.keys) for part in self.parts]
        order = np.argsort(keys[:, 0], kind="stable")
        self._keys = keys[order]
        self._part = np.repeat(np.arange(len(sizes)), sizes)[order]
        self._row = np.concatenate([np.arange(size) for size in sizes])[order]
        self._places = np.unique(keys[:, 2])
        if verify:
            for part in self.parts:
                part.verify()

    def _check_origin(self, teacher: nn.Module | str | None, tokenizer: Any) -> None:
        problems = []
        if teacher is not None and self.manifest.teacher != (teacher if isinstance(teacher, str) else teacher_hash(teacher)):
            problems.append("another teacher (its weights or its config differ)")
        if tokenizer is not None and self.manifest.tokenizer != tokenizer_hash(tokenizer):
            problems.append("no tokenizer" if self.manifest.tokenizer is None else "another tokenizer")
        if problems:
            raise ConfigError(
                f"the teacher cache '{self.folder}' is of {' and of '.join(problems)}; write one of this in another folder"
            )

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._keys)

    @property
    def num_tokens(self) -> int:
        """The tokens of all samples."""
        return sum(int(part.starts[-1]) for part in self.parts)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and self._find(key) is not None

    def _find(self, key: Key) -> int | None:
        """The number of a sample, in order of keys."""
        place = int(np.searchsorted(self._keys[:, 0], key[0]))
        while place < len(self._keys) and self._keys[place, 0] == key[0]:
            if self._keys[place, 1] == key[1]:
                return place
            place += 1
        return None

    def entry(self, key: Key, place: int = 0, words: str = "a sample") -> dict[str, Tensor]:
        """Read what the teacher said of a sample: `values`, `ids`, `tails`, and hidden states as `hidden.NAME`.

        Args:
            key: the hash of its inputs.
            place: the hash of its place, to tell why it is missing.
            words: the place, for messages.

        Raises:
            DataError: it is not there, or its file is damaged.
        """
        found = self._find(key)
        if found is None:
            known = place and place in self._places
            raise DataError(
                f"{words} is not in the teacher cache '{self.folder}' with these inputs, "
                + (
                    "but with others: are they augmented, or tokenized or cut in another way than when the cache was written? "
                    "A cache is of inputs that do not change"
                    if known
                    else f"which has {len(self)} samples; write what is missing ('pipestill cache', or ps.cache.fill)"
                )
            )
        return self.parts[int(self._part[found])].read(int(self._row[found]))

    def missing(self, examples: Any) -> list[str]:
        """List the places of examples that the cache does not have.

        Args:
            examples: a data set of `ps.data.Example`s.
        """
        return [example.place for example in examples if key_of(example) not in self]

    def attach(self, dataset: Any, *, temperature: float = 1.0) -> Any:
        """Make a data set whose targets hold what the teacher said, for `ps.losses.CachedTopK`; no teacher is needed then.

        The targets are `teacher_values`, `teacher_ids`, `teacher_tail` and `teacher_facts`, and `teacher_NAME` for hidden states.

        Args:
            dataset: gives `ps.data.Example`s (`Examples`, `Packed`, `Stream`), or pairs (inputs, target) of one sample each.
            temperature: the temperature of the loss; the cache must have been written for it.

        Raises:
            ConfigError: the cache was not written for this temperature.
            DataError: later, where a sample is read that the cache does not have.
        """
        raise_problems(real_number("temperature", temperature, above=0), ConfigError)
        if temperature not in self.manifest.temperatures:
            held = ", ".join(f"{t:g}" for t in self.manifest.temperatures)
            raise ConfigError(
                f"the teacher cache '{self.folder}' is for temperatures {held}, not {temperature:g}: the mass of the logits that "
                f"it does not hold depends on that; write it with temperatures=({held}, {temperature:g})"
            )
        column = self.manifest.temperatures.index(temperature)
        facts = torch.tensor([[temperature, self.manifest.vocabulary]])

        def extra(key: Key, place: int, length: int, words: str) -> Mapping[str, Tensor]:
            entry = self.entry(key, place, words)
            given = {VALUES: entry["values"], IDS: entry["ids"], TAIL: entry["tails"][:, column], FACTS: facts.repeat(length, 1)}
            return {**given, **{f"teacher_{name}": entry[f"hidden.{name}"] for name in self.manifest.hidden}}

        return extended(dataset, extra)
