import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from layercut.errors import NumericsError, OutputError, ResourceError
from layercut.report.write import render_html, write_headline, write_model_card, write_report
from layercut.results import Estimate, Evaluation, Provenance, RunResult
from layercut.types import LayerScores, Median, PruningPlan, Round

RECIPE = {"model": "embedded:smollm2-135m", "selection": {"drop_layers": 1}}
PROVENANCE = Provenance(
    "0.1.0", {"torch": "2.13.0"}, {"gpus": [], "memory_bytes": 2**31}, "layercut"
)


def measured(n_layers: int, perplexity: float) -> Evaluation:
    return Evaluation(n_layers, 100 * n_layers, {"speeches": Estimate(perplexity, 0.5, 99)})


def finished(model: str = "embedded:smollm2-135m", perplexity: float = 30.0) -> RunResult:
    rounds = (Round((3.0, 1.0, 2.0, 4.0), (1,), 0.3),)
    return RunResult(
        model,
        RECIPE,
        PROVENANCE,
        PruningPlan(model, 4, (1,), "gradmap", rounds, "f1"),
        {"method": "projection", "layer": 2, "mean_shift": 1.23456},
        {"dense": measured(4, 20.0), "pruned": measured(3, perplexity)},
        {"load": 1.0, "score": 9.0, "total": 11.0},
        2**30,
        ["Watch out."],
    )


SCORES = tuple(LayerScores((float(i), 1.0, 2.0, 4.0), "gradmap", fingerprint="f1") for i in (0, 1))


