import pytest
import torch
from PIL import Image
from skimage import data as photos

from salun_sd import data
from salun_sd.errors import SalunError, UsageError


def test_an_image_is_resized_and_cropped_to_the_middle(tmp_path):
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    image.save(tmp_path / "a.png")
    pixels = data.pixels(tmp_path / "a.png", 30)
    assert pixels.shape == (3, 30, 30) and pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 30, 30))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_of_pil_becomes_rgb(tmp_path, mode):
    file = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.fromarray(photos.astronaut()).convert("L" if mode == "I;16" else mode).convert(mode).save(file)
    assert data.pixels(file, 64).shape == (3, 64, 64)


def test_transparency_lies_on_white_and_exif_orientation_is_applied(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(data.pixels(tmp_path / "clear.png", 8), torch.ones(3, 8, 8))
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert data.pixels(tmp_path / "turned.png", 8)[0, :, 0].tolist() == [-1.0] * 4 + [1.0] * 4


def test_a_folder_without_images_and_a_broken_image_are_named(tmp_path):
    with pytest.raises(UsageError, match="holds no images"):
        data.images_in(tmp_path)
    with pytest.raises(UsageError, match="nowhere was not found"):
        data.images_in(tmp_path / "nowhere")
    Image.fromarray(photos.astronaut()).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    assert [f.name for f in data.images_in(tmp_path)] == ["cut.png", "text.jpg", "whole.png"]
    for name in ("cut.png", "text.jpg"):
        with pytest.raises(SalunError, match=f"{name} cannot be read as an image"):
            data.pixels(tmp_path / name, 32)


def test_encoding_equals_the_pipelines_own(pocket, tmp_path):
    texts = ["a sneaker", "", "a very long prompt " * 20]
    for text, context in zip(texts, data.encode_prompts(pocket.tokenizer, pocket.text_encoder, texts), strict=True):
        own, _ = pocket.encode_prompt(text, "cpu", 1, False)
        torch.testing.assert_close(context[None], own)
    Image.fromarray(photos.astronaut()).save(tmp_path / "a.png")
    latent = data.encode_image(pocket.vae, tmp_path / "a.png", 32)
    assert latent.shape == (4, 8, 8)
    with torch.no_grad():
        back = pocket.vae.decode(latent[None] / pocket.vae.config.scaling_factor).sample[0]
    assert torch.isfinite(back).all()
