"""Which attacks run, and the reason of each that does not."""

import json
import sys

import pytest
from helpers.by_class import write_ddpm, write_dit
from helpers.models import write_pipeline

from salun_sd.attacks.attack import ROOM
from salun_sd.attacks.catalog import ATTACKS
from salun_sd.attacks.choice import chosen, not_given, not_possible
from salun_sd.checkpoint.find import find
from salun_sd.errors import UsageError

ALL = {"base": "b", "pictures": "p", "adversarial": "a", "mask": "m"}


@pytest.mark.parametrize(("lacking", "names"), [
    ({}, set()),
    ({"mask"}, {"positions"}),
    ({"adversarial"}, {"prompts"}),
    ({"pictures"}, set()),  # the base draws them
    ({"base"}, {"tokens", "continue", "benign"}),
    ({"base", "pictures"}, {"prefix", "inversion", "conditioning", "latent", "relearn", "relearn-lora", "tokens",
                            "continue", "benign"}),
])  # fmt: skip
def test_an_attack_without_what_it_needs_is_named_with_the_option_that_gives_it(lacking, names):
    attacks, reasons = chosen([], "quick", not_given(**ALL | dict.fromkeys(lacking)))
    assert set(reasons) == names and [*attacks] == [name for name in ATTACKS if name not in names]
    assert all(any(f"--{option}" in why for option in lacking) for why in reasons.values())
    for name in names:
        with pytest.raises(UsageError, match=f"--with {name} "):
            chosen([name], "quick", not_given(**ALL | dict.fromkeys(lacking)))
    assert list(chosen(["genetic"], "paper", not_given(**dict.fromkeys(ALL)))[0]) == ["genetic"]


def test_without_peft_the_attack_that_needs_it_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "[lora]" in chosen([], "quick", not_given(**ALL))[1]["relearn-lora"]


def test_a_model_has_the_attacks_that_it_allows(tmp_path):
    def left_out(model, **given) -> set[str]:
        return set(chosen([], "quick", not_possible(find(str(model)), given.get("has_others", True)))[1])

    searching_texts = {"paraphrase", "prompts", "prefix", "tokens", "genetic", "relearn-lora"}
    assert left_out("pocket") == set() and left_out("pocket", has_others=False) == {"benign"}
    assert left_out("pocket-ddpm") == searching_texts
    assert left_out(write_dit(tmp_path / "dit")) == searching_texts | {"inversion", "conditioning"}
    unguided = write_ddpm(tmp_path / "bare", None, embeddings=3, guidance=1.0)
    assert left_out(unguided) == searching_texts | {"latent"}


def test_a_model_that_reads_fewer_tokens_than_are_searched_has_no_such_attack(tmp_path):
    file = write_pipeline(tmp_path / "short", "sd1") / "tokenizer" / "tokenizer_config.json"
    for places, names in ((ROOM, set()), (ROOM - 1, {"tokens", "genetic"})):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": places + 2}))
        reasons = chosen([], "quick", not_possible(find(str(tmp_path / "short")), True))[1]
        assert set(reasons) == names and all(str(places) in why for why in reasons.values())
