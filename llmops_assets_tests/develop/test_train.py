"""Training must give the same weights whether or not somebody killed it on the way."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from llmops_assets.develop.data import build_data
from llmops_assets.develop.tokenizer import build_tokenizer
from llmops_assets.develop.train import (
    _batch,
    _encode,
    learning_rate,
    main,
    order_of_pass,
    train,
)
from llmops_assets.errors import LLMOpsError, ToolError
from llmops_assets.spec import Architecture, GeneratedDates, Split, TrainedWeights
from llmops_assets.tools import PROGRESS_PREFIX

MAX_TOKENS = 76
TINY = Architecture(hidden_size=32, intermediate_size=64, layers=2, heads=2)


def tiny(steps: int, seed: int = 0, rate: float = 2e-3) -> TrainedWeights:
    return TrainedWeights(
        source="train", architecture=TINY, steps=steps, batch_size=32, seed=seed, learning_rate=rate
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 9 full batches a pass, so that these trainings begin a second one.
    directory = tmp_path_factory.mktemp("training") / "data"
    split = Split(rows=300, seed=1)
    dates = GeneratedDates(source="dates", locales=("en", "fr"), training=split, evaluation=split)
    build_data(dates, "training", directory, Path())
    return directory


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def arguments(data: Path, parameters: TrainedWeights, folder: Path) -> list[str]:
    return [
        "--training-data", str(data),
        "--parameters", parameters.model_dump_json(),
        "--max-tokens", str(MAX_TOKENS),
        "--output", str(folder / "output"),
        "--work", str(folder / "work"),
        "--threads", "1",
    ]  # fmt: skip


# Saves after every step, and kills itself without warning beside the fifth rename of its
# state: before it, the new state exists under another name only; after it, it counts.
KILLED_WHILE_SAVING = """
import os, signal, sys
from llmops_assets.develop import train

when, *arguments = sys.argv[1:]
rename, saves = train.replace_file, 0

def rename_and_die(partial, path):
    global saves
    saves += path.name == train.STATE_FILE
    if saves == 5 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(partial, path)
    if saves == 5:
        os.kill(os.getpid(), signal.SIGKILL)

