"""The noise that a picture of the concept comes from."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from helpers.scenes import scene, searched, target

from salun_sd.attacks.attack import Scene, Try
from salun_sd.attacks.latent import Latent
from salun_sd.attacks.target import Target
from salun_sd.checkpoint.find import find
from salun_sd.draw import prompts
from salun_sd.draw.sample import Row, Sampler


@cache
def by_class() -> Scene:
    """The bundled model of classes, which draws pixels and predicts v."""
    model = Target(find("pocket-ddpm"))
    prompt = prompts.read("classes", ["class=sneaker"], model=model.model)
    picture = Sampler(model.pipeline, 5).latents([Row("sneaker", 3, 3.0, (32, 32))], 1).clamp(-1, 1)
    return Scene(model, "sneaker", prompt, lambda _: picture)


@cache
def tried(of: Callable[[], Scene]) -> Try:
    return searched(Latent(), of())[0]


@pytest.mark.slow
@pytest.mark.parametrize("of", [scene, by_class])
def test_the_noise_gives_the_picture_back_and_is_likely(of):
    one = tried(of)
    assert one.facts["psnr"] > 25 and one.start.shape == of().picture(of().prompts[0]).shape
    assert -1.6 < one.facts["log_likelihood"] < -1 and (one.text, one.guidance) == ("", 1.0)
    (control,) = searched(Latent(), replace(of(), control=True))
    assert control.start is None and control.text == "" and control.guidance == 1.0 and control.seed != one.seed


@pytest.mark.parametrize("of", [scene, by_class])
@torch.no_grad()
def test_the_inversion_is_the_loop_written_out(of):
    """x at a lower noise level a => at the next level b: sqrt(b) x0 + sqrt(1 - b) noise, both as predicted at b."""
    model = of().target
    alphas, null, x = model.schedule.alphas_cumprod, model.encode(""), of().picture(of().prompts[0])
    first, a = (19, alphas[0]) if of is scene else (0, torch.tensor(1.0))
    for t in range(first, 1000, 20):
        output, b = model.predict(x, torch.tensor([t]), null), alphas[t]
        if of is scene:
            noise, x0 = output, (x - (1 - a).sqrt() * output) / a.sqrt()
        else:
            noise, x0 = a.sqrt() * output + (1 - a).sqrt() * x, a.sqrt() * x - (1 - a).sqrt() * output
        x, a = b.sqrt() * x0 + (1 - b).sqrt() * noise, b
    torch.testing.assert_close(tried(of).start, x, rtol=0, atol=1e-3)


def test_a_scheduler_whose_steps_cannot_be_taken_backwards_has_near_ones(monkeypatch):
    spaced = EulerDiscreteScheduler.from_config(target().pipeline.scheduler.config, timestep_spacing="linspace")
    monkeypatch.setattr(target().pipeline, "scheduler", spaced)
    assert searched(Latent(), scene())[0].facts["psnr"] > 25
