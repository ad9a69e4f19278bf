"""Trains a small Llama from nothing on a data directory.

Run as `python -m llmops_assets.develop.train …`, through the tool runner. Killed at any
instruction and started again with the same work folder, it carries on from its last
saved state and ends with the same weights as a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from llmops_assets.develop.data import DATA_FILE, read_data
from llmops_assets.develop.directory import replace_file, whole_directory
from llmops_assets.develop.history import HISTORY_FILE
from llmops_assets.develop.tokenizer import BEGIN, END, PAD, build_tokenizer, save_tokenizer
from llmops_assets.errors import DataError, LLMOpsError, ToolError
from llmops_assets.spec import TrainedWeights
from llmops_assets.tools import report_progress

RUN_FILE = "run.json"
STATE_FILE = "state.safetensors"

WARMUP_SHARE = 0.1
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT_NORM = 1.0
HISTORY_POINTS = 500
SORTED_BATCHES = 8
"""Rows are sorted by length within this many batches, not over all, to stay random."""
IGNORED_LABEL = -100
"""A position that adds nothing to the loss (torch's `CrossEntropyLoss.ignore_index`)."""


@dataclass(frozen=True)
class Examples:
    """Token ids of every row, one after another.

    Row i is `ids[starts[i]:starts[i + 1]]`; its first `prompts[i]` tokens are the prompt.
    """

    ids: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)


def train(
    training_data: Path,
    parameters: TrainedWeights,
    max_tokens: int,
    output: Path,
    work: Path,
    threads: int,
    save_every_seconds: float = 10.0,
) -> None:
    """Writes a Hugging Face directory with the trained model, its tokenizer and its history.

    `history.json` is a list of `{"step", "loss", "learning_rate"}`, at most about 500
    long; the loss is the mean over one batch's completion tokens, in nats.

    Args:
        training_data: data directory.
        parameters: the spec's weights section.
        max_tokens: the longest sequence the model must take, prompt, completion and
            special tokens together.
        output: directory to write; must not exist.
        work: folder that keeps the state of an unfinished training.
        threads: CPU threads.
        save_every_seconds: how much work a kill may cost.

    Raises:
        ToolError: `work` belongs to another training, or the loss is no longer finite.
        DataError: the data are not valid, or a row is longer than `max_tokens`.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(parameters.seed)
    work.mkdir(parents=True, exist_ok=True)
    _claim(work, _identity(training_data, parameters, max_tokens))
    rows = read_data(training_data).to_pydict()
    tokenizer = build_tokenizer(rows["prompt"] + rows["completion"])
    examples = _encode(tokenizer, rows["prompt"], rows["completion"], max_tokens)

    with whole_directory(output) as folder:
        model = LlamaForCausalLM(_config(tokenizer, parameters, max_tokens))
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
        history = _optimise(model, optimizer, examples, parameters, work, save_every_seconds)
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder, max_tokens)
        (folder / HISTORY_FILE).write_text(json.dumps(history, indent=1) + "\n")


def learning_rate(step: int, parameters: TrainedWeights) -> float:
    """Linear warm-up, then a cosine to zero; steps count from 0."""
    warmup = max(1, round(parameters.steps * WARMUP_SHARE))
    if step < warmup:
        return parameters.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, parameters.steps - warmup)
    return parameters.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def order_of_pass(lengths: np.ndarray, batch_size: int, seed: int, number: int) -> list[np.ndarray]:
    """Row numbers of each batch of one pass over the data.

    A function of nothing but its arguments, so a resumed training sees the batches it
    would have seen. Rows come in random order, but a batch's rows are of like length, as
    padding is wasted work. Rows that fill no batch are left to the other passes.

    Args:
        lengths: tokens of each row.
        batch_size: rows per batch; fewer if there are fewer rows at all.
        seed: of the training.
        number: which pass, from 0.
    """
    random = np.random.default_rng((seed, number))
    rows = random.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(rows), batch_size * SORTED_BATCHES):
        window = rows[start : start + batch_size * SORTED_BATCHES]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
    full = [batch for batch in batches if len(batch) == min(batch_size, len(rows))]
    return [full[place] for place in random.permutation(len(full))]


def _config(tokenizer: Tokenizer, parameters: TrainedWeights, max_tokens: int) -> LlamaConfig:
    architecture = parameters.architecture
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.heads,
        max_position_embeddings=max_tokens,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        tie_word_embeddings=False,
    )


def _encode(
    tokenizer: Tokenizer, prompts: list[str], completions: list[str], max_tokens: int
) -> Examples:
    whole = tokenizer.encode_batch(list(zip(prompts, completions, strict=True)))
    lengths = np.array([len(encoding.ids) for encoding in whole])
    if lengths.max() > max_tokens:
        row = int(lengths.argmax())
        raise DataError(
            f"Row {row + 1} of the training data is longer than the model may be asked",
            expected=f"at most {max_tokens} tokens, prompt, completion and special tokens",
            found=f"{lengths[row]} tokens in {prompts[row]!r}",
            cure="raise constraints.max_input_tokens in the model's spec, or drop the row",
        )
    return Examples(
        ids=np.concatenate([np.array(encoding.ids) for encoding in whole]),
        starts=np.concatenate([[0], lengths.cumsum()]),
        prompts=np.array([len(encoding.ids) for encoding in tokenizer.encode_batch(prompts)]),
    )


def _batch(examples: Examples, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, of shape (rows, longest row).

    Padding is on the right, where causal attention never looks: no mask is needed, and any
    id will do.
    """
    starts, ends = examples.starts[rows], examples.starts[rows + 1]
    ids = torch.zeros((len(rows), int((ends - starts).max())), dtype=torch.long)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for place, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        tokens = torch.from_numpy(examples.ids[start:end])
        ids[place, : len(tokens)] = tokens
        prompt = int(examples.prompts[row])
        labels[place, prompt : len(tokens)] = tokens[prompt:]
    return ids, labels


