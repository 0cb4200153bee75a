from importlib import metadata
from pathlib import Path

import torch

from layercut.machine import available_memory_bytes, peak_rss_bytes, provenance, reset_peak_rss


def test_provenance_names_the_versions_that_run_and_keeps_the_command() -> None:
    found = provenance("layercut run 'a b.yaml'")
    assert found.command == "layercut run 'a b.yaml'"
    assert found.versions["torch"] == metadata.version("torch")
    assert found.versions["layercut"] == found.layercut
    assert {"python", "transformers", "safetensors", "platform"} <= set(found.versions)


def test_provenance_describes_the_machine() -> None:
    hardware = provenance("").hardware
    assert hardware["cpu"]
    assert hardware["logical_cores"] >= 1
    assert hardware["torch_threads"] == torch.get_num_threads()
    assert hardware["memory_bytes"] > 2**28
    assert len(hardware["gpus"]) == torch.cuda.device_count()


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    before = peak_rss_bytes()
    block = bytearray(b"x") * 2**26
    during = peak_rss_bytes()
    del block
    # A process with torch loaded takes more than 2^26 bytes: KiB mistaken for bytes would be less.
    assert during > 2**26
    assert before <= during <= peak_rss_bytes()


def test_peak_memory_can_be_counted_anew() -> None:
    block = bytearray(b"x") * 2**28
    high = peak_rss_bytes()
    del block
    reset_peak_rss()
    if Path("/proc/self/clear_refs").exists():
        assert peak_rss_bytes() < high - 2**27


def test_available_memory_is_part_of_the_machines() -> None:
    total = provenance("x").hardware["memory_bytes"]
    assert 0 < available_memory_bytes() <= total
