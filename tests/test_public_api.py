"""What the package promises to export, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import layercut


def test_all_is_sorted_complete_and_importable():
    assert layercut.__all__ == sorted(layercut.__all__)
    assert set(layercut.__all__) == {*layercut._HOMES, *layercut._OLD_NAMES, "__version__"}
    for name in layercut.__all__:
        assert getattr(layercut, name) is not None
    assert dir(layercut) == layercut.__all__


def test_the_names_of_the_last_release_are_the_new_ones():
    assert layercut.HealSettings is layercut.HealConfig
    assert layercut.FinetuneSettings is layercut.FinetuneConfig
    assert layercut.tune is layercut.finetune
    assert layercut.tune_checkpoint is layercut.finetune_checkpoint
    assert callable(layercut.heal)


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = layercut.prune


def test_import_brings_in_neither_torch_nor_transformers():
    code = "import layercut, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
