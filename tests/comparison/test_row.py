"""Lines of rows.jsonl as version 0.1.0 wrote them, with a tiny model."""

from __future__ import annotations

import json

import pytest

from layercut.comparison.row import Row

DENSE = (
    '{"method": "dense", "layers": 0, "dropped": [], "reason": null, "perplexity": {"fox": '
    '{"value": 333.1135285159074, "stderr": 12.14884240013692, "n_tokens": 124}}, "accuracy": '
    '{"parity": {"value": 0.5, "stderr": 0.22360679774997896, "n_rows": 6}, "parity (per '
    'character)": {"value": 0.5, "stderr": 0.22360679774997896, "n_rows": 6}}, "model": '
    '"tiny-model", "forward_seconds": 0.03152340999986336, "n_parameters": '
    '22320, "flops_per_token": 232544, "measured_with": {"layercut": "0.1.0", "threads": 1}, '
    '"losses": {"fox": [5.74331, 5.80926, 5.77126, 5.91011]}, "outcomes": {"parity": "101010", '
    '"parity (per character)": "010101"}, "fidelity": {"agreement": {"value": 1.0, "stderr": '
    '0.0, "n_tokens": 128}, "kl": {"value": 0.0, "stderr": 0.0, "n_tokens": 128}}, '
    '"generation": {"distinct_1": {"value": 0.37890625, "stderr": 0.11128814157729999, '
    '"n_prompts": 4}, "distinct_2": {"value": 0.5595238095238095, "stderr": '
    '0.17440765869105318, "n_prompts": 4}, "distinct_3": {"value": 0.6411290322580645, '
    '"stderr": 0.19392604284533946, "n_prompts": 4}, "loop": {"value": 0.31640625, "stderr": '
    '0.19685588118146016, "n_prompts": 4}, "common_prefix": {"value": 64.0, "stderr": 0.0, '
    '"n_prompts": 4}, "agreement": {"value": 1.0, "stderr": 0.0, "n_prompts": 4}, '
    '"prompt_tokens": 32, "new_tokens": 64}, "key": "648ce4233e78353e"}'
)
PRUNED = (
    '{"method": "shortgpt", "pair": "block-influence+none", "source": "arXiv:2403.03853", '
    '"reading": "", "layers": 1, "dropped": [4], "perplexity": {"fox": {"value": '
    '348.3703751864648, "stderr": 8.936128016524231, "n_tokens": 124}}, "accuracy": {"parity": '
    '{"value": 0.5, "stderr": 0.22360679774997896, "n_rows": 6}, "parity (per character)": '
    '{"value": 0.5, "stderr": 0.22360679774997896, "n_rows": 6}}, "cuts": [[4, 1]], "reason": '
    'null, "notes": {}, "n_parameters": 19984, "seconds": {"score": 0.08545890699951997, '
    '"select": 0.002772253000330238, "recover": 0.2504977670005246}, "flops_per_token": '
    '195168, "measured_with": {"layercut": "0.1.0", "threads": 1}, "losses": {"fox": [5.77823, '
    '5.86252, 5.88908, 5.88323]}, "outcomes": {"parity": "101010", "parity (per character)": '
    '"010101"}, "fidelity": {"agreement": {"value": 0.453125, "stderr": 0.046875, "n_tokens": '
    '128}, "kl": {"value": 0.08987701145088067, "stderr": 0.01300760897491401, "n_tokens": '
    '128}}, "generation": {"distinct_1": {"value": 0.34765625, "stderr": 0.11854680394916811, '
    '"n_prompts": 4}, "distinct_2": {"value": 0.5595238095238095, "stderr": '
    '0.18605709327653114, "n_prompts": 4}, "distinct_3": {"value": 0.6532258064516129, '
    '"stderr": 0.21443122258561823, "n_prompts": 4}, "loop": {"value": 0.33984375, "stderr": '
    '0.22201570875705132, "n_prompts": 4}, "common_prefix": {"value": 0.25, "stderr": 0.25, '
    '"n_prompts": 4}, "agreement": {"value": 0.23828125, "stderr": 0.2175726314013227, '
    '"n_prompts": 4}, "prompt_tokens": 32, "new_tokens": 64}, "prefill_tokens_per_second": '
    '9573.574301840126, "decode_tokens_per_second": 93.72724222042905, "key": '
    '"9d5f09adf082fa03"}'
)
HEALED = (
    '{"pair": "block-influence+none", "source": "arXiv:2403.03853", "reading": "", '
    '"perplexity": {"fox": {"value": 345.54305160123243, "stderr": 20.334231528308255, '
    '"n_tokens": 124}}, "accuracy": {"parity": {"value": 0.5, "stderr": 0.22360679774997896, '
    '"n_rows": 6}, "parity (per character)": {"value": 0.5, "stderr": 0.22360679774997896, '
    '"n_rows": 6}}, "layers": 2, "dropped": [4, 5], "cuts": [[4, 2]], "reason": null, '
    '"method": "shortgpt, healed 2 steps, 100 % labels", "n_parameters": 17648, "seconds": '
    '{"score": 0.04936044499936543, "select": 0.008114551001199288, "recover": '
    '0.17702133300008427, "heal": 0.4664903670000058}, "heal": {"loss_before": '
    '5.965634346008301, "loss_after": 5.954378604888916, "best_step": 2, "n_windows": 4, '
    '"n_steps": 2, "n_tokens": 64, "resumed_at": 0, "train_seconds": 0.4664903670000058, '
    '"losses": [[0, 5.965634346008301], [2, 5.954378604888916]], "stopped_early": false, '
    '"settings": {"minutes": null, "steps": 2, "data": null, "text_column": null, '
    '"max_tokens": 2000000, "seq_len": 16, "batch_size": 2, "learning_rate": 0.001, '
    '"warmup_ratio": 0.03, "scheduler": "linear", "weight_decay": 0.0, "lora": {"rank": 16, '
    '"alpha": 32.0, "dropout": 0.0}, "temperature": 1.0, "label_weight": 1.0, "held_out": 2, '
    '"evaluations": 1, "patience": 3, "save_steps": 50, "seed": 0}}, "flops_per_token": '
    '157792, "measured_with": {"layercut": "0.1.0", "threads": 1}, "losses": {"fox": [5.79178, '
    '5.97566, 5.70985, 5.90318]}, "outcomes": {"parity": "101010", "parity (per character)": '
    '"010101"}, "fidelity": {"agreement": {"value": 0.25, "stderr": 0.0637887953849786, '
    '"n_tokens": 128}, "kl": {"value": 0.14185911738604773, "stderr": 0.011341990895020693, '
    '"n_tokens": 128}}, "generation": {"distinct_1": {"value": 0.40234375, "stderr": '
    '0.11559244333315723, "n_prompts": 4}, "distinct_2": {"value": 0.626984126984127, '
    '"stderr": 0.17260764421374242, "n_prompts": 4}, "distinct_3": {"value": '
    '0.7258064516129032, "stderr": 0.18832559019502143, "n_prompts": 4}, "loop": {"value": '
    '0.25390625, "stderr": 0.16167345380136622, "n_prompts": 4}, "common_prefix": {"value": '
    '0.0, "stderr": 0.0, "n_prompts": 4}, "agreement": {"value": 0.19921875, "stderr": '
    '0.19404536877552414, "n_prompts": 4}, "prompt_tokens": 32, "new_tokens": 64}, "key": '
    '"88db7b5d7f60c09e"}'
)
FAILED = (
    '{"method": "ours", "pair": "priced-cuts+refit", "source": "layercut\'s default", '
    '"reading": "", "layers": 1, "dropped": [], "perplexity": {}, "accuracy": {}, "reason": '
    "\"layer 0 of this olmo2 model does not add its MLP's output to the residual stream as it "
    "is (a norm or a factor stands between), so that no correction folds into its weights "
    'exactly. Set recovery.method: none, and selection.strategy: lowest.", "key": '
    '"bb2b0388b6485c4d"}'
)


@pytest.mark.parametrize("line", [DENSE, PRUNED, HEALED, FAILED])
def test_a_line_is_read_and_written_unchanged(line: str):
    content = json.loads(line)
    assert Row.from_json(content).to_json() == content


def test_tasks_of_the_harness_are_read_and_written_unchanged():
    content = json.loads(PRUNED)
    content["harness"] = {"parity": {"acc": {"value": 0.5, "stderr": 0.5, "n_rows": 2}}}
    content["outcomes"]["parity (acc)"] = "01"
    row = Row.from_json(content)
    assert row.evaluation.harness["parity"]["acc"].outcomes == (False, True)
    assert row.to_json() == content


def test_what_was_not_kept_in_earlier_lines_is_not_made_up():
    content = json.loads(PRUNED)
    for key in ("losses", "measured_with", "prefill_tokens_per_second", "decode_tokens_per_second"):
        del content[key]
    assert Row.from_json(content).to_json() == content
