from __future__ import annotations

import subprocess
import sys

from layercut.recipe_page import PAGE, RECIPES, render


def test_the_committed_page_is_what_the_models_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python -m layercut.recipe_page"


def test_every_recipe_of_the_repository_is_explained() -> None:
    folder = PAGE.parents[1] / "recipes"
    assert sorted(RECIPES) == sorted(path.name for path in folder.glob("*.yaml"))


def test_the_page_needs_no_torch() -> None:
    code = "import sys, layercut.recipe_page as page; page.render(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
