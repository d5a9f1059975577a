"""One new embedding."""

from dataclasses import replace

import pytest
import torch
from helpers.scenes import NAME, named, run, scene, searched, target

from salun_sd.attacks.attack import Attack, Scene
from salun_sd.attacks.catalog import ATTACKS
from salun_sd.attacks.conditioning import Conditioning
from salun_sd.attacks.inversion import Inversion, around
from salun_sd.attacks.target import Target
from salun_sd.checkpoint.find import find
from salun_sd.draw import prompts
from salun_sd.draw.sample import Given, Row, Sampler

SMALL = Inversion(steps=12, batch_size=4)


@torch.no_grad()
def loss(attack: Attack, asked: Scene, found: dict[str, torch.Tensor]) -> float:
    """Of the same noises and timesteps."""
    g, x0 = torch.Generator().manual_seed(0), asked.pictures().repeat(8, 1, 1, 1)
    noise, t = torch.randn(x0.shape, generator=g), torch.randint(1000, (len(x0),), generator=g)
    (one,) = attack.tries(asked, asked.prompts[0], found)
    return asked.target.loss(x0, noise, t, one.condition).mean().item()


def classes() -> Scene:
    """The bundled model of classes, asked for bags; the pictures show sneakers."""
    model = Target(find("pocket-ddpm"))
    bag = prompts.read("classes", ["class=bag"], model=model.model)
    picture = Sampler(model.pipeline, 5).latents([Row(NAME, 3, 3.0, (32, 32))], 1)
    return Scene(model, "bag", bag, lambda _: picture)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inversion", "conditioning"])
def test_what_is_found_denoises_the_pictures_better_than_the_start(name):
    for asked in (scene(), classes()):
        attacks = [ATTACKS[name](steps=n, batch_size=4) for n in (0, 12)]
        start, found = (loss(attack, asked, attack.prepare(asked)) for attack in attacks)
        assert found < start


def test_the_new_word_stands_where_the_concepts_name_stood():
    (word,) = target().tables()[0][target().ids(NAME)].split(1)
    prompt = named()[0]
    (one,) = Inversion().tries(scene(), prompt, {"0": word})
    torch.testing.assert_close(one.condition, target().encode(prompt.text))
    assert NAME not in one.text and one.text.startswith(prompt.text.partition(NAME)[0])
    assert around(scene(), prompt._replace(text=f"Two {NAME.upper()}, red")) == ("Two", ", red")
    assert around(scene(), prompt._replace(text="shoes")) == ("a photo of a", "")


def test_a_conditioning_starts_without_the_name_where_the_prompts_have_none():
    for asked, text in ((scene(), "a photo of a sneaker"), (replace(scene(), nameless=True), "a photo of a thing")):
        torch.testing.assert_close(Conditioning(steps=0).prepare(asked), target().encode(text))
    assert Conditioning(steps=0).prepare(replace(classes(), nameless=True))["embedding"].shape[0] == 1


def test_a_classs_own_embedding_draws_the_class():
    pipeline = classes().target.pipeline
    given = Given(classes().target.free(NAME))
    rows = [Row(NAME, 3, guidance, (32, 32)) for guidance in (3.0, 1.0)]
    for row in rows:
        wanted = Sampler(pipeline, 2).draw([row], 1)
        assert Sampler(pipeline, 2, given=lambda _: given).draw([row], 1)[0].tobytes() == wanted[0].tobytes()


def test_the_control_is_a_random_embedding_as_long_as_a_words():
    tables, seen = target().tables(), set()
    for seed in (0, 1):
        found = SMALL.prepare(scene(control=True, seed=seed, picture=None))
        lengths = tables[0].norm(dim=1)
        assert found["0"].shape == (1, tables[0].shape[1]) and lengths.min() <= found["0"].norm() <= lengths.max()
        seen.add(found["0"][0, 0].item())
    assert len(seen) == 2 and len(searched(SMALL, scene(control=True))) == 1


def test_a_search_is_the_same_again(tmp_path):
    attack = Inversion(steps=3, batch_size=2)
    for name in "ab":
        run(attack, scene(2), tmp_path / name).search()
    files = [sorted(path for path in (tmp_path / name).rglob("*.safetensors")) for name in "ab"]
    assert len(files[0]) == 3 and all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_a_prompt_that_is_too_long_loses_its_end_and_the_name_if_it_stands_there():
    ahead, behind = (named()[0]._replace(text=text) for text in (f"{NAME} " + "shoe " * 40, "shoe " * 40 + NAME))
    before, after = around(scene(), ahead)
    assert before == "" and ahead.text.startswith(f"{NAME} {after}") and 0 < len(after) < 100
    assert around(scene(), behind) == ("a photo of a", "")
    for prompt in (ahead, behind):
        assert Inversion().tries(scene(), prompt, SMALL.prepare(scene(control=True, picture=None)))
