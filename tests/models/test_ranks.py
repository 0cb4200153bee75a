from __future__ import annotations

import pytest
import torch

from layercut.errors import RecipeError
from layercut.models.ranks import ALONE, Ranks
from layercut.pipeline.whole_model import check_ranks
from layercut.recipe.recipe import Recipe


@pytest.mark.parametrize("n_items", [0, 1, 2, 3, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_all_items_in_order_and_differ_by_one_at_most(n_items: int, world: int):
    shares = [Ranks(rank, world).share(range(n_items)) for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(n_items))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "rank 0 has work wherever there is any"


def test_the_only_rank_keeps_what_it_has():
    rows = torch.arange(6.0).view(3, 2)
    total = rows.clone()
    ALONE.sum_(total)
    ALONE.broadcast_(total, 5)
    assert torch.equal(total, rows)
    assert ALONE.gather_rows(rows) is rows and ALONE.share(rows) is not None
    assert ALONE.total(1, 2.5) == [1, 2.5]
    assert ALONE.agree(True) and not ALONE.agree(False)
    ALONE.check_same("text", "a", RecipeError)
    assert ALONE.choose_device("cuda:1") == "cuda:1"


def test_each_rank_gets_the_gpu_of_its_number_on_its_machine():
    ranks = Ranks(rank=5, world=8, local_rank=1, gpus=(True,) * 8)
    assert [ranks.choose_device(d) for d in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(RecipeError, match=r"device 'cuda:0' would be used by 8 processes"):
        ranks.choose_device("cuda:0")
    some = Ranks(rank=0, world=3, gpus=(True, True, False))
    assert some.choose_device("cpu") == "cpu"
    with pytest.raises(RecipeError, match="rank 2 finds no GPU of its own"):
        some.choose_device("auto")
    assert Ranks(rank=1, world=2, gpus=(False, False)).choose_device("auto") == "auto"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"heal": {"steps": 1}}, "heal"),
        ({"finetune": {"data": "rows.jsonl"}}, "finetune"),
        ({"evaluation": {"harness": ["arc_easy"]}}, r"evaluation\.harness"),
    ],
)
def test_what_runs_in_one_process_is_refused_before_any_work(section: dict[str, object], key: str):
    recipe = Recipe(model="m", **section)
    with pytest.raises(RecipeError, match=f"{key} runs in one process, and 2 were started"):
        check_ranks(recipe, Ranks(rank=0, world=2))
    check_ranks(recipe, ALONE)
