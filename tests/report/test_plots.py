import re
from collections.abc import Callable
from xml.etree import ElementTree

from matplotlib import rcParams

from layercut.report import plots
from layercut.results import Estimate
from layercut.types import PruningPlan, Round


def plan_in_rounds() -> PruningPlan:
    first = Round((5.0, 1.0, 3.0, 4.0), (1,), 0.5)
    second = Round((5.0, None, 2.0, 4.0), (2,), 0.5)
    return PruningPlan("m", 4, (1, 2), "gradmap", (first, second))


def one_shot() -> PruningPlan:
    return PruningPlan("m", 4, (1,), "gradmap", (Round((5.0, 1.0, 3.0, 4.0), (1,), 0.5),))


def elements(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg.replace("xlink:href", "href")).iter())


def words(svg: str) -> list[str]:
    return [(e.text or "").strip() for e in elements(svg) if e.tag == "text"]


def test_every_plot_is_well_formed_and_the_same_bytes_every_time() -> None:
    stages = {"Dense": {"speeches": Estimate(20.0, 0.5, 9)}}
    drawings: list[Callable[[], str]] = [
        lambda: plots.layers(plan_in_rounds(), patched=3),
        lambda: plots.perplexities(stages),
        lambda: plots.seconds({"load": 1.0, "score": 9.0}),
    ]
    for draw in drawings:
        svg = draw()
        assert elements(svg)
        assert svg == draw()


def test_plots_on_one_page_share_no_id() -> None:
    pictures = [plots.layers(one_shot()), plots.seconds({"a": 1.0, "b": 2.0})]
    ids = [e.get("id") for svg in pictures for e in elements(svg) if e.get("id")]
    assert len(ids) == len(set(ids))


def test_every_reference_inside_a_plot_has_its_target() -> None:
    svg = plots.layers(plan_in_rounds(), patched=3)
    ids = {e.get("id") for e in elements(svg)}
    references = re.findall(r'(?:url\(#|href="#)([^")]+)', svg)
    assert references
    assert set(references) <= ids


def test_colours_are_left_to_the_page_and_nothing_is_fetched() -> None:
    svg = plots.layers(plan_in_rounds(), patched=3)
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
    assert "var(--dropped)" in svg
    assert "http" not in svg


def test_dropped_layers_differ_by_hatch_not_by_colour_alone() -> None:
    nothing = PruningPlan("m", 4, (), "given", (Round((5.0, 1.0, 3.0, 4.0), (), None),))

    def hatched(plan: PruningPlan) -> int:
        # The legend's sample is hatched in both.
        return plots.layers(plan).count("fill: url(#")

    # One dropped layer is one hatched bar and one hatched cell of the stack.
    assert hatched(one_shot()) == hatched(nothing) + 2


def test_bars_tell_the_round_in_which_a_layer_went() -> None:
    assert "dropped (number: round)" in words(plots.layers(plan_in_rounds()))
    assert "dropped" in words(plots.layers(one_shot()))


def test_description_names_what_a_blind_reader_misses() -> None:
    svg = plots.layers(plan_in_rounds(), patched=3)
    label = elements(svg)[0].get("aria-label") or ""
    assert "dropped: 1, 2" in label
    assert "layer 3" in label


def test_a_plan_named_by_the_user_shows_the_stack_alone() -> None:
    svg = plots.layers(PruningPlan("m", 4, (1,), "given"))
    assert "stack" in words(svg)
    assert "round" not in words(svg)


def test_negative_and_equal_scores_can_be_drawn() -> None:
    for values in ((-1.0, -2.0, -3.0), (0.0, 0.0, 0.0)):
        plan = PruningPlan("m", 3, (2,), "random", (Round(values, (2,), None),))
        assert "stack" in words(plots.layers(plan))


def test_a_name_with_markup_stays_text() -> None:
    svg = plots.perplexities({"Dense": {'<b>"$x$"': Estimate(2.0, 0.1, 5)}})
    assert any('<b>"$x$"' in word for word in words(svg))
    assert '<b>"$x$"' in (elements(svg)[0].get("aria-label") or "")


def test_names_in_any_script_are_text_and_control_characters_are_spelled_out() -> None:
    # A warning would be an error here: matplotlib's own font has no such glyphs.
    svg = plots.perplexities({"Dense": {"\u65e5\u672c\x1b": Estimate(20.0, 0.5, 9)}})
    assert "\u65e5\u672c\\x1b: dense" in words(svg)


def test_drawing_leaves_global_settings_alone() -> None:
    before = dict(rcParams)
    plots.seconds({"load": 1.0})
    assert dict(rcParams) == before
