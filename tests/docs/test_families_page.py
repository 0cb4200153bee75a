from __future__ import annotations

from families_page import PAGE, render


def test_the_committed_page_is_what_the_rules_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python scripts/families_page.py"
