"""Points on the paths by which a base draws, against diffusers' own pipelines; and their copy in the cache."""

from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler
from helpers.models import write_pipeline

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.core.diffusion import noise_for
from salun_sd.edit import encodings
from salun_sd.edit.concepts import Concept
from salun_sd.edit.encodings import LoadedBase
from salun_sd.edit.sources import Sources
from salun_sd.edit.training_data import collect
from salun_sd.edit.trajectories import STEPS, half_drawn
from salun_sd.methods.esd import ESD

CONCEPT, ANCHOR = "a photo of a sneaker", "a photo of a bag"


@pytest.mark.parametrize(("family", "prediction"), [
    ("pocket", None), ("sd1", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon"),
])  # fmt: skip
def test_a_point_lies_on_the_path_of_diffusers_pipeline(tmp_path, monkeypatch, family, prediction):
    """Pipelines whose own schedulers are DDIM, PNDM and Euler; two points go through the UNet together."""
    model = "pocket" if family == "pocket" else write_pipeline(tmp_path / family, family, prediction=prediction)
    pipeline = load_pipeline(find(str(model)))
    points = half_drawn(pipeline, [CONCEPT, ANCHOR], 32, seed=2, guidance=3.0)
    noise = noise_for(range(2), (4, 8, 8), STEPS, seed=2)[1]
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    assert len(set(points["times"].tolist())) == 2
    for n, text in enumerate([CONCEPT, ANCHOR]):
        path = [noise[n]]

        def keep(_, i, t, kept, path=path):
            path.append(kept["latents"][0])
            return kept

        pipeline(text, latents=noise[n : n + 1], num_inference_steps=STEPS, guidance_scale=3.0, height=32, width=32,
                 output_type="latent", callback_on_step_end=keep)  # fmt: skip
        step = pipeline.scheduler.timesteps.tolist().index(points["times"][n])
        torch.testing.assert_close(points["latents"][n], path[step], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(path[step], path[step + 1], atol=1e-2)


def test_points_are_spread_over_the_whole_path(tiny):
    pipeline = load_pipeline(find(tiny))
    times = half_drawn(pipeline, ["a tree"] * 64, 32, seed=0, guidance=1.0)["times"]
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    assert set(times.tolist()) <= set(scheduler.timesteps.tolist())
    assert min(Counter((times // 200).tolist())[fifth] for fifth in range(5)) >= 5


def esd_of(tiny, *, anchor=None, seed=0, samples=2):
    """What ESD is given for a concept with a synonym."""
    sources = Sources(concepts=(Concept(CONCEPT, anchor, ("a boot",)),), method=ESD(), images=[None], retains=False,
                      retain=None, caption=None, prompts=[], samples=samples, seed=seed, holds_empty=False)  # fmt: skip
    return collect(LoadedBase(find(tiny), 32), sources, needs_mask=False).training


def test_a_point_is_drawn_once_whatever_else_the_loss_needs(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path))
    first, loaded = esd_of(tiny), []

    def load(model, **parts):
        loaded.append(parts)
        return load_pipeline(model, **parts)

    with monkeypatch.context() as patched:
        patched.setattr(encodings, "load_pipeline", load)
        again, anchored = esd_of(tiny), esd_of(tiny, anchor=ANCHOR)
    assert [parts["unet"] for parts in loaded] == [False]  # for the anchor's embedding
    for training in (again, anchored):
        assert torch.equal(training.forget.latents, first.forget.latents) and torch.equal(training.times, first.times)
    assert first.anchors is None and len(anchored.anchors) == 2
    assert first.forget.which.unique().numel() == 2 and first.empty not in first.forget.which
    [file] = tmp_path.rglob("encoded.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    made_anew = esd_of(tiny)
    assert torch.equal(made_anew.forget.latents, first.forget.latents) and torch.equal(made_anew.times, first.times)
    assert not torch.equal(esd_of(tiny, seed=1).forget.latents, first.forget.latents)