def _optimise(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    parameters: TrainedWeights,
    work: Path,
    save_every_seconds: float,
) -> list[dict[str, float]]:
    """Trains the model in place, from the state in `work` if there is one."""
    state = work / STATE_FILE
    first, history = _load(state, model, optimizer) if state.exists() else (0, [])
    lengths = np.diff(examples.starts)
    batches_per_pass = max(1, len(examples) // parameters.batch_size)
    pass_number, batches = -1, []
    history_every = -(-parameters.steps // HISTORY_POINTS)  # rounded up
    saved = reported = time.monotonic()
    model.train()
    for step in range(first, parameters.steps):
        rate = learning_rate(step, parameters)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step // batches_per_pass != pass_number:
            pass_number = step // batches_per_pass
            batches = order_of_pass(lengths, parameters.batch_size, parameters.seed, pass_number)
        ids, labels = _batch(examples, batches[step % batches_per_pass])
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        value = loss.item()
        if not math.isfinite(value):
            raise ToolError(
                f"The loss is {value} at step {step + 1}",
                expected="a finite number",
                cure="lower weights.learning_rate in the model's spec",
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT_NORM)
        optimizer.step()

        last = step + 1 == parameters.steps
        if step % history_every == 0 or last:
            history.append({"step": step + 1, "loss": value, "learning_rate": rate})
        now = time.monotonic()
        if now - reported >= 1 or last:
            report_progress(step=step + 1, of=parameters.steps, loss=value)
            reported = now
        if now - saved >= save_every_seconds or last:
            _save(state, step + 1, history, model, optimizer)
            saved = now
    return history


def _save(
    path: Path,
    step: int,
    history: list[dict[str, float]],
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes everything that the next step depends on, in one file, at once."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    tensors["random"] = torch.get_rng_state()
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"step": str(step), "history": json.dumps(history)})
    replace_file(partial, path)


def _load(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]]]:
    """Restores model, optimizer and random numbers; returns steps done and history."""
    weights: dict[str, torch.Tensor] = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        torch.set_rng_state(file.get_tensor("random"))
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            kind, _, name = key.partition(".")
            if kind == "model":
                weights[name] = file.get_tensor(key)
            elif kind == "optimizer":
                number, _, moment = name.partition(".")
                moments.setdefault(int(number), {})[moment] = file.get_tensor(key)
    model.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(metadata["step"]), json.loads(metadata["history"])


def _identity(training_data: Path, parameters: TrainedWeights, max_tokens: int) -> dict[str, Any]:
    """What a saved state belongs to: all that decides the weights."""
    content = (training_data / DATA_FILE).read_bytes()
    return {
        "parameters": json.loads(parameters.model_dump_json()),
        "max_tokens": max_tokens,
        "training_data": hashlib.sha256(content).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _claim(work: Path, identity: Mapping[str, Any]) -> None:
    path = work / RUN_FILE
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n")
        replace_file(partial, path)
        return
    found = json.loads(path.read_text())
    if found != identity:
        different = sorted(
            key for key in {*found, *identity} if found.get(key) != identity.get(key)
        )
        raise ToolError(
            f"The work folder {work} belongs to another training",
            expected=f"the same {', '.join(different)}",
            found={key: found.get(key) for key in different},
            cure="give each training a work folder of its own, or empty this one",
        )


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llmops_assets.develop.train", description=__doc__)
    parser.add_argument("--training-data", required=True, type=Path, help="data directory")
    parser.add_argument("--parameters", required=True, help="the spec's weights section, JSON")
    parser.add_argument(
        "--max-tokens", required=True, type=int,
        help="longest sequence: prompt, completion and special tokens",
    )  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--work", required=True, type=Path, help="keeps unfinished training")
    parser.add_argument("--threads", required=True, type=int, help="CPU threads")
    parser.add_argument("--save-every-seconds", type=float, default=10.0)
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        train(
            options.training_data,
            TrainedWeights.model_validate_json(options.parameters),
            options.max_tokens,
            options.output,
            options.work,
            options.threads,
            options.save_every_seconds,
        )
    except LLMOpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
