"""What image files say of their making, as each program writes it; and what no program wrote."""

import json
import time
from pathlib import Path

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from salun_sd.draw.generate import PROVENANCE
from salun_sd.draw.images import MOST_NOTE
from salun_sd.draw.metadata import MOST_PROMPT, Generation, read

SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Variation seed: 3"
A1111 = f"a cat, (large:1.2)\nby the sea\nNegative prompt: dog,\nbad\n{SETTINGS}"
CAT = Generation("a cat, (large:1.2)\nby the sea", "dog,\nbad", 965400086, "A1111")
TEXTS = {"6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}},
         "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "dog"}}}  # fmt: skip
SAMPLER = {"class_type": "KSampler", "inputs": {"seed": 11, "positive": ["6", 0], "negative": ["7", 0]}}


def png(folder: Path, chunks: dict[str, str], *, zip: bool = False) -> Generation | None:
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text, zip=zip)
    Image.new("RGB", (4, 4)).save(folder / "x.png", pnginfo=info)
    return read(folder / "x.png")


def with_exif(file: Path, tags: dict[int, str], comment: bytes = b"") -> Generation | None:
    exif = Image.Exif()
    exif.update(tags)
    if comment:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    Image.new("RGB", (4, 4)).save(file, exif=exif.tobytes())
    return read(file)


def comfyui(folder: Path, graph: dict) -> Generation | None:
    return png(folder, {"prompt": json.dumps(graph), "workflow": "{}"})


@pytest.mark.parametrize("zip", [False, True])
def test_a1111_in_a_png(tmp_path, zip):
    assert png(tmp_path, {"parameters": A1111}, zip=zip) == CAT
    assert png(tmp_path, {"parameters": A1111.replace("cat", "猫")}, zip=zip).prompt.startswith("a 猫")
    assert png(tmp_path, {"parameters": SETTINGS}).prompt == ""  # known, and empty
    assert png(tmp_path, {"parameters": "just a text, Seed: 5"}) is None


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
@pytest.mark.parametrize(
    ("code", "encoding"),
    [(b"UNICODE\0", "utf-16-be"), (b"UNICODE\0", "utf-16-le"), (b"ASCII\0\0\0", "ascii"), (bytes(8), "utf-8"),
     (b"", "utf-8")],
)  # fmt: skip
def test_a1111_in_the_exif_of_a_file(tmp_path, ending, code, encoding):
    assert with_exif(tmp_path / f"x.{ending}", {}, code + A1111.encode(encoding)) == CAT
    assert with_exif(tmp_path / f"x.{ending}", {}, code + "a holiday".encode(encoding)) is None


def test_comfyui_where_the_samplers_links_lead_to_its_texts(tmp_path):
    cat = Generation("a cat", "dog", 11, "ComfyUI")
    assert comfyui(tmp_path, TEXTS | {"3": SAMPLER}) == cat
    control = {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["6", 0], "negative": ["7", 0]}}
    through = {"seed": ["9", 0], "positive": ["8", 0], "negative": ["8", 1]}
    number = {"class_type": "PrimitiveInt", "inputs": {"value": 11}}
    graph = {"3": {"class_type": "KSampler", "inputs": through}, "8": control, "9": number}
    assert comfyui(tmp_path, TEXTS | graph) == cat
    graph = {"1": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": ["2", 0], "guider": ["3", 0]}},
             "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 11}},
             "3": {"class_type": "BasicGuider", "inputs": {"conditioning": ["4", 0]}},
             "4": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["6", 0]}}}  # fmt: skip
    assert comfyui(tmp_path, TEXTS | graph) == cat._replace(negative=None)
    text = {"6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["5", 0]}},
            "5": {"class_type": "PrimitiveString", "inputs": {"value": "a cat"}}}  # fmt: skip
    assert comfyui(tmp_path, TEXTS | text | {"3": SAMPLER}) == cat


def test_comfyui_in_webp_and_in_its_editors_form(tmp_path):
    cat = Generation("a cat", "dog", 11, "ComfyUI")
    graph = json.dumps(TEXTS | {"3": SAMPLER})
    assert with_exif(tmp_path / "x.webp", {0x0110: f"prompt:{graph}", 0x010F: "workflow:{}"}) == cat
    sockets = [{"name": "positive", "link": 1}, {"name": "negative", "link": 2}, {"name": "vae", "link": None}]
    nodes = [{"id": 3, "type": "KSampler", "inputs": sockets, "widgets_values": [11, "randomize", 20]},
             {"id": 6, "type": "CLIPTextEncode", "inputs": [], "widgets_values": ["a cat"]},
             {"id": 7, "type": "CLIPTextEncode", "widgets_values": ["dog"]},
             {"id": 9, "type": "KSampler", "inputs": sockets, "widgets_values": [5], "mode": 4}]  # fmt: skip
    links = [[1, 6, 0, 3, 1, "CONDITIONING"], [2, 7, 0, 3, 2, "CONDITIONING"]]
    assert png(tmp_path, {"workflow": json.dumps({"nodes": nodes, "links": links})}) == cat


