"""What a run learns from: images that are given or drawn, encoded once, and kept."""

import json
import time

import pytest
import torch
from helpers.commands import ANCHOR, CONCEPT, fails, spawn
from helpers.models import damage, write_pipeline
from helpers.runs import PAIR, SHORT, erased_fingerprint, record_of, write_photographs
from PIL import Image

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.cli import app as cli
from salun_sd.draw import generate
from salun_sd.draw import kept as kept_images
from salun_sd.draw.encode import encode_prompts
from salun_sd.edit import datasets, encodings
from salun_sd.edit.concepts import Concept
from salun_sd.edit.datasets import Item
from salun_sd.edit.recipes import recipe_of
from salun_sd.edit.sources import Sources, check_texts, sources_in_words
from salun_sd.edit.training_data import collect
from salun_sd.errors import UsageError
from salun_sd.methods.ablation import Ablation
from salun_sd.methods.ascent import Ascent
from salun_sd.methods.esd import ESD
from salun_sd.runtime import cache

SNEAKER, COAT = Concept(CONCEPT, ANCHOR), Concept("a photo of a coat", "a photo of a dress")
ERASE = [*PAIR, "--mask", "random:0.1", *SHORT]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photographs(tmp_path):
    return write_photographs(tmp_path / "photographs")


def drawn_files(folder) -> dict[str, int]:
    """Name of each image that is kept, and when it was written."""
    return {f.name: f.stat().st_mtime_ns for f in folder.rglob("*.png")}


# What a run asks for


def sources(tiny, *concepts, samples=5, retain=None, caption=None, prompts=None, method="salun") -> Sources:
    recipe = recipe_of(method, None, None, {"samples": samples, "retain_prompts": prompts, "retain_weight": 1.0})
    return Sources.of(find(tiny), concepts, recipe, retain and str(retain), caption, seed=0)


def test_images_are_counted_whether_they_are_given_or_will_be_drawn(tiny, photographs):
    given = SNEAKER._replace(images=str(photographs))
    for concepts, retain, count, draws in (
        ([SNEAKER], None, 5, True),
        ([SNEAKER, COAT], None, 10, True),
        ([given, COAT], None, 3 + 5, True),
        ([given], None, 3, True),
        ([given], photographs, 3, False),
        ([given, COAT], photographs, 3 + 5, True),
    ):
        found = sources(tiny, *concepts, retain=retain, caption=retain and "a photo")
        assert (found.count(), found.draws(needs_mask=True)) == (count, draws)


def test_what_stays_is_the_anchors_the_texts_or_a_prompt_set_without_the_concepts_classes(tiny, photographs):
    guidance = find(tiny).sampling[1]
    two, one = [SNEAKER, COAT], [SNEAKER, COAT._replace(anchor=ANCHOR)]
    assert sources(tiny, *two, prompts="anchor").prompts == [(ANCHOR, guidance), (COAT.anchor, guidance)]
    assert sources(tiny, *one, prompts="anchor").prompts == [(ANCHOR, guidance)]
    given = sources(tiny, *two, retain=photographs, caption="a photo")
    assert given.prompts == [] and given.retains
    assert sources(tiny, SNEAKER, prompts=("a tree", "a dog")).prompts == [("a tree", guidance), ("a dog", guidance)]
    texts = [text for text, _ in sources(tiny, SNEAKER, prompts="pocket").prompts]
    assert len(texts) == 900 and not [text for text in texts if "sneaker" in text]


@pytest.mark.parametrize("method", ["finetune", "ascent", "esd", "forget-me-not"])
def test_images_to_retain_need_no_anchor_but_each_a_caption(tiny, photographs, method):
    bare = SNEAKER._replace(anchor=None)
    for caption, concepts in (("a photo", [bare]), ("a photo", [bare, COAT._replace(anchor=None)]), (None, [SNEAKER])):
        found = sources(tiny, *concepts, retain=photographs, caption=caption, method=method)
        assert found.retains and len(found.retain) == 3 and found.examples(1)[0] == CONCEPT
    for concepts in ([bare], [bare, COAT._replace(anchor=None)]):
        with pytest.raises(UsageError, match=r"photographs.* no anchor.*--retain-caption"):
            sources(tiny, *concepts, retain=photographs, method=method)


def test_images_to_retain_that_have_captions_need_neither_an_anchor_nor_another_caption(tiny, photographs):
    bare = SNEAKER._replace(anchor=None)
    (photographs / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{f.name}", "text": "a tree"}}\n' for f in sorted(photographs.glob("*.png")))
    )
    of_finetune = sources(tiny, bare, retain=photographs, method="finetune")
    assert len(collect(encodings.LoadedBase(find(tiny), 32), of_finetune, needs_mask=False).training.retain) == 3


