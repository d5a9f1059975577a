import pytest
import torch
from diffusers import DDPMScheduler

from salun_sd.core.diffusion import Schedule, add_noise, guide, mse, noise_for, target


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_targets_are_diffusers_own(prediction):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              prediction_type=prediction)  # fmt: skip
    schedule = Schedule(scheduler.alphas_cumprod, prediction)
    t, noise = noise_for(range(5), (4, 8, 8), 1000, seed=3)
    x0 = torch.randn(5, 4, 8, 8)
    torch.testing.assert_close(add_noise(schedule, x0, noise, t), scheduler.add_noise(x0, noise, t))
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(target(schedule, x0, noise, t), wanted)


def test_guidance_is_diffusers_scale_minus_one():
    c, u = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(guide(c, u, 6.5), u + 7.5 * (c - u))
    assert torch.equal(guide(c, u, 0), c)


def test_noise_is_a_function_of_seed_and_index_alone():
    t, noise = noise_for(range(6), (4, 8, 8), 1000, seed=0)
    t2, noise2 = noise_for([4, 2], (4, 8, 8), 1000, seed=0)
    assert torch.equal(t[[4, 2]], t2) and torch.equal(noise[[4, 2]], noise2)
    t3, noise3 = noise_for(range(6), (4, 8, 8), 1000, seed=1)
    assert not torch.equal(t, t3) and not torch.equal(noise, noise3)


def test_mse_is_per_example():
    a, b = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(mse(a, b)[1], torch.nn.functional.mse_loss(a[1], b[1]))
