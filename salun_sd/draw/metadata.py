"""What an image file says of how it was made: the prompt and the seed, as the program wrote them that drew it.

Nothing in a file is executed, opened or followed as a path or link. Texts and JSON are bounded in size and depth before
anything is looked for in them. What is not understood counts as not said: a prompt is never guessed.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from salun_sd.draw.generate import PROVENANCE
from salun_sd.draw.images import Unreadable, read_notes
from salun_sd.errors import SalunError
from salun_sd.runtime.documents import is_unicode, parse_json

MOST_PROMPT = 20_000  # characters; a longer text is no prompt
MOST_SEED = 2**64 - 1
OWN = re.compile(r"\S+ (?:\w+=\S+ )*?seed=(\d{1,20}) (.*)", re.DOTALL)  # of generate.draw
SETTINGS = re.compile(r"Steps: \d+(?:,|$)")  # the beginning of A1111's line of settings
SEED = re.compile(r", Seed: (\d{1,20})(?:,|$)")
CODES = {b"UNICODE\0": ("utf-16-be", "utf-16-le"), b"ASCII\0\0\0": ("utf-8", "latin-1"), bytes(8): ("utf-8",)}
PRIMITIVES = ("PrimitiveString", "PrimitiveStringMultiline")  # ComfyUI's nodes that hold one text
TEXTS = ("text", "text_g", "text_l", "clip_l", "t5xxl")  # inputs of ComfyUI's nodes that encode texts
# The values that ComfyUI's editor writes into a node, in their order; its API has their names.
WIDGETS = {"CLIPTextEncode": ("text",), "KSampler": ("seed",), "KSamplerAdvanced": ("add_noise", "noise_seed"),
           "SamplerCustom": ("add_noise", "noise_seed"), "RandomNoise": ("noise_seed",), "PrimitiveInt": ("value",),
           **dict.fromkeys(PRIMITIVES, ("value",))}  # fmt: skip
OFF = (2, 4)  # modes of its nodes that were muted, or passed by
Graph = dict[str, tuple[str, dict]]  # a node's number => its kind and its inputs: values, and links [node, output]


class Generation(NamedTuple):
    """What a program noted in an image: None where it said nothing."""

    prompt: str | None
    negative: str | None
    seed: int | None
    tool: str


def read(file: Path) -> Generation | None:
    """What an image file of any of these programs says; None if it says neither a prompt nor a seed, or cannot be read.

    - salun_sd: the chunk that `generate` writes.
    - InvokeAI (services/image_files/image_files_disk.py): JSON in the chunk `invokeai_metadata`; before version 3, in
      `sd-metadata`, where words in [brackets] are negative.
    - A1111, Forge and others (modules/images.py, modules/infotext_utils.py): a text in the chunk `parameters`; in JPEG
      and WebP in EXIF's UserComment.
    - ComfyUI (comfy_api/latest/_ui.py): a graph as JSON in the chunks `prompt` and `workflow`; in WebP in EXIF's Model
      and Make, after the name and a colon.
    - Scripts with diffusers, which writes nothing itself: texts in the chunks `prompt`, `negative_prompt` and `seed`.
    """
    try:
        texts, exif = read_notes(file)
    except Unreadable:
        return None
    texts = _of_exif(exif) | texts
    readers: dict[str, Callable[[str], Generation | None]] = {
        PROVENANCE: _own, "invokeai_metadata": _invokeai, "sd-metadata": _old_invokeai, "parameters": _a1111,
        "prompt": _comfyui, "workflow": _comfyui,
    }  # fmt: skip
    found = (reader(texts[key]) for key, reader in readers.items() if key in texts)
    said = next(filter(None, found), None) or _by_script(texts)
    return said if said and (said.prompt is not None or said.seed is not None) else None


def _of_exif(exif: Image.Exif) -> dict[str, str]:
    """The texts in EXIF tags, by the keyword that a PNG has for them."""
    texts = {}
    for value in (exif.get(tag) for tag in (ExifTags.Base.Make, ExifTags.Base.Model)):
        if isinstance(value, str) and value.startswith(("prompt:", "workflow:")):
            key, _, texts_of_key = value.partition(":")
            texts[key] = texts_of_key
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    encoded = comment.encode(errors="replace") if isinstance(comment, str) else comment
    for text in _decoded(encoded) if isinstance(encoded, bytes) else ():
        if _a1111(text):
            texts["parameters"] = text
            break
    return texts


def _decoded(comment: bytes) -> list[str]:
    """The texts that a UserComment may be. Its first 8 bytes name the code, but not the order of UTF-16's bytes."""
    codes, body = CODES.get(comment[:8]), comment[8:]
    texts = []
    for code in codes or ("utf-8",):
        try:
            texts.append((body if codes else comment).decode(code).strip("\ufeff\0"))
        except UnicodeDecodeError:
            continue
    return texts


def _generation(tool: str, prompt: object, negative: object, seed: object) -> Generation:
    """The values of a file, each None where it is not what it should be."""

    def text(value: object) -> str | None:
        is_text = isinstance(value, str) and len(value) <= MOST_PROMPT and is_unicode(value)
        return value.strip() if is_text else None

    is_seed = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= MOST_SEED
    return Generation(text(prompt), text(negative), seed if is_seed else None, tool)


def _json(text: str) -> Any:
    """The value of a JSON text; None for any other text, and for one that is nested too deeply."""
    try:
        return parse_json(text, "metadata")
    except SalunError:
        return None


def _own(text: str) -> Generation | None:
    match = OWN.fullmatch(text)
    return match and _generation("salun_sd", match[2], None, int(match[1]))


