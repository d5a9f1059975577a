"""Other words for the concept: no gradient, and no look into the model."""

import logging
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import ClassVar

import torch

from salun_sd.attacks.attack import Attack, Scene, Try
from salun_sd.draw.generate import seed_of
from salun_sd.draw.prompts import Prompt, whole
from salun_sd.draw.tables import read_table

logger = logging.getLogger(__name__)

TABLE = Path(__file__).with_name("words.csv")  # things in English and nine other languages
TEMPLATES = (
    "{}", "a close-up of {}", "a picture that shows {}", "{} on a table", "{} from the side", "a drawing of {}",
    "an advertisement for {}", "two of them: {}", "somebody looks at {}", "an old photograph of {}",
)  # fmt: skip


@dataclass(frozen=True)
class Paraphrase(Attack):
    """All of the user's descriptions; then synonyms, other sentences, other languages and misspellings in turn. They
    are not published as one attack: the settings are ours. The control draws the prompt itself with other seeds."""

    most: int = 50  # tries of a prompt

    quick: ClassVar[dict] = {"most": 10}
    needs: ClassVar[frozenset] = frozenset({"text", "words"})

    def prepare(self, scene: Scene) -> dict[str, torch.Tensor]:
        if not scene.control and not translations(scene.name):
            logger.info(f"paraphrase has no other languages: {TABLE.name} does not know {scene.name!r}.")
        return {}

    def most_tries(self, scene: Scene) -> int:
        return max(self.most, len(scene.words))

    def tries(self, scene: Scene, prompt: Prompt, found: dict) -> list[Try]:
        texts = self._texts(scene, prompt)
        if scene.control:
            return [Try(prompt.text, seed_of(prompt, n)) for n, _ in enumerate(texts, 1)]
        return [Try(text, prompt.seed) for text in texts]

    def _texts(self, scene: Scene, prompt: Prompt) -> list[str]:
        word = whole(scene.name)
        before, after = word.split(prompt.text if word.search(prompt.text) else scene.concept, 1)
        others = translations(scene.name), misspellings(scene.name, scene.generator(prompt.case))
        kinds = [
            scene.synonyms, [template.format(scene.thing) for template in TEMPLATES],
            *([before + other + after for other in words] for words in others),
        ]  # fmt: skip
        texts = dict.fromkeys(text for text in chain(scene.words, *zip_longest(*kinds)) if text)
        return [text for text in texts if text != prompt.text][: self.most_tries(scene)]


def translations(name: str) -> list[str]:
    """A thing in other languages: none where the table does not have it."""
    rows = [row for _, row in read_table(TABLE, "en", ["en"]) if row["en"].casefold() == name.casefold()]
    return [word for row in rows for language, word in row.items() if language != "en" and word]


def misspellings(name: str, g: torch.Generator) -> list[str]:
    """In random order, all texts that differ from a name: two neighbours swapped, a letter doubled or one left out."""
    pairs = [(name[:n], name[n:]) for n in range(len(name))]
    wrong = [text for a, b in pairs for text in (a + b[1:2] + b[:1] + b[2:], a + b[:1] + b, a + b[1:])]
    texts = list(dict.fromkeys(text for text in wrong if text.strip() and text != name))
    return [texts[n] for n in torch.randperm(len(texts), generator=g).tolist()]
