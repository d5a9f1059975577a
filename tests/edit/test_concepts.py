import inspect
import shlex
import subprocess
import sys

import pytest

import salun_sd
from salun_sd.draw import prompts
from salun_sd.edit import concepts
from salun_sd.edit.concepts import FOLDER, RENAMED, Concept, Plan, builtin, concepts_of
from salun_sd.errors import SalunError, UsageError

CONCEPT = '[[concept]]\nprompt = "a cat"\nanchor = "a dog"\n'


@pytest.fixture
def read(tmp_path):
    def write_and_read(text: str | bytes):
        file = tmp_path / "p.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return concepts.read(str(file))

    return write_and_read


def test_the_shipped_plans_are_the_papers_settings_and_one_has_our_retain_term():
    assert builtin() == ["imagenette-church", "nudity", "nudity-paper"]
    clothes = "a photo of a person wearing clothes"
    nudity, ours = concepts.read("nudity-paper"), concepts.read("nudity")
    assert nudity.concepts == ours.concepts == (Concept("a photo of a nude person", clothes),)
    assert nudity.retain_prompts == (clothes,) and ours.retain_prompts is None
    assert nudity.settings == {**ours.settings, "recipe": "paper", "retain_weight": 0.1}
    common = {"recipe": "paper", "density": 0.5, "saliency_guidance": 7.5, "lr": 1e-5, "batch_size": 8, "size": 512}
    assert nudity.settings == {"samples": 800, "steps": 800 // 8, "retain_weight": 0.1, **common}

    church = concepts.read("imagenette-church")
    [concept] = church.concepts
    assert concept == Concept("an image of a church", "an image of a French horn", (), concept.images)
    assert concept.images == "frgfm/imagenette/160px:label=church"
    assert church.retain_prompts is None
    retain = {"retain": "frgfm/imagenette/160px:label!=church", "retain_caption": "an image of a {label}"}
    assert church.settings == {"steps": -(-941 // 8) * 5, "retain_weight": 0.5, **common, **retain}


def test_a_whole_plan(read):
    text = """
    [[concept]]
    prompt = "a cat"
    synonyms = ["a kitten", "Katze 🐈"]
    anchor = "a dog"
    [[concept]]
    prompt = "a cow"
    anchor = "a dog"
    synonyms = []
    [retain]
    prompts = ["a tree", "a dog"]
    [settings]
    density = 1
    anchor_from = "base"
    seed = 0
    """
    cats = Concept("a cat", "a dog", ("a kitten", "Katze 🐈"))
    assert cats.prompts() == ("a cat", "a kitten", "Katze 🐈")
    whole = Plan((cats, Concept("a cow", "a dog")), ("a tree", "a dog"),
                      {"density": 1.0, "anchor_from": "base", "seed": 0})  # fmt: skip
    for content in (text, "\ufeff" + text, text.replace("\n", "\r\n")):
        assert read(content) == whole
    assert isinstance(whole.settings["density"], float) and isinstance(read(text).settings["density"], float)
    assert read(CONCEPT) == Plan((Concept("a cat", "a dog"),), None, {})  # what is left out is not filled in


def test_what_lies_beside_the_plan_is_found_from_anywhere(read, tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    (tmp_path / "big:cats").mkdir()
    (tmp_path / "keep.csv").write_text("")
    (tmp_path / "people").mkdir()  # a built-in name stays one
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def images(value: str) -> str:
        found = read(f'{CONCEPT}images = "{value}"\n[retain]\nimages = "{value}"\n')
        assert found.concepts[0].images == found.settings["retain"]
        return found.concepts[0].images

    assert images("cats") == str(tmp_path / "cats")
    assert images("cats:label=a:b") == f"{tmp_path / 'cats'}:label=a:b"
    assert images("big:cats:label!=x") == f"{tmp_path / 'big:cats'}:label!=x"
    for left in ("frgfm/imagenette/160px:label=cats", "dogs", ":label=x", str(tmp_path / "cats")):
        assert images(left) == left
    for name, found in (("keep.csv", str(tmp_path / "keep.csv")), ("people", "people"), ("no.csv", "no.csv")):
        assert read(f'{CONCEPT}[retain]\nprompts = "{name}"').retain_prompts == found

    (elsewhere / "sub").symlink_to(tmp_path)
    assert concepts.read("../p.toml").retain_prompts == "no.csv"
    (tmp_path / "no.csv").write_text("")
    assert concepts.read("sub/p.toml").retain_prompts == "sub/no.csv"  # a path from here, as the plan's own


def settings(line: str) -> str:
    return f"{CONCEPT}[settings]\n{line}\n"


WRONG = {  # content, and words of the refusal
    "a string without an end": ('[settings\ndensity = "', "TOML 'line 1'"),
    "no value": (CONCEPT + "density 0.5", "TOML 'line 4'"),
    "no text": (b"\xff\xfe\x00", "UTF-8"),
    "half a pair": ('[[concept]]\nprompt = "\\ud800"', "TOML"),
    "a number too long": (settings("steps = 1" + "0" * 5000), "TOML"),
    "empty": ("", "[[concept]]"),
    "settings alone": (settings("density = 0.5").replace(CONCEPT, ""), "[[concept]]"),
    "an empty list": ("concept = []", "[[concept]]"),
    "one bracket": (CONCEPT.replace("[[concept]]", "[concept]"), "concept [[concept]]"),
    "concepts as texts": ('concept = ["a cat"]', "concept [[concept]]"),
    "an unknown table": (CONCEPT + "[setting]", "': setting is' 'concept, retain, settings'"),
    "an unknown key": (CONCEPT + 'anker = "x"', "'concept 1: anker' 'prompt, anchor, synonyms, images'"),
    "an unknown key to retain": (CONCEPT + '[retain]\nprompt = "x"', "'retain.prompt is' 'retain.prompts, retain.im'"),
    "an unknown setting": (settings("learning_rate = 1e-5"), "settings.learning_rate 'settings.lr,'"),
    "a setting of retain": (settings('retain = "x"'), "'settings.retain is'"),
    "a number for a table": ('settings = 3\n[[concept]]\nprompt = "a"', "settings table 3"),
    "a text for a number": (settings('density = "half"'), "settings.density \"'half'\""),
    "true for a number": (settings("lr = true"), "settings.lr True"),
    "a number beyond floats": (settings("lr = 1" + "0" * 400), "settings.lr"),
    "half a step": (settings("steps = 1.5"), "settings.steps whole 1.5"),
    "a float of steps": (settings("steps = 1.0"), "settings.steps whole 1.0"),
    "false for steps": (settings("steps = false"), "settings.steps whole False"),
    "no samples": (settings("samples = 0"), "settings.samples 'it is 0'"),
    "a share above 1": (settings("density = 1.5"), "settings.density 1.5"),
    "a rate of 0": (settings("lr = 0.0"), "settings.lr 0.0"),
    "a rate without effect": (settings("lr = 1e-320"), "settings.lr 1e-320 1e-10"),
    "a rate above 1": (settings("lr = 2"), "settings.lr 'it is 2'"),
    "a weight beyond float32": (settings("retain_weight = 1e300"), "settings.retain_weight 1e+300"),
    "a little above 1": (settings("density = 1.0000001"), "settings.density 1.0000001"),
    "more steps than numbers": (settings("steps = 2147483648"), "settings.steps 2147483648"),
    "a negative weight": (settings("retain_weight = -1"), "settings.retain_weight -1"),
    "infinite guidance": (settings("saliency_guidance = inf"), "settings.saliency_guidance inf"),
    "infinite guidance by its old name": (settings("guidance = inf"), "settings.saliency_guidance inf"),
    "a date for a seed": (settings("seed = 2026-11-22"), "settings.seed whole"),
    "an unknown anchor_from": (settings('anchor_from = "now"'), "settings.anchor_from current base now"),
    "a number for a prompt": ('[[concept]]\nprompt = 3\nanchor = "a"', "'concept 1: prompt' 'it is 3'"),
    "a blank prompt": ('[[concept]]\nprompt = " "\nanchor = "a"', "'concept 1: prompt'"),
    "a blank anchor": (CONCEPT + "[[concept]]\nprompt = 'x'\nanchor = ''", "'concept 2: anchor'"),
    "a text for synonyms": (CONCEPT + 'synonyms = "a kitten"', "'concept 1: synonyms' list"),
    "a blank synonym": (CONCEPT + 'synonyms = ["a kitten", " "]', "'concept 1: synonyms' list"),
    "blank images": (CONCEPT + "images = ''", "'concept 1: images'"),
    "nothing to retain": (CONCEPT + "[retain]\nprompts = []", "retain.prompts list"),
    "a number to retain": (CONCEPT + "[retain]\nprompts = ['a', 3]", "retain.prompts list"),
    "no prompt": ('[[concept]]\nanchor = "a cat"', "'concept 1' prompt"),
    "its own anchor": ('[[concept]]\nprompt = "a cat"\nanchor = "A  Cat "', "'concept 1: prompt' \"'a cat'\""),
    "a concept twice": (CONCEPT + CONCEPT.replace("a cat", "A CAT"), "'concept 2: prompt' \"'A CAT'\""),
    "a synonym as the anchor": (CONCEPT + 'synonyms = ["a pet", "A dog"]', "'concept 1: synonym 2' \"'A dog'\""),
    "an anchor that another concept erases": (
        CONCEPT + '[[concept]]\nprompt = "a cow"\nsynonyms = ["a DOG"]\nanchor = "a pig"',
        "'concept 1: anchor' \"'a dog'\" 'concept 2'",
    ),
    "a synonym as the concept": (CONCEPT + 'synonyms = ["a cat"]', "'concept 1: synonym 1' \"'a cat'\""),
    "prompts and images": (CONCEPT + '[retain]\nprompts = "people"\nimages = "x"', "retain.prompts retain.images"),
    "a caption of nothing": (CONCEPT + '[retain]\ncaption = "a {label}"', "retain.caption retain.images"),
    "to go and to stay": (CONCEPT + '[retain]\nprompts = ["a tree", "A cat"]', "retain.prompts \"'A cat'\""),
}


@pytest.mark.parametrize(("content", "named"), WRONG.values(), ids=WRONG)
def test_wrong_content_is_named_with_its_key(read, content, named):
    with pytest.raises(SalunError) as e:
        read(content)
    assert e.value.exit_code == 1
    assert [word for word in ["p.toml", *shlex.split(named)] if word not in str(e.value)] == []


def test_a_missing_plan_lists_the_built_in_ones(tmp_path):
    for nowhere in ("nowhere.toml", "", str(tmp_path)):
        with pytest.raises(UsageError, match=f"{nowhere}.*imagenette-church, nudity, nudity-paper"):
            concepts.read(nowhere)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_in_a_plan_still_works_and_is_said(read, caplog, old, new):
    assert read(settings(f"{new} = 16")) == read(settings(f"{old} = 16"))
    assert read(settings(f"{old} = 16")).settings == {new: 16}
    assert len(caplog.messages) == 2 and all("p.toml" in m and old in m and new in m for m in caplog.messages)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_beside_the_new_one_is_refused(read, old, new):
    with pytest.raises(SalunError, match=f"{old}.*{new}"):
        read(settings(f"{old} = 16\n{new} = 32"))


def test_a_plan_is_what_erase_is_called_with(read, tmp_path):
    read(f'{CONCEPT}images = "cats"\n[retain]\nimages = "dogs"\ncaption = "a {{label}}"\n'
         "[settings]\nguidance = 2\nsize = 16\nsteps = 3\n")  # fmt: skip
    assert salun_sd.plan(str(tmp_path / "p.toml")) == {
        "concept": (Concept("a cat", "a dog", (), "cats"),), "retain_prompts": None, "retain": "dogs",
        "retain_caption": "a {label}", "saliency_guidance": 2.0, "size": 16, "steps": 3}  # fmt: skip
    known = inspect.signature(salun_sd.erase).parameters
    assert {*concepts.SETTINGS, "concept", "retain_prompts", "retain", "retain_caption"} <= known.keys()
    for name in builtin():
        assert salun_sd.plan(name).keys() <= known.keys()


CAT, COW = Concept("a cat", "a dog", ("a kitten",), "photos"), Concept("a cow", "a horse")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (("a cat", "a dog"), [Concept("a cat", "a dog")]),
        ((["a cat", "a cow"], ["a dog", "a horse"]), [Concept("a cat", "a dog"), COW]),
        ((CAT,), [CAT]),
        (((CAT, COW),), [CAT, COW]),
        (([CAT, COW], []), [CAT, COW]),
        ((COW, None, "photos"), [COW._replace(images="photos")]),
        (("a cat", "a dog", "photos"), [Concept("a cat", "a dog", (), "photos")]),
    ],
)
def test_concepts_are_prompts_with_anchors_or_what_a_plan_has(given, found):
    assert concepts_of(*given, needs_anchor=True) == tuple(found)


def test_a_mask_needs_no_anchors():
    assert concepts_of("a cat", needs_anchor=False) == (Concept("a cat", None),)
    assert concepts_of(["a cat", "a cow"], needs_anchor=False) == (Concept("a cat", None), Concept("a cow", None))
    assert concepts_of([CAT, Concept("a cow", None)], needs_anchor=False) == (CAT, Concept("a cow", None))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((["a cat", COW], ["a dog"]), "plan"),
        ((["a cat", COW],), "plan"),
        ((COW, "a dog"), "--anchor 'a dog'"),
        (([],), "--concept .*--plan"),
        (([], []), "--concept .*--plan"),
        (("a cat", []), "--concept 'a cat'"),
        (([], "a dog"), "--anchor 'a dog'"),
        (([CAT, COW], None, "photos"), "--forget"),
        ((["a cat", "a cow"], ["a dog", "a horse"], "photos"), "--forget"),
        ((["a cat", "a cow"],), "--concept 'a cat'"),
        ((Concept("a cat", None),), "--concept 'a cat' .*anchor"),
        (([COW, Concept("a cat", None)],), "--concept 2 'a cat' .*anchor"),
        ((Concept("a cat", " "),), "^--anchor is"),
        ((Concept(" ", "a dog"),), "^--concept is"),
        ((Concept("a cat", "A  cat"),), "^--concept .*'a cat'"),
        (([CAT, Concept("a kitten", "a dog")],), "^--concept 2 .*'a kitten'"),
    ],
)
def test_concepts_that_do_not_go_together_are_refused(given, named):
    with pytest.raises(UsageError, match=named):
        concepts_of(*given, needs_anchor=True)


