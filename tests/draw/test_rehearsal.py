"""Every scheduler of diffusers draws as diffusers does, or is refused by name before anything is drawn."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import schedulers
from diffusers.utils import is_torchsde_available
from helpers import models

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.draw import rehearsal
from salun_sd.draw.sample import Row, Sampler
from salun_sd.edit.resources import Compute
from salun_sd.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about its own schedulers

EVERY = sorted(name for name in dir(schedulers) if name.endswith("Scheduler"))
# Those that diffusers says are for Stable Diffusion, and those that say it of themselves
OURS = {kind.name for kind in schedulers.KarrasDiffusionSchedulers} | {
    "DDIMParallelScheduler", "DDPMParallelScheduler", "LCMScheduler", "SASolverScheduler", "TCDScheduler"
}  # fmt: skip
FOR_EDM, UNSEEDED = "EDMEulerScheduler", "DPMSolverSDEScheduler"
DRAW = sorted(OURS - {FOR_EDM, UNSEEDED})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return find(str(models.write_pipeline(tmp_path_factory.mktemp("model") / "sd1", "sd1")))


@pytest.fixture(scope="module")
def pipeline(model):
    return load_pipeline(model)


def with_noise(model, **changes):
    """The model with another config of its scheduler."""
    other = replace(model)
    other.__dict__["noise"] = {k: v for k, v in (model.noise | changes).items() if v is not None}
    return other


def test_there_are_schedulers():
    assert len(EVERY) > 30 and set(EVERY) >= OURS


@pytest.mark.parametrize("name", EVERY)
def test_every_scheduler_works_or_is_refused_by_name(model, name):
    own = with_noise(model, _class_name=name)
    if name in DRAW:
        rehearsal.check(own, name, 50)
    elif name != "CogVideoXDDIMScheduler":  # DDIM with more noise
        with pytest.raises(UsageError, match=f"{name}.*--scheduler ddim"):
            rehearsal.check(own, name, 50)
        rehearsal.check(own, "DDIMScheduler", 50)


@pytest.mark.parametrize("name", DRAW)
def test_what_works_draws_as_diffusers_does(model, pipeline, name, request):
    own, steps = load_pipeline(with_noise(model, _class_name=name)).scheduler, 4
    rows = [Row("a bag", 5, 3.0, (32, 32)), Row("a coat", 2**32 + 1, 3.0, (32, 32))]
    before = pipeline.scheduler
    request.addfinalizer(lambda: setattr(pipeline, "scheduler", before))
    pipeline.scheduler = own
    images = Sampler(pipeline, steps).draw(rows, 2)
    theirs = pipeline(
        prompt=[row.text for row in rows], guidance_scale=3.0, num_inference_steps=steps, width=32, height=32,
        generator=[torch.Generator().manual_seed(row.seed) for row in rows],
    ).images  # fmt: skip
    assert type(own).__name__ == name
    assert [a.tobytes() for a in images] == [b.tobytes() for b in theirs]


def test_a_scheduler_that_cannot_be_made_leaves_its_noise_to_one_that_is_named(model, pipeline):
    row = [Row("a bag", 5, 3.0, (32, 32))]
    named = Sampler(pipeline, 3, "DDIMScheduler").draw(row, 1)
    for name in ("FlowMatchEulerDiscreteScheduler", "NoSuchScheduler", "VQDiffusionScheduler"):
        pipeline_of = load_pipeline(with_noise(model, _class_name=name, prediction_type=None))
        assert Sampler(pipeline_of, 3, "DDIMScheduler").draw(row, 1)[0].tobytes() == named[0].tobytes()


@pytest.mark.skipif(is_torchsde_available(), reason="no scheduler lacks a package")
def test_a_package_that_a_scheduler_needs_is_named(model, monkeypatch):
    """As LMS without SciPy."""
    monkeypatch.setattr(schedulers, "LMSDiscreteScheduler", schedulers.DPMSolverSDEScheduler)
    own = with_noise(model, _class_name="LMSDiscreteScheduler")
    with pytest.raises(UsageError, match="LMSDiscreteScheduler.*torchsde.*--scheduler ddim"):
        rehearsal.check(own, own.scheduler, 5)
    rehearsal.check(own, "DDIMScheduler", 5)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"_class_name": "LCMScheduler"}, 60),  # of the 50 that it was distilled for
        ({"_class_name": "LCMScheduler", "rescale_betas_zero_snr": True}, 4),  # NaN from the first step
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, 4),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, 4),
        ({"skip_prk_steps": False}, 2),
        ({}, 1001),
    ],
)
def test_settings_and_numbers_of_steps_that_cannot_draw_are_refused(model, changes, steps):
    own = with_noise(model, **changes)
    with pytest.raises(UsageError, match="--scheduler|--denoising-steps"):
        rehearsal.check(own, own.scheduler, steps)


@pytest.mark.parametrize("changes", [{"timestep_spacing": "zig"}, {"steps_offset": "a"}])
def test_settings_that_are_damaged_name_their_file(model, changes):
    with pytest.raises(UsageError, match="scheduler_config.json") as e:
        rehearsal.check(with_noise(model, _class_name="DDIMScheduler", **changes), "DDIMScheduler", 20)
    assert "dtype" not in str(e.value)


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}, {"final_sigmas_type": "sigma_min"},
     {"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}, {"rescale_betas_zero_snr": True}],
)  # fmt: skip
def test_settings_that_people_draw_with_pass(model, kind, prediction, changes):
    own = with_noise(model, _class_name=kind, prediction_type=prediction, **changes)
    for steps in (1, 2, 25):
        rehearsal.check(own, kind, steps)


def test_a_checkpoint_that_cannot_be_drawn_is_not_trained_where_that_draws(model):
    compute = Compute.of(with_noise(model, _class_name="FlowMatchEulerDiscreteScheduler"), None, None)
    compute.drawing(32, draws=False)
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler"):
        compute.drawing(32, draws=True)


def test_a_model_of_flow_matching_is_refused_when_it_is_found(model, tmp_path):
    folder = shutil.copytree(model.path, tmp_path / "flow")
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler"):
        find(str(folder))
