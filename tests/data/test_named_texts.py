"""Texts by name: what they stand for, how rows become documents, and what is said offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from layercut.cli.options import parse_sources
from layercut.data.calibration import calibration_batches
from layercut.data.named_texts import find_benchmark
from layercut.data.sources import is_detokenized, read_texts
from layercut.errors import DataError, NetworkError
from layercut.models.view import DecoderView


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[Any, ...]], list[dict[str, str]]]:
    """A Hub whose every data set holds the rows given; records what is asked of it."""
    asked: list[tuple[Any, ...]] = []
    rows: list[dict[str, str]] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: Any, **_: Any) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, rows


def test_wikitext2_is_one_document_equal_to_its_raw_file(hub, tmp_path: Path):
    asked, rows = hub
    lines = [" = Robert = \n", "", " It cost 1 @,@ 250 . \n", "", "", " The end . \n"]
    rows += [{"text": line} for line in lines]
    raw = tmp_path / "wiki.test.raw"
    raw.write_text("".join(line or " \n" for line in lines))
    by_name, by_file = "".join(read_texts("wikitext2")), "".join(read_texts(str(raw)))
    assert by_name == "= Robert =\n\nIt cost 1,250.\n\n\nThe end."
    assert by_file == by_name + "\n"
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None)]


def test_ptb_joins_sentences_and_undoes_its_contractions(hub):
    asked, rows = hub
    rows += [{"sentence": "they do n't pay $ N"}, {"sentence": "it 's <unk>"}]
    assert list(read_texts("ptb")) == ["they don't pay $N it's <unk>"]
    assert list(read_texts("ptb", detokenize=False)) == ["they do n't pay $ N it 's <unk>"]
    assert asked[0] == ("ptb-text-only/ptb_text_only", None, "test", "refs/convert/parquet")


def test_c4_has_one_document_per_row_and_other_splits(hub):
    asked, rows = hub
    rows += [{"text": "a 1 @,@ 2"}, {"text": ""}, {"text": "b"}]
    assert list(read_texts("c4@train")) == ["a 1 @,@ 2", "b"]
    assert asked == [("allenai/c4", "en", "train", None)]


@pytest.mark.parametrize(("name", "local"), [("wikitext2", "wiki.test.raw"), ("c4", "c4.jsonl")])
def test_without_a_network_a_local_copy_is_proposed(name: str, local: str):
    with pytest.raises(
        NetworkError, match=rf"{name}: hub:.* cannot be read: .* such as {local}, in the"
    ):
        next(read_texts(name))


def test_calibrating_on_a_test_split_is_refused(view: DecoderView):
    with pytest.raises(DataError, match=r"wikitext2 is the test split, .* on wikitext2@train"):
        calibration_batches({"data": "wikitext2"}, view.tokenizer)
    with pytest.raises(DataError, match="c4@validation is the validation split"):
        calibration_batches({"data": "c4@validation"}, view.tokenizer)
    with pytest.raises(NetworkError):
        calibration_batches({"data": "c4@train"}, view.tokenizer)


def test_misspelt_names_get_a_suggestion():
    with pytest.raises(DataError, match="data file wikitext does not exist; did you mean 'wikitex"):
        read_texts("wikitext")
    with pytest.raises(DataError, match="'ptb@' should read ptb or ptb@train"):
        find_benchmark("ptb@")


def test_what_is_detokenized_is_known_beforehand():
    wanted = {
        "wikitext2": True,
        "ptb@valid": True,
        "c4": False,
        "hub:me/wikitext": True,
        "embedded:docs": False,
        "wiki.raw.gz": True,
        "a.txt": False,
    }
    assert {source: is_detokenized(source, "auto") for source in wanted} == wanted
    assert is_detokenized("a.txt", True)
    assert not is_detokenized("wikitext2", False)


def test_a_name_alone_is_its_own_label():
    assert parse_sources(["wikitext2", "a.txt"], "--text") == {
        "wikitext2": "wikitext2",
        "text": "a.txt",
    }
