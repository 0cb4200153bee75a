from __future__ import annotations

import subprocess
import sys

from recipes_page import PAGE, RECIPES, render


def test_the_committed_page_is_what_the_models_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python scripts/recipes_page.py"


def test_every_recipe_of_the_repository_is_explained() -> None:
    folder = PAGE.parents[1] / "recipes"
    assert sorted(RECIPES) == sorted(path.name for path in folder.glob("*.yaml"))


def test_the_page_needs_no_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import recipes_page; recipes_page.render(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=PAGE.parents[1],
    )
    assert done.stdout == "False\n"
