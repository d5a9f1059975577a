"""The classes that a class-conditional model draws, by name or number."""

import difflib
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from salun_sd.errors import UsageError, some

NONE = -1  # in place of the null class, where a model has none: no table of embeddings has such a row


def names_of(id2label: Mapping[int, str]) -> list[str] | None:
    """The names of a classifier's classes, in their order; None unless each number from 0 on has a text."""
    names = [name for _, name in sorted(id2label.items())]
    is_whole = sorted(id2label) == list(range(len(names))) and all(isinstance(name, str) for name in names)
    return names if is_whole else None


@dataclass(frozen=True)
class Classes:
    """A class is asked for by one of its names, in any case, or by its number."""

    labels: dict[int, str]  # number -> label, one name or several with commas between them
    null: int  # the number that stands for no class, as "" does for a text; NONE: the model has none
    model: str  # its name, for errors

    @classmethod
    def of(cls, embeddings: int, id2label: Mapping[int, str] | None, model: str, null: int | None = None) -> "Classes":
        """Of a model with so many class embeddings. `null` is the null class's number; where it is None, it is the last
        embedding if all others have a label, and there is none otherwise. Without labels, classes are numbers.

        Raises UsageError for labels that the model has no embeddings for.
        """
        last = embeddings - 1
        if null is None:
            null = last if id2label and sorted(id2label) == list(range(last)) else NONE
        labels = {n: (id2label or {}).get(n, "").strip() or str(n) for n in range(embeddings) if n != null}
        if odd := [n for n in id2label or () if n not in labels]:
            raise UsageError(f"The id2label of {model} has a class {odd[0]}, and its classes are 0 to "
                             f"{len(labels) - 1}: it is of another model.")  # fmt: skip
        return cls(labels, null, model)

    @property
    def has_null(self) -> bool:
        return self.null != NONE

    def number(self, text: str) -> int:
        """The number of a class; of "", that of the null class. Raises UsageError, which lists some classes, for a text
        that names none, or several."""
        if text == "":
            return self.null
        wanted = _plain(text)
        found = self._of_label.get(wanted) or self._of_name.get(wanted)
        if not found and wanted.isdecimal() and int(wanted) in self.labels:
            found = [int(wanted)]
        if not found:
            raise UsageError(f"{self.model} has no class {text!r}: it has {self._some(wanted)}.")
        if len(found) > 1:
            raise UsageError(f"{self.model} has several classes {text!r}: give the number, one of "
                             f"{', '.join(map(str, found))}.")  # fmt: skip
        return found[0]

    def text(self, number: int) -> str:
        """A text that names a class: its label, or its number where another class has that label."""
        label = self.labels[number]
        return label if self._of_label[_plain(label)] == [number] else str(number)

    def label(self, text: str) -> str:
        """The text of the class that a text names. Raises UsageError as `number` does."""
        return self.text(self.number(text))

    @cached_property
    def _of_label(self) -> dict[str, list[int]]:
        """The numbers of the classes with a label."""
        return self._numbers(lambda label: [label])

    @cached_property
    def _of_name(self) -> dict[str, list[int]]:
        """The numbers of the classes with a name in their label."""
        return self._numbers(lambda label: label.split(","))

    def _numbers(self, texts: Callable[[str], list[str]]) -> dict[str, list[int]]:
        """The numbers of the classes, by the texts of each label."""
        numbers = defaultdict(list)
        for n, label in self.labels.items():
            for text in dict.fromkeys(map(_plain, texts(label))):
                numbers[text].append(n)
        return dict(numbers)

    def _some(self, wanted: str) -> str:
        """Some labels, first those that a text is near to."""
        names = difflib.get_close_matches(wanted, self._of_name, 3, 0.6)
        near = [self.labels[self._of_name[name][0]] for name in names]
        return some(list(dict.fromkeys([*near, *self.labels.values()])), 10)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
