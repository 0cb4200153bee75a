from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from layercut.errors import RecipeError
from layercut.recipe.recipe import Config, Recipe, load_recipe
from layercut.recipe.selection import SelectionConfig


def load(content: dict[str, Any], *overrides: str, **environ: str) -> Recipe:
    return load_recipe({"model": "m", **content}, overrides, environ)


def problems(content: dict[str, Any], *overrides: str, **environ: str) -> list[str]:
    with pytest.raises(RecipeError, match=r".") as caught:
        load_recipe(content, overrides, environ)
    return str(caught.value).splitlines()


def test_defaults_are_those_of_the_interface() -> None:
    recipe = load({})
    assert recipe.model_dump(mode="json") == {
        "model": "m",
        "revision": None,
        "seed": 0,
        "dtype": "auto",
        "device": "auto",
        "residency": "auto",
        "effort": None,
        "minutes": None,
        "calibration": {
            "data": "embedded:docs",
            "text_column": "text",
            "n_sequences": 48,
            "seq_len": 256,
            "gradient_batch": 8,
            "micro_batch": "auto",
        },
        "scoring": {"method": "residual-sensitivity", "options": {}},
        "selection": {
            "strategy": "priced-cuts",
            "drop_layers": 6,
            "drop_fraction": None,
            "drop": None,
            "drop_parameters": None,
            "fit_memory": None,
            "max_perplexity_ratio": None,
            "rounds": "one-shot",
            "protect": [],
            "preserve_pattern": False,
        },
        "recovery": {"method": "refit", "options": {}},
        "heal": None,
        "finetune": None,
        "evaluation": {
            "text": {"speeches": "embedded:speeches"},
            "tasks": {},
            "harness": [],
            "harness_limit": None,
            "harness_batch_size": 8,
            "seq_len": 512,
            "max_tokens": 8192,
            "detokenize": "auto",
        },
    }


def test_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load(
        {
            "scoring": {"method": "gradmap", "options": {"name": "1e-4", "flag": "no", "x": 1e-5}},
            "selection": {"drop": [3, 1], "protect": [0]},
            "evaluation": {"text": {"a b": "x: y.txt"}},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path, environ={}) == recipe
    assert list(load_recipe(str(path), environ={}).model_dump()) == list(Recipe.model_fields)


def test_recipe_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load({}).seed = 3  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    def undocumented(model: type[BaseModel]) -> list[str]:
        names = [name for name, field in model.model_fields.items() if not field.description]
        for field in model.model_fields.values():
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, Config):
                names += undocumented(annotation)
        return names

    assert undocumented(Recipe) == []


def test_precedence_is_flag_environment_recipe_default() -> None:
    content = {"seed": 1, "calibration": {"seq_len": 11, "n_sequences": 11}}
    recipe = load(
        content,
        "calibration.seq_len=33",
        LAYERCUT__CALIBRATION__SEQ_LEN="22",
        LAYERCUT__CALIBRATION__N_SEQUENCES="22",
        LAYERCUT_CACHE="elsewhere",
        OTHER="1",
    )
    calibration = recipe.calibration
    assert (calibration.seq_len, calibration.n_sequences) == (33, 22)
    assert (recipe.seed, calibration.gradient_batch) == (1, 8)


def test_source_mapping_is_left_alone() -> None:
    content: dict[str, Any] = {"model": "m", "calibration": {"seq_len": 11}}
    load_recipe(content, ["calibration.seq_len=5", "selection.drop=[1]"], {})
    assert content == {"model": "m", "calibration": {"seq_len": 11}}


def test_override_values_are_yaml() -> None:
    recipe = load(
        {},
        "scoring.options={norm: l2, rate: 1e-4}",
        "evaluation.text.wiki=wiki.raw",
        "selection.drop=[13, 14]",
        "revision='1234567'",
        "model=a=b",
    )
    assert recipe.scoring.options == {"norm": "l2", "rate": 1e-4}
    assert recipe.evaluation.text == {"wiki": "wiki.raw"}
    assert recipe.selection.drop == (13, 14)
    assert (recipe.revision, recipe.model) == ("1234567", "a=b")


@pytest.mark.parametrize(
    ("override", "given"),
    [
        ("drop_fraction=0.5", "drop_fraction"),
        ("drop=[1]", "drop"),
        ("drop_layers=2", "drop_layers"),
    ],
)
def test_an_amount_replaces_the_weaker_sources_amount(override: str, given: str) -> None:
    selection = load({"selection": {"drop_layers": 3}}, f"selection.{override}").selection
    amounts = ("drop_layers", "drop_fraction", "drop")
    assert [name for name in amounts if getattr(selection, name) is not None] == [given]


def test_two_amounts_from_one_source_are_refused() -> None:
    expected = "selection: drop_layers and drop are set together; keep one"
    assert problems({"model": "m", "selection": {"drop_layers": 3, "drop": [1]}}) == [
        f"recipe: {expected}"
    ]
    assert problems({"model": "m"}, "selection.drop=[1]", "selection.drop_layers=3") == [
        f"recipe: {expected}"
    ]
    with pytest.raises(ValidationError, match="drop_layers and drop are set together"):
        SelectionConfig(drop_layers=3, drop=(1,))


