"""Each method's own claim, on a small net and real gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.pictures import CLASSES, classifier, task

from salun_sd.classifier.methods.be import be, expand, shrink
from salun_sd.classifier.methods.bs import nearest
from salun_sd.classifier.methods.catalog import METHODS, forget
from salun_sd.classifier.methods.iu import iu, woodfisher
from salun_sd.classifier.methods.l1_sparse import l1_sparse
from salun_sd.classifier.methods.rl import rl
from salun_sd.classifier.methods.salun import control_bits, salient_bits
from salun_sd.classifier.settings import METHODS as PUBLISHED
from salun_sd.core.mask import kept

FIRST = lambda: torch.Generator().manual_seed(0)  # noqa: E731


def test_every_method_that_is_offered_is_there():
    assert list(METHODS) == list(PUBLISHED)


def spied(monkeypatch, module, run):
    """The labels of each cross-entropy that a method takes, with the true ones."""
    seen, real = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y, **k: seen.append(y) or real(x, y, **k))
    for _ in run:
        pass
    return seen


def test_random_labels_are_never_the_true_ones_and_retain_images_keep_theirs(monkeypatch):
    own = task({})
    orders = [y for _, y in own.batches(own.forget, FIRST())]
    seen = spied(monkeypatch, rl, rl(own, 0, FIRST()))
    assert len(seen) == 1 + 4 and not (seen[0] == orders[0]).any() and set(seen[0].tolist()) <= set(range(CLASSES))
    assert len(seen[0].unique()) > 2
    retain = torch.cat(seen[1:])
    assert torch.equal(retain.sort().values, own.retain.labels.sort().values)


def test_the_nearest_class_is_never_the_true_one_and_is_what_the_changed_image_looks_like():
    own = task({})
    [(pixels, labels)] = own.batches(own.forget)
    near = nearest(own.original, pixels, labels, 0.1)
    assert not (near == labels).any() and all(p.grad is None for p in own.original.net.parameters())
    still = nearest(own.original, pixels, labels, 0.0)
    with torch.no_grad():
        logits = own.original(pixels)
    assert torch.equal(still, logits.scatter(1, labels[:, None], -torch.inf).argmax(1))


def test_an_added_class_is_trained_to_and_then_gone():
    own = task({"epochs": 1, "lr": 0.1})
    net = own.classifier.net
    before = copy.deepcopy(net.state_dict())
    expand(net, 0)
    [(pixels, _)] = own.batches(own.forget)
    assert own.classifier(pixels).shape == (16, CLASSES + 1)
    added = F.cross_entropy(own.classifier(pixels), torch.full((16,), CLASSES))
    assert [loss.item() for loss in be(own, 0, FIRST())] == pytest.approx([added.item()], rel=1e-4)
    shrink(net)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items() if "classifier" in n)
    result = forget("be", own, what="be")
    assert own.classifier(pixels).shape == (16, CLASSES) and result.bits is None


def test_woodfisher_is_the_recursion_of_its_paper_and_the_inverse_of_the_fisher_matrix():
    gradients, v = torch.randn(12, 7, generator=FIRST()), torch.randn(7, generator=torch.Generator().manual_seed(1))
    fisher, inverse = torch.eye(7) + gradients.T @ gradients / 12, torch.eye(7)
    for g in gradients:  # the recursion of the paper
        o = inverse @ g
        inverse -= torch.outer(o, o) / (12 + g @ o)
    assert torch.allclose(woodfisher(gradients, v), torch.linalg.solve(fisher, v), atol=1e-5)
    assert torch.allclose(woodfisher(gradients, v), inverse @ v, atol=1e-5)


def test_influence_makes_the_forget_loss_grow_and_twice_the_step_twice_the_change():
    def run(alpha):
        own = task({"alpha": alpha, "samples": 4})
        iu(own)
        [(pixels, labels)] = own.batches(own.forget)
        with torch.no_grad():
            losses = [float(F.cross_entropy(m(pixels), labels)) for m in (own.original, own.classifier)]
        names = dict(own.original.net.named_parameters())
        change = sum(float((p - names[n]).square().sum()) for n, p in own.classifier.net.named_parameters()) ** 0.5
        return losses, change

    (before, after), change = run(1.0)
    assert after > before and run(2.0)[1] == pytest.approx(2 * change, rel=1e-3)


def test_l1_adds_the_sum_of_all_weights_and_fades():
    plain, own = (
        [float(loss) for loss in l1_sparse(task({"alpha": alpha, "epochs": 4}), 2, FIRST())] for alpha in (0, 0.1)
    )
    size = sum(float(p.detach().abs().sum()) for p in classifier().net.parameters())
    assert own[0] - plain[0] == pytest.approx(0.1 * 0.5 * size, rel=1e-4)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_the_mask_keeps_the_largest_gradients_of_the_forget_images_alone(density):
    own = task({"density": density})
    bits = salient_bits(own)
    net = own.original.net.eval()
    [(pixels, labels)] = own.batches(own.forget)
    F.cross_entropy(own.original(pixels), labels).backward()
    naive = torch.cat([p.grad.abs().view(-1) for p in net.parameters()])
    mask = torch.cat([bits[n].view(-1) for n, _ in net.named_parameters()])
    assert int(mask.sum()) == round(density * len(naive)) == kept(control_bits(own))[0]
    assert naive[mask].min() >= naive[~mask].max() * (1 - 1e-4)


@pytest.mark.parametrize("name", ["salun", "random"])
def test_a_masked_method_moves_only_its_mask(name):
    own = task({"epochs": 1, "lr": 0.05, "density": 0.3})
    bits = forget(name, own, what=name).bits
    before = dict(own.original.net.named_parameters())
    moved = {n: p != before[n] for n, p in own.classifier.net.named_parameters()}
    assert not any((moved[n] & ~bits[n]).any() for n in bits) and any(m.any() for m in moved.values())
    assert any((m & bits[n]).any() for n, m in moved.items())


@pytest.mark.parametrize("name", ["ft", "ga", "bs", "l1-sparse", "retrain"])
def test_a_method_does_the_same_twice_and_something(name):
    settings = {"epochs": 1, "lr": 0.05, "alpha": 1e-4, "bound": 0.1}
    runs = []
    for _ in range(2):
        own = task(settings, augment="crop-flip")
        forget(name, own, what=name)
        runs.append(own.classifier.net.state_dict())
    assert all(torch.equal(runs[0][n], t) for n, t in runs[1].items())
    assert any((runs[0][n] != p).any() for n, p in classifier().net.named_parameters())