def test_texts_of_a_mask_are_checked_too():
    for given in (" ", ["a cat", "A  cat"], [COW, COW], Concept("a cat", None, ("a CAT",))):
        with pytest.raises(UsageError, match="--concept"):
            concepts_of(given, needs_anchor=False)


def test_pairs_go_together_in_their_order():
    assert concepts_of(["a cat", "a cow"], ["a dog", "a dog"], needs_anchor=True) == (
        Concept("a cat", "a dog"),
        Concept("a cow", "a dog"),
    )


@pytest.mark.parametrize(
    ("prompts", "anchors", "named"),
    [
        (["a cat", "a cow"], ["a dog"], "--concept 'a cow' .*--anchor"),
        (["a cat"], [], "--concept 'a cat' .*--anchor"),
        (["a cat"], ["a dog", "a pig"], "--anchor 'a pig' .*--concept"),
        ([" "], ["a dog"], "^--concept is"),
        (["a cat", ""], ["a dog", "a pig"], "^--concept 2 is"),
        (["a cat", "a cow"], ["\t", "a pig"], "^--anchor 1 is"),
        (["A  cat"], ["a cat "], "^--concept .*'A  cat'"),
        (["a cat", "a CAT"], ["a dog", "a pig"], "^--concept 2 .*'a CAT'"),
        (["caf\u00e9", "cafe\u0301"], ["a dog", "a pig"], "^--concept 2 .*'cafe\u0301'"),
        (["a cat", "a dog"], ["a dog", "a cat"], "^--anchor 1 .*'a dog'.*--concept 2"),
        (["a cat", "a cow"], ["a pig", "A  CAT"], "^--anchor 2 .*'A  CAT'.*--concept 1"),
    ],
)
def test_pairs_that_do_not_go_together_are_refused(prompts, anchors, named):
    with pytest.raises(UsageError, match=named):
        concepts_of(prompts, anchors, needs_anchor=True)


def test_plans_lie_beside_the_prompt_sets_and_reading_one_waits_for_no_library():
    assert FOLDER == prompts.FOLDER
    code = "import sys, salun_sd; salun_sd.plan; print(sorted({'torch', 'numpy', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