@pytest.mark.parametrize(
    "unknown",
    [
        {"6": {"class_type": "LLM", "inputs": {"text": "improve this", "positive": "x"}}},  # of no known kind
        {"6": {"class_type": "Combine", "inputs": {"conditioning_1": ["7", 0], "conditioning_2": ["7", 0]}}},
        {"6": {"class_type": "CLIPTextEncodeSDXL", "inputs": {"text_g": "a cat", "text_l": "another"}}},
        {"6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["7", 0]}}},  # a text that a node makes
        {"6": {"class_type": "Pass", "inputs": {"conditioning": ["6", 0]}}},  # a circle
        {"6": {"class_type": "Pass", "inputs": {"conditioning": ["nowhere", 0]}}},
        {"6": {"class_type": "Pass", "inputs": {"conditioning": "../../etc/passwd"}}},
        {"9": {"class_type": "KSampler", "inputs": {"seed": 11, "positive": ["7", 0], "negative": ["7", 0]}}},
    ],
)
def test_of_a_graph_that_is_not_understood_no_prompt_is_guessed(tmp_path, unknown):
    assert comfyui(tmp_path, TEXTS | {"3": SAMPLER} | unknown) == Generation(None, "dog", 11, "ComfyUI")


def test_many_samplers_behind_a_long_way_or_a_circle_take_no_longer_than_the_graph(tmp_path):
    count = 2500
    way = {f"n{i}": {"class_type": "Pass", "inputs": {"conditioning": [f"n{i + 1}", 0]}} for i in range(count)}
    ends = {"": way | {f"n{count}": TEXTS["6"]}, "circle": way | {f"n{count}": way["n0"]}}
    samplers = {f"s{i}": {"class_type": "KSampler", "inputs": {"seed": 11, "positive": [f"n{i % 9}", 0]}}
                for i in range(count)}  # fmt: skip
    texts = {name: json.dumps(graph | samplers) for name, graph in ends.items()}
    begun = time.process_time()
    found = [png(tmp_path, {"prompt": text}) for text in texts.values()]
    assert [one.prompt for one in found] == ["a cat", None] and time.process_time() - begun < 2


def test_invokeai_and_scripts_and_salun_sd_itself(tmp_path):
    new = {"positive_prompt": "a cat", "negative_prompt": "dog", "seed": 3}
    assert png(tmp_path, {"invokeai_metadata": json.dumps(new)}) == Generation("a cat", "dog", 3, "InvokeAI")
    for prompt in ("a cat [dog]", [{"prompt": "a cat [dog]", "weight": 1.0}]):
        old = png(tmp_path, {"sd-metadata": json.dumps({"image": {"prompt": prompt, "seed": 4}})})
        assert old == Generation("a cat", "dog", 4, "InvokeAI")
    plain = {"prompt": "a cat", "negative_prompt": "dog", "seed": "5"}
    assert png(tmp_path, plain)[:3] == ("a cat", "dog", 5)
    own = "0123abcd scheduler=DDIMScheduler steps=25 size=32x32 guidance=7.5 seed=6 a cat\nseed=9 x"
    assert png(tmp_path, {PROVENANCE: own}) == Generation("a cat\nseed=9 x", None, 6, "salun_sd")


DEEP = "[" * 10_000 + "]" * 10_000
DEEP_GRAPH = '{"a":' * 10_000 + "1" + "}" * 10_000


@pytest.mark.parametrize("key", ["parameters", "prompt", "workflow", "invokeai_metadata", "sd-metadata", PROVENANCE])
@pytest.mark.parametrize(
    "text",
    ["{not json", DEEP, DEEP_GRAPH, "[]", "[3]", "{}", '{"image": 3}', '{"nodes": 3}', "[null]", "{" + "9" * 5000 + "}",
     '{"3": {"class_type": "KSampler", "inputs": {"positive": 3, "seed": {}}}}',
     '{"positive_prompt": "\\ud800", "seed": -1}'],
)  # fmt: skip
def test_what_is_no_metadata_of_these_programs_says_nothing(tmp_path, key, text):
    assert png(tmp_path, {key: text}) is None


def test_a_text_that_is_huge_is_not_read_and_a_bomb_not_unpacked(tmp_path):
    huge = "x" * MOST_NOTE + A1111
    assert png(tmp_path, {"parameters": huge}) is None and png(tmp_path, {"parameters": huge}, zip=True) is None
    assert png(tmp_path, {"Comment": huge, "parameters": A1111}) == CAT
    long = png(tmp_path, {"parameters": f"{'x' * (MOST_PROMPT + 1)}\n{SETTINGS}"})
    assert (long.prompt, long.seed) == (None, CAT.seed)


@pytest.mark.parametrize("content", [b"", b"x", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1\x00\x10Exif\0\0II*\0"])
def test_a_file_that_is_no_image_says_nothing(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    assert read(tmp_path / "x.png") is None and read(tmp_path / "no.png") is None


def test_an_image_is_read_the_same_wherever_its_texts_stand(tmp_path):
    """After the pixels, too, and in a file whose end is gone."""
    png(tmp_path, {"parameters": A1111})
    content = (tmp_path / "x.png").read_bytes()
    start = content.index(b"tEXt") - 4
    end = content.index(b"IDAT") - 4
    (tmp_path / "y.png").write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    assert read(tmp_path / "y.png") == CAT
