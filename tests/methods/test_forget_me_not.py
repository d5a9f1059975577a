"""Forget-Me-Not: the attention on the concept's tokens, seen and lowered."""

import logging
from copy import deepcopy

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.models import TINY

from salun_sd.core.diffusion import Examples, predict
from salun_sd.core.mask import full_bits
from salun_sd.core.masked import MaskedAdam
from salun_sd.errors import TrainingError
from salun_sd.methods.batches import Rows, Training
from salun_sd.methods.forget_me_not import ForgetMeNot
from salun_sd.methods.loop import Erasure, Retain, Term, erase, losses_of
from salun_sd.runtime.device import Precision

METHOD, TOKENS = ForgetMeNot(), torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()


def family(name):
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY[name]["unet"]).eval()


def rows_of(unet, tokens, seed=0):
    """A row for each of `tokens`, with random contexts."""
    g, n, config = torch.Generator().manual_seed(seed), len(tokens), unet.config
    condition = {"context": torch.randn(*tokens.shape, config.cross_attention_dim, generator=g)}
    if config.addition_embed_type:
        condition["text_embeds"] = torch.randn(n, 40, generator=g)
        condition["time_ids"] = torch.full((n, 6), 32.0)
    x, target = torch.randn(2, n, 4, 8, 8, generator=g)
    return Rows(x, torch.randint(1000, (n,), generator=g), condition, target, tokens=tokens)


def loss_of(unet, *rows):
    with METHOD.watching(unet, rows[0]):
        terms = [
            Term("forget", METHOD, 1.0, rows[0]),
            *(Term("retain", Retain(1.0, "noise"), 1.0, r) for r in rows[1:]),
        ]
        return losses_of(unet, terms, None)[0]


def erasure_of(schedule, examples, tokens, retain=None, steps=3, **rest):
    training = Training(schedule, examples, retain, torch.zeros(len(examples)).long(), tokens=tokens)
    return Erasure(METHOD, Retain(0.5, "noise"), training, steps, batch_size=2, seed=0, **rest)


def run(unet, erasure, lr=1e-3):
    bits = full_bits({n: p.shape for n, p in unet.named_parameters()})
    return list(erase(unet, MaskedAdam(unet, bits, lr, holds=erasure.holds), erasure, name="here/model"))


@pytest.mark.parametrize("name", TINY)
def test_the_loss_is_the_root_mean_square_of_the_probabilities_of_every_layers_own_queries_and_keys(name):
    unet = family(name)
    rows, inputs = rows_of(unet, TOKENS), []
    layers = [layer for layer_name, layer in unet.named_modules() if layer_name.endswith("attn2")]
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, kw: inputs.append((m, args[0], rows.condition["context"])),
                                        with_kwargs=True)
        for layer in layers
    ]  # fmt: skip
    with torch.no_grad():
        predict(unet, rows.x_t, rows.t, rows.condition)
        for hook in hooks:
            hook.remove()
        seen = [[], []]
        for layer, pixels, context in inputs:
            width = layer.to_q.out_features // layer.heads
            for image in range(2):
                q, k = layer.to_q(pixels[image]), layer.to_k(context[image])
                for of_head in range(0, q.shape[1], width):
                    logits = q[:, of_head : of_head + width] @ k[:, of_head : of_head + width].T / width**0.5
                    seen[image].append((logits.softmax(1)[:, TOKENS[image]] ** 2).flatten())
        wanted = torch.stack([torch.cat(of_image).mean() for of_image in seen])
        loss = loss_of(unet, rows)
    assert len(inputs) == len(layers) > 1 and wanted.min() > 0
    torch.testing.assert_close(loss, wanted.sqrt())


def test_watching_changes_no_prediction_and_goes_after_an_error(fresh_unet):
    rows, before = rows_of(fresh_unet, TOKENS), fresh_unet.attn_processors
    with torch.no_grad():
        plain = predict(fresh_unet, rows.x_t, rows.t, rows.condition)
        with pytest.raises(ZeroDivisionError), METHOD.watching(fresh_unet, rows):
            assert torch.equal(predict(fresh_unet, rows.x_t, rows.t, rows.condition), plain)
            assert fresh_unet.attn_processors != before
            raise ZeroDivisionError
    assert fresh_unet.attn_processors == before


@pytest.mark.parametrize("retained", [False, True])
def test_checkpointing_gives_the_same_gradient(fresh_unet, retained):
    rows = [rows_of(fresh_unet, TOKENS), *([rows_of(fresh_unet, TOKENS, 1)] if retained else [])]
    gradients = []
    for checkpointing in (False, True):
        unet = deepcopy(fresh_unet).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with METHOD.watching(unet, rows[0]):
            terms = [Term("forget", METHOD, 1.0, rows[0])] + [
                Term("retain", Retain(1.0, "noise"), 1.0, r) for r in rows[1:]
            ]
            sum(loss.sum() for loss in losses_of(unet, terms, None)).backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert any("attn2.to_k" in name for name in gradients[0])


def test_the_rows_to_retain_count_for_nothing(fresh_unet):
    rows = rows_of(fresh_unet, TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(fresh_unet, rows, rows_of(fresh_unet, TOKENS, 1)), loss_of(fresh_unet, rows))


@pytest.mark.parametrize("widens", [False, True])
@torch.no_grad()
def test_in_bfloat16_it_is_the_same_loss_to_rounding(fresh_unet, widens):
    rows = rows_of(fresh_unet, TOKENS)
    exact = loss_of(fresh_unet, rows)
    loss = loss_of(Precision(torch.bfloat16, widens, "").prepare(fresh_unet.to(torch.bfloat16), False), rows)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_training_lowers_the_attention_on_the_concepts_tokens(pocket, schedule, forget, retain, caplog):
    """On the bundled checkpoint; another step's noise is another sample of the loss, so means of a few are compared."""
    unet, tokens = deepcopy(pocket.unet), torch.zeros(3, 24).bool()
    tokens[1, 5] = True  # "sneaker"
    caplog.set_level(logging.INFO)
    rows = run(unet, erasure_of(schedule, forget, tokens, retain, steps=12), lr=5e-4)
    attention = [row["forget"] for row in rows]
    assert sum(attention[-4:]) < 0.5 * sum(attention[:4])
    assert f"{attention[0]:.3f}" in caplog.text


def test_parts_are_the_same_update_and_what_no_gradient_reaches_stays(fresh_unet, schedule, forget):
    """The output layer lies behind all attention."""
    context = {"context": forget.prompts["context"][:, :6]}
    examples = Examples(forget.latents, context, forget.which)
    tokens, trained = torch.zeros(3, 6).bool(), []
    tokens[1, 2:4] = True
    for parts in (1, 2):
        unet = deepcopy(fresh_unet)
        trained.append((run(unet, erasure_of(schedule, examples, tokens, parts=parts)), unet.state_dict()))
    (rows, weights), (rows_in_parts, weights_in_parts) = trained
    assert [r["loss"] for r in rows_in_parts] == pytest.approx([r["loss"] for r in rows], rel=1e-3)
    for name, before in fresh_unet.state_dict().items():
        torch.testing.assert_close(weights[name], weights_in_parts[name], rtol=1e-3, atol=2e-4)
        assert torch.equal(weights[name], before) or not name.startswith("conv_out"), name
    assert not torch.equal(weights["conv_in.weight"], fresh_unet.conv_in.weight)


def test_no_attention_to_lower_is_an_error_by_name():
    with pytest.raises(TrainingError, match="here/model"):
        METHOD.check_first(3e-5, "here/model")
    METHOD.check_first(1e-2, "here/model")
