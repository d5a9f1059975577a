"""Which prompts retain images are drawn from: given ones, or by default anchors, neighbours and everyday prompts."""

import logging
import re
import unicodedata
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain, pairwise

import torch

from salun_sd.checkpoint.load import load_part, load_tokenizers
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import prompts
from salun_sd.draw.encode import reader
from salun_sd.edit.concepts import Concept
from salun_sd.errors import UsageError, some
from salun_sd.methods.batches import spread
from salun_sd.runtime.finite import finite

logger = logging.getLogger(__name__)

ANCHOR = "anchor"  # of --retain-prompts: the anchors alone
SET = "retain"  # the prompt set of neighbours and everyday prompts
ANCHORS = "the anchors"
SHARES = {ANCHORS: 1, "neighbours of the concepts": 1, "everyday prompts": 1}  # of the images, as weights
MOST = 9_999  # prompts in the list of a run; a multiple of the sum of SHARES. More images are spread over it
NEIGHBOURS = 24  # prompts nearest to a concept
COMMON = frozenset("a an the this and or of in on at by to from with without is photo photograph picture image".split())
WORD = re.compile(r"\w+(?:[-'’]\w+)*")  # "t-shirt" is one word, which is not "shirt"
SPELLED = 1.5  # most tokens per word of a prompt whose words a tokenizer knows; of SET, CLIP's has 1.4 at most
ENDING = 3  # most letters of an ending, as in "nudity"
BATCH = 32  # prompts that are encoded at once


def prompts_to_retain(
    base: Checkpoint, concepts: Sequence[Concept], retain_prompts: str | Sequence[str] | None, samples: int
) -> list[tuple[str, float]]:  # fmt: skip
    """Text and guidance scale of each prompt to draw `samples` retain images from, each equally often.

    They are the rows of a prompt set without those whose class a concept names; or, with the base's own guidance, the
    texts of a plan; the anchors where `retain_prompts` is ANCHOR, as in the paper's erasure of nudity; and where none
    are given, `samples` texts, at most MOST, in SHARES: our choice, of no paper. A class-conditional base then retains
    all other classes, as the paper does. Raises UsageError where none is left.
    """
    if retain_prompts == ANCHOR:
        texts = dict.fromkeys(c.anchor for c in concepts if c.anchor)
        if not texts:
            raise UsageError("The anchor is to be retained, and there is none: give --anchor, --retain-prompts or "
                             "--retain.")  # fmt: skip
    elif isinstance(retain_prompts, str):
        return _of_set(base, retain_prompts, concepts)
    else:
        texts = retain_prompts or (_others if base.classes else _broad)(base, concepts, samples)
    return [(text, base.sampling[1]) for text in texts]


