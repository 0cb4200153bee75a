from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.errors import RecipeError
from layercut.recipe import strict_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("7", 7),
        ("-1_000", -1000),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("012", "012"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("null", None),
        ("", None),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    loaded = strict_yaml.load(text, "x")
    assert loaded == value
    assert type(loaded) is type(value)


def test_infinity_and_nan_are_numbers() -> None:
    assert strict_yaml.load("-.inf", "x") == -math.inf
    assert math.isnan(strict_yaml.load(".nan", "x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"r\.yaml, line 3: the key 'a' appears twice"),
        ("a:\n  b: 1\n  b: 1", r"line 3: the key 'b' appears twice"),
        ("a: 1\n\tb: 2", r"line 2: .*indent with spaces, not tabs"),
        ("a: !!python/object/apply:os.system [ls]", r"line 1: the tag .*os\.system is not allowed"),
        ("a: !!binary aGk=", r"line 1: the tag .*binary is not allowed"),
        ("a: 1\n2: 3", r"line 2: the key '2' is not text; quote it"),
        ("? [a, b]\n: 1", r"line 1: the key .* is not text"),
        ("a: [1", r"r\.yaml, line 1"),
        ("a: 1\n---\nb: 2", r"r\.yaml, line 2"),
        ("a: \x00", r"r\.yaml, line 1: special characters are not allowed"),
        ("a: &x [*x]", r"line 1: an alias that contains itself"),
        ("[" * 50 + "]" * 50, r"line 1: nested deeper than 20 levels"),
        ("a: " + "9" * 5000, r"r\.yaml: Exceeds the limit"),
    ],
)
def test_malformed_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        strict_yaml.load(text, "r.yaml")


def test_alias_bomb_is_refused_before_it_expands() -> None:
    levels = ["a0: &a0 [x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(RecipeError, match="line 3: more than 16 aliases"):
        strict_yaml.load("\n".join(levels), "r.yaml")


def test_a_few_aliases_are_fine() -> None:
    assert strict_yaml.load("a: &x {k: 1}\nb: *x", "r.yaml") == {"a": {"k": 1}, "b": {"k": 1}}


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: m\n")
    assert strict_yaml.load_file(path) == {"model": "m"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no keys"),
        (b"- a\n- b", "has no keys"),
        (b"# only a comment", "has no keys"),
        (b"model: \xff", "is not UTF-8 at byte 7"),
        (b"a" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
)
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        strict_yaml.load_file(path)


def test_missing_file_points_to_the_template(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist; `layercut recipe` prints a template"):
        strict_yaml.load_file(tmp_path / "none.yaml")


def test_folders_and_fifos_are_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(RecipeError, match="is not a regular file"):
            strict_yaml.load_file(path)


def test_unreadable_name_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot be read: File name too long"):
        strict_yaml.load_file(Path("a" * 300))


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), trees, max_size=4))
def test_what_is_dumped_loads_back_equal(value: dict[str, object]) -> None:
    assert strict_yaml.load(strict_yaml.dump(value), "x") == value