def test_every_problem_is_listed_at_once_by_its_key() -> None:
    content = {
        "modl": "x",
        "dtype": "fp16",
        "calibration": {"seq_len": "1e-4", "n_sequnces": 3, "micro_batch": 0},
        "selection": {"drop": [1, True], "drop_layers": 3},
        "evaluation": {"text": ["a"]},
        "heal": {"minutes": 5.0, "steps": 100},
        "recovery": None,
    }
    header, *lines = problems(
        content, "seed", "device=[", "revision=12", LAYERCUT__SELECTION__ROUNDS="twice"
    )
    assert header == "recipe has 15 problems:"
    assert [line.strip() for line in lines] == [
        "--set seed: should read KEY=VALUE",
        "--set device, line 1: expected the node content, but found '<stream end>'",
        "selection: drop_layers and drop are set together; keep one",
        "model: is required",
        "revision: should be a valid string, got 12 (from --set revision)",
        "dtype: should be 'auto', 'float32' or 'bfloat16', got \"fp16\"",
        'calibration.seq_len: should be a valid integer, got "1e-4"',
        "calibration.micro_batch: should be greater than or equal to 1 or should be 'auto', got 0",
        "calibration.n_sequnces: unknown key; did you mean 'n_sequences'?",
        "selection.drop.1: should be a valid integer, got true",
        "selection.rounds: should be 'one-shot' or 'each', got \"twice\" "
        "(from LAYERCUT__SELECTION__ROUNDS)",
        "recovery: should be a section of keys, got null",
        "heal: minutes and steps are set together; give either minutes or steps",
        'evaluation.text: should be a mapping of names to values, got ["a"]',
        "modl: unknown key; did you mean 'model'?",
    ]


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("selection", {"drop_layers": 0}, "drop_layers: should be greater than or equal to 1"),
        ("selection", {"drop_layers": True}, "drop_layers: should be a valid integer, got true"),
        ("selection", {"drop_layers": 2.0}, r"drop_layers: should be a valid integer, got 2\.0"),
        ("selection", {"drop_fraction": 1.0}, "drop_fraction: should be less than 1"),
        ("selection", {"drop_fraction": 0}, "drop_fraction: should be greater than 0"),
        ("selection", {"drop_fraction": float("nan")}, "drop_fraction: should be a finite number"),
        ("selection", {"drop": []}, r"drop: should not be empty, got \[\]"),
        ("selection", {"drop": 3}, "drop: should be a list, got 3"),
        ("selection", {"drop": [-1]}, r"drop\.0: should be greater than or equal to 0"),
        ("selection", {"drop": [4, 2, 4]}, "drop: names layer 4 twice"),
        ("selection", {"protect": [1, 1]}, "protect: names layer 1 twice"),
        (
            "selection",
            {"max_perplexity_ratio": 1},
            "max_perplexity_ratio: should be greater than 1",
        ),
        ("evaluation", {"tasks": {"a": ""}}, r"tasks\.a: should not be empty"),
        ("evaluation", {"harness": [""]}, r"harness\.0: should not be empty"),
        ("evaluation", {"harness_limit": 0}, "harness_limit: should be greater than or equal to 1"),
        ("evaluation", {"detokenize": "yes"}, "detokenize: should be a valid boolean or .*'auto'"),
        ("evaluation", {"text": {"a": 1}}, r"evaluation\.text\.a: should be a valid string"),
        ("calibration", {"seq_len": 1}, "seq_len: should be greater than or equal to 2"),
        (
            "calibration",
            {"data": ["a.txt", "b.txt", "c.txt"], "n_sequences": 2},
            "calibration: n_sequences is 2, but data names 3 texts; draw at least one window",
        ),
        ("calibration", {"x": 1}, r"calibration\.x: unknown key \(known: data, text_column, "),
        ("finetune", {"mode": "qlora"}, r"finetune\.mode: should be 'lora' or 'full'"),
        ("finetune", {"epoch": 2}, r"finetune\.epoch: unknown key; did you mean 'epochs'"),
        ("finetune", {"lora": {"r": 2}}, r"finetune\.lora\.r: unknown key"),
        (
            "finetune",
            {"distill": {"wait": 2}},
            r"distill\.wait: unknown key; did you mean 'weight'",
        ),
        ("finetune", {"mode": "full", "keep_adapter": True}, "keep_adapter needs mode: lora"),
        ("model", "a/../b", r"model: '\.\.' inside 'a/\.\./b'; write a local folder as"),
        ("model", "", "model: should not be empty"),
        ("device", "gpu", r"device: unknown device 'gpu' \(known: auto, cpu"),
        ("seed", -1, "seed: should be greater than or equal to 0"),
    ],
)
def test_values_out_of_range_are_refused(section: str, value: object, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^recipe: .*{message}"):
        load({section: value})


@pytest.mark.parametrize("room", ["scoring", "recovery"])
def test_unknown_method_lists_the_known(room: str) -> None:
    known = {"scoring": "gradmap", "recovery": "projection"}[room]
    with pytest.raises(
        RecipeError,
        match=rf"{room}\.method: unknown method '{known}x'; did you mean '{known}'\? \(known: .+\)",
    ):
        load({room: {"method": f"{known}x"}})


def test_unknown_strategy_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"selection\.strategy: .*did you mean 'lowest'\?"):
        load({"selection": {"strategy": "lowst"}})


def test_a_key_below_a_value_is_a_type_error_of_the_value() -> None:
    assert problems({"model": "m", "seed": 3}, "seed.x=1") == [
        'recipe: seed: should be a valid integer, got {"x": 1} (from --set seed.x)'
    ]


def test_recipe_file_is_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: m\nseed: [1]\n")
    with pytest.raises(RecipeError, match=r"my\.yaml: seed: should be a valid integer, got \[1\]"):
        load_recipe(path, environ={})


@pytest.mark.parametrize("name", ["./a", "../a", "/x/../a", "~/a", "owner/name", "embedded:x"])
def test_model_may_be_a_path_or_a_name(name: str) -> None:
    assert load({"model": name}).model == name