def shares(samples: int, has_anchor: bool = True) -> dict[str, int]:
    """How many of `samples` retain images each of SHARES has, rounded; without the anchors, where there are none."""
    weights = {name: weight for name, weight in SHARES.items() if has_anchor or name != ANCHORS}
    ends = [-(-samples * weight // sum(weights.values())) for weight in accumulate(weights.values(), initial=0)]
    return {name: end - start for name, (start, end) in zip(weights, pairwise(ends), strict=True)}


def shares_in_words(samples: int, has_anchor: bool) -> str:
    return ", ".join(f"{name} ({count})" for name, count in shares(samples, has_anchor).items())


def _of_set(base: Checkpoint, name: str, concepts: Sequence[Concept]) -> list[tuple[str, float]]:
    """Text and guidance scale of the rows of a prompt set that ask for no concept's class; the base's own scale where
    it cannot be guided."""
    rows = prompts.read(name, model=base)
    classes = {p.label for p in rows if p.label}
    class_of = {text: prompts.class_in(text, classes) for c in concepts for text in c.prompts()}
    for text in [text for text, label in class_of.items() if classes and label is None]:
        logger.warning(f"{text!r} names no class of {name}: none of its prompts is left out for it.")
    if not (left := [p for p in rows if not p.label or p.label not in class_of.values()]):
        raise UsageError(f"Every prompt of {name} asks for a concept: none is left to retain.")
    return [(p.text, p.guidance if base.is_guided else base.sampling[1]) for p in left]


def _broad(base: Checkpoint, concepts: Sequence[Concept], samples: int) -> list[str]:
    """`samples` prompts, at most MOST: anchors, neighbours of each concept, everyday prompts, in SHARES; logs them."""
    if not (everyday := _everyday(base, concepts)):
        raise UsageError(f"Every prompt of {SET} has a word of a concept: give --retain-prompts or --retain.")
    nearest = neighbours(base, concepts, everyday)
    first = [repr(text) for texts in zip(*nearest, strict=True) for text in texts]  # of each concept in turn
    anchors = [c.anchor for c in concepts if c.anchor]
    logger.info(f"Retain images come from {shares_in_words(samples, bool(anchors))}. Neighbours are {some(first)}.")
    pools = [*([anchors] if anchors else []), [*chain(*nearest)], everyday]
    counts = shares(min(samples, MOST), bool(anchors)).values()
    return [text for pool, n in zip(pools, counts, strict=True) for text in spread(pool, n)]


def _others(base: Checkpoint, concepts: Sequence[Concept], samples: int) -> list[str]:
    """The labels of all classes but the concepts'; where there are more than `samples`, that many, spread over them."""
    erased = {base.classes.number(text) for c in concepts for text in c.prompts()}
    if not (left := [base.classes.text(n) for n in base.classes.labels if n not in erased]):
        raise UsageError(f"{base.name} has no other class to retain: give --retain-weight 0.")
    logger.info(f"Retain images come from the other classes: {some(left)}.")
    return spread(left, min(samples, len(left)))


def _everyday(base: Checkpoint, concepts: Sequence[Concept]) -> list[str]:
    """The prompts of SET that ask for no concept: they have none of its telling words, and their tokens are not those
    of a concept or an anchor. Prompts that the tokenizer has to spell are left out, as long as others are left: what
    the base draws for words that it was not trained on shows nothing."""
    tokenizers, telling = load_tokenizers(base), set().union(*map(telling_words, concepts))
    texts = [p.text for p in prompts.read(SET) if not has_one_of(p.text, telling)]
    tokens = partial(tokenizers["tokenizer"], add_special_tokens=False, verbose=False)
    texts = [text for text in texts if len(tokens(text).input_ids) <= SPELLED * len(text.split())] or texts
    ids = reader(base)
    taken = {ids(text) for c in concepts for text in (*c.prompts(), c.anchor or "")}
    return [text for text in texts if ids(text) not in taken]


def telling_words(concept: Concept) -> set[str]:
    """The words of a concept's prompts that its anchor has not, without those that every prompt may have: "nude", of "a
    photo of a nude person" and "a photo of a person wearing clothes"."""
    return set().union(*map(_words, concept.prompts())) - _words(concept.anchor or "") - COMMON


def has_one_of(text: str, words: set[str]) -> bool:
    """Whether a text has one of the words, or a form of one: "dresses" of "dress", "nudity" of "nude"."""
    return any(_is_form(a, b) for a in _words(text) - COMMON for b in words)


def _words(text: str) -> set[str]:
    return set(WORD.findall(unicodedata.normalize("NFC", text.casefold())))


def _is_form(a: str, b: str) -> bool:
    """Whether two words begin alike and differ by an ending. It is true of some other words, such as "car" and
    "carpet": a prompt too many is left out then. It does not know "men" of "man"."""
    short, long = sorted((a, b), key=len)
    stem = short[:-1] if len(short) > ENDING and short[-1] in "ey" else short
    return long.startswith(stem) and len(long) - len(stem) <= ENDING


def neighbours(base: Checkpoint, concepts: Sequence[Concept], texts: Sequence[str]) -> list[list[str]]:
    """For each concept the NEIGHBOURS texts that the base's first text encoder puts nearest to one of its prompts, by
    cosine, the nearest first; of two alike, the first."""
    asked = [c.prompts() for c in concepts]
    vectors = _vectors(base, [*texts, *chain(*asked)])
    cosines = (vectors[: len(texts)] @ vectors[len(texts) :].T).split([*map(len, asked)], dim=1)
    orders = [c.amax(dim=1).argsort(descending=True, stable=True)[:NEIGHBOURS] for c in cosines]
    return [[texts[i] for i in order] for order in orders]


@torch.no_grad()
def _vectors(base: Checkpoint, texts: Sequence[str]) -> torch.Tensor:
    """[N, D] float32 on the CPU, of length 1: each text's state at its end token, the pooled output of CLIP (arXiv
    2103.00020, section 2.4). Raises NotFinite."""
    tokenizer, encoder = load_tokenizers(base)["tokenizer"], load_part(base, "text_encoder")
    rows = []
    for i in range(0, len(texts), BATCH):  # a state does not depend on what follows, so the padding may be short
        batch = tokenizer(
            texts[i : i + BATCH], padding=True, truncation=True, max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )  # fmt: skip
        ids = batch.input_ids
        states = encoder(ids.to(encoder.device)).last_hidden_state.cpu()
        rows.append(states[torch.arange(len(ids)), (ids == tokenizer.eos_token_id).int().argmax(dim=1)])
    states = finite(torch.cat(rows).float(), f"The output of the text encoder of {base.name}")
    return torch.nn.functional.normalize(states, dim=1)
