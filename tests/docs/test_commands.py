"""Every command and every Python block of the README and the quickstart, run as it stands.

The blocks of a page run in order, in one temporary folder that has a copy of ``recipes/``. The
usual test runs the same commands on less work, by what is set from outside:

- ``LAYERCUT_CACHE`` names a cache whose converted SmolLM2-135M is a tiny random Llama of `LAYERS`;
- `SMALL` shortens the texts of recipes, and no GPU is seen;
- ``layercut`` and ``python`` are forks of one process that has imported torch (`warm_programs`).

The slow test changes nothing: the real model, real processes and every token, so it takes tens of
minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import layercut
from conftest import save_tiny
from layercut.checkpoints.embedded_model import CACHE_FOLDER
from warm_programs import serve

ROOT = Path(__file__).parents[2]
SOURCE = Path(layercut.__file__).parents[1]
BLOCK = re.compile(
    r"(?:^<!-- not run:(?P<reason>[^>]*)-->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {"sh", "python", "text", ""}
"""What a block may be called, so that none escapes by another name; the last two are outputs."""
LAYERS = 9
"""Enough to drop 6 of them and keep more than a quarter."""
SMALL = {
    "LAYERCUT__CALIBRATION__N_SEQUENCES": "4",
    "LAYERCUT__CALIBRATION__SEQ_LEN": "32",
    "LAYERCUT__EVALUATION__MAX_TOKENS": "512",
}


@dataclass(frozen=True)
class Page:
    """A page, how many of its blocks are not run, and the files that it promises."""

    path: str
    n_not_run: int
    promised: tuple[str, ...]


PAGES = [
    Page(
        "README.md",
        n_not_run=3,
        promised=(
            "out/config.json",
            "out/layercut/report.html",
            "out/layercut/result.json",
            "out/layercut/plan.json",
            "out/layercut/scores.json",
            "out/layercut/recipe.yaml",
            "out-python/config.json",
        ),
    ),
    Page(
        "docs/quickstart.md",
        n_not_run=3,
        promised=(
            "runs/demo/config.json",
            "runs/demo/README.md",
            "runs/demo/layercut/report.html",
            "runs/demo/layercut/result.json",
            "runs/demo/layercut/plan.json",
            "runs/demo/layercut/scores.json",
            "runs/demo/layercut/recipe.yaml",
            "out-own/config.json",
            "out-stages/config.json",
        ),
    ),
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)


def find_blocks(page: Page) -> list[re.Match[str]]:
    return list(BLOCK.finditer((ROOT / page.path).read_text(encoding="utf-8")))


def environment_of(**settings: str) -> dict[str, str]:
    """This process's environment, the same layercut, and no settings of recipes but these."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LAYERCUT__")}
    return inherited | {"PYTHONPATH": str(SOURCE)} | settings


def run_blocks(page: Page, folder: Path, programs: Path, environment: dict[str, str]) -> None:
    """Run the page's blocks in ``folder`` with the ``layercut`` and ``python`` of ``programs``."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    commands = {"sh": ["sh", "-ec"], "python": [str(programs / "python"), "-c"]}
    for block in find_blocks(page):
        if block["reason"] is not None or block["language"] not in commands:
            continue
        done = subprocess.run(
            [*commands[block["language"]], block["code"]],
            cwd=folder,
            env=environment | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{page.path}:\n{block[0]}\n{done.stdout}\n{done.stderr}"
    for name in page.promised:
        assert (folder / name).is_file(), f"{page.path} promises {name}"


@every_page
def test_every_block_is_run_or_says_why_not(page: Page) -> None:
    blocks = find_blocks(page)
    fences = re.findall(r"^\s*```", (ROOT / page.path).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(blocks)
    assert {block["language"] for block in blocks} <= LANGUAGES
    reasons = [block["reason"].strip() for block in blocks if block["reason"] is not None]
    assert all(reasons)
    assert len(reasons) == page.n_not_run


@pytest.fixture(scope="module")
def tiny_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings under which the embedded model is tiny, texts are short and no GPU is used."""
    cache = tmp_path_factory.mktemp("cache")
    save_tiny(cache / CACHE_FOLDER, num_hidden_layers=LAYERS, max_position_embeddings=1024)
    return environment_of(LAYERCUT_CACHE=str(cache), CUDA_VISIBLE_DEVICES="", **SMALL)


@pytest.fixture(scope="module")
def warm_programs(tiny_environment: dict[str, str]) -> Iterator[Path]:
    with serve(tiny_environment) as folder:
        yield folder


@every_page
def test_blocks_run_on_a_tiny_model(
    page: Page, tmp_path: Path, warm_programs: Path, tiny_environment: dict[str, str]
) -> None:
    run_blocks(page, tmp_path / "checkout", warm_programs, tiny_environment)


@pytest.mark.slow
@every_page
def test_blocks_run_on_the_embedded_model(page: Page, tmp_path: Path) -> None:
    run_blocks(page, tmp_path / "checkout", Path(sys.executable).parent, environment_of())
