"""Fine-tuning as an attack: it learns its pictures, in any dtype, and LoRA beside the model's own weights."""

from dataclasses import replace

import pytest
import torch

from salun_sd.attacks.relearn import Benign, Relearn, RelearnLora
from salun_sd.attacks.target import Target
from salun_sd.draw.encode import encode_prompts

STEPS = {"steps": (5,), "batch_size": 2}
FULL, BESIDE = Relearn(lr=1e-3, **STEPS), RelearnLora(lr=1e-2, **STEPS)


def loss(attack, scene) -> float:
    """Of the attack's own pictures, at noise levels and noise that it did not see."""
    latents, texts = attack.examples(scene)
    t, g = torch.arange(100, 1000, 200), torch.Generator().manual_seed(7)
    conditions = encode_prompts(scene.target.pipeline, texts)
    with torch.no_grad():
        return sum(
            scene.target.loss(
                x0.expand(5, -1, -1, -1), torch.randn((5, *x0.shape), generator=g), t,
                {key: value[n : n + 1] for key, value in conditions.items()},
            ).mean().item() for n, x0 in enumerate(latents)
        )  # fmt: skip


@pytest.mark.parametrize("attack", [FULL, BESIDE, Benign(lr=1e-3, **STEPS)], ids=["full", "lora", "benign"])
def test_the_loss_of_its_pictures_falls(attack, tiny):
    if attack is BESIDE:
        pytest.importorskip("peft")
    before = loss(attack, tiny)
    for _ in attack.stages(tiny):
        assert loss(attack, tiny) < 0.98 * before
    assert loss(attack, tiny) == before


def test_it_takes_the_first_pictures_with_the_texts_of_their_prompts(tiny):
    for attack, count in ((FULL, 2), (replace(FULL, pictures=1), 1), (RelearnLora(), 2)):
        latents, texts = attack.examples(tiny)
        assert texts == [prompt.text for prompt in tiny.prompts[:count]]
        assert torch.equal(latents, tiny.pictures()[:count])


@pytest.mark.parametrize("attack", [FULL, BESIDE], ids=["full", "lora"])
def test_another_seed_is_another_training(attack, tiny):
    if attack is BESIDE:
        pytest.importorskip("peft")
    ends = []
    for seed in (0, 0, 1):
        for _ in replace(attack, steps=(1,)).stages(replace(tiny, seed=seed)):
            ends.append([p.detach().clone() for p in tiny.target.unet.parameters()])
    same, other = (all(map(torch.equal, ends[0], end)) for end in ends[1:])
    assert same and not other


def test_steps_too_small_for_bfloat16_add_up(tiny):
    target = Target(tiny.target.model, torch.bfloat16)
    before, moved = [p.detach().clone() for p in target.unet.parameters()], []
    for _ in Relearn(lr=1e-5, steps=(1, 8), batch_size=1).stages(replace(tiny, target=target)):
        moved.append(sum(int((a != b).sum()) for a, b in zip(before, target.unet.parameters(), strict=True)))
        assert target.unet.dtype == torch.bfloat16
    assert moved[1] > 2 * moved[0]


def test_lora_leaves_the_models_own_weights_alone(tiny):
    pytest.importorskip("peft")
    before = {name: p.detach().clone() for name, p in tiny.target.unet.named_parameters()}
    for _ in replace(BESIDE, steps=(1,)).stages(tiny):
        now = {name.replace(".base_layer", ""): p for name, p in tiny.target.unet.named_parameters()}
        assert all(torch.equal(now[name], value) for name, value in before.items())
        assert {name for name in now if name not in before} == {name for name in now if ".lora_" in name} != set()


def test_lora_opens_no_other_gpu_of_the_machine(tiny, monkeypatch, recwarn):
    """Their generators are neither asked nor seeded: that would take memory on each."""
    pytest.importorskip("peft")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"GPU {device} was opened"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were seeded"))
    assert list(BESIDE.stages(tiny)) and not [w for w in recwarn if "available devices" in str(w.message)]
