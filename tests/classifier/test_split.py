import pytest
import torch
from helpers.pictures import pictures

from salun_sd.classifier.split import held_out, split, wanted
from salun_sd.errors import UsageError

DATA = pictures()


def made(text, seed=0, **rest):
    forget = wanted(text, DATA)
    return split(DATA, forget, seed, held_out(DATA, forget, 0), **rest)


def places(parts):
    return [set(getattr(parts, name).index.tolist()) for name in ("forget", "retain", "validation")]


def listed(tmp_path, *names):
    (tmp_path / "list").write_text("\n".join(names))
    return str(tmp_path / "list")


@pytest.mark.parametrize("text", ["0.1", "0.5", "class:2"])
def test_no_image_is_in_two_parts_and_each_in_one(text):
    forget, retain, validation = places(made(text))
    assert len(forget | retain | validation) == len(forget) + len(retain) + len(validation)
    assert len(validation) == (6 if text == "class:2" else 8)
    assert len(forget | retain | validation) == 72 + len(validation)
    assert sorted(made(text).trained.index.tolist()) == sorted(forget | retain)


def test_a_share_is_of_what_was_learned_and_each_seed_forgets_others():
    first, same, other = (made("0.25", seed) for seed in (0, 0, 1))
    assert len(first.forget) == round(0.25 * 72)
    assert places(first) == places(same) and places(first)[0] != places(other)[0]
    assert places(first)[2] == places(other)[2]  # or the original would have seen other images


def test_a_class_is_forgotten_whole_and_is_no_longer_tested():
    parts = made("class:2")
    assert (parts.forget.labels == 2).all() and not any((p.labels == 2).any() for p in parts[1:])
    assert len(parts.test) == 30


def test_images_of_a_list_are_forgotten_and_never_held_out(tmp_path):
    names = [DATA.train.names[i] for i in torch.randperm(80)[:30].tolist()]
    parts = made(listed(tmp_path, *names))
    assert set(parts.forget.names) == set(names) and len(parts.validation) == 8
    assert not set(parts.validation.names) & set(names)


WRONG = {
    "1.5": "1.5", "0": "0", "nan": "nan", "class:9": "9", "nowhere": "nowhere", "0.001": "forget",
    "LIST train[1] train[1]": "train[1]", "LIST train[1] train[99]": "train[99]", "LIST": "list",
}  # fmt: skip


@pytest.mark.parametrize(("text", "named"), WRONG.items())
def test_what_cannot_be_forgotten_is_refused_by_name(text, named, tmp_path):
    with pytest.raises(UsageError) as e:
        made(listed(tmp_path, *text.split()[1:]) if text.startswith("LIST") else text)
    assert named in str(e.value)


def test_a_class_with_nothing_left_is_named_and_goes_on_where_that_is_asked(tmp_path):
    forget = listed(tmp_path, *(name for name, y in zip(DATA.train.names, DATA.train.labels, strict=True) if y == 3))
    with pytest.raises(UsageError, match="--empty-class") as e:
        made(forget)
    assert " 3 " in str(e.value)
    assert len(made(forget, empty_class=True).forget) == 20
