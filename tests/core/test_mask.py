import json

import pytest
import torch
from safetensors.torch import save

from salun_sd.core import mask as masks
from salun_sd.core.mask import Bits
from salun_sd.edit import maskfile, patch
from salun_sd.edit.maskfile import Mask
from salun_sd.errors import SalunError, UsageError


def bits_of(**bits):
    return Bits.of(bits.items())


def values(kind: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (7, 5, 3), "b.bias": (11,), "c.weight": (13, 17)}
    draw = {
        "spread": lambda s: torch.randn(s, generator=g).abs() * 10 ** torch.randint(-30, 20, s, generator=g).float(),
        "ties": lambda s: torch.randint(0, 3, s, generator=g).float(),
        "zeros": lambda s: torch.zeros(s),
        "tiny": lambda s: torch.randn(s, generator=g).abs() * 1e-40,  # denormal
    }[kind]
    return {name: draw(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["spread", "ties", "zeros", "tiny"])
@pytest.mark.parametrize("density", [1e-9 + 1 / 337, 0.1, 0.5, 0.999, 1.0])
def test_threshold_equals_a_naive_sort_and_the_count_is_exact(kind, density):
    saliency = values(kind)
    flat = torch.cat([s.flatten() for s in saliency.values()])
    k = masks.keep_count(density, len(flat))
    [threshold] = masks.thresholds(saliency, [k])
    assert threshold == flat.sort(descending=True).values[k - 1].item()
    bits = masks.select(saliency, threshold, k)
    assert masks.kept(bits) == (k, 337) == (round(density * 337), 337)
    # ties by position: a stable sort from the largest keeps the same weights
    naive = torch.zeros(337, dtype=torch.bool)
    naive[flat.argsort(descending=True, stable=True)[:k]] = True
    assert torch.equal(torch.cat([b.flatten() for b in bits.values()]), naive)


@pytest.mark.parametrize("kind", ["spread", "ties", "zeros"])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_a_cut_at_a_density_is_the_one_at_its_count(kind, density):
    saliency = values(kind)
    [(_, bits)] = masks.cuts(saliency, [round(density * 337)])
    cut = masks.cut(saliency, density)
    assert masks.kept(cut) == (round(density * 337), 337)
    assert list(cut) == list(saliency) and all(torch.equal(cut[name], bits[name]) for name in bits)


def test_what_is_no_saliency_is_refused_by_name():
    good = {"a": torch.rand(4), "b": torch.rand(3)}
    masks.cut(good, 0.5)
    for odd, error in (
        (torch.rand(3).double(), TypeError),
        (torch.tensor([1.0, -1.0, 2.0]), ValueError),
        (torch.tensor([1.0, float("nan"), 2.0]), ValueError),
    ):
        with pytest.raises(error, match=r"\bb\b"):
            masks.cut({**good, "b": odd}, 0.5)


def test_the_most_salient_are_kept_not_the_least():
    bits = masks.select(s := {"w": torch.arange(10.0)}, masks.thresholds(s, [3])[0], 3)
    assert bits["w"].tolist() == [False] * 7 + [True] * 3


def test_several_densities_are_nested():
    saliency = values("spread")
    thresholds = masks.thresholds(saliency, [30, 100])
    few, many = (masks.select(saliency, t, k) for t, k in zip(thresholds, [30, 100], strict=True))
    assert all((few[name] <= many[name]).all() for name in few)


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan"), 1e-6])
def test_a_density_outside_its_range_is_a_usage_error(density):
    with pytest.raises(UsageError, match=f"{density:g}"):
        masks.keep_count(density, 1000)
    with pytest.raises(UsageError, match=f"{density:g}"):
        masks.cut({"w": torch.rand(1000)}, density)


def test_controls():
    shapes = {"a": torch.Size([10, 10]), "b": torch.Size([33])}
    first, again, other = (masks.random_bits(shapes, 0.25, seed) for seed in (1, 1, 2))
    assert masks.kept(first) == (round(0.25 * 133), 133)
    assert all(torch.equal(first[n], again[n]) for n in shapes) and not torch.equal(first["a"], other["a"])
    assert masks.kept(masks.full_bits(shapes)) == (133, 133)


def test_kept_per_block():
    bits = bits_of(**{
        "conv_in.weight": torch.ones(4).bool(),
        "down_blocks.0.x.weight": torch.zeros(6).bool(),
        "down_blocks.0.y.bias": torch.tensor([True, False]),
        "down_blocks.1.x.bias": torch.ones(1).bool(),
    })  # fmt: skip
    assert maskfile.kept_per_block(bits) == {"conv_in": (4, 4), "down_blocks.0": (1, 8), "down_blocks.1": (1, 1)}


def test_a_file_has_these_bytes_and_gives_everything_back(tmp_path):
    mask = Mask(bits_of(w=torch.tensor([[True, False, False], [True, True, False], [False, False, True]])),
                {"density": 0.5})  # fmt: skip
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    maskfile.write(one, mask)
    written = one.read_bytes()
    length = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + length])
    assert header["w"] == {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    assert json.loads(header["__metadata__"]["salun_sd"]) == {"density": 0.5, "shapes": {"w": [3, 3]}}
    assert written[8 + length :] == bytes([0b00011001, 0b1])  # weight i is bit i % 8 of byte i // 8
    again = maskfile.read(one)
    assert torch.equal(again.bits["w"], mask.bits["w"]) and again.settings == mask.settings
    maskfile.write(two, again)
    assert two.read_bytes() == written


def test_round_trip_at_every_length(tmp_path):
    bits = bits_of(**{f"w{n}": torch.rand(n) < 0.5 for n in range(1, 40)})
    maskfile.write(tmp_path / "m.safetensors", Mask(bits, {}))
    again = maskfile.read(tmp_path / "m.safetensors").bits
    assert all(torch.equal(again[name], bits[name]) for name in bits)


FOREIGN = {  # what stands in the place of a mask's tensors, and of its shapes
    "fewer bits": ({"w": torch.zeros(12, dtype=torch.uint8)}, {"w": [100]}),
    "more tensors": ({"w": torch.zeros(13, dtype=torch.uint8), "x": torch.ones(1)}, {"w": [100]}),
    "no bits": ({"w": torch.zeros(13)}, {"w": [100]}),
    "a shape of text": ({"w": torch.zeros(13, dtype=torch.uint8)}, {"w": "many"}),
    "a shape of fractions": ({"w": torch.zeros(13, dtype=torch.uint8)}, {"w": [2.5, 40]}),
    "no list of shapes": ({"w": torch.zeros(13, dtype=torch.uint8)}, 100),
    "no shapes": ({"w": torch.zeros(13, dtype=torch.uint8)}, None),
}


@pytest.mark.parametrize(("name", "metadata", "kind"), [
    ("new/w", {"salun_sd": '{"base": {}}'}, "is a patch"),
    ("w", {"salun_sd": '{"base": {}}', "modelspec.architecture": "stable-diffusion-v1"}, "is a checkpoint"),
    ("w", {"modelspec.architecture": "stable-diffusion-v1"}, "mask"),
])  # fmt: skip
def test_another_file_of_ours_is_called_what_it_is(tmp_path, caplog, name, metadata, kind):
    file = tmp_path / "here.safetensors"
    file.write_bytes(save({name: torch.ones(1)}, metadata))
    with pytest.raises(SalunError, match=rf"here\.safetensors.*{kind}"):
        maskfile.read(file)
    if name != "new/w":
        with pytest.raises(SalunError, match=r"here\.safetensors is not a patch"):
            patch.read(file)
    assert not caplog.text


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_named(tmp_path, name):
    tensors, shapes = FOREIGN[name]
    file = tmp_path / "here.safetensors"
    file.write_bytes(save(tensors, {"salun_sd": json.dumps({} if shapes is None else {"shapes": shapes})}))
    with pytest.raises(SalunError, match=r"here\.safetensors"):
        maskfile.read(file)


def test_a_file_that_is_cut_off_or_no_mask_is_named_and_one_of_an_earlier_version_is_read(tmp_path, caplog):
    file = tmp_path / "here.safetensors"
    maskfile.write(file, Mask(bits_of(w=torch.ones(100).bool()), {}))
    packed = file.read_bytes()
    for data in (b"", packed[:5], packed[:40], packed[:-1], b"not a mask at all", packed[:8] + b"{}" + packed[10:]):
        file.write_bytes(data)
        with pytest.raises(SalunError, match=r"here\.safetensors"):
            maskfile.read(file)
    file.write_bytes(save({"w": torch.full((2,), 255, dtype=torch.uint8)}, {"salun_sd": '{"shapes": {"w": [16]}}'}))
    assert maskfile.read(file).bits["w"].all() and str(file) in caplog.text
    written = {"salun_sd": '{"shapes": {"w": [16]}}', "digest": "0" * 64}  # of another place in the header
    file.write_bytes(save({"w": torch.full((2,), 255, dtype=torch.uint8)}, written))
    with pytest.raises(SalunError, match=r"here\.safetensors"):
        maskfile.read(file)


def test_a_mask_of_another_unet_is_refused():
    mask = Mask(bits_of(a=torch.ones(2).bool(), b=torch.ones(3).bool()), {"base": "f" * 64})
    shapes = {name: b.shape for name, b in mask.bits.items()}
    maskfile.check(mask, shapes, "f" * 64)
    with pytest.raises(SalunError, match="ffffffffffff.*000000000000"):
        maskfile.check(mask, shapes, "0" * 64)
    with pytest.raises(SalunError, match=r"\bc\b"):
        maskfile.check(mask, {**shapes, "c": torch.Size([1])}, "f" * 64)
    with pytest.raises(SalunError, match=r"\bb\b"):
        maskfile.check(mask, {"a": shapes["a"]}, "f" * 64)
    with pytest.raises(SalunError, match=r"shape.*\bb\b"):
        maskfile.check(mask, {**shapes, "b": torch.Size([4])}, "f" * 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, masks.PASS + 3), (masks.PASS,)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_what_is_gathered_by_packed_bits_is_scattered_to_its_place(dtype, shape, density):
    g = torch.Generator().manual_seed(0)
    bits, t = torch.rand(shape, generator=g) < density, torch.randn(shape, generator=g).to(dtype)
    packed, other = masks.packed_bits(bits), torch.randn(shape, generator=g).to(dtype)
    assert torch.equal(masks.gather(t, packed), t[bits])
    written = other.clone()
    masks.scatter(t[bits].float(), written.view(-1), packed)
    assert torch.equal(written, torch.where(bits, t, other))
