"""Which attacks run: those of --with, or all that can, and why the others cannot."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from salun_sd.attacks.attack import ROOM, Attack
from salun_sd.attacks.catalog import ATTACKS
from salun_sd.checkpoint.families import DIT
from salun_sd.checkpoint.load import load_tokenizers
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.errors import UsageError


def chosen(named: Sequence[str], budget: str, absent: Mapping[str, str]) -> tuple[dict[str, Attack], dict[str, str]]:
    """The attacks that run, and why each other one cannot: of the named ones, or of all. `absent` has what attacks may
    need and do not have, and why. Raises UsageError for a budget or a name that there is not, and where a named attack
    cannot run."""
    if budget not in Attack.cases:
        raise UsageError(f"There is no --budget {budget}: give {' or '.join(Attack.cases)}.")
    if unknown := [name for name in named if name not in ATTACKS]:
        raise UsageError(f"There is no attack {unknown[0]}: give --with one of {', '.join(ATTACKS)}.")
    wanted = [name for name in ATTACKS if name in (named or ATTACKS)]
    whys = {name: [why for need, why in absent.items() if need in ATTACKS[name].needs] for name in wanted}
    reasons = {name: why[0] for name, why in whys.items() if why}
    for name in filter(reasons.get, named):
        raise UsageError(f"--with {name} {reasons[name]}. Without --with, all attacks run that can.")
    return {name: ATTACKS[name].of(budget) for name in wanted if name not in reasons}, reasons


def check_used(named: Sequence[str], *, pictures: object, words: object, adversarial: object, mask: object) -> None:
    """Raise UsageError for an option that is given, and that none of the named attacks has a use for."""
    needed = {"picture": ("pictures", pictures), "words": ("words", words), "mask": ("mask", mask),
              "adversarial": ("adversarial", adversarial)}  # fmt: skip
    for need, (option, given) in needed.items():
        users = [name for name, attack in ATTACKS.items() if need in attack.needs]
        if named and given and not set(users) & set(named):
            raise UsageError(f"--{option} has no use in {', '.join(named)}: leave it out, or name "
                             f"{'one of ' * (len(users) > 1)}{', '.join(users)} in --with.")  # fmt: skip


def places_of(model: Checkpoint) -> int:
    """The tokens that a model reads of a text, without those of the beginning and the end."""
    return min(tokenizer.model_max_length for tokenizer in load_tokenizers(model).values()) - 2


def not_given(*, base: object, pictures: object, adversarial: object, mask: object) -> dict[str, str]:
    """What attacks may need and was not given, with the option that gives it."""
    needs = {
        "picture": (base or pictures, "pictures of the concept: give --base, which draws them, or --pictures"),
        "base": (base, "the model before the erasure: give --base"),
        "others": (base, "pictures of other things, which the base draws: give --base"),
        "adversarial": (adversarial, "prompts of others: give --adversarial with a CSV file"),
        "mask": (mask, "the positions of the erased weights: give --mask with a mask file"),
        "peft": (find_spec("peft"), "the package peft: pip install 'salun-sd[lora]'"),
    }
    return {need: f"needs {what}" for need, (given, what) in needs.items() if not given}


def not_possible(model: Checkpoint, has_others: bool) -> dict[str, str]:
    """What attacks may need, and this model or these prompts do not allow. `has_others` says whether prompts ask for
    other things than the concept."""
    absent = {}
    if model.classes:
        absent["text"] = f"is for models that read a text, and {model.name} draws a class"
    elif (places := places_of(model)) < ROOM:
        absent["room"] = f"searches for {ROOM} tokens, and {model.name} reads {places}"
    if model.family is DIT:
        absent["embedding"] = f"searches for an embedding, and the DiT {model.name} has one in each block"
    if not model.is_guided:
        absent["null"] = f"draws without a class, and {model.name} has no null class"
    if not has_others:
        absent["others"] = "trains on pictures of other things, and these prompts ask for none: give other --prompts"
    return absent
