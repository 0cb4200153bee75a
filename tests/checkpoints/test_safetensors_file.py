from __future__ import annotations

import errno
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layercut.checkpoints import shard_writer
from layercut.checkpoints.folder import check_plain_file, list_weight_files
from layercut.checkpoints.safetensors_file import read_shard, read_tensor
from layercut.checkpoints.shard_writer import write_shard
from layercut.errors import ModelError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(2, 2).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
    }
    save_file(tensors, path, metadata={"format": "pt", "note": "é"})
    return path


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_copies_and_new_tensors_read_back_with_safetensors(shard: Path, tmp_path: Path) -> None:
    source, new = read_shard(shard), torch.randn(4, 3).t()
    entries = [(f"x.{name}", stored) for name, stored in source.tensors.items()]
    target = tmp_path / "target.safetensors"
    write_shard(target, [*entries, ("new", new.bfloat16())], source.metadata)
    written, original = load_file(target), load_file(shard)
    assert torch.equal(written.pop("new"), new.bfloat16())
    assert {n.removeprefix("x.") for n in written} == set(original)
    for name, tensor in original.items():
        assert torch.equal(written[f"x.{name}"], tensor)
    with safe_open(target, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "é"}
    assert int.from_bytes(target.read_bytes()[:8], "little") % 8 == 0


def test_tensors_come_in_stored_order_and_cover_the_file(shard: Path) -> None:
    tensors = list(read_shard(shard).tensors.values())
    assert all(a.end == b.begin for a, b in pairwise(tensors))
    assert tensors[-1].end == shard.stat().st_size


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "damaged or truncated: 0 bytes"),
        (b"\x01\x02", "damaged or truncated: 2 bytes"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "header of 1099511627776 bytes"),
        ((200_000_000).to_bytes(8, "little") + b"{}", "header of 200000000 bytes"),
        (raw(b"{no json"), "header does not follow the format"),
        (raw([1]), "header does not follow the format"),
        (raw({"t": [1]}), "header does not follow the format"),
        (raw({"t": F32 | {"data_offsets": [0]}}), "header does not follow the format"),
        (raw({"t": F32 | {"shape": [-2]}}), "header does not follow the format"),
        (raw({"t": F32}, b"1234"), "it has 73 bytes, its header describes 77"),
        (raw({"t": F32}, b"123456789"), "its header describes"),
        (raw({"t": F32 | {"shape": [3]}}, b"12345678"), "bytes of t are not where"),
        (raw({"t": F32 | {"data_offsets": [4, 12]}}, b"x" * 12), "bytes of t are not where"),
        (raw({"t": F32, "u": F32}, b"12345678"), "bytes of u are not where"),
        (raw({"t": F32 | {"dtype": "Q4_0"}}, b"12345678"), "tensors as Q4_0, a type that"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer.*pull"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"model\.safetensors.*{why}"):
        read_shard(path)


def test_a_file_that_shrinks_while_it_is_copied_is_refused(shard: Path, tmp_path: Path) -> None:
    source = read_shard(shard)
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(ModelError, match="became shorter"):
        write_shard(tmp_path / "new", list(source.tensors.items()), None)


def test_every_type_of_the_format_is_copied(tmp_path: Path) -> None:
    sizes = {"F4": 4, "F6_E2M3": 6, "F8_E4M3": 8, "I32": 32, "U8": 8, "I64": 64, "BOOL": 8}
    header, data = {}, b""
    for name, bits in sizes.items():
        end = len(data) + bits  # 8 elements each
        header[name] = {"dtype": name, "shape": [2, 4], "data_offsets": [len(data), end]}
        data += bytes(range(bits))
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(raw(header, data))
    write_shard(target, list(read_shard(source).tensors.items()), None)
    assert target.read_bytes().endswith(data)
    assert {n: t.dtype for n, t in read_shard(target).tensors.items()} == {n: n for n in sizes}


def test_copies_work_where_the_kernel_cannot_copy(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def across_devices(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", across_devices, raising=False)
    monkeypatch.setattr(shard_writer, "COPY_BYTES", 7)
    source = read_shard(shard)
    write_shard(tmp_path / "new", list(source.tensors.items()), source.metadata)
    assert load_file(tmp_path / "new").keys() == load_file(shard).keys()
    for name, tensor in load_file(shard).items():
        assert torch.equal(load_file(tmp_path / "new")[name], tensor)


def test_stored_tensors_are_decoded(shard: Path) -> None:
    for name, stored in read_shard(shard).tensors.items():
        assert torch.equal(read_tensor(stored), load_file(shard)[name])


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="named pipe where a file is meant"):
        check_plain_file(tmp_path / "pipe")


def test_folders_devices_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder where a file is meant"):
        check_plain_file(tmp_path)
    with pytest.raises(ModelError, match="is a device where a file is meant"):
        check_plain_file(Path("/dev/null"))
    with pytest.raises(ModelError, match=r"cannot be read .No such file"):
        check_plain_file(tmp_path / "none")


def test_links_to_files_are_fine(shard: Path, tmp_path: Path) -> None:
    link = tmp_path / "model.safetensors"
    link.symlink_to(shard)
    assert read_shard(link).tensors.keys() == read_shard(shard).tensors.keys()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x", "sub/x", "..", "", "a\\b"])
def test_index_names_outside_the_folder_are_a_security_error(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(ModelError, match=r"security: .* not a plain name"):
        list_weight_files(tmp_path)


def test_layouts_without_usable_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights"):
        list_weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match=r"only pickle weights \(pytorch_model.bin\)"):
        list_weight_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"names model-1.safetensors, which is missing"):
        list_weight_files(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"both .* one of them is stale"):
        list_weight_files(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index.write_text("{}")
    with pytest.raises(ModelError, match="has no weight_map"):
        list_weight_files(tmp_path)
