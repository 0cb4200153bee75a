"""Every call into a library on what a user brings stands under a guard, or here with a reason.

What is found: calls of names imported from the libraries below, and calls of a tokenizer or its
methods. What is not found: methods of other objects that a library returned, such as a model's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "layercut"
LIBRARIES = {
    *("transformers", "tokenizers", "huggingface_hub", "peft", "accelerate", "datasets"),
    *("gguf", "jinja2", "lm_eval", "pandas", "pyarrow", "json", "yaml"),
}
READERS = {"json.load", "json.loads", "yaml.load", "yaml.safe_load"}
"""Of these two libraries, other calls are on our own values."""
GUARDS = {"guard", "_task_guard"}
CAUGHT = {"ValueError", "RecursionError", "yaml.YAMLError"}
"""What parsing JSON or YAML can raise; a handler of one of them is one that expects it."""

BUILT = "transformers has built this model or configuration before, under a guard"
OURS = "only values of our own are handed over"
CALLER = "the only caller holds the guard: "
ALLOWED = {
    "checkpoints/conversion_cache.py _spell_rope_theta": "transformers has just written the file",
    "checkpoints/gguf/tokenizer.py _added": CALLER + "build_tokenizer",
    "checkpoints/gguf/tokenizer.py _own": CALLER + "build_tokenizer",
    "checkpoints/gguf/tokenizer.py _complete": CALLER + "build_tokenizer",
    "checkpoints/gguf/tokenizer.py _add_ends": CALLER + "build_tokenizer",
    "checkpoints/gguf/tokenizer.py _byte_level": CALLER + "build_tokenizer",
    "checkpoints/gguf/tokenizer.py _sentencepiece": CALLER + "build_tokenizer",
    "checkpoints/hf_calls.py quiet": OURS,
    "checkpoints/json_edit.py _edit_value": "the same text was parsed before, with its refusals",
    "checkpoints/own_code.py is_built_in": "a look into a table of names",
    "checkpoints/resolve.py _fetch": CALLER + "_download",
    "checkpoints/weight_names.py __init__": BUILT,
    "checkpoints/weight_names.py _follow": "the library's own expressions on a text",
    "data/embedded_texts.py _speeches": "a file of an installed package",
    "data/files.py _parquet_batches": CALLER + "parquet_rows, by fetch_each",
    "data/sources.py _stream_hub": "a flag of the library: is_offline_mode",
    "engine/record_file.py read_record": "a file that layercut wrote, whose hash is checked before",
    "models/stored_parts.py load_part": BUILT,
    "models/surgery.py _rebuild": BUILT,
    "output/decoding.py _generation_gap": CALLER + "check_decoding",
    "output/decoding.py cached_logits": BUILT,
    "report/write.py environment": OURS,
    "training/finetune.py build_trainer": OURS,
    "training/heal.py _trainer": BUILT,
    "training/lora_adapters.py adapters_on": OURS,
}


class Calls(ast.NodeVisitor):
    """The calls of one module that no guard covers: function and what is called."""

    def __init__(self, tree: ast.Module) -> None:
        self.names = dict(_imports(tree))
        self.found: set[tuple[str, str]] = set()
        self.function = ""
        self.guarded = False
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, self.function = self.function, node.name
        self.generic_visit(node)
        self.function = before

    def visit_With(self, node: ast.With) -> None:
        calls = [i.context_expr for i in node.items if isinstance(i.context_expr, ast.Call)]
        self._visit_inside(node, any(ast.unparse(call.func) in GUARDS for call in calls))

    def visit_Try(self, node: ast.Try) -> None:
        kinds = {ast.unparse(k) for h in node.handlers if h.type for k in _parts(h.type)}
        before, self.guarded = self.guarded, self.guarded or bool(kinds & {"Exception", *CAUGHT})
        for statement in node.body:
            self.visit(statement)
        self.guarded = before
        for statement in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(statement)

    def visit_Call(self, node: ast.Call) -> None:
        first, *rest = parts = _dotted(node.func)
        library = self.names.get(first, "").split(".")[0]
        whole = ".".join([self.names.get(first, first), *rest])
        reads = whole in READERS if library in {"json", "yaml"} else library in LIBRARIES
        if (reads or "tokenizer" in parts) and not self.guarded:
            self.found.add((self.function, ".".join(parts)))
        self.generic_visit(node)

    def _visit_inside(self, node: ast.AST, guards: bool) -> None:
        before, self.guarded = self.guarded, self.guarded or guards
        self.generic_visit(node)
        self.guarded = before


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.asname or a.name.split(".")[0], a.name) for a in node.names)


def _dotted(node: ast.expr) -> list[str]:
    """``a.b(c).d`` → a, b, d; of what starts with no name, only the rest."""
    if isinstance(node, ast.Call):
        return _dotted(node.func)
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    return [node.id if isinstance(node, ast.Name) else ""]


def _parts(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def find_calls() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        for function, call in Calls(ast.parse(path.read_text(encoding="utf-8"))).found:
            place = f"{path.relative_to(ROOT).as_posix()} {function}"
            found.setdefault(place, set()).add(call)
    return found


def test_every_library_call_on_what_a_user_brings_is_guarded() -> None:
    found = find_calls()
    bare = {place: sorted(calls) for place, calls in found.items() if place not in ALLOWED}
    assert bare == {}, "put it under hf_calls.guard, or into ALLOWED with the reason"
    assert sorted(ALLOWED.keys() - found.keys()) == [], "nothing to allow there any more"


@pytest.mark.parametrize(
    ("code", "bare"),
    [
        ("import json\ndef f(x): json.loads(x)", True),
        ("import json\ndef f(x): json.dumps(x)", False),
        ("def f():\n from datasets import load_dataset\n load_dataset('x')", True),
        ("def f(g):\n from datasets import load_dataset\n with guard(g): load_dataset('x')", False),
        ("from transformers import A\ndef f(g):\n with guard(g): pass\n A.b().c()", True),
        ("def f(view): view.tokenizer.pad([])", True),
        ("import json\ndef f(x):\n try: json.loads(x)\n except ValueError: json.loads(x)", True),
        ("import json\ndef f(x):\n try: json.loads(x)\n except KeyError: pass", True),
        ("import json\ndef f(x):\n try: json.loads(x)\n except ValueError: pass", False),
    ],
)
def test_the_search_finds_bare_calls_and_those_alone(code: str, bare: bool) -> None:
    assert bool(Calls(ast.parse(code)).found) is bare
