"""What the user gives to an attack."""

import numpy as np
import pytest
import torch
from helpers.scenes import run
from PIL import Image

from salun_sd.attacks.catalog import ATTACKS
from salun_sd.attacks.given import Material, Pictures, Texts
from salun_sd.draw.prompts import overridden
from salun_sd.errors import SalunError, UsageError

SIZE = (48, 32)  # another one than the model's own


@pytest.fixture
def material(tiny, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(file := tmp_path / "picture.png")
    pictures = Pictures({p.case: file for p in tiny.prompts}, [(file, "a bag")], SIZE)
    return Material(pictures, Texts([], [], []), None, None)


@pytest.mark.parametrize(("name", "settings"), [
    ("prefix", {"timesteps": 1, "steps": 1}), ("inversion", {"steps": 1, "batch_size": 2}),
    ("continue", {"begun": (1,)}),
])  # fmt: skip
def test_it_searches_and_draws_in_the_size_that_is_asked_for(name, settings, material, tiny, tmp_path):
    asked = material.scene(tiny.target, tiny.concept, overridden(tiny.prompts[:1], 1.0, SIZE), seed=0)
    asked.base, sizes = tiny.target, set()
    hook = tiny.target.unet.register_forward_hook(lambda unet, inputs, output: sizes.add(output.sample.shape[2:]))
    on_one = run(ATTACKS[name](**settings), asked, tmp_path / "out", steps=1)
    try:
        on_one.search()
        [one] = on_one.tries(asked.prompts[0].case)
        if one.start is None:
            assert {Image.open(on_one.out / line["file"]).size for line in on_one.draw()} == {SIZE}
    finally:
        hook.remove()
    assert sizes == {(8, 12)} and (one.start is None or one.start.shape == asked.pictures().shape)
    latents, captions = material.pictures.captioned(tiny.target)()
    assert latents.shape == (1, 4, 8, 12) and captions == ["a bag"] and torch.equal(latents, asked.pictures())


def test_the_words_are_lines_of_any_text_file_and_no_prompt_set(tiny, tmp_path):
    (file := tmp_path / "words.md").write_text("\nprompt, class\n a shoe with laces \n\n")
    texts = Texts.of("a sneaker", tiny.target.model, file, None, None, SIZE)
    assert texts.words == ["prompt, class", "a shoe with laces"]
    (empty := tmp_path / "empty.txt").write_text("\n \n")
    (unnamed := tmp_path / "theirs.csv").write_text("text,class\na shoe,sneaker\n")
    for words, adversarial, named in (
        (empty, None, "--words"), ("i2p", None, "--words i2p"), (None, "pocket", "--adversarial pocket"),
        (None, unnamed, "theirs.csv"),
    ):  # fmt: skip
        with pytest.raises(SalunError if adversarial == unnamed else UsageError, match=named):
            Texts.of("a sneaker", tiny.target.model, words, adversarial, None, SIZE)
