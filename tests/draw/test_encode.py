import copy

import numpy as np
import pytest
import torch
from helpers.models import damage, write_pipeline
from PIL import Image
from skimage import data as photos

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.draw.encode import encode_image, encode_prompts, token_ids, warn_of_long
from salun_sd.draw.encode import pixels as to_pixels
from salun_sd.draw.images import read_image
from salun_sd.errors import SalunError
from salun_sd.runtime.finite import NotFinite


def test_an_image_is_resized_and_cropped_to_the_middle(tmp_path):
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    image.save(tmp_path / "a.png")
    pixels, _ = to_pixels(read_image(tmp_path / "a.png"), 30)
    assert pixels.shape == (3, 30, 30) and pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 30, 30))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_of_pil_becomes_rgb(tmp_path, mode):
    file = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.fromarray(photos.astronaut()).convert("L" if mode == "I;16" else mode).convert(mode).save(file)
    assert to_pixels(read_image(file), 64)[0].shape == (3, 64, 64)


def pixels(file):
    return to_pixels(read_image(file), 8)[0]


def test_transparency_lies_on_white_and_exif_orientation_is_applied(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(pixels(tmp_path / "clear.png"), torch.ones(3, 8, 8))
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert pixels(tmp_path / "turned.png")[0, :, 0].tolist() == [-1.0] * 4 + [1.0] * 4


def test_time_ids_are_the_true_size_the_corner_of_the_crop_and_the_size():
    """As diffusers' SDXL pipeline orders them: original height and width, crop top and left, target size."""
    assert to_pixels(Image.new("RGB", (90, 30)), 60)[1].tolist() == [30, 90, 0, 60, 60, 60]
    assert to_pixels(Image.new("RGB", (512, 1024)), 256)[1].tolist() == [1024, 512, 128, 0, 256, 256]
    assert to_pixels(Image.new("RGB", (8, 8)), 8)[1].tolist() == [8, 8, 0, 0, 8, 8]


def test_a_broken_image_is_named(tmp_path):
    Image.fromarray(photos.astronaut()).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.png", "text.jpg"):
        with pytest.raises(SalunError, match=name):
            read_image(tmp_path / name)


def test_encoding_equals_the_pipelines_own(pocket, tmp_path):
    texts = ["a sneaker", "", "a very long prompt " * 20]
    for text, context in zip(texts, encode_prompts(pocket, texts)["context"], strict=True):
        expected, _ = pocket.encode_prompt(text, "cpu", 1, False)
        torch.testing.assert_close(context[None], expected)
    Image.fromarray(photos.astronaut()).save(tmp_path / "a.png")
    latent = encode_image(pocket, to_pixels(read_image(tmp_path / "a.png"), 32)[0])
    assert latent.shape == (4, 8, 8)
    with torch.no_grad():
        back = pocket.vae.decode(latent[None] / pocket.vae.config.scaling_factor).sample[0]
    assert torch.isfinite(back).all()


def test_an_embedding_does_not_depend_on_its_neighbours(pocket):
    texts = [f"a photo of {n} bags" for n in range(11)]  # in more batches than one, at places of their own
    together, turned = (encode_prompts(pocket, some)["context"] for some in (texts, ["", *reversed(texts)]))
    assert torch.equal(together, turned.flip(0)[:-1])
    assert torch.equal(together[9:10], encode_prompts(pocket, texts[9:10])["context"])


def test_sdxl_is_told_the_pooled_embedding_and_nothing_for_no_prompt(tmp_path):
    folder = write_pipeline(tmp_path / "sdxl", "sdxl")
    pipeline = load_pipeline(find(str(folder)))
    encoded = encode_prompts(pipeline, ["a sneaker", ""])
    expected, _, pooled, _ = pipeline.encode_prompt("a sneaker", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(encoded["context"][:1], expected)
    torch.testing.assert_close(encoded["text_embeds"][:1], pooled)
    _, nothing, _, pooled_nothing = pipeline.encode_prompt("a sneaker", device="cpu", do_classifier_free_guidance=True)
    assert torch.equal(encoded["context"][1:], nothing) and torch.equal(encoded["text_embeds"][1:], pooled_nothing)
    assert encoded["context"][0].any() and not encoded["context"][1].any()


def test_images_whose_white_is_not_known_are_refused_not_blackened(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((8, 8), 2**20, np.int32)).save(tmp_path / "wide.tiff")
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(tmp_path / "narrow.tiff")
    for name in ("float", "wide"):
        with pytest.raises(SalunError, match=f"{name}.tiff.* values"):
            read_image(tmp_path / f"{name}.tiff")
    assert read_image(tmp_path / "narrow.tiff").getpixel((0, 0)) == (200, 200, 200)


def test_an_encoder_that_overflows_is_named_with_its_checkpoint(tmp_path):
    folder = write_pipeline(tmp_path / "sd1", "sd1")
    damage(folder, "vae", "encoder.conv_out.weight", 3e38)
    pipeline = load_pipeline(find(str(folder)), unet=False)
    with pytest.raises(NotFinite, match=f"VAE of {folder}"):
        encode_image(pipeline, torch.linspace(-1, 1, 3 * 32 * 32).view(3, 32, 32))
    assert encode_prompts(pipeline, ["a bag"])["context"].isfinite().all()


def test_prompts_with_the_same_tokens_are_one_to_every_encoder(pocket):
    tokenizers = {"tokenizer": pocket.tokenizer}
    long = "a photo of " * 12
    for one, other, same in (
        ("a cat", "A  Cat ", True), (long + "a cat", long + "a dog", True), ("a cat", "a dog", False),
        ("a cat" + long, "a dog" + long, False), ("", " ", True),
        ("a cat", "a cat<|endoftext|>", True),
    ):  # fmt: skip
        assert (token_ids(tokenizers, one) == token_ids(tokenizers, other)) is same
        encoded = encode_prompts(pocket, [one, other])["context"]
        assert torch.equal(encoded[0], encoded[1]) is same
    other = copy.deepcopy(pocket.tokenizer)
    other.model_max_length = 40  # a second encoder that reads further tells them apart
    assert token_ids(tokenizers | {"tokenizer_2": other}, long + "a cat") != token_ids(
        tokenizers | {"tokenizer_2": other}, long + "a dog"
    )


def test_prompts_that_are_cut_are_counted_and_the_first_is_shown(pocket, caplog):
    tokenizers = {"tokenizer": pocket.tokenizer}
    fits = " ".join(["a"] * 22)
    assert len(pocket.tokenizer(fits).input_ids) == 24  # with those of its beginning and end
    warn_of_long(tokenizers, ["a cat", "", fits], "pocket")
    assert caplog.text == ""
    warn_of_long(tokenizers, ["a cat", fits + " a", "b " * 500, "a cat", fits + " a"], "pocket")
    [line] = caplog.messages
    assert all(word in line for word in ("2 of 3", "24", "pocket", repr(fits + " a"))) and len(line) < 300
