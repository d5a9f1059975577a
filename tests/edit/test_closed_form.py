"""UCE on whole checkpoints: embeddings, matrices, and what they read from prompts afterwards."""

import pytest
import torch
from helpers.models import write_pipeline

from salun_sd.checkpoint.find import find
from salun_sd.draw.encode import encode_prompts
from salun_sd.edit import closed_form, patch
from salun_sd.edit.concepts import Concept
from salun_sd.edit.encodings import LoadedBase
from salun_sd.edit.supports import support_of
from salun_sd.errors import UsageError
from salun_sd.methods.uce import UCE

SNEAKER, BAG, COAT = "a photo of a sneaker", "a photo of a bag", "a photo of a coat"


def erased(base, mask, method, concepts, preserved=()):
    """The UNet's tensors after UCE, by name, and the changes against the base."""
    values = closed_form.solve(LoadedBase(base, 32), method, mask, concepts, preserved)
    weights = patch.merged(base.unet, patch.of_training(values, mask.bits, base.unet, False))
    return {name: t.read() for name, t in weights.items()}, patch.changes(base.unet, weights, mask.bits)


def test_the_empty_prompt_is_the_anchor_of_a_concept_that_has_none():
    loaded, mask = LoadedBase(find("pocket"), 32), support_of(UCE.support).mask(find("pocket"), [], 0)
    none, empty, bag = (
        closed_form.solve(loaded, UCE(), mask, [Concept(SNEAKER, anchor)], []) for anchor in (None, "", BAG)
    )
    assert all(torch.equal(none[k], empty[k]) and not torch.equal(none[k], bag[k]) for k in none)


@pytest.mark.parametrize("spec", ["cross-attention-kv", "none", "random:0.5"])
def test_the_last_tokens_keys_and_values_are_the_anchors_and_nothing_else_changes(spec):
    """The concept and its synonym go to the anchor; outside the matrices, and outside the mask, all bits stay."""
    base = find("pocket")
    mask, concepts = support_of(spec).mask(base, [], 0), [Concept(SNEAKER, BAG, (f"{SNEAKER} at night",))]
    new, changes = erased(base, mask, UCE(ridge=1e-4), concepts, [COAT])
    names = closed_form.matrices(base)
    assert changes["outside"] == 0 < changes["inside"] <= sum(int(mask.bits[name].sum()) for name in names)
    pipeline = LoadedBase(base, 32).encoders()
    contexts = encode_prompts(pipeline, [SNEAKER, BAG, COAT])["context"][:, 5]  # "a photo of a X": X
    for name in names:
        before, after = base.unet[name].read().float() @ contexts.T, new[name].float() @ contexts.T
        assert (after[:, 0] - before[:, 1]).norm() < 0.05 * (before[:, 0] - before[:, 1]).norm(), name
        assert (after[:, 2] - before[:, 2]).norm() < 0.05 * (before[:, 2] - before[:, 1]).norm(), name


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_each_family_is_rewritten_and_a_prompt_that_is_there_twice_counts_once(tmp_path, family):
    base = find(str(write_pipeline(tmp_path / family, family)))
    mask, concepts = support_of(UCE.support).mask(base, [], 0), [Concept(SNEAKER, BAG), Concept(COAT, BAG)]
    new, changes = erased(base, mask, UCE(), concepts, [BAG])
    assert changes["outside"] == 0 < changes["inside"] and all(t.isfinite().all() for t in new.values())
    assert all(torch.equal(new[k], t) for k, t in erased(base, mask, UCE(), concepts, [BAG, BAG])[0].items())


def test_a_support_without_keys_and_values_is_refused():
    base = find("pocket")
    mask = support_of("not-cross-attention").mask(base, [], 0)
    with pytest.raises(UsageError, match="--mask cross-attention-kv"):
        closed_form.solve(LoadedBase(base, 32), UCE(), mask, [Concept(SNEAKER, BAG)], [])
