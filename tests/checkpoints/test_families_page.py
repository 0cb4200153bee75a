from __future__ import annotations

from layercut.checkpoints.families_page import PAGE, markdown


def test_the_committed_page_is_what_the_rules_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), (
        "run: python -m layercut.checkpoints.families_page"
    )
