from copy import deepcopy

import torch
from helpers.erasures import check_forget_loss, erasure_by, of_prompt, train

from salun_sd.core.diffusion import add_noise, noise_for, target
from salun_sd.methods.ascent import Ascent


def test_the_loss_is_the_equation(fresh_unet, schedule, forget, contexts):
    v = schedule._replace(prediction_type="v_prediction")

    def naive(batch):
        x0, t, noise = forget.latents[batch.forget], batch.t[:4], batch.noise[:4]
        prediction = of_prompt(fresh_unet, contexts, add_noise(v, x0, noise, t), t, 1)
        return -(prediction - target(v, x0, noise, t)).square().mean()

    check_forget_loss(fresh_unet, erasure_by(Ascent(), v, forget), naive)


def test_the_denoising_loss_of_the_concept_rises(pocket, schedule, forget, contexts):
    unet = deepcopy(pocket.unet)
    t, noise = noise_for(range(10), (4, 8, 8), 1000, seed=3)
    x_t = add_noise(schedule, forget.latents, noise, t)

    @torch.no_grad()
    def denoising_loss():
        return (of_prompt(unet, contexts, x_t, t, 1) - noise).square().mean().item()

    before = denoising_loss()
    list(train(unet, erasure_by(Ascent(), schedule, forget, steps=4), lr=1e-4))
    assert denoising_loss() > 1.1 * before
