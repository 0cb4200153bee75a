"""A method is one file: what each declares, what a broken one gets, and new ones from the docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import layercut.recovery.methods
import layercut.scoring.methods
from conftest import plan_of, save_tiny
from layercut import registry
from layercut.comparison.run import compare
from layercut.errors import LayercutError, RecipeError
from layercut.models.view import DecoderView
from layercut.pipeline.run import run
from layercut.recipe.recipe import load_recipe
from layercut.registry import FUNCTIONS, Method, available, describe, resolve
from layercut.types import CalibrationBatches

DOCS = Path(__file__).parents[2] / "docs"
EVERY = [(stage, name) for stage in FUNCTIONS for name in available(stage)]
COMPLETE = (
    "from layercut.registry import Method, MethodOptions\n"
    "class Options(MethodOptions):\n    pass\n"
    "METHOD = Method({})\n"
    "def score(view, batches, options): ...\n"
)


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_every_method_declares_itself_and_documents_its_options(stage, name):
    assert isinstance(describe(stage, name), Method)
    call = resolve(stage, name)
    assert call.function.__doc__
    for key, field in type(call.options).model_fields.items():
        assert field.description, f"option {key} of {name} has no description"
    with pytest.raises(RecipeError, match=rf"{stage}.options.no_such_key: "):
        resolve(stage, name, {"no_such_key": 1})


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_every_method_has_a_section_in_the_docs(stage, name):
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert re.search(rf"^#+ `?{re.escape(name)}`?$", text, re.MULTILINE)


def add_folder(monkeypatch: pytest.MonkeyPatch, package, folder: Path) -> None:
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"mine\.py does not say what it is: declare METHOD = Method"),
        (
            COMPLETE.format("stage='scorin'"),
            r"mine\.py declares the unknown stage 'scorin'; did you mean 'scoring'",
        ),
        (
            COMPLETE.format("stage='recovery'"),
            r"mine\.py declares the stage 'recovery' but lies among the methods of sc",
        ),
        ("METHOD = 1\n", r"mine\.py does not say what it is"),
        ("METHOD = Method(stores='no')\n", r"mine\.py: METHOD's stores cannot be 'no'"),
        ("METHOD: Method = Method(rounds='eech')\n", r"mine\.py: METHOD .* rounds is one of"),
        ("METHOD = Method(rounds=ROUNDS)\n", r"mine\.py: METHOD's rounds is not a literal"),
        (
            "METHOD = Method(stors=False)\n",
            r"mine\.py: METHOD has an unknown field 'stors'; did you mean 'stores'",
        ),
        ("def broken(:\n", r"mine\.py cannot be read as a method file"),
    ],
)
def test_a_file_that_declares_nothing_or_wrongly_is_named_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
):
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    add_folder(monkeypatch, layercut.scoring.methods, tmp_path)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe({"model": "m"})
    assert str(tmp_path) in str(caught.value)


def test_a_name_that_is_taken_is_refused_with_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "gradmap.py").write_text(COMPLETE.format(""), encoding="utf-8")
    add_folder(monkeypatch, layercut.scoring.methods, tmp_path)
    with pytest.raises(RecipeError, match="there is a scoring method 'gradmap' already") as caught:
        load_recipe({"model": "m"})
    assert str(tmp_path / "gradmap.py") in str(caught.value)
    assert "methods/gradmap.py" in str(caught.value).replace(str(tmp_path / "gradmap.py"), "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("class Options(MethodOptions)", "class Others(MethodOptions)"), "has no class Options"),
        (("def score", "def scores"), "has no function score"),
        (("METHOD = Method({})", "METHOD = dict()"), "METHOD is not a layercut.registry.Method"),
    ],
)
def test_a_file_that_lacks_a_name_is_refused_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], message: str
):
    name = f"lacks_{abs(hash(message))}"
    text = COMPLETE.replace(*change).replace("Method({})", "Method()")
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    add_folder(monkeypatch, layercut.scoring.methods, tmp_path)
    with pytest.raises(RecipeError, match=message):
        resolve("scoring", name.replace("_", "-"))


def test_the_two_files_of_the_docs_are_used_by_run_and_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page = (DOCS / "add_a_method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", page, re.DOTALL)
    assert [path for path, _ in blocks] == [
        "scoring/methods/relative_change.py",
        "recovery/methods/output_scale.py",
    ]
    for path, code in blocks:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(code, encoding="utf-8")
        body = [line for line in code.split('"""', 2)[2].splitlines() if line.strip()]
        assert len(body) <= 50
    add_folder(monkeypatch, layercut.scoring.methods, tmp_path / "scoring" / "methods")
    add_folder(monkeypatch, layercut.recovery.methods, tmp_path / "recovery" / "methods")
    model = save_tiny(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    shared = {
        "model": str(model),
        "dtype": "float32",
        "calibration": {"data": str(text), "n_sequences": 4, "seq_len": 32},
        "evaluation": {"text": {"fox": str(text)}, "seq_len": 32, "max_tokens": 256},
    }
    result = run(
        shared
        | {
            "scoring": {"method": "relative-change"},
            "selection": {"strategy": "lowest", "drop_layers": 2},
            "recovery": {"method": "output-scale"},
        },
        tmp_path / "out",
    )
    assert result.plan is not None and result.plan.method == "relative-change"
    assert result.recovery["method"] == "output-scale" and result.recovery["scale"]
    assert result.recovery["tensors_changed"] == len(result.recovery["scale"])
    rows = compare(
        shared | {"drop_layers": [2], "methods": ["relative-change@each+output-scale"]},
        tmp_path / "compare",
    ).rows
    assert [row.reason for row in rows] == [None]
    for name in ("scoring.methods.relative_change", "recovery.methods.output_scale"):
        sys.modules.pop(f"layercut.{name}", None)


def test_an_unknown_method_is_refused_with_the_closest_name():
    with pytest.raises(RecipeError, match="unknown scoring method 'igai'; did you mean 'igia'"):
        registry.describe("scoring", "igai")


BROKEN = {
    "two": ("return LayerScores((1.0, 2.0))", "gave 2 scores for 6 layers"),
    "nothing": ("return None", "returned a NoneType where its METHOD promises a WeightPatch"),
    "dropped": (
        "return WeightPatch({'model.layers.2.mlp.down_proj.weight': "
        "view.model.model.layers[2].mlp.down_proj.weight}, 'x')",
        "changes model.layers.2.mlp.down_proj.weight, which the pruned model does not have",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_a_method_returns_wrongly_is_refused_with_its_name(
    view: DecoderView,
    batches: CalibrationBatches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
):
    body, message = BROKEN[fault]
    stage = "scoring" if fault == "two" else "recovery"
    arguments = "view, batches, options" if fault == "two" else "view, plan, evidence, *rest"
    text = COMPLETE.replace("def score(view, batches, options): ...", "").format("")
    text += "from layercut.types import LayerScores, WeightPatch\n"
    text += f"def {FUNCTIONS[stage]}({arguments}):\n    {body}\n"
    (tmp_path / f"wrong_{fault}.py").write_text(text, encoding="utf-8")
    package = layercut.scoring.methods if fault == "two" else layercut.recovery.methods
    add_folder(monkeypatch, package, tmp_path)
    with pytest.raises(LayercutError, match=f"wrong-{fault}' {message}"):
        if fault == "two":
            layercut.score(view, batches, method="wrong-two")
        else:
            layercut.fit(view, plan_of(2), None, batches, method=f"wrong-{fault}")


def test_a_score_that_changes_the_model_ends_a_comparison_before_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = COMPLETE.replace("def score(view, batches, options): ...", "").format("")
    text += (
        "from layercut.types import LayerScores\n"
        "def score(view, batches, options):\n"
        "    view.model.model.embed_tokens.weight.data.add_(1)\n"
        "    return LayerScores((0.0,) * view.n_layers)\n"
    )
    (tmp_path / "vandal.py").write_text(text, encoding="utf-8")
    add_folder(monkeypatch, layercut.scoring.methods, tmp_path)
    prose = tmp_path / "text.txt"
    prose.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    content = {
        "model": str(save_tiny(tmp_path / "model")),
        "calibration": {"data": str(prose), "n_sequences": 4, "seq_len": 32},
        "evaluation": {"text": {"fox": str(prose)}, "seq_len": 32, "max_tokens": 256},
        "drop_layers": [2],
        "methods": ["vandal+none"],
    }
    with pytest.raises(RuntimeError, match=r"vandal\+none changed the model's weights"):
        compare(content, tmp_path / "out")
    rows = (tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 and '"method": "dense"' in rows[0]