def test_sample_images_show_each_concept_and_each_prompt_alike_often(tiny):
    two = sources(tiny, SNEAKER, COAT, prompts=("a tree", "a dog", "a cat"))
    assert two.examples(4) == [CONCEPT, CONCEPT, COAT.prompt, COAT.prompt, "a tree", "a tree", "a dog", "a cat"]


def test_the_digests_are_of_what_is_given(tiny, photographs):
    drawn = sources(tiny, SNEAKER).digests()
    assert drawn["forget"] == [None] and drawn["retain"] is None
    others = [sources(tiny, SNEAKER, **given) for given in ({"prompts": ("a tree",)}, {"prompts": "anchor"})]
    assert len({drawn["retain_prompts"], *(s.digests()["retain_prompts"] for s in others)}) == 3
    given = sources(tiny, SNEAKER._replace(images=str(photographs)), COAT, retain=photographs, caption="x").digests()
    digest = datasets.digest(datasets.items(str(photographs)))
    assert given == {"forget": [digest, None], "retain": digest, "retain_prompts": None}
    (photographs / "1.txt").write_text("a coat")
    captioned = sources(tiny, SNEAKER, retain=photographs, caption="x").digests()
    assert captioned["retain"] not in (None, digest)


@pytest.mark.parametrize("at", [-1, 12, 40, 200])
def test_an_encoding_that_was_damaged_is_made_again(tiny, own_cache, photographs, caplog, at):
    def encoded():
        return encodings.encode(base, [item._replace(caption="a coat") for item in items], ["", "a dress"])

    base, items = encodings.LoadedBase(find(tiny), 32), datasets.items(str(photographs))
    examples, row = encoded()
    [file] = own_cache.glob("encoded/*/*.safetensors")
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[at] ^= 4
    file.write_bytes(damaged)
    again, same_row = encoded()
    assert torch.equal(again.latents, examples.latents) and same_row == row
    assert file.read_bytes() == whole


# Captions and labels in a run


def test_captions_are_read_and_another_caption_is_another_run(tiny, tmp_path, photographs, capsys):
    folders = ["--forget", str(photographs), "--retain", str(photographs), "--retain-caption", "a photo"]
    argv = ["erase", tiny, *ERASE, *folders]
    cli.run([*argv, "--out", str(tmp_path / "plain")])
    (photographs / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a photo of a coat"}\n')
    assert "--out" in fails([*argv, "--out", tmp_path / "plain"], 2, capsys)
    cli.run([*argv, "--out", str(tmp_path / "captioned")])
    assert erased_fingerprint(tmp_path / "plain") != erased_fingerprint(tmp_path / "captioned")
    (photographs / "1.txt").write_text("a coat")
    assert "1.png" in fails([*argv, "--out", tmp_path / "x"], 1, capsys)  # two captions for one image


def test_a_data_set_with_labels(tiny, tmp_path, photographs, capsys):
    library = pytest.importorskip("datasets")
    images = [Image.open(file) for file in sorted(photographs.iterdir())]
    features = library.Features(image=library.Image(), label=library.ClassLabel(names=["church", "tench"]))
    rows = library.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)
    rows.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    argv = ["erase", tiny, "--concept", "an image of a church", "--anchor", "an image of a tench",
            "--forget", f"{tmp_path / 'set'}:label=church", "--retain", f"{tmp_path / 'set'}:label!=church",
            "--retain-caption", "an image of a {label}", "--mask", "random:0.1", *SHORT]  # fmt: skip
    cli.run([*argv, "--out", str(tmp_path / "erased")])
    assert record_of(tmp_path / "erased")["images"] == {"forget": 1, "retain": 2}
    argv[argv.index("--forget") + 1] = f"{tmp_path / 'set'}:label=horn"
    assert "church, tench" in fails([*argv, "--out", tmp_path / "x"], 2, capsys)


# Texts and the tokens that the encoders are given

LONG = "a photo of " * 12  # more than the 24 tokens that the encoder reads


@pytest.mark.parametrize(("concepts", "retain", "named"), [
    ([Concept("a cat", "A  CAT")], (), ["'a cat'", "the anchor 'A  CAT'"]),
    ([Concept(LONG + "a cat", LONG + "a dog")], (), [repr(LONG + "a cat"), repr(LONG + "a dog")]),
    ([Concept("a cat", "a dog", ("A Dog",))], (), ["'A Dog'", "the anchor"]),
    ([Concept("a cat", "a dog"), Concept("a CAT", "a bag")], (), ["the concept 'a cat'", "'a CAT'"]),
    ([Concept("a cat", "a dog")], ("a bag", "A cat"), ["'a cat'", "to retain 'A cat'"]),
    ([Concept("<|endoftext|>", "a dog")], (), ["empty"]),
    ([Concept(LONG, None), Concept(LONG + "b", None)], (), [repr(LONG)]),
])  # fmt: skip
def test_texts_that_the_encoder_cannot_tell_apart_are_refused_by_name(tiny, concepts, retain, named):
    with pytest.raises(UsageError) as caught:
        check_texts(find(tiny), concepts, [None] * len(concepts), retain)
    assert all(word in str(caught.value) for word in [*named, tiny])


