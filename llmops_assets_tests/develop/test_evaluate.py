"""Evaluation on a model whose every answer is known in advance."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmops_assets.develop import evaluate as evaluation_module
from llmops_assets.develop.data import build_data
from llmops_assets.develop.evaluate import _generate, _times, evaluate, load_checkpoint, main
from llmops_assets.develop.metrics import PREDICTION_COLUMNS, TIME_COLUMNS, latency
from llmops_assets.develop.tokenizer import build_tokenizer, save_tokenizer
from llmops_assets.errors import LLMOpsError
from llmops_assets.evidence.latency import LatencySummary
from llmops_assets.spec import DataFiles

ALPHABET = "abcdefgh"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without attention that always continues a with b, b with c … h with the end,
    and every prompt (which ends with <sep>) with a."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = build_tokenizer([])
    size = tokenizer.get_vocab_size()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=size + size % 2, intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=128,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    ids = [3, *(tokenizer.token_to_id(letter) for letter in ALPHABET), 2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size, model.config.hidden_size))
        for before, after in itertools.pairwise(ids):
            model.lm_head.weight[after, before] = 1.0
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory, max_tokens=128)
    # A sampling default of an imported model must not make an evaluation random.
    settings = json.loads((directory / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 50.0, "repetition_penalty": 3.0}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    rows = [
        # Lengths differ, so that batching pads; the order is not that of lengths.
        {"prompt": "a much longer prompt than others", "completion": ALPHABET, "slice": "right"},
        {"prompt": "x", "completion": "abc", "slice": "wrong"},
        {"prompt": "hello", "completion": ALPHABET, "slice": "right"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = DataFiles(source="files", training=Path("x"), evaluation=folder / "rows.jsonl")
    build_data(files, "evaluation", folder / "data", folder)
    return folder / "data"


@pytest.fixture(scope="module")
def evaluation(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("output") / "evaluation"
    evaluate(checkpoint, data, 12, output, threads=1)
    return output


def test_answers_are_greedy_and_stand_beside_their_rows(evaluation: Path) -> None:
    """Batches are sorted by length; an answer that lands in another row ruins every metric."""
    predictions = pd.read_parquet(evaluation / "predictions.parquet")
    assert tuple(predictions.columns) == PREDICTION_COLUMNS + TIME_COLUMNS
    assert predictions["prompt"].tolist()[1] == "x"
    assert predictions["prediction"].tolist() == [ALPHABET] * 3
    assert predictions["correct"].tolist() == [True, False, True]


def test_losses_are_those_worked_out_by_hand(evaluation: Path) -> None:
    """Off by one position, the loss of a good model still looks like a number."""
    predictions = pd.read_parquet(evaluation / "predictions.parquet")
    assert predictions["tokens"].tolist() == [9, 4, 9]
    # The norm scales the one-hot embedding, of width n, to about √n: so is the right logit.
    size = build_tokenizer([]).get_vocab_size()
    scale = math.sqrt(size + size % 2)
    right = math.log(math.exp(scale) + size - 1) - scale
    wrong = math.log(math.exp(scale) + size - 1)
    expected = [9 * right, 3 * right + wrong, 9 * right]
    assert predictions["loss"].tolist() == pytest.approx(expected, rel=1e-2)


def test_metrics_are_those_of_the_predictions(evaluation: Path) -> None:
    """Gates read this file."""
    found = json.loads((evaluation / "evaluation.json").read_text())
    predictions = pd.read_parquet(evaluation / "predictions.parquet")
    assert found["rows"] == 3
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["slices"] == {
        "right": {"rows": 2, "exact_match": 1.0},
        "wrong": {"rows": 1, "exact_match": 0.0},
    }
    loss = predictions["loss"].sum() / predictions["tokens"].sum()
    assert found["loss"] == pytest.approx(loss)
    assert found["perplexity"] == pytest.approx(math.exp(loss))
    assert LatencySummary.model_validate(found["latency"]) == latency(predictions)
    assert found["latency"]["levels"][0]["requests"] == 3


def test_every_token_of_an_answer_is_timed_and_no_other(evaluation: Path) -> None:
    """The prompt comes through the same stream; counted, it would be the first token."""
    predictions = pd.read_parquet(evaluation / "predictions.parquet")
    assert predictions["output_tokens"].tolist() == [len(ALPHABET) + 1] * 3


def test_times_of_the_first_token_and_of_later_ones_are_told_apart(checkpoint: Path) -> None:
    """A long prompt must show in the time to first token, a slow decoder between tokens."""
    tokenizer, model = load_checkpoint(checkpoint)

    def slow(_: torch.nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        time.sleep(0.2 if inputs["input_ids"].shape[1] > 1 else 0.02)

    model.register_forward_pre_hook(slow, with_kwargs=True)
    (request,) = _times(model, tokenizer, ["x"], 3)
    assert request is not None
    assert request.inter_token_latency is not None
    assert 0.02 <= request.inter_token_latency < 0.2 <= request.time_to_first_token
    assert request.end_to_end >= 0.2 + 2 * 0.02
    assert request.output_tokens == 3


def test_timed_prompts_are_spread_evenly(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are often sorted, by length or slice; the first rows would speak for all."""
    tokenizer, model = load_checkpoint(checkpoint)
    monkeypatch.setattr(evaluation_module, "LATENCY_ROWS", 3)
    times = _times(model, tokenizer, ["x"] * 9, 1)
    assert [row for row, request in enumerate(times) if request is not None] == [0, 4, 8]


def test_answers_stop_at_the_limit(checkpoint: Path) -> None:
    """A model that never ends must not hold the evaluation up."""
    tokenizer, model = load_checkpoint(checkpoint)
    assert _generate(model, tokenizer, ["x"], 3) == ["abc"]


def test_a_batch_answers_as_each_prompt_alone(tmp_path: Path) -> None:
    """Padding that leaks into attention changes answers, and only those of short prompts.

    The model of the other tests has no attention; this one has, with random weights.
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer([])
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path, max_tokens=128)
    tokenizer, model = load_checkpoint(tmp_path)
    prompts = ["x", "July 4, 2031", "mercoledì 30 settembre 2024"]
    alone = [_generate(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert _generate(model, tokenizer, prompts, 8) == alone
    assert len(set(alone)) == 3


def test_a_tokenizer_without_an_end_is_refused(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an end token every answer runs to the limit and counts as wrong."""
    broken = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, broken)
    config = json.loads((broken / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(LLMOpsError, match="no end-of-sequence token"):
        load_checkpoint(broken)
    assert main([
        "--checkpoint", str(broken), "--evaluation-data", str(data), "--max-tokens", "12",
        "--output", str(tmp_path / "output"), "--threads", "1",
    ]) == 1  # fmt: skip
    assert "no end-of-sequence token" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
