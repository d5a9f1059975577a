import subprocess
import sys

import pytest

from salun_sd.draw import prompts
from salun_sd.edit.concepts import FOLDER, Concept, Plan, builtin, of_pairs
from salun_sd.errors import SalunError, UsageError

CONCEPT = '[[concept]]\nprompt = "a cat"\nanchor = "a dog"\n'


@pytest.fixture
def read(tmp_path):
    def write_and_read(text: str | bytes):
        file = tmp_path / "p.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_plan(str(file))

    return write_and_read


def test_the_shipped_plans_are_the_papers_settings():
    assert builtin() == ["imagenette-church", "nudity"]
    clothes = "a photo of a person wearing clothes"
    nudity = read("nudity")
    assert nudity.concepts == (Concept("a photo of a nude person", clothes),)
    assert nudity.retain_prompts == (clothes,)
    common = {"density": 0.5, "guidance": 7.5, "lr": 1e-5, "batch_size": 8, "resolution": 512}
    assert nudity.settings == {"samples": 800, "steps": 800 // 8, "retain_weight": 0.1, **common}

    church = read("imagenette-church")
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
    assert read("../p.toml").retain_prompts == "no.csv"
    (tmp_path / "no.csv").write_text("")
    assert read("sub/p.toml").retain_prompts == "sub/no.csv"  # a path from here, as the plan's own


def settings(line: str) -> str:
    return f"{CONCEPT}[settings]\n{line}\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[settings\ndensity = "', "is no TOML file: .*line 1"),
        (CONCEPT + "density 0.5", "is no TOML file: .*line 4"),
        (b"\xff\xfe\x00", "is no TOML file: .*decode"),
        (settings("steps = 1" + "0" * 5000), "is no TOML file"),
        ("", "has no concept: write a "),
        (settings("density = 0.5").replace(CONCEPT, ""), "has no concept: write a "),
        ("concept = []", "has no concept: write a "),
        (CONCEPT.replace("[[concept]]", "[concept]"), r"concept has to be written \[\[concept\]\], in two brackets"),
        ('concept = ["a cat"]', "concept has to be written"),
        (CONCEPT + "[setting]", ": setting is not known; known are concept, retain, settings"),
        (CONCEPT + 'anker = "x"', "concept 1: anker is not known; known are prompt, anchor, synonyms, images"),
        (CONCEPT + '[retain]\nprompt = "x"', "retain.prompt is not known; known are retain.prompts, retain.images"),
        (settings("learning_rate = 1e-5"), "settings.learning_rate is not known; known are settings.samples, .*lr"),
        (settings('retain = "x"'), "settings.retain is not known"),
        ('settings = 3\n[[concept]]\nprompt = "a"', "settings has to be a table; it is 3"),
        (settings('density = "half"'), "settings.density has to be a number above 0, 1 at most; it is 'half'"),
        (settings("lr = true"), "settings.lr has to be a number above 0; it is True"),
        (settings("lr = 1" + "0" * 400), "settings.lr has to be a number"),
        (settings("steps = 1.5"), "settings.steps has to be a whole number from 1 on; it is 1.5"),
        (settings("steps = 1.0"), "settings.steps has to be a whole number"),
        (settings("steps = false"), "settings.steps has to be a whole number from 1 on; it is False"),
        (settings("samples = 0"), "settings.samples has to be a whole number from 1 on; it is 0"),
        (settings("density = 1.5"), "settings.density has to be a number above 0, 1 at most; it is 1.5"),
        (settings("lr = 0.0"), "settings.lr has to be a number above 0; it is 0.0"),
        (settings("retain_weight = -1"), "settings.retain_weight has to be a number from 0 on; it is -1"),
        (settings("guidance = inf"), "settings.guidance has to be a number from 0 on; it is inf"),
        (settings("seed = 2026-11-22"), "settings.seed has to be a whole number"),
        (settings('anchor_from = "now"'), 'settings.anchor_from has to be "current" or "base"; it is \'now\''),
        ('[[concept]]\nprompt = 3\nanchor = "a"', "concept 1: prompt has to be a text in quotes.*; it is 3"),
        ('[[concept]]\nprompt = " "\nanchor = "a"', "concept 1: prompt has to be a text in quotes"),
        (CONCEPT + "[[concept]]\nprompt = 'x'\nanchor = ''", "concept 2: anchor has to be a text in quotes"),
        (CONCEPT + 'synonyms = "a kitten"', "concept 1: synonyms has to be a list of texts"),
        (CONCEPT + 'synonyms = ["a kitten", " "]', "concept 1: synonyms has to be a list of texts"),
        (CONCEPT + "images = ''", "concept 1: images has to be a text"),
        (CONCEPT + "[retain]\nprompts = []", "retain.prompts has to be a list of prompts, or the name"),
        (CONCEPT + "[retain]\nprompts = ['a', 3]", "retain.prompts has to be a list of prompts, or the name"),
        ('[[concept]]\nprompt = "a cat"', r"concept 1 \('a cat'\) has no anchor"),
        ('[[concept]]\nanchor = "a cat"', "concept 1 has no prompt"),
        ('[[concept]]\nprompt = "a cat"\nanchor = "A  Cat "', "concept 1: prompt and the anchor are both 'a cat'"),
        (CONCEPT + CONCEPT.replace("a cat", "A CAT"), "concept 2: prompt is 'A CAT', which is there already"),
        (CONCEPT + 'synonyms = ["a pet", "A dog"]', "concept 1: synonym 2 and the anchor are both 'A dog'"),
        (CONCEPT + 'synonyms = ["a cat"]', "concept 1: synonym 1 is 'a cat', which is there already"),
        (CONCEPT + '[retain]\nprompts = "people"\nimages = "x"', "retain.prompts and retain.images cannot go together"),
        (CONCEPT + '[retain]\ncaption = "a {label}"', "retain.caption is for retain.images"),
        (CONCEPT + '[retain]\nprompts = ["a tree", "A cat"]', "retain.prompts has 'A cat', a concept"),
    ],
)
def test_wrong_content_is_named_with_its_key(read, content, said):
    with pytest.raises(SalunError, match=rf"p\.toml.*{said}") as e:
        read(content)
    assert e.value.exit_code == 1