def test_texts_that_the_encoder_can_tell_apart_are_taken_though_their_ends_are_cut(tiny, caplog):
    """The caption of a forget image may be anything but the anchor; the anchor may be retained."""
    items = [Item(str(n), text, None, None) for n, text in enumerate(["a dog", "in a garden", None, LONG + "far away"])]
    concept = Concept("a cat " + LONG, "a dog " + LONG, ("a kitten",))
    check_texts(find(tiny), [concept], [items], [concept.anchor], [Item("9", "a tree", None, None)])
    [line] = caplog.messages
    assert "3 of 7" in line and "'a cat a photo" in line
    with pytest.raises(UsageError, match="'a dog' from the anchor 'a Dog'"):
        check_texts(find(tiny), [Concept("a cat", "a Dog")], [items])
    caplog.clear()
    check_texts(find(tiny), [Concept("a cat", "a bag")], [items[:3]])
    assert not caplog.messages


def test_texts_are_told_apart_by_any_encoder(tmp_path):
    """SDXL whose second tokenizer reads on to where the first has ended."""
    folder = write_pipeline(tmp_path / "sdxl", "sdxl")
    with pytest.raises(UsageError):
        check_texts(find(str(folder)), [Concept(LONG + "a cat", LONG + "a dog")], [None])
    for file, key, value in (("tokenizer_2/tokenizer_config.json", "model_max_length", 77),
                             ("text_encoder_2/config.json", "max_position_embeddings", 77)):  # fmt: skip
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | {key: value}))
    check_texts(find(str(folder)), [Concept(LONG + "a cat", LONG + "a dog")], [None])


@pytest.mark.parametrize("command", ["mask", "erase"])
def test_texts_are_compared_before_anything_is_drawn(tiny, own_cache, tmp_path, capsys, command):
    argv = {"mask": ["--concept", LONG + "a cat", "--concept", LONG + "a dog"],
            "erase": ["--concept", LONG + "a cat", "--anchor", LONG + "a dog"]}  # fmt: skip
    out = tmp_path / ("m.safetensors" if command == "mask" else "erased")
    assert "a dog" in fails([command, tiny, *argv[command], "--out", out], 2, capsys)
    assert not list(tmp_path.rglob("*.png")) and not out.exists()


def test_training_images_of_one_colour_are_named(tiny, photographs, tmp_path, capsys):
    Image.new("RGB", (64, 64), (3, 3, 3)).save(photographs / "0.png")
    argv = ["mask", tiny, "--concept", CONCEPT, "--forget", str(photographs), "--out", str(tmp_path / "m.safetensors")]
    cli.run(argv)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "one colour" in line]
    assert "1 of 3" in line and "0.png" in line


# A base that is broken


@pytest.mark.parametrize(("name", "value"), [("conv_out.weight", float("nan")), ("conv_out.weight", 3e38)])
@pytest.mark.parametrize("command", ["mask", "erase"])
def test_a_base_that_gives_no_numbers_is_the_cause_and_leaves_nothing(
    tmp_path, own_cache, photographs, capsys, command, name, value
):  # fmt: skip
    """Drawing, and with images of one's own the gradient; neither a weight that is NaN nor one that overflows."""
    base = write_pipeline(tmp_path / "base", "sd1")
    damage(base, "unet", name, value)
    for images in ((), ("--forget", photographs)):
        argv = ["mask", base, "--concept", CONCEPT, "--samples", "2", *images, "--out", tmp_path / "m.safetensors"]
        if command == "erase":
            argv = ["erase", base, *ERASE, *images, *(("--retain", photographs) if images else ()), "--samples", "2",
                    "--out", tmp_path / "out"]  # fmt: skip
        sentence = fails(argv, 1, capsys)
        assert "UNet" in sentence and str(base) in sentence and "--lr" not in sentence
    assert not list(own_cache.rglob("*.png")) and {p.name for p in tmp_path.iterdir()} <= {
        "base", "cache", "photographs"
    }  # fmt: skip


# The cache


