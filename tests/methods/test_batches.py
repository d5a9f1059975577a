"""Which examples a step sees."""

from itertools import islice

import torch

from salun_sd.methods.batches import EMPTY_SHARE, Training, balanced, batches, retain_rows, shuffled


def test_every_example_is_seen_once_a_pass():
    seen = torch.cat(list(islice(shuffled(10, 4, torch.Generator().manual_seed(0)), 5)))
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert len(next(shuffled(3, 8, torch.Generator()))) == 8


def test_concepts_have_equal_shares_of_every_batch_however_many_images_each_has():
    concepts = torch.tensor([0] * 30 + [1] * 3 + [2] * 7)
    drawn = list(islice(balanced(concepts, 8, torch.Generator().manual_seed(0)), 9))
    for batch in drawn:
        shares = concepts[batch].bincount(minlength=3)
        assert len(batch) == 8 and shares.max() - shares.min() <= 1
    everything = torch.cat(drawn)
    assert concepts[everything].bincount().tolist() == [24, 24, 24]
    assert all((everything == i).sum() == 8 for i in range(30, 33))  # 24 / 3: shuffled passes, nothing left out
    alone = islice(balanced(torch.zeros(10), 4, torch.Generator().manual_seed(3)), 5)
    usual = islice(shuffled(10, 4, torch.Generator().manual_seed(3)), 5)
    assert all(torch.equal(a, b) for a, b in zip(alone, usual, strict=True))


def test_some_images_to_retain_have_the_empty_prompt_where_it_is_held_and_the_others_their_own(schedule, retain):
    own = Training(schedule, None, retain, torch.empty(0))
    held, context, count = own._replace(retain_empty=0), retain.prompts["context"], 0
    for training in (own, held):
        for batch in batches(training, 20, 8, seed=0):
            rows = retain_rows(training, batch, torch.arange(8), torch.device("cpu"))
            prompts = retain.which[batch.retain]
            if training is held:
                prompts = prompts.where(~batch.is_empty, 0)
                count += int(batch.is_empty.sum())
            assert torch.equal(rows.condition["context"], context[prompts])
    assert abs(count / 160 - EMPTY_SHARE) < 0.1