def test_a_missing_plan_lists_the_built_in_ones(tmp_path):
    for nowhere in ("nowhere.toml", "", str(tmp_path)):
        with pytest.raises(UsageError, match="no plan or file .*; built in are imagenette-church, nudity."):
            read(nowhere)


def test_pairs_go_together_in_their_order():
    assert of_pairs(["a cat", "a cow"], ["a dog", "a dog"]) == (
        Concept("a cat", "a dog"),
        Concept("a cow", "a dog"),
    )
    assert of_pairs([], []) == ()


@pytest.mark.parametrize(
    ("concepts", "anchors", "said"),
    [
        (["a cat", "a cow"], ["a dog"], "--concept 'a cow' has no --anchor"),
        (["a cat"], [], "--concept 'a cat' has no --anchor"),
        (["a cat"], ["a dog", "a pig"], "--anchor 'a pig' has no --concept"),
        ([" "], ["a dog"], "^--concept is empty: say what must go"),
        (["a cat", ""], ["a dog", "a pig"], "^--concept 2 is empty"),
        (["a cat", "a cow"], ["\t", "a pig"], "^--anchor 1 is empty: say what stands"),
        (["A  cat"], ["a cat "], "^--concept and the anchor are both 'A  cat'"),
        (["a cat", "a CAT"], ["a dog", "a pig"], "^--concept 2 is 'a CAT', which is there already"),
    ],
)
def test_pairs_that_do_not_go_together_are_refused(concepts, anchors, said):
    with pytest.raises(UsageError, match=said):
        of_pairs(concepts, anchors)


def test_plans_stand_on_the_ground_floor_and_beside_the_prompt_sets():
    assert FOLDER == prompts.FOLDER
    code = "import sys, salun_sd.plan, salun_sd.cache; print(sorted({'torch', 'numpy', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
