from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from layercut.checkpoints.output_dir import check_disk_space, check_output_dir, staged_folder
from layercut.errors import OutputError, ResourceError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def earlier_output(out: Path) -> Path:
    (out / "layercut").mkdir(parents=True)
    (out / "old").write_text("old")
    return out


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_folder_appears_when_the_block_ends_well(out: Path) -> None:
    with staged_folder(out, overwrite=False) as folder:
        assert folder.parent == out.parent
        (folder / "a").write_text("a")
        assert not out.exists()
    assert names(out) == {"a"}
    assert names(out.parent) == {"out"}


def test_an_empty_destination_is_filled(out: Path) -> None:
    out.mkdir()
    with staged_folder(out, overwrite=False) as folder:
        (folder / "a").touch()
    assert names(out) == {"a"}


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_any_other_end_leaves_everything_as_it_was(
    out: Path, end: type[BaseException], overwrite: bool
) -> None:
    if overwrite:
        earlier_output(out)
    before = names(out.parent), sorted(out.rglob("*"))
    with pytest.raises(end), staged_folder(out, overwrite=overwrite) as folder:
        (folder / "a").touch()
        raise end
    assert (names(out.parent), sorted(out.rglob("*"))) == before


def test_overwriting_replaces_the_whole_folder(out: Path) -> None:
    with staged_folder(earlier_output(out), overwrite=True) as folder:
        (folder / "new").touch()
        assert (out / "old").read_text() == "old"
    assert names(out) == {"new"}
    assert names(out.parent) == {"out"}


def test_a_destination_behind_a_link_is_replaced_where_it_is(out: Path, tmp_path: Path) -> None:
    elsewhere = earlier_output(tmp_path / "elsewhere")
    out.symlink_to(elsewhere)
    with staged_folder(out, overwrite=True) as folder:
        (folder / "new").touch()
    assert out.is_symlink()
    assert names(elsewhere) == {"new"}


def test_a_destination_that_fills_meanwhile_is_not_touched(out: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"cannot be written .*nothing of it was left behind"),
        staged_folder(out, overwrite=False),
    ):
        earlier_output(out)
    assert names(out) == {"layercut", "old"}
    assert names(out.parent) == {"out"}


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(out: Path) -> None:
    dead, living = f"out.partial-{dead_pid()}", f"out.partial-{os.getppid()}"
    for name in (dead, living, "out.partial-notes", "other.partial-1"):
        (out.parent / name).mkdir()
    with staged_folder(out, overwrite=False):
        pass
    assert names(out.parent) == {"out", living, "out.partial-notes", "other.partial-1"}


def test_an_output_lost_between_two_renames_comes_back(out: Path) -> None:
    earlier_output(out).rename(out.parent / f"out.replaced-{dead_pid()}")
    with pytest.raises(ValueError, match="stop"), staged_folder(out, overwrite=True):
        raise ValueError("stop")
    assert names(out.parent) == {"out"}
    assert (out / "old").exists()


@pytest.mark.parametrize("where", ["", "inside", "inside/deeper", ".."])
def test_the_source_is_never_an_output(tmp_path: Path, where: str) -> None:
    source = tmp_path / "runs" / "source"
    (source / "inside").mkdir(parents=True)
    with pytest.raises(OutputError, match="is, holds or lies in the source"):
        check_output_dir(source / where, source, overwrite=True)


def test_the_source_is_recognised_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    with pytest.raises(OutputError, match="is, holds or lies in the source"):
        check_output_dir(tmp_path / "link", tmp_path / "source", overwrite=True)


def test_destinations_that_cannot_be_used_are_refused(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    check_output_dir(out, source, overwrite=False)
    with pytest.raises(OutputError, match=r"does not exist\. Create it"):
        check_output_dir(out / "deep", source, overwrite=False)
    out.mkdir()
    check_output_dir(out, source, overwrite=False)
    (out / "precious").touch()
    with pytest.raises(OutputError, match=r"not empty.*--overwrite"):
        check_output_dir(out, source, overwrite=False)
    with pytest.raises(OutputError, match="not an earlier output of layercut"):
        check_output_dir(out, source, overwrite=True)
    (out / "layercut").mkdir()
    check_output_dir(out, source, overwrite=True)
    with pytest.raises(OutputError, match="precious is a file"):
        check_output_dir(out / "precious", source, overwrite=True)


def test_parents_without_permission_are_refused(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The test may run as root, whom no permission bits stop.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="is not writable"):
        check_output_dir(out, tmp_path / "source", overwrite=False)


def test_a_disk_that_is_too_small_is_refused(
    out: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_disk_space(tiny_llama, out)
    size = (tiny_llama / "model.safetensors").stat().st_size
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=int(size * 1.04)))
    with pytest.raises(ResourceError, match=r"needs up to .* free"):
        check_disk_space(tiny_llama, out)