train.replace_file = rename_and_die
train.main([*arguments, "--save-every-seconds", "0"])
"""


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(data, tiny(steps=20), MAX_TOKENS, folder / "output", folder / "work", 1)
    return folder / "output"


@pytest.mark.parametrize(("when", "saved_steps"), [("before", 4), ("after", 5)])
def test_a_killed_training_resumes_to_the_same_bytes(
    data: Path, undisturbed: Path, tmp_path: Path, when: str, saved_steps: int
) -> None:
    """kill -9 is how pods and laptops end. A resume with other batches, a fresh optimiser or
    a restarted schedule would still look like a model; only its digest tells."""
    parameters = tiny(steps=20)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, when, *arguments(data, parameters, tmp_path)],
        check=False,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    with safe_open(tmp_path / "work" / "state.safetensors", framework="np") as file:
        assert int(file.metadata()["step"]) == saved_steps
    assert not (tmp_path / "output").exists()

    assert main(arguments(data, parameters, tmp_path)) == 0
    assert digests(tmp_path / "output") == digests(undisturbed)


def test_output_is_a_hugging_face_directory_with_its_history(data: Path, tmp_path: Path) -> None:
    """Every later step, ours or a stranger's, reads it with transformers and nothing else."""
    output = tmp_path / "output"
    train(data, tiny(steps=5), MAX_TOKENS, output, tmp_path / "work", 1)
    assert set(digests(output)) == {
        "config.json", "generation_config.json", "history.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(output, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    assert model.config.max_position_embeddings == MAX_TOKENS
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    history = json.loads((output / "history.json").read_text())
    assert [set(point) for point in history] == [{"step", "loss", "learning_rate"}] * 5
    assert [point["step"] for point in history] == [1, 2, 3, 4, 5]
    # An untrained model spreads its guesses evenly: ln(vocabulary), give or take.
    assert history[0]["loss"] == pytest.approx(math.log(len(tokenizer)), rel=0.1)


def test_the_loss_is_about_completions_only() -> None:
    """Learning to predict prompts too would spend a small model on what nobody asks."""
    tokenizer = build_tokenizer([])
    examples = _encode(tokenizer, ["le 3 mars 2024", "x"], ["2024-03-03", "y"], MAX_TOKENS)
    ids, labels = _batch(examples, np.array([1, 0]))
    y, end = tokenizer.token_to_id("y"), tokenizer.token_to_id("</s>")
    assert labels[0].tolist() == [-100] * 3 + [y, end] + [-100] * (ids.shape[1] - 5)
    answer = tokenizer.encode("2024-03-03", add_special_tokens=False).ids
    assert labels[1].tolist() == [-100] * 16 + [*answer, end]
    assert ids[1].tolist() == tokenizer.encode("le 3 mars 2024", "2024-03-03").ids


def test_another_training_does_not_take_over_a_work_folder(data: Path, tmp_path: Path) -> None:
    """Resuming another model's state would give weights that no parameters describe."""
    work = tmp_path / "work"
    train(data, tiny(steps=2), MAX_TOKENS, tmp_path / "first", work, 1)
    with pytest.raises(ToolError, match=r"belongs to another training.*the same parameters"):
        train(data, tiny(steps=2, seed=1), MAX_TOKENS, tmp_path / "second", work, 1)
    assert not (tmp_path / "second").exists()


def test_rows_that_do_not_fit_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cutting a row silently would teach the model unfinished answers."""
    with pytest.raises(LLMOpsError, match=r"Row .* longer.*max_input_tokens"):
        train(data, tiny(steps=1), 20, tmp_path / "output", tmp_path / "work", 1)
    given = arguments(data, tiny(steps=1), tmp_path)
    given[given.index(str(MAX_TOKENS))] = "20"
    assert main(given) == 1
    assert "is longer than" in capsys.readouterr().err


def test_a_diverging_training_stops(data: Path, tmp_path: Path) -> None:
    """Hours of NaN help nobody; the message names the knob."""
    work = tmp_path / "work"
    train(data, tiny(steps=3), MAX_TOKENS, tmp_path / "good", work, 1)
    tensors = load_file(work / "state.safetensors")
    tensors["model.model.embed_tokens.weight"][:] = math.nan
    save_file(tensors, work / "state.safetensors", metadata={"step": "1", "history": "[]"})
    with pytest.raises(ToolError, match=r"loss is nan at step 2.*learning_rate"):
        train(data, tiny(steps=3), MAX_TOKENS, tmp_path / "output", work, 1)


def test_progress_counts_up_to_the_last_step(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run page shows step, total and loss while it trains."""
    train(data, tiny(steps=3), MAX_TOKENS, tmp_path / "output", tmp_path / "work", 1)
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(PROGRESS_PREFIX)
    ]
    last = json.loads(lines[-1].removeprefix(PROGRESS_PREFIX))
    assert (last["step"], last["of"], set(last)) == (3, 3, {"step", "of", "loss"})


def test_each_pass_shows_every_row_once_in_its_own_order() -> None:
    """Sampling the same rows over and over looks like training, and overfits."""
    lengths = np.arange(64) % 7
    first = order_of_pass(lengths, batch_size=8, seed=0, number=0)
    assert sorted(np.concatenate(first).tolist()) == list(range(64))
    again = order_of_pass(lengths, batch_size=8, seed=0, number=0)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for other in ({"seed": 1, "number": 0}, {"seed": 0, "number": 1}):
        batches = order_of_pass(lengths, batch_size=8, **other)
        assert any((a != b).any() for a, b in zip(first, batches, strict=True))


@pytest.mark.parametrize(("rows", "batches", "size"), [(20, 2, 8), (5, 1, 5), (8, 1, 8)])
def test_batches_are_full(rows: int, batches: int, size: int) -> None:
    """Step numbers map to batches by division; an odd batch would shift all that follow."""
    found = order_of_pass(np.ones(rows, dtype=int), batch_size=8, seed=0, number=0)
    assert [len(batch) for batch in found] == [size] * batches


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    """Without warm-up some seeds never recover; without decay the last steps stay noisy."""
    parameters = tiny(steps=100, rate=1.0)
    rates = [learning_rate(step, parameters) for step in range(100)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
