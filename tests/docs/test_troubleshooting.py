from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from layercut import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
NOT_RAISED = {0, 130, 143}
"""Exit codes that no exception stands for: success and two signals."""


def read_table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its header."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def find_classes(base: type[errors.LayercutError]) -> set[type[errors.LayercutError]]:
    found = (find_classes(child) for child in base.__subclasses__())
    return {base}.union(*found)


def collect_texts(tree: ast.AST) -> list[str]:
    """Texts between formatted values; the parser has joined adjacent literals."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


TREES = [
    ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "src" / "layercut").rglob("*.py"))
]
PARTS = [part for tree in TREES for part in collect_texts(tree)]
CODES = {kind.__name__: kind.exit_code for kind in find_classes(errors.LayercutError)}
RAISED = [
    (CODES[node.func.id], part)
    for tree in TREES
    for node in ast.walk(tree)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODES
    for part in collect_texts(node)
]
ROWS = [(int(code), message) for code, message, *_ in read_table("Errors")]


def test_every_exit_code_is_in_the_table() -> None:
    documented = [int(row[0]) for row in read_table("Exit codes")]
    assert sorted(documented) == sorted(NOT_RAISED | set(CODES.values()))


@pytest.mark.parametrize(("code", "cell"), ROWS)
def test_every_message_is_one_of_the_code(code: int, cell: str) -> None:
    found = re.fullmatch(r"`([^`]+)`", cell)
    assert found, f"{cell} is not one code span"
    fragment = found[1]
    assert any(fragment in part for part in PARTS), f"no message contains '{fragment}'"
    raised = {exit_code for exit_code, part in RAISED if fragment in part}
    # Messages that a helper or pydantic turns into an error stand in no call of its class.
    assert not raised or raised == {code}, f"'{fragment}' exits with {raised}"


def test_the_table_names_the_likeliest_errors_once() -> None:
    cells = [cell for _, cell in ROWS]
    assert len(set(cells)) == len(cells) >= 25
