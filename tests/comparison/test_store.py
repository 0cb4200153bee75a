"""Records that survive a kill, and folders that belong to one comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from layercut.checkpoints.claimed_folder import find_differences
from layercut.comparison.store import Records, Store, check_folder, open_store
from layercut.errors import OutputError


def test_records_are_read_back_and_the_last_of_a_key_counts(tmp_path: Path):
    records = Records(tmp_path / "rows.jsonl")
    records.add("a", {"value": 1})
    records.add("b", {"value": "zwei …"})
    records.add("a", {"value": 3})
    again = Records(tmp_path / "rows.jsonl")
    assert again.get("a") == {"key": "a", "value": 3}
    assert again.get("b") == {"key": "b", "value": "zwei …"}
    assert again.get("c") is None


@pytest.mark.parametrize("n_bytes", [1, 5, 18])
def test_a_torn_last_line_is_forgotten_and_not_glued_to_the_next(tmp_path: Path, n_bytes: int):
    path = tmp_path / "rows.jsonl"
    records = Records(path)
    records.add("a", {"value": 1})
    whole = path.read_bytes()
    records.add("b", {"value": 2})
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:n_bytes])
    torn = Records(path)
    assert (torn.get("a"), torn.get("b")) == ({"key": "a", "value": 1}, None)
    torn.add("c", {"value": 3})
    assert list(Records(path).known) == ["a", "c"]


def test_other_settings_are_refused_with_the_keys_that_differ(tmp_path: Path):
    with open_store(tmp_path, overwrite=False) as store:
        store.claim({"seed": 0, "evaluation": {"text": {"a": "1"}, "seq_len": 8}})
        store.rows.add("x", {})
    message = r"evaluation\.text\.a 1 there, 2 now; seed 0 there, 1 now.*--overwrite"
    with open_store(tmp_path, overwrite=False) as store, pytest.raises(OutputError, match=message):
        store.claim({"seed": 1, "evaluation": {"text": {"a": "2"}, "seq_len": 8}})
    with open_store(tmp_path, overwrite=True) as store:
        store.claim({"seed": 1})
        assert not store.rows.known


def test_texts_are_added_to_what_is_there(tmp_path: Path):
    with open_store(tmp_path, overwrite=False) as store:
        store.claim({"text": {"a": "1"}})
        store.claim({"text": {"b": "2"}})
    assert Store(tmp_path).identity == {"text": {"a": "1", "b": "2"}}


def test_a_key_that_only_one_side_has_is_no_difference():
    assert find_differences({"a": {"b": 1}}, {"a": {"c": 2}, "d": 3}) == []


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"holds config\.json, which no comparison wrote"):
            check_folder(tmp_path, overwrite=overwrite)
    with pytest.raises(OutputError, match="is a file"):
        check_folder(tmp_path / "config.json", overwrite=False)


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path):
    with (
        open_store(tmp_path, overwrite=False),
        pytest.raises(OutputError, match="another comparison"),
        open_store(tmp_path, overwrite=False),
    ):
        pass


def test_what_a_kill_left_of_the_first_claim_is_no_foreign_file(tmp_path: Path):
    (tmp_path / "settings.json.partial").write_text('{"seed"')
    check_folder(tmp_path, overwrite=False)
    with open_store(tmp_path, overwrite=False) as store:
        store.claim({"seed": 0})
    assert Store(tmp_path).identity == {"seed": 0}