def _invokeai(text: str) -> Generation | None:
    value = _json(text)
    if not isinstance(value, dict):
        return None
    return _generation("InvokeAI", *map(value.get, ("positive_prompt", "negative_prompt", "seed")))


def _old_invokeai(text: str) -> Generation | None:
    value = _json(text)
    image = value.get("image") if isinstance(value, dict) else None
    if not isinstance(image, dict):
        return None
    prompt = image.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], dict):  # the only one, with its weight
        prompt = prompt[0].get("prompt")
    negative = None
    if isinstance(prompt, str):
        negative = ", ".join(re.findall(r"\[([^\[\]]*)\]", prompt)) or None
        prompt = re.sub(r"\[[^\[\]]*\]", "", prompt)
    return _generation("InvokeAI", prompt, negative, image.get("seed"))


def _a1111(text: str) -> Generation | None:
    """Lines of the prompt, then of "Negative prompt: ", then one of settings, the last that begins as SETTINGS."""
    lines = text.strip().split("\n")
    at = max((n for n, line in enumerate(lines) if SETTINGS.match(line)), default=None)
    if at is None:
        return None
    prompt, *negative = re.split("^Negative prompt:", "\n".join(lines[:at]), maxsplit=1, flags=re.MULTILINE)
    seed = SEED.search(lines[at])
    return _generation("A1111", prompt, negative[0] if negative else None, seed and int(seed[1]))


def _by_script(texts: dict[str, str]) -> Generation | None:
    prompt, seed = texts.get("prompt"), texts.get("seed", "").strip()
    if prompt is None or prompt.lstrip().startswith(("{", "[")):  # JSON that is not understood
        return None
    seed = int(seed) if re.fullmatch(r"[0-9]{1,20}", seed) else None
    return _generation("a script", prompt, texts.get("negative_prompt"), seed)


def _comfyui(text: str) -> Generation | None:
    """The texts that the samplers of a graph are given, and their seed, each only where all samplers have the same. A
    sampler that goes on from another one's noise (`add_noise` is disable) says nothing new."""
    graph = _graph(_json(text))
    samplers = [
        inputs
        for _, inputs in graph.values()
        if (("positive" in inputs and inputs.keys() & {"seed", "noise_seed"}) or {"guider", "noise"} <= inputs.keys())
        and inputs.get("add_noise") != "disable"
    ]
    known: dict[tuple, str | None] = {}
    found = [
        (*(_text(graph, inputs, side, known) for side in ("positive", "negative")), _seed(graph, inputs))
        for inputs in samplers
    ]
    each = [values.pop() if len(values := set(column)) == 1 else None for column in zip(*found, strict=True)]
    return _generation("ComfyUI", *each) if each else None


def _graph(value: Any) -> Graph:
    """The nodes of a graph in the form of ComfyUI's API or of its editor; empty for any other value."""
    if not isinstance(value, dict):
        return {}
    try:
        if "nodes" not in value:
            nodes = [(key, node["class_type"], node["inputs"]) for key, node in value.items()]
        else:
            links = {link[0]: [str(link[1]), link[2]] for link in value["links"]}
            nodes = [_of_editor(node, links) for node in value["nodes"] if node.get("mode") not in OFF]
        return {key: (kind, inputs) for key, kind, inputs in nodes if inputs.keys() and kind.strip()}
    except (LookupError, TypeError, AttributeError):
        return {}


def _of_editor(node: dict, links: dict) -> tuple[str, str, dict]:
    """Number, kind and inputs of a node in the form of the editor. A link to an input goes before its value."""
    names, values = WIDGETS.get(node["type"], ()), node.get("widgets_values") or ()
    linked = {socket["name"]: links[socket["link"]] for socket in node.get("inputs") or () if socket.get("link")}
    return str(node["id"]), node["type"], dict(zip(names, values, strict=False)) | linked


def _text(graph: Graph, sampler: dict, side: str, known: dict[tuple, str | None]) -> str | None:
    """The text whose encoding a sampler takes as its `side`, positive or negative; None where a node on the way is not
    known or joins several. `known` keeps what each link on the way leads to: no link is followed twice."""
    way, text = [], None
    try:
        if "guider" in sampler:
            _, sampler = graph[sampler["guider"][0]]
        link = sampler[side if side in sampler or side == "negative" else "conditioning"]
        while tuple(link) not in known:
            way.append(tuple(link))
            known[way[-1]] = None  # a circle has an end
            kind, inputs = graph[link[0]]
            if kind.startswith("CLIPTextEncode"):
                texts = {_value(graph, inputs[key], ("value",), PRIMITIVES) for key in TEXTS if key in inputs}
                text = texts.pop() if len(texts) == 1 else None
                break
            if {"positive", "negative"} <= inputs.keys():  # it changes both, and passes them on in this order
                link = inputs[("positive", "negative")[link[1]]]
            else:
                link = inputs["conditioning"]
        else:
            text = known[tuple(link)]
    except (LookupError, TypeError):
        pass
    known.update(dict.fromkeys(way, text))
    return text


def _seed(graph: Graph, sampler: dict) -> object:
    try:
        if "noise" in sampler:
            _, sampler = graph[sampler["noise"][0]]
        return _value(graph, sampler["seed" if "seed" in sampler else "noise_seed"], ("seed", "noise_seed", "value"))
    except (LookupError, TypeError):
        return None


def _value(graph: Graph, value: Any, names: tuple[str, ...], kinds: tuple[str, ...] = ()) -> Any:
    """A value, or the one behind a link: the first of `names` in a node of these kinds, or of any. None if it is no
    text or number."""
    if isinstance(value, list):
        kind, inputs = graph[value[0]]
        value = next((inputs[name] for name in names if name in inputs), None) if kind in kinds or not kinds else None
    return value if isinstance(value, str | int) else None
