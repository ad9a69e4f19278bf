"""A spec's repository with tasks for the tiny Llama, whose right answers are known.

What the model would choose and say is computed with transformers alone. Documents with an
even number have that as their truth, the others have something else.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llmops_assets.develop.evaluate import _generate, load_checkpoint
from llmops_assets.spec import HarnessMetric

DOCUMENTS = 12
EXPECTED = [1.0, 0.0] * (DOCUMENTS // 2)
MAX_TOKENS = 10
STOP = "x"
QUESTIONS = [f"{day} août {1950 + day}" for day in range(1, DOCUMENTS + 1)]

COMMON = """\
dataset_path: json
test_split: test
doc_to_text: "{{question}}"
target_delimiter: ""
metadata: {version: 3.0}
"""
CHOICE = """\
include: common.yaml
task: choose_date
dataset_kwargs: {data_files: {test: data/dates.jsonl}}
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: choice
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATION = f"""\
include: common.yaml
task: write_date
dataset_kwargs: {{data_files: {{test: data/dates.jsonl}}}}
output_type: generate_until
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["{STOP}"], max_gen_toks: {MAX_TOKENS}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = HarnessMetric(name="choosing", task="tasks/choose.yaml", metric="acc")
WRITE = HarnessMetric(name="writing", task="tasks/write.yaml", metric="exact_match")


def write_repository(folder: Path, checkpoint: Path) -> Path:
    """Writes it to `folder`, which must not exist; returns it."""
    tasks = folder / "tasks"
    (tasks / "data").mkdir(parents=True)
    (tasks / "common.yaml").write_text(COMMON)
    (tasks / "choose.yaml").write_text(CHOICE)
    (tasks / "write.yaml").write_text(GENERATION)
    documents = _documents(checkpoint)
    (tasks / "data" / "dates.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in documents)
    )
    return folder


def likelihood(checkpoint: Path, question: str, continuation: str) -> float:
    """Log-likelihood of a continuation, nats, after the prompt as it is served."""
    tokenizer, model = load_checkpoint(checkpoint)
    ids = tokenizer.encode(question, continuation)[:-1]  # without the end of the sequence
    length = len(tokenizer.encode(continuation, add_special_tokens=False))
    with torch.inference_mode():
        likelihoods = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(
        float(likelihoods[place - 1, ids[place]]) for place in range(len(ids) - length, len(ids))
    )


def _documents(checkpoint: Path) -> list[dict[str, object]]:
    tokenizer, model = load_checkpoint(checkpoint)
    answers = _generate(model, tokenizer, QUESTIONS, MAX_TOKENS)
    documents: list[dict[str, object]] = []
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        # They differ in nothing but the first character, which a wrong split loses.
        choices = [f"{letter}{number:02}" for letter in "Nmx"]
        likelihoods = [likelihood(checkpoint, question, choice) for choice in choices]
        best = likelihoods.index(max(likelihoods))
        documents.append(
            {
                "question": question,
                "choices": choices,
                "choice": best if number % 2 == 0 else (best + 1) % len(choices),
                "text": answer.split(STOP)[0] if number % 2 == 0 else "something else",
            }
        )
    return documents
