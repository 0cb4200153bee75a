"""lm-evaluation-harness on the model in memory; what it finds must be what our own answers are."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import byte_tokenizer, leading_tokenizer
from layercut.data.tasks import read_rows
from layercut.errors import DataError, NetworkError, RecipeError
from layercut.evaluation.accuracy import answer, paired_change
from layercut.evaluation.evaluate import add_changes, check_tasks, evaluate
from layercut.evaluation.harness import (
    GROUPS,
    check_harness,
    expand_groups,
    run_harness,
)
from layercut.evaluation.harness_model import wrap_model
from layercut.models.view import DecoderView

TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def task(tmp_path: Path) -> tuple[str, str]:
    """The same rows as a task of the harness and as one of ours."""
    rows = tmp_path / "rows.jsonl"
    choices = ["yes", "nay", "may not"]
    content = [
        {"question": f"Row {i}" + "!" * (i % 5), "choices": choices, "answer": i % 3}
        for i in range(24)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in content))
    path = tmp_path / "mine.yaml"
    path.write_text(TASK.format(rows=rows))
    return str(path), str(rows)


def test_a_group_stands_for_its_tasks_once():
    assert len(GROUPS["gradmap7"]) == 7
    names = expand_groups(["piqa", "gradmap7", "mmlu"])
    assert names == ["piqa", *(t for t in GROUPS["gradmap7"] if t != "piqa"), "mmlu"]


@pytest.mark.skipif(bool(importlib.util.find_spec("lm_eval")), reason="lm_eval is installed")
def test_without_the_package_the_command_to_install_it_is_told(view: DecoderView):
    check_harness([])
    assert evaluate(view, speed=False).harness == {}
    for attempt in (check_harness, lambda names: run_harness(view, names)):
        with pytest.raises(RecipeError, match=r'Run: pip install "lm_eval==0\.4\.13"$'):
            attempt(["boolq"])


@pytest.mark.slow
class TestWithTheHarness:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("lm_eval")

    def test_rows_are_judged_as_by_our_own_choices(self, view: DecoderView, task: tuple[str, str]):
        path, rows = task
        found = run_harness(view, [path])["mine"]
        ours = answer(view, read_rows(rows))
        assert found["acc"].outcomes == ours.correct
        assert found["acc_norm"].outcomes == ours.by_length
        n_right = sum(ours.correct)
        assert 0 < n_right < 24
        # The sample standard error of a share: √(p(1 − p)/(n − 1))
        p = n_right / 24
        assert found["acc"].stderr == pytest.approx((p * (1 - p) / 23) ** 0.5)
        assert found["acc"].n == 24

    def test_skipped_and_patched_models_limit_and_batches_are_heeded(
        self, view: DecoderView, task: tuple[str, str]
    ):
        path, rows = task
        whole = run_harness(view, [path])["mine"]
        turned = {"lm_head.weight": -view.model.lm_head.weight}
        with view.skipping([1, 4]), view.patched(turned):
            found = run_harness(view, [path], limit=10, batch_size=3)["mine"]
            ours = answer(view, read_rows(rows)[:10])
        assert found["acc"].outcomes == ours.correct
        assert found["acc"].outcomes != whole["acc"].outcomes[:10]
        assert run_harness(view, [path])["mine"] == whole

    def test_requests_start_with_the_leading_token(self, view: DecoderView, task: tuple[str, str]):
        path, rows = task
        view.tokenizer = leading_tokenizer(" <eos>")
        ours = answer(view, read_rows(rows))
        found = run_harness(view, [path])["mine"]
        assert found["acc"].outcomes == ours.correct
        assert found["acc_norm"].outcomes == ours.by_length

    def test_a_rolled_text_is_predicted_once_and_a_long_prompt_keeps_its_start(
        self, view: DecoderView
    ):
        view.tokenizer = leading_tokenizer()
        model = wrap_model(view, 2)
        ids = byte_tokenizer()("abc" * 100)["input_ids"]
        windows = [ids[i : i + 128] for i in range(0, 300, 128)]
        total = sum(float(view.token_losses(torch.tensor([[1, *part]])).sum()) for part in windows)
        (rolled,) = model.loglikelihood_rolling([SimpleNamespace(args=("abc" * 100,))])
        assert rolled == pytest.approx(-total, rel=1e-5)
        row = torch.tensor([[1, *ids[-128:]]])
        pair = SimpleNamespace(args=("abc" * 99, "abc"))
        ((likelihood, _),) = model.loglikelihood([pair])
        assert likelihood == pytest.approx(-float(view.token_losses(row)[0, -3:].sum()), rel=1e-4)
        batch, mask = model.tok_batch_encode(["a", "bcd"], left_truncate_len=3)
        assert batch.tolist() == [[2, 1, ids[0]], [1, ids[2], ids[2] + 1]]
        assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]

    def test_it_is_part_of_an_evaluation_and_changes_no_random_state(
        self, view: DecoderView, task: tuple[str, str]
    ):
        path, rows = task
        check_tasks(view, {"t": rows})
        states = random.getstate(), torch.get_rng_state()
        dense = evaluate(view, harness=[path], tasks={"t": rows}, speed=False)
        assert random.getstate() == states[0]
        assert torch.get_rng_state().equal(states[1])
        content = dense.to_json()["harness"]["mine"]
        assert set(content) == {"acc", "acc_norm"}
        assert set(content["acc"]) == {"value", "stderr", "n_rows"}
        with view.skipping([0, 1, 2, 3]):
            pruned = add_changes(evaluate(view, harness=[path], speed=False), dense)
        before, after = (stage.harness["mine"]["acc"].outcomes for stage in (dense, pruned))
        assert pruned.accuracy_change["mine (acc)"] == paired_change(before, after)
        assert view.tokenizer.pad_token == "<pad>"

    def test_mistakes_are_told_before_any_compute(self, tmp_path: Path):
        with pytest.raises(RecipeError, match=r"unknown task 'boolqq' .*; did you mean 'boolq'"):
            check_harness(["boolqq"])
        with pytest.raises(RecipeError, match=r"unknown task 'gradmap'.*; did you mean 'gradmap7'"):
            check_harness(["gradmap"])
        with pytest.raises(DataError, match=r"task file nowhere\.yaml does not exist"):
            check_harness(["nowhere.yaml"])
        with pytest.raises(NetworkError, match=r"task piqa cannot be loaded: .* Connect"):
            check_harness(["piqa"])
        path = tmp_path / "odd.yaml"
        path.write_text(TASK.format(rows=tmp_path / "none.jsonl"))
        with pytest.raises(DataError, match=r"odd\.yaml cannot be loaded"):
            check_harness([str(path)])

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('doc_to_text: "{{question | nofilter}}"', "loaded: .*No filter named 'nofilter'"),
            ("metric_list: [{metric: nothing}]", "loaded: "),
            ("num_fewshot: 100", "used: Sample larger than population"),
            ('gen_prefix: "{{nothing.x}}"', "used: UndefinedError: 'nothing' is undefined"),
        ],
    )
    def test_what_a_task_says_wrongly_is_told_before_any_compute(
        self, task: tuple[str, str], line: str, message: str
    ):
        path, key = Path(task[0]), line.split(":")[0]
        kept = [old for old in path.read_text().splitlines() if not old.startswith(f"{key}:")]
        path.write_text("\n".join([*kept, line]))
        with pytest.raises(DataError, match=rf"^task \S+ cannot be {message}"):
            check_harness([str(path)])

    def test_a_later_rows_fault_is_its_own_and_a_mistake_of_ours_is_ours(
        self, view: DecoderView, task: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ):
        path, rows = map(Path, task)
        broken, odd = (path.with_name(f"{name}.yaml") for name in ("broken", "odd"))
        divided = "{{ 8 // (question | replace('!', '') | replace('Row ', '') | int - 5) }}"
        broken.write_text(
            path.read_text().replace("{{question}}", divided).replace("mine", "broken")
        )
        check_harness([str(broken)])
        run_harness(view, [str(broken)], limit=5)
        with pytest.raises(DataError, match=r"^task broken cannot be run: ZeroDivisionError: "):
            run_harness(view, [str(broken)])
        lines = rows.read_text().splitlines()
        lines[3] = json.dumps(json.loads(lines[3]) | {"answer": -1})
        withheld = rows.with_name("withheld.jsonl")
        withheld.write_text("\n".join(lines))
        odd.write_text(path.read_text().replace(str(rows), str(withheld)).replace("mine", "odd"))
        run_harness(view, [str(odd)], limit=3)
        with pytest.raises(DataError, match="task odd, row 4: the answer -1 is none of its 3"):
            run_harness(view, [str(odd)])

        def fail(*_: object) -> object:
            raise KeyError("ours")

        # Called by our code, which the harness calls.
        monkeypatch.setattr("layercut.evaluation.harness_model._shorten", fail)
        with pytest.raises(KeyError, match="ours"):
            run_harness(view, [str(path)], limit=2)
