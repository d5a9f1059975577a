import torch
from helpers.pictures import pictures

from salun_sd.classifier.data import Part, batches, moved


def part(count=40):
    return Part(pictures().train, torch.arange(count))


def test_batches_have_every_image_once_and_without_a_generator_in_order():
    own = part()
    pixels, labels = (torch.cat(each) for each in zip(*batches(own, 16, "cpu"), strict=True))
    assert torch.equal(labels, own.labels) and torch.equal((pixels * 255).round().byte(), own.images.pixels[:40])
    shuffled = torch.cat([y for _, y in batches(own, 16, "cpu", torch.Generator().manual_seed(0))])
    assert not torch.equal(shuffled, labels) and torch.equal(shuffled.sort().values, labels.sort().values)


def test_one_seed_gives_one_order_and_one_augmentation_and_another_seed_another():
    first, same, other = (
        next(batches(part(), 40, "cpu", torch.Generator().manual_seed(seed), "crop-flip"))[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_moved_image_is_a_piece_of_the_original_and_only_a_flip_mirrors():
    image = torch.arange(2 * 3 * 16 * 16, dtype=torch.int32).remainder(251).byte().view(2, 3, 16, 16)
    for flip in (False, True):
        images = image[:1].expand(64, -1, -1, -1)
        result = moved(images, torch.Generator().manual_seed(0), flip)
        padded = torch.nn.functional.pad(image[0], (2, 2, 2, 2))
        pieces = {padded[:, y : y + 16, x : x + 16].numpy().tobytes() for y in range(5) for x in range(5)}
        mirrored = {padded[:, y : y + 16, x : x + 16].flip(2).contiguous().numpy().tobytes()
                    for y in range(5) for x in range(5)}  # fmt: skip
        seen = [r.contiguous().numpy().tobytes() for r in result]
        assert set(seen) <= pieces | mirrored and len(set(seen)) > 10
        assert any(each in mirrored for each in seen) == flip
