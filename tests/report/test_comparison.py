from layercut.report.comparison import MISSING, columns, rows, sizes
from layercut.results import Evaluation, Figure, Provenance, RunResult
from layercut.types import PruningPlan


def result(**stages: Evaluation) -> RunResult:
    return RunResult("m", {}, Provenance("0", {}, {}, ""), stages=stages)


DENSE = Evaluation(
    30,
    1_000,
    {"speeches": Figure(20.0, 0.5, 100)},
    {"boolq": Figure(0.75, 0.01, 10)},
    prefill_tokens_per_second=100.0,
)
PRUNED = Evaluation(
    24,
    800,
    {"speeches": Figure(30.0, 0.5, 100)},
    {"boolq": Figure(0.70, 0.01, 10)},
    prefill_tokens_per_second=125.0,
)


def test_change_compares_pruned_with_dense() -> None:
    changes = {row.label: row.change for row in rows(result(dense=DENSE, pruned=PRUNED))}
    assert changes == {
        "Layers": "−6",
        "Parameters": "−20.0 %",  # 800 / 1000 − 1
        "Perplexity, speeches": "× 1.50",  # 30 / 20
        "Accuracy, boolq": "−5.0 points",  # 100 · (0.70 − 0.75)
        "Prefill, tokens per second": "× 1.25",  # 125 / 100
    }


def test_stages_come_in_order_whatever_order_they_ran_in() -> None:
    both = result(pruned=PRUNED, dense=DENSE)
    assert columns(both) == ("Dense", "Pruned")
    assert rows(both)[0].cells == ("30", "24")


def test_a_quantity_only_one_stage_measured_has_a_gap_and_no_change() -> None:
    bare = Evaluation(24, 800)
    found = {row.label: row for row in rows(result(dense=DENSE, pruned=bare))}
    assert found["Perplexity, speeches"].cells == ("20.00 ± 0.50", MISSING)
    assert found["Perplexity, speeches"].change == ""
    assert "Decoding, tokens per second" not in found


def test_one_stage_alone_has_nothing_to_compare() -> None:
    assert all(row.change == "" for row in rows(result(dense=DENSE)))
    assert rows(result()) == ()


def test_other_sizes_are_shown_where_the_run_knows_them() -> None:
    found = result(dense=DENSE)
    assert sizes(found) == ()
    found.plan = PruningPlan("m", 6, (2,), "given", curve={1: 0.5, 2: 1.25}, trials={2: 1.1})
    assert sizes(found) == (
        "Price by layers dropped (a bound on the loss, nats per token): 1: 0.50, 2: 1.25",
        "Perplexity on held-out text by layers dropped: 2: × 1.100",
    )