class Page(HTMLParser):
    """Collects the tags that are open at the end, the attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def front_matter(card: Path) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])
    return found


def test_report_folder_holds_what_the_interface_names(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "layercut"
    write_report(finished(), folder, scores=SCORES, recipe_yaml="model: m\n")
    assert sorted(p.name for p in folder.iterdir()) == [
        "plan.json",
        "recipe.yaml",
        "report.html",
        "result.json",
        "scores.json",
    ]
    assert (folder / "recipe.yaml").read_text(encoding="utf-8") == "model: m\n"
    assert json.loads((folder / "result.json").read_text()) == finished().to_json()


def test_plan_and_scores_carry_model_and_fingerprint(tmp_path: Path) -> None:
    write_report(finished(), tmp_path, scores=SCORES, recipe_yaml="")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["schema"] == 1
    assert plan["model"] == "embedded:smollm2-135m"
    assert plan["fingerprint"] == "f1"
    assert plan["kept"] == [0, 2, 3]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["scores"] == [1.0, 1.0, 2.0, 4.0]  # the last round's


def test_a_run_that_did_not_get_far_still_has_a_report(tmp_path: Path) -> None:
    bare = RunResult("m", {}, PROVENANCE)
    write_report(bare, tmp_path, recipe_yaml="model: m")
    write_model_card(bare, tmp_path / "README.md")
    assert not (tmp_path / "plan.json").exists()
    assert not (tmp_path / "scores.json").exists()
    assert "svg" not in Page((tmp_path / "report.html").read_text()).tags


def test_figures_that_are_not_finite_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "layercut"
    with pytest.raises(NumericsError, match=r"result\.json cannot be written: a figure is NaN"):
        write_report(finished(perplexity=float("inf")), folder, recipe_yaml="")
    assert not folder.exists()


def test_a_full_disk_is_said_so(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "result.json").symlink_to(full)
    with pytest.raises(ResourceError, match=r"result\.json: No space left.*Free some space"):
        write_report(finished(), tmp_path, recipe_yaml="")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written: .* Choose another --output-dir"):
        write_report(finished(), tmp_path / "file" / "layercut", recipe_yaml="")


def test_page_is_balanced_and_needs_nothing_else() -> None:
    text = render_html(finished(), recipe_yaml="model: m")
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 3
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    outside = [v for k, v in page.attributes if k in ("src", "href", "xlink:href") and v]
    assert all(target.startswith("#") for target in outside)


def test_page_shows_the_result_the_command_and_the_warnings() -> None:
    text = Page(render_html(finished(), recipe_yaml="model: m")).text
    for words in ("Watch out.", "20.00 ± 0.50", "× 1.50", "1.235", "2.00 GiB", "11.0 in total"):
        assert words in text


def test_page_escapes_what_users_and_models_bring() -> None:
    evil = "</pre><script>alert('&')</script>"
    result = finished()
    result.model = evil
    result.warnings = [evil]
    result.recovery = {"layer": 2, evil: evil}
    result.stages["dense"] = Evaluation(4, 400, {evil: Estimate(2.0, 0.1, 9)})
    result.provenance = Provenance(evil, {evil: evil}, {evil: evil}, evil)
    page = Page(render_html(result, recipe_yaml=evil))
    assert "script" not in page.tags
    assert page.open == []
    assert page.text.count(evil) >= 6


def test_headline_says_only_what_was_measured() -> None:
    assert write_headline(finished()) == (
        ("1 of 4", "layers dropped"),
        ("−25.0 %", "parameters"),
        ("× 1.50", "perplexity on speeches"),
    )
    assert write_headline(RunResult("m", {}, PROVENANCE)) == ()


def timed(change: Median | None) -> RunResult:
    """A finished run with speeds, in rounds unless there is no change."""
    result = finished()
    for name, speed, size in (("dense", 100.0, 400), ("pruned", 125.0, 300)):
        result.stages[name] = replace(
            result.stages[name],
            prefill_tokens_per_second=speed,
            prefill_spread=None if change is None else (speed - 5, speed + 5),
            speed_change={"prefill": change} if change and name == "pruned" else {},
            weight_bytes=None if change is None else size,
            flops_per_token=10 * size,
            flops_context=512,
        )
    return result


def test_headline_and_pages_show_a_speed_that_is_clear_of_its_spread(tmp_path: Path) -> None:
    result = timed(Median(1.25, (1.23, 1.27), 7))
    assert write_headline(result)[-1] == ("× 1.25 ± 0.02", "prompt speed")
    write_model_card(result, tmp_path / "README.md")
    for text in (render_html(result, recipe_yaml=""), (tmp_path / "README.md").read_text()):
        assert "125.0 ± 5.0" in text
        assert "too noisy" not in text


def test_headline_of_a_noisy_timing_shows_bytes_and_flops_and_says_so(tmp_path: Path) -> None:
    result = timed(Median(0.07, (0.03, 1.3), 7))
    assert write_headline(result)[2:] == (
        ("× 0.75", "bytes of weights"),
        ("× 1.50", "perplexity on speeches"),
        ("× 0.75", "FLOPs per token"),
    )
    write_model_card(result, tmp_path / "README.md")
    for text in (render_html(result, recipe_yaml=""), (tmp_path / "README.md").read_text()):
        assert "The timing was too noisy to tell how the speed changed (prefill)" in text
        assert "× 0.07 ± 0.64" in text  # the table tells it all the same


def test_headline_of_an_older_result_shows_the_speed_that_it_has() -> None:
    assert write_headline(timed(None))[-1] == ("× 1.25", "prompt speed")


def test_card_of_the_embedded_model_has_its_licence_and_no_hub_base(tmp_path: Path) -> None:
    write_model_card(finished(), tmp_path / "README.md")
    assert front_matter(tmp_path / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["depth-pruning", "layer-pruning", "layercut"],
    }


def test_card_of_a_hub_model_names_its_base_and_keeps_its_licence(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\ntags: [x]\n---\n# card\n"
    )
    card = tmp_path / "README.md"
    write_model_card(finished("meta/Llama-3"), card, source=tmp_path / "source")
    found = front_matter(card)
    assert found["base_model"] == "meta/Llama-3"
    assert (found["license"], found["license_name"]) == ("other", "llama3")
    assert found["tags"] == ["depth-pruning", "layer-pruning", "layercut"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "no front matter",
        "---\na: [\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: 2001-99-99\n---\n",
        f"---\nlicense: {'[' * 5000}\n---\n",
    ],
)
def test_card_of_a_local_folder_guesses_neither_base_nor_licence(
    tmp_path: Path, content: str | None
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    if content is not None:
        (source / "README.md").write_text(content)
    write_model_card(finished(str(source)), tmp_path / "README.md", source=source)
    assert not {"base_model", "license"} & set(front_matter(tmp_path / "README.md"))


def test_a_folder_that_looks_like_a_hub_name_is_no_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_model_card(finished("models/mine"), tmp_path / "README.md")
    assert "base_model" not in front_matter(tmp_path / "README.md")


def test_card_lists_what_was_dropped_measured_and_run(tmp_path: Path) -> None:
    write_model_card(finished(), tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "input model): 1\n" in text
    assert "| Perplexity, speeches | 20.00 ± 0.50 | 30.00 ± 0.50 | × 1.50 |" in text
    assert "from_pretrained(folder)" in text
    assert "```yaml\nmodel: embedded:smollm2-135m\nselection:\n  drop_layers: 1\n```" in text


def test_card_stays_markdown_whatever_the_names_are(tmp_path: Path) -> None:
    result = finished()
    result.stages["dense"] = Evaluation(4, 400, {"a|b": Estimate(2.0, 0.1, 9)})
    result.recipe = {"model": "```"}
    write_model_card(result, tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| Perplexity, a\\|b |" in text
    assert "````yaml\nmodel: '```'\n````" in text


def test_a_tuned_model_is_not_shown_as_a_pruned_one(tmp_path: Path) -> None:
    tuned = finished()
    tuned.plan, tuned.recovery = None, {}
    tuned.stages = {"dense": measured(4, 20.0), "dense_tuned": measured(4, 10.0)}
    card = tmp_path / "README.md"
    write_model_card(tuned, card)
    assert front_matter(card)["tags"] == ["layercut"]
    page = render_html(tuned, recipe_yaml="")
    for text in (card.read_text(encoding="utf-8"), page):
        assert "Change compares “Tuned” with “Before”" in text
        assert "Dense" not in text
