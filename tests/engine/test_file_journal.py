"""A journal in a folder: what comes back is what was recorded, bit for bit, or it does not."""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from layercut.checkpoints.claimed_folder import RUN_FILE
from layercut.engine import file_journal
from layercut.engine.file_journal import FileJournal, open_journal
from layercut.engine.journal import NO_JOURNAL, Entry
from layercut.errors import OutputError, ResourceError

MACHINE = {"threads": 1}
RUN = {"recipe": {"seed": 0, "options": {"norm": "l1"}}, "model": "abc"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out.progress"


@pytest.fixture
def journal(folder: Path) -> Iterator[FileJournal]:
    with open_journal(folder, RUN, MACHINE) as journal:
        yield journal


def never() -> Entry:
    raise AssertionError("computed again")


def test_numbers_and_tensors_come_back_as_they_were(journal: FileJournal):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "z": torch.randn(3, 5, generator=generator).T,
        "a": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "m": torch.randn(7, generator=generator).bfloat16(),
    }
    values = {"loss": 0.1 + 0.2, "price": float("inf"), "lists": [[1, None, "é"]], "none": None}
    assert journal.record("layers", 3, Entry(values, tensors))
    found = FileJournal(journal.folder, MACHINE).find("layers", 3)
    assert found is not None
    assert found.values == values
    assert list(found.tensors) == ["z", "a", "m"]
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].stride() == tensor.stride()


def test_what_is_recorded_is_not_computed_again(journal: FileJournal):
    assert journal.recall_number("losses", "dense", lambda: 2.5) == 2.5
    again = FileJournal(journal.folder, MACHINE)
    assert again.recall("losses", "dense", never).values == {"value": 2.5}
    assert again.find("losses", "pruned") is None
    assert again.within("a plan").find("losses", "dense") is None
    assert NO_JOURNAL.recall_number("losses", "dense", lambda: 3.5) == 3.5


def test_a_conclusion_forgets_what_led_to_it_and_nothing_else(journal: FileJournal):
    plan, other = journal.within("a"), journal.within("b")
    for part in (journal, plan, other):
        part.record("steps", 1, Entry(tensors={"w": torch.ones(2)}))
    plan.conclude("patch", "refit")  # which is not recorded
    assert plan.find("steps", 1) is not None
    plan.record("patch", "refit", Entry({"loss": 1.0}))
    plan.conclude("patch", "refit")
    assert plan.find("steps", 1) is None
    assert len(list(journal.folder.glob("*.safetensors"))) == 2
    again = FileJournal(journal.folder, MACHINE)
    assert set(again.records) == {("", "steps", 1), ("a/", "patch", "refit"), ("b/", "steps", 1)}


def test_warnings_are_repeated(journal: FileJournal):
    def compute() -> Entry:
        warnings.warn("the text is short", stacklevel=1)
        return Entry({"value": 1})

    for part in (journal, FileJournal(journal.folder, MACHINE)):
        with pytest.warns(UserWarning, match="the text is short"):
            part.recall("scores", 1, compute)


@pytest.mark.parametrize("ending", ["record", "safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_what_is_damaged_is_computed_again(journal: FileJournal, ending: str, damage: str):
    journal.record("layers", 3, Entry({"loss": 1.5}, {"w": torch.ones(2, 3)}))
    (path,) = journal.folder.glob(f"*.{ending}")
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-3])
    if damage == "remove":
        path.unlink()
    if ending == "record" and damage == "remove":
        assert FileJournal(journal.folder, MACHINE).find("layers", 3) is None
        return
    with pytest.warns(UserWarning, match=r"record of layers 3 was damaged; it is computed again"):
        again = FileJournal(journal.folder, MACHINE)
        assert again.find("layers", 3) is None
    assert again.record("layers", 3, Entry({"loss": 1.5}, {"w": torch.ones(2, 3)}))
    assert FileJournal(journal.folder, MACHINE).find("layers", 3) is not None


def test_what_a_kill_tore_is_cleared_away(journal: FileJournal):
    journal.record("layers", 3, Entry({"loss": 1.5}))
    torn = journal.folder / "layers-4-0.record.partial"
    torn.write_bytes(b"half")
    orphan = journal.folder / f"{file_journal.name_record(('', 'layers', 4))}.safetensors"
    orphan.write_bytes(b"tensors without their record")
    again = FileJournal(journal.folder, MACHINE)
    assert not torn.exists()
    assert again.find("layers", 4) is None
    again.record("layers", 4, Entry(tensors={"w": torch.ones(2)}))
    assert FileJournal(journal.folder, MACHINE).find("layers", 4) is not None


def test_a_full_disk_keeps_what_was_recorded(journal: FileJournal, monkeypatch: pytest.MonkeyPatch):
    journal.record("layers", 3, Entry({"loss": 1.5}))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("layercut.engine.record_file.write_shard", full)
        with pytest.raises(ResourceError, match=r"out\.progress was written .* goes on from what"):
            journal.record("layers", 4, Entry(tensors={"w": torch.ones(2)}))
    assert not list(journal.folder.glob("*.partial"))
    again = FileJournal(journal.folder, MACHINE)
    assert again.find("layers", 3) is not None
    assert again.find("layers", 4) is None


def test_records_do_not_take_the_outputs_room(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with open_journal(folder, RUN, MACHINE, reserve_bytes=900) as journal:
        assert journal.record("layers", 1, Entry(tensors={"w": torch.ones(25)}))
        with pytest.warns(UserWarning, match="too little room beside the output"):
            assert not journal.record("layers", 2, Entry(tensors={"w": torch.ones(26)}))
        assert journal.record("losses", 2, Entry({"loss": 1.0}))


def test_another_run_is_refused_by_its_differing_keys(folder: Path):
    with open_journal(folder, RUN, MACHINE) as journal:
        journal.record("layers", 3, Entry({"loss": 1.5}))
    other = {"recipe": {"seed": 1, "options": {}}, "model": "abc"}
    with (
        pytest.raises(
            OutputError,
            match=r"another run: recipe\.options\.norm l1 there, None now; recipe\.seed 0 there, "
            r"1 now\. Choose another --output-dir, remove that folder, or pass --overwrite",
        ),
        open_journal(folder, other, MACHINE),
    ):
        pass
    with open_journal(folder, RUN, MACHINE) as journal:
        assert journal.find("layers", 3) is not None
    with open_journal(folder, other, MACHINE, overwrite=True) as journal:
        assert not journal.records


def test_the_same_run_goes_on_whatever_the_flag(folder: Path):
    with open_journal(folder, RUN, MACHINE) as journal:
        journal.record("layers", 3, Entry({"loss": 1.5}))
    with open_journal(folder, RUN, {"threads": 2}, overwrite=True) as journal:
        assert journal.find("layers", 3) is not None
        assert journal.records["", "layers", 3].machine == MACHINE


def test_a_folder_without_a_record_goes_and_a_foreign_one_stays(folder: Path):
    with open_journal(folder, RUN, MACHINE):
        assert (folder / RUN_FILE).is_file()
    assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(OutputError, match="the record of the run, was not made by layercut"),
        open_journal(folder, RUN, MACHINE, overwrite=True),
    ):
        pass
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_two_processes_do_not_share_a_journal(journal: FileJournal):
    with (
        pytest.raises(OutputError, match="another run records what it does in"),
        open_journal(journal.folder, RUN, MACHINE),
    ):
        pass
