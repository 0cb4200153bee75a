from __future__ import annotations

import json

import pytest

from layercut.checkpoints.json_edit import replace_values

TABBED = '{\n\t"eps": 1e-6,\n\t"types": [\n\t\t"a",\n\t\t"b"\n\t],\n\t"n": 2, "ü": "\\u00fc"\n}\n'


def test_only_the_changed_values_change() -> None:
    edited = replace_values(TABBED, {"n": 1, "types": ["b"]})
    assert edited == TABBED.replace('"n": 2', '"n": 1').replace('\n\t\t"a",', "")


@pytest.mark.parametrize("text", ['{"n":2,"types":["a","b"]}', '{ "types" : [], "n" : 2 }', TABBED])
def test_the_result_is_the_edited_object(text: str) -> None:
    changes = {"n": 1, "types": ["b", "c"], "new": 7}
    assert json.loads(replace_values(text, changes)) == json.loads(text) | changes


def test_nested_keys_of_the_same_name_stay() -> None:
    text = '{"inner": {"n": 5}, "n": 2}'
    assert replace_values(text, {"n": 1}) == '{"inner": {"n": 5}, "n": 1}'
