from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer, leading_tokenizer
from layercut.data.calibration import calibration_batches, evaluation_windows, pack_tokens
from layercut.errors import DataError, RecipeError
from layercut.recipe.recipe import CalibrationConfig

EOS, BOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """1,000 bytes of text that never repeats within 4 bytes."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{i:04d}" for i in range(250)))
    return str(path)


def ids(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def test_documents_are_joined_by_the_end_of_text_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    windows = pack_tokens(["abc", "de", "fgh"], tokenizer, seq_len=4, max_tokens=100)
    # abc·de·fgh is 10 tokens: two windows, and 2 tokens that fill none.
    expected = [*ids("abc", tokenizer), EOS, *ids("de", tokenizer), EOS, *ids("f", tokenizer)]
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == expected
    assert windows.shape == (2, 4)


def test_a_tokenizer_without_end_of_text_joins_directly() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    windows = pack_tokens(["abc", "de"], tokenizer, seq_len=5, max_tokens=100)
    assert windows.tolist() == [ids("abcde", tokenizer)]


def test_reading_stops_at_the_token_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    def texts() -> Iterator[str]:
        yield "abc"
        yield "defgh"
        raise AssertionError("read too far")

    assert pack_tokens(texts(), tokenizer, seq_len=4, max_tokens=8).shape == (2, 4)


def test_a_short_text_is_one_shorter_window(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pack_tokens(["abc"], tokenizer, seq_len=9, max_tokens=90).shape == (1, 3)


@pytest.mark.parametrize(("texts", "n_tokens"), [([], 0), (["a"], 1)])
def test_fewer_than_two_tokens_are_refused(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], n_tokens: int
) -> None:
    with pytest.raises(DataError, match=rf"yields {n_tokens} token\(s\); at least 2 are needed"):
        pack_tokens(texts, tokenizer, seq_len=4, max_tokens=8)


def test_windows_are_drawn_without_replacement_in_corpus_order(
    tokenizer: PreTrainedTokenizerFast, numbers: str
) -> None:
    # 16 × 3 × 8 = 384 tokens are packed into 48 windows; window i starts with the number 2 i.
    section = CalibrationConfig(data=numbers, n_sequences=3, seq_len=8)
    batches = calibration_batches(section, tokenizer, seed=5)
    starts = [int(tokenizer.decode(row[:4])) // 2 for row in batches.input_ids]
    assert starts == sorted(set(starts))
    assert len(starts) == 3
    assert max(starts) < 48
    assert all(
        tokenizer.decode(row[4:]) == f"{2 * s + 1:04d}"
        for row, s in zip(batches.input_ids, starts, strict=True)
    )


def test_the_draw_depends_on_the_seed_alone(
    tokenizer: PreTrainedTokenizerFast, numbers: str
) -> None:
    section = {"data": numbers, "n_sequences": 4, "seq_len": 8}
    first = calibration_batches(section, tokenizer, seed=1)
    torch.rand(3)
    again = calibration_batches(section, tokenizer, seed=1)
    other = calibration_batches(section, tokenizer, seed=2)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.fingerprint == again.fingerprint
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.fingerprint != other.fingerprint


def test_the_draw_leaves_the_global_generator_alone(
    tokenizer: PreTrainedTokenizerFast, numbers: str
) -> None:
    state = torch.get_rng_state()
    calibration_batches({"data": numbers, "n_sequences": 2, "seq_len": 8}, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fingerprint_knows_how_tokens_are_cut(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789abcdef")
    fingerprints = {
        calibration_batches(
            {"data": str(path), "n_sequences": 16 // n, "seq_len": n}, tokenizer
        ).fingerprint
        for n in (4, 8)
    }
    assert len(fingerprints) == 2


def test_fewer_windows_than_asked_for_are_all_used_with_a_warning(
    tokenizer: PreTrainedTokenizerFast, numbers: str
) -> None:
    section = {"data": numbers, "n_sequences": 48, "seq_len": 100}
    with pytest.warns(UserWarning, match=r"holds 10 calibration window\(s\) of 100 tokens, fewer"):
        batches = calibration_batches(section, tokenizer)
    assert batches.input_ids.shape == (10, 100)


def test_a_text_shorter_than_a_window_warns_and_is_used(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdef")
    with pytest.warns(UserWarning, match=r"1 calibration window\(s\) of 6 tokens, fewer than"):
        batches = calibration_batches({"data": str(path), "n_sequences": 1}, tokenizer)
    assert batches.input_ids.shape == (1, 6)


@pytest.mark.parametrize(
    ("micro_batch", "seq_len", "expected"),
    # auto: as many as fit 2,048 tokens, at most gradient_batch = 8
    [("auto", 8, 8), ("auto", 512, 4), ("auto", 1000, 2), (3, 8, 3), (20, 8, 20)],
)
def test_micro_batch_fits_a_token_budget(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    micro_batch: int | str,
    seq_len: int,
    expected: int,
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 1000)
    batches = calibration_batches(
        {"data": str(path), "n_sequences": 1, "seq_len": seq_len, "micro_batch": micro_batch},
        tokenizer,
    )
    assert batches.micro_batch == expected
    assert (batches.gradient_batch, batches.source) == (8, str(path))


def test_a_mapping_is_checked_like_a_recipe(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        RecipeError, match=r"calibration: n_seq: unknown key; did you mean 'n_sequences'"
    ):
        calibration_batches({"n_seq": 3}, tokenizer)
    with pytest.raises(RecipeError, match=r"calibration: seq_len: should be a valid integer"):
        calibration_batches({"seq_len": "long"}, tokenizer)


@pytest.mark.parametrize(("max_tokens", "shape"), [(59, (2, 20)), (60, (3, 20)), (5, (1, 20))])
def test_evaluation_uses_the_first_whole_windows(
    tokenizer: PreTrainedTokenizerFast, numbers: str, max_tokens: int, shape: tuple[int, int]
) -> None:
    windows = evaluation_windows(
        numbers, tokenizer, seq_len=20, max_tokens=max_tokens, detokenize="auto"
    )
    assert windows.shape == shape
    assert tokenizer.decode(windows[0]) == "00000001000200030004"


def test_evaluation_can_leave_markers_in_place(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "a.raw"
    path.write_text("a @-@ b .")
    texts = [
        tokenizer.decode(
            evaluation_windows(
                str(path), tokenizer, seq_len=99, max_tokens=99, detokenize=detokenize
            )[0]
        )
        for detokenize in ("auto", False)
    ]
    assert texts == ["a-b.", "a @-@ b ."]


def test_several_texts_give_equally_many_windows(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sources = []
    for letter in "abc":
        path = tmp_path / f"{letter}.txt"
        path.write_text(letter * 400)
        sources.append(str(path))
    section = CalibrationConfig(data=tuple(sources), n_sequences=7, seq_len=10)
    batches = calibration_batches(section, tokenizer, seed=1)
    letters = [set(tokenizer.decode(window)) for window in batches.input_ids]
    assert sorted(map(sorted, letters)) == [["a"]] * 3 + [["b"]] * 2 + [["c"]] * 2
    assert batches.source == " + ".join(sources)
    again = calibration_batches(section, tokenizer, seed=1)
    assert again.input_ids.equal(batches.input_ids)


def test_no_text_at_all_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RecipeError, match=r"data"):
        calibration_batches({"data": []}, tokenizer)


def test_task_rows_are_read_as_prompts_with_their_right_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "2+2=", "choices": ["3", "4"], "answer": 1}\n')
    section = {"data": f"rows:{path}", "n_sequences": 1, "seq_len": 5}
    (window,) = calibration_batches(section, tokenizer).input_ids.tolist()
    assert window == ids("2+2=4", tokenizer)


TURNS = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"


def test_chat_rows_need_a_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(f'{{"messages": {TURNS}}}\n')
    with pytest.raises(DataError, match=r"line 1 holds chat messages, but .* no chat template"):
        calibration_batches({"data": f"rows:{path}"}, tokenizer)


@pytest.mark.parametrize("written", ["", "{{ bos_token }}"])
def test_chat_rows_are_read_as_the_template_writes_them_behind_one_leading_token(
    tmp_path: Path, written: str
) -> None:
    tokenizer = leading_tokenizer()
    tokenizer.chat_template = written + TEMPLATE
    path = tmp_path / "chat.jsonl"
    path.write_text(f'{{"messages": {TURNS}}}\n' * 2)
    section = {"data": f"rows:{path}", "n_sequences": 1, "seq_len": 28}
    (window,) = calibration_batches(section, tokenizer).input_ids.tolist()
    said = ids("<u>Hi<a>Hello", tokenizer)
    assert window == [BOS, *said, EOS, *said]


@pytest.mark.parametrize("after", ["", " <eos>"])
def test_every_window_starts_with_the_leading_token_and_no_text_is_lost(
    numbers: str, after: str
) -> None:
    tokenizer = leading_tokenizer(after)
    section = CalibrationConfig(data=numbers, n_sequences=50, seq_len=21)
    windows = calibration_batches(section, tokenizer).input_ids
    assert windows.shape == (50, 21)
    assert (windows[:, 0] == BOS).all()
    # 50 windows of 20 bytes are the text's 1,000, each once.
    assert tokenizer.decode(windows[:, 1:].flatten()) == Path(numbers).read_text()
    cut = {"seq_len": 21, "detokenize": "auto"}
    assert evaluation_windows(numbers, tokenizer, max_tokens=1050, **cut).equal(windows)
    assert evaluation_windows(numbers, tokenizer, max_tokens=43, **cut).equal(windows[:2])


def test_several_leading_tokens_start_every_window(numbers: str) -> None:
    tokenizer = leading_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> <bos> $A", special_tokens=[("<pad>", 2), ("<bos>", 1)]
    )
    section = CalibrationConfig(data=numbers, n_sequences=50, seq_len=22)
    batches = calibration_batches(section, tokenizer)
    assert batches.input_ids[:, :2].tolist() == [[2, 1]] * 50
    assert tokenizer.decode(batches.input_ids[:, 2:].flatten()) == Path(numbers).read_text()
    assert (batches.n_targets, batches.n_unscored) == (50 * 20, 2)


def test_between_documents_stands_their_end_alone() -> None:
    windows = pack_tokens(["abc", "de"], leading_tokenizer(), seq_len=4, max_tokens=8)
    plain = byte_tokenizer()
    assert windows.tolist() == [
        [BOS, *ids("abc", plain)],
        [BOS, EOS, *ids("de", plain)],
    ]


def test_an_end_that_a_text_already_has_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = pack_tokens(["ab<eos>", "c"], tokenizer, seq_len=4, max_tokens=4)
    assert windows.tolist() == [[*ids("ab", tokenizer), EOS, *ids("c", tokenizer)]]


def test_one_token_behind_the_leading_one_can_be_predicted() -> None:
    assert pack_tokens(["a"], leading_tokenizer(), seq_len=9, max_tokens=9).shape == (1, 2)
    with pytest.raises(DataError, match=r"yields 0 token\(s\); at least 1 are needed"):
        pack_tokens([], leading_tokenizer(), seq_len=9, max_tokens=9)
    with pytest.raises(RecipeError, match=r"windows of 1 token.* no room for text behind <bos>"):
        pack_tokens(["abc"], leading_tokenizer(), seq_len=1, max_tokens=9)
