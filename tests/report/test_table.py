from dataclasses import replace

from layercut.report.table import (
    MISSING,
    change_compares,
    columns,
    compared_stages,
    measured,
    rows,
    sizes,
    windows,
)
from layercut.results import Estimate, Evaluation, Fidelity, Provenance, RunResult, TextWindows
from layercut.types import PruningPlan


def result(**stages: Evaluation) -> RunResult:
    return RunResult("m", {}, Provenance("0", {}, {}, ""), stages=stages)


DENSE = Evaluation(
    30,
    1_000,
    {"speeches": Estimate(20.0, 0.5, 100)},
    {"boolq": Estimate(0.75, 0.01, 10)},
    prefill_tokens_per_second=100.0,
)
PRUNED = Evaluation(
    24,
    800,
    {"speeches": Estimate(30.0, 0.5, 100)},
    {"boolq": Estimate(0.70, 0.01, 10)},
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


def test_tuned_stages_are_compared_with_each_other() -> None:
    tuned = replace(DENSE, train_seconds=100.0, peak_rss_bytes=2**30)
    small = replace(
        PRUNED,
        train_seconds=80.0,
        peak_rss_bytes=2**29,
        accuracy_change={"boolq": Estimate(-0.021, 0.0094, 10)},
    )
    whole = result(dense=DENSE, pruned=PRUNED, dense_tuned=tuned, pruned_tuned=small)
    found = {row.label: row for row in rows(whole)}
    assert compared_stages(whole) == ("dense_tuned", "pruned_tuned")
    assert found["Accuracy, boolq"].change == "−2.1 ± 0.9 points"
    assert found["Fine-tuning, seconds"].cells == (MISSING, MISSING, "100.0", "80.0")
    assert found["Fine-tuning, seconds"].change == "× 0.80"
    assert found["Peak memory, GiB"].cells == (MISSING, MISSING, "1.00", "0.50")
    del whole.stages["dense_tuned"]
    assert compared_stages(whole) == ("dense", "pruned_tuned")


def test_a_healed_model_is_compared_with_the_dense_one() -> None:
    healed = replace(PRUNED, train_seconds=60.0, perplexity={"speeches": Estimate(24.0, 0.5, 100)})
    whole = result(dense=DENSE, pruned=PRUNED, healed=healed)
    found = {row.label: row for row in rows(whole)}
    assert columns(whole) == ("Dense", "Pruned", "Healed")
    assert change_compares(whole) == "“Healed” with “Dense”"
    assert found["Perplexity, speeches"].change == "× 1.20"  # 24 / 20
    assert found["Heal, seconds"].cells == (MISSING, MISSING, "60.0")


def test_a_model_that_was_only_tuned_is_compared_with_itself() -> None:
    alone = result(dense=DENSE, dense_tuned=replace(DENSE, train_seconds=100.0))
    assert columns(alone) == ("Before", "Tuned")
    assert change_compares(alone) == "“Tuned” with “Before”"
    assert compared_stages(alone) == ("dense", "dense_tuned")
    assert rows(alone)[0].change == "+0"


def test_zero_shot_metrics_are_shown_with_their_mean() -> None:
    def stage(boolq: float, piqa: float) -> Evaluation:
        tasks = {"boolq": {"acc": Estimate(boolq, 0.03, 50)}}
        tasks["piqa"] = {"acc": Estimate(piqa, 0.04, 50), "exact_match": Estimate(0.0, 0.0, 50)}
        return Evaluation(30, 1_000, harness=tasks)

    paired = {"boolq (acc)": Estimate(-0.1, 0.02, 50)}
    pruned = replace(stage(0.6, 0.5), accuracy_change=paired)
    found = {row.label: row for row in rows(result(dense=stage(0.7, 0.7), pruned=pruned))}
    assert found["Zero-shot, boolq (acc)"].change == "−10.0 ± 2.0 points"
    assert found["Zero-shot, piqa (acc)"].change == "−20.0 points"
    assert found["Zero-shot, piqa (exact_match)"].change == "+0.000"
    # (0.7 + 0.7)/2; √(0.03² + 0.04²)/2 = 0.025; 0.55 − 0.70
    mean = found["Zero-shot, mean acc of 2"]
    assert (mean.cells[0], mean.change) == ("0.700 ± 0.025", "−15.0 points")


def test_likeness_and_windows_are_shown_where_they_were_measured() -> None:
    fidelity = Fidelity(Estimate(0.9, 0.01, 64), Estimate(0.25, 0.02, 64))
    stage = replace(
        DENSE,
        fidelity={"wiki": fidelity},
        windows={"speeches": TextWindows("a.raw", 16, 512, True, "<bos>")},
        flops_per_token=2_500_000_000,
        flops_context=512,
    )
    found = dict(measured(stage))
    assert found["Next-token agreement, wiki"] == "0.900 ± 0.010"
    assert found["KL, nats per token, wiki"] == "0.250 ± 0.020"
    assert found["GFLOPs per token, context 512"] == "2.500"
    assert found["Windows, speeches"] == "16 windows of 512 tokens, each behind <bos>, detokenized"
    assert stage.to_json()["windows"]["speeches"] == {
        "source": "a.raw",
        "n_windows": 16,
        "seq_len": 512,
        "detokenized": True,
        "leading_token": "<bos>",
        "document_separator": None,
    }
    assert windows(result(dense=stage)) == {"speeches": found["Windows, speeches"]}
    assert "Windows, speeches" not in {row.label for row in rows(result(dense=stage))}