def test_a_second_run_draws_and_encodes_nothing_and_needs_no_vae(tiny, own_cache, tmp_path, monkeypatch):
    argv = ["erase", tiny, *ERASE, "--samples", "2"]
    cli.run([*argv, "--out", str(tmp_path / "first")])
    drawn = drawn_files(own_cache)
    assert len(drawn) == 4 and len(list(own_cache.rglob("encoded.safetensors"))) == 2
    loaded = []

    def load(model, **parts):
        loaded.append(parts)
        return load_pipeline(model, **parts)

    monkeypatch.setattr(encodings, "load_pipeline", load)
    cli.run([*argv, "--out", str(tmp_path / "second")])
    assert loaded == [] and drawn_files(own_cache) == drawn
    assert erased_fingerprint(tmp_path / "first") == erased_fingerprint(tmp_path / "second")


def test_images_are_kept_by_prompt_seed_and_checkpoint_and_each_entry_says_what_it_is(tiny, own_cache, tmp_path):
    """What `mask` draws, `erase` finds; more samples extend fewer."""
    cli.run(["mask", tiny, "--concept", CONCEPT, "--samples", "2", "--out", str(tmp_path / "m.safetensors")])
    first = drawn_files(own_cache)
    cli.run(["erase", tiny, *PAIR, "--samples", "3", *SHORT, "--mask", str(tmp_path / "m.safetensors"),
             "--out", str(tmp_path / "erased")])  # fmt: skip
    after = drawn_files(own_cache)
    assert len(first) == 2 and len(after) == 6 and first.items() <= after.items()
    with Image.open(next(own_cache.rglob("*.png"))) as image:
        assert image.info[generate.PROVENANCE].startswith(find(tiny).identity)
    about = sorted((entry.kind, entry.files, entry.about) for entry in cache.entries())
    assert [(kind, files) for kind, files, _ in about] == [("drawn", 7)] + [("encoded", 1)] * 3  # six, and their stamps
    base = find(tiny).fingerprint[:8]  # whatever the folder is called
    words = {"drawn": [base, "2 steps", "PNDM"], "encoded": [base, "images", "32"]}
    assert all(word in text for kind, _, text in about for word in words[kind])


def test_a_damaged_encoding_is_made_anew(tiny, own_cache, tmp_path, photographs):
    argv = ["mask", tiny, "--concept", CONCEPT, "--forget", str(photographs), "--out", str(tmp_path / "m.safetensors")]
    cli.run(argv)
    mask = (tmp_path / "m.safetensors").read_bytes()
    [file] = own_cache.rglob("encoded.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    cli.run(argv)
    assert (tmp_path / "m.safetensors").read_bytes() == mask and file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_named_and_nothing_is_written(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "file" / "cache"))
    sentence = fails(["erase", tiny, *ERASE, "--out", tmp_path / "out"], 1, capsys)
    assert "SALUN_SD_CACHE" in sentence and str(tmp_path / "file" / "cache") in sentence
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_second_run_on_the_same_cache_waits_for_the_first(tiny, own_cache, tmp_path):
    base = find(tiny)
    key = kept_images.key_of(base, base.scheduler, base.sampling[0])
    with cache.held("drawn", key) as folder:
        process = spawn(["erase", tiny, *ERASE, "--samples", "2", "--out", tmp_path / "out"])
        while str(folder) not in (line := process.stderr.readline()):
            assert line, "it does not say that it waits"
        time.sleep(1)
        assert process.poll() is None and not list(folder.rglob("*.png"))
    process.communicate(timeout=120)
    assert process.returncode == 0 and len(list(folder.rglob("*.png"))) == 4


def test_images_of_the_anchor_have_the_concepts_prompts_and_are_those_that_are_retained(tiny, own_cache):
    concepts, guidance = (SNEAKER._replace(synonyms=("a boot",)),), find(tiny).sampling[1]
    asked = Sources(concepts, Ablation(), [None], True, None, None, [(ANCHOR, guidance)], 2, 0, False)
    training = collect(encodings.LoadedBase(find(tiny), 32), asked, needs_mask=False).training
    assert torch.equal(training.forget.latents, training.retain.latents) and len(drawn_files(own_cache)) == 2
    prompts, contexts = encode_prompts(load_pipeline(find(tiny)), [CONCEPT, "a boot", ANCHOR]), training.forget.prompts
    assert torch.equal(contexts["context"][training.forget.which], prompts["context"][:2])
    assert torch.equal(contexts["context"][training.anchors], prompts["context"][[2, 2]])


def test_images_that_only_a_mask_is_made_of_are_not_said_to_be_trained_on():
    concept = Concept("a photo of a sneaker", None, images="here/photos").record()
    said = {kind: sources_in_words({"samples": 7, "concepts": [concept]}, kind())["forget"] for kind in (ESD, Ascent)}
    assert "7" in said[ESD] and "photos" not in said[ESD] and said[Ascent] == "here/photos"
