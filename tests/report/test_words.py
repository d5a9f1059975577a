from salun_sd.report.words import in_words, named, plain, rate


def test_names_are_joined_as_people_do():
    assert [named("abc"[:n]) for n in range(4)] == ["", "“a”", "“a” and “b”", "“a”, “b” and “c”"]
    assert named("ab", str.upper) == "A and B"


def test_a_share_has_its_numbers_before_its_rate_and_interval():
    assert rate({"n": 1, "of": 3, "rate": 1 / 3, "ci95": [0.0615, 0.7923]}) == "1 / 3 = 0.333 [0.061, 0.792]"


def test_a_metric_has_its_interval_and_its_images():
    assert in_words({"value": 0.25, "ci95": [0.2, 0.3], "images": 7}) == "0.25 [0.2, 0.3] of 7 images"
    assert in_words({"value": 12.5, "images": [7, 9]}) == "12.5 of 7 and 9 images"
    assert in_words({"value": 0.5, "ci95": None, "images": 7}) == "0.5 of 7 images"


def test_what_was_not_measured_has_no_number():
    for words in (rate(None), in_words(None)):
        assert words == "not measured"


def test_a_setting_is_one_line():
    assert [plain(value) for value in (None, [], {}, 0, "x", ["a", 2])] == ["none", "none", "none", "0", "x", "a, 2"]
