"""Tasks of the lm-evaluation-harness on a checkpoint: right scores, and nothing that runs code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llmops_assets.develop.harness import (
    check_same_task,
    run_tasks,
    scores,
)
from llmops_assets.develop.harness_tasks import task_digest
from llmops_assets.errors import DataError, LLMOpsError, SpecError
from llmops_assets.spec import HarnessMetric
from llmops_assets.versions import versions_of
from llmops_assets_tests.harness_repository import (
    CHOOSE,
    DOCUMENTS,
    EXPECTED,
    WRITE,
    write_repository,
)
from llmops_assets_tests.tiny_llama import write_checkpoint

if TYPE_CHECKING:
    from lm_eval.api.model import LM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LM:
    # Heavy, so only for tests that ask a model.
    from llmops_assets.develop.evaluate import load_checkpoint
    from llmops_assets.develop.harness_model import CheckpointModel

    return CheckpointModel(*load_checkpoint(checkpoint))


@pytest.fixture(scope="module")
def pristine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("pristine") / "repository", checkpoint)


@pytest.fixture
def repository(pristine: Path, tmp_path: Path) -> Path:
    """A repository of the test's own."""
    return shutil.copytree(pristine, tmp_path / "repository")


def edit(file: Path, old: str, new: str) -> None:
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new))


def refusal(
    model: LM, repository: Path, metric: HarnessMetric = CHOOSE, error: type = SpecError
) -> str:
    """What `run_tasks` says."""
    with pytest.raises(LLMOpsError) as raised:
        run_tasks(model, [metric], repository, repository)
    assert type(raised.value) is error
    assert not (repository / "harness.parquet").exists()
    return str(raised.value)


def test_scores_are_those_of_the_model(model: LM, pristine: Path, tmp_path: Path) -> None:
    """Truth is known document by document, so a shifted token or a lost stop text shows."""
    limited = CHOOSE.model_copy(update={"name": "first_five", "limit": 5})
    run_tasks(model, [CHOOSE, WRITE, limited], pristine, tmp_path)
    assert scores(tmp_path, "choosing") == EXPECTED
    assert scores(tmp_path, "writing") == EXPECTED
    assert scores(tmp_path, "first_five") == EXPECTED[:5]
    summary = json.loads((tmp_path / "harness.json").read_text())
    assert summary["lm_eval"] == versions_of("lm_eval")["lm_eval"]
    assert summary["metrics"]["writing"] == {
        "task": "tasks/write.yaml",
        "digest": task_digest(WRITE, pristine),
        "version": 3.0,
        "metric": "exact_match",
        "documents": DOCUMENTS,
        "value": 0.5,
    }
    assert summary["metrics"]["first_five"]["documents"] == 5
    with pytest.raises(DataError, match=r"other was not measured.*choosing, first_five, writing"):
        scores(tmp_path, "other")


def test_scores_of_a_changed_task_are_not_compared(
    model: LM, pristine: Path, repository: Path, tmp_path: Path
) -> None:
    """Document by document against other questions would compare the questions."""
    for name in ("candidate", "baseline", "later"):
        (tmp_path / name).mkdir()
    run_tasks(model, [WRITE], pristine, tmp_path / "candidate")
    run_tasks(model, [WRITE], pristine, tmp_path / "baseline")
    check_same_task(tmp_path / "candidate", tmp_path / "baseline", "writing")
    edit(repository / "tasks" / "common.yaml", "{{question}}", "When: {{question}}")
    run_tasks(model, [WRITE], repository, tmp_path / "later")
    with pytest.raises(DataError, match="task of metric writing has changed"):
        check_same_task(tmp_path / "later", tmp_path / "baseline", "writing")


def test_filter_is_chosen_with_the_metric(model: LM, repository: Path) -> None:
    """Of several ways to read an answer the harness makes several scores; one must be meant."""
    with (repository / "tasks" / "write.yaml").open("a") as file:
        file.write(
            "filter_list:\n"
            "- {name: strict, filter: [{function: take_first}]}\n"
            "- name: never\n"
            "  filter: [{function: regex, regex_pattern: '(§)'}, {function: take_first}]\n"
        )
    message = refusal(model, repository, WRITE)
    assert "exact_match,strict or exact_match,never" in message
    strict, never = (
        WRITE.model_copy(update={"name": name, "metric": f"exact_match,{name}"})
        for name in ("strict", "never")
    )
    run_tasks(model, [strict, never], repository, repository)
    assert scores(repository, "strict") == EXPECTED
    assert scores(repository, "never") == [0.0] * DOCUMENTS


def test_function_of_a_file_is_not_run(model: LM, repository: Path) -> None:
    """A push must not run code in the platform's name through a task file."""
    (repository / "tasks" / "evil.py").write_text(
        f"open({str(repository / 'ran')!r}, 'w')\ndef process(documents): return documents\n"
    )
    with (repository / "tasks" / "choose.yaml").open("a") as file:
        file.write("process_docs: !function evil.process\n")
    assert "!function" in refusal(model, repository)
    assert not (repository / "ran").exists()


def test_template_cannot_reach_python(model: LM, repository: Path) -> None:
    """The harness's own templates can call anything that any value leads to."""
    edit(
        repository / "tasks" / "common.yaml",
        "{{question}}",
        f"{{{{question.__class__.__mro__[1].__subclasses__()}}}}{repository / 'ran'}",
    )
    assert "SecurityError" in refusal(model, repository)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("doc_to_choice: choices", "doc_to_choice: choices\nuse_prompt: a.yaml:b", "use_prompt"),
        ("doc_to_choice: choices", "doc_to_choice: choices\nunsafe_code: true", "unsafe_code"),
        ("data_files: {", "trust_remote_code: true, data_files: {", "trust_remote_code"),
        ("{metric: acc,", "{metric: acc, hf_evaluate: true,", "hf_evaluate"),
        ("{metric: acc,", "{metric: ./evil,", "./evil"),
        ("include: common.yaml", "dataset_path: a/hub_dataset", "a/hub_dataset"),
        ("data/dates.jsonl", "../../../outside.jsonl", "outside.jsonl"),
        ("data/dates.jsonl", "https://example.com/dates.jsonl", "https:"),
        ("include: common.yaml", "include: ../../../outside.yaml", "outside.yaml"),
        ("include: common.yaml", "include: choose.yaml", "includes itself"),
        ("task: choose_date", "group: choose_dates", "group"),
        ("task: choose_date", "task_alias: choose_date", "no name"),
        ("{data_files: {test: data/dates.jsonl}}", "[]", "dataset_kwargs"),
        ("{test: data/dates.jsonl}", "3", "data_files"),
        ("doc_to_choice: choices", "doc_to_choice: '{{nothing}}'", "nothing"),
        ("include: common.yaml", "include: common.yaml\ntest_split: nowhere", "nowhere"),
        ("task: choose_date", "task: choose_date\nmetadata: {on: 2024-13-45}", "month must be"),
    ],
)
def test_task_file_is_refused(
    model: LM, repository: Path, tmp_path: Path, old: str, new: str, named: str
) -> None:
    """Each of these runs code, leaves the repository, or fails deep inside the harness."""
    for name in ("jsonl", "yaml"):
        (tmp_path / f"outside.{name}").write_text("{}")
    edit(repository / "tasks" / "choose.yaml", old, new)
    assert named in refusal(model, repository)


def test_link_out_of_the_repository_is_refused(model: LM, repository: Path, tmp_path: Path) -> None:
    """A link in git would otherwise pull any file that the platform can read."""
    data = repository / "tasks" / "data" / "dates.jsonl"
    data.rename(tmp_path / "secret.jsonl")
    data.symlink_to(tmp_path / "secret.jsonl")
    assert "a file elsewhere" in refusal(model, repository)


@pytest.mark.parametrize(
    ("metric", "named"),
    [
        (CHOOSE.model_copy(update={"metric": "acc_norm"}), "has no metric acc_norm"),
        (CHOOSE.model_copy(update={"metric": "acc,strict"}), "has no metric acc,strict"),
        (CHOOSE.model_copy(update={"higher_is_better": False}), "disagree"),
        (CHOOSE.model_copy(update={"task": "tasks/none.yaml"}), "not in the repository"),
        (CHOOSE.model_copy(update={"task": "no_such_task"}), "not a task of the harness"),
        (CHOOSE.model_copy(update={"task": "mmlu"}), "stands for several"),
        (CHOOSE.model_copy(update={"task": "humaneval"}), "code that the model writes"),
    ],
)
def test_metric_of_the_spec_is_refused(
    model: LM, repository: Path, metric: HarnessMetric, named: str
) -> None:
    """A slip in the spec must be named at once, not after hours of evaluation."""
    assert named in refusal(model, repository, metric)


@pytest.mark.parametrize(
    ("metric", "aggregation"), [("acc", "median"), ("f1", "f1"), ("f1", "mean")]
)
def test_metric_that_is_no_mean_of_documents_is_refused(
    model: LM, repository: Path, metric: str, aggregation: str
) -> None:
    """The gate's interval is that of a mean; any other number would be judged wrongly."""
    edit(
        repository / "tasks" / "choose.yaml",
        "metric: acc, aggregation: mean",
        f"metric: {metric}, aggregation: {aggregation}",
    )
    asked = CHOOSE.model_copy(update={"metric": metric})
    assert "not one of documents" in refusal(model, repository, asked)


@pytest.mark.parametrize("setting", ["do_sample: true", "num_beams: 4", "temperature: 0.7"])
def test_chance_and_unknown_settings_are_refused(model: LM, repository: Path, setting: str) -> None:
    """Sampling makes a gate a lottery, and what an engine does not know it would ignore."""
    edit(repository / "tasks" / "write.yaml", "do_sample: false", setting)
    assert setting in refusal(model, repository, WRITE)


def test_document_that_does_not_fit_is_refused(model: LM, repository: Path) -> None:
    """The harness would cut the document's beginning off and score what is left."""
    edit(repository / "tasks" / "write.yaml", "max_gen_toks: 10", "max_gen_toks: 4090")
    assert "does not fit" in refusal(model, repository, WRITE, DataError)


def test_broken_data_are_named(model: LM, repository: Path) -> None:
    """The reader must learn that it is the data, not the model."""
    (repository / "tasks" / "data" / "dates.jsonl").write_text("no JSON\n")
    assert "cannot be read" in refusal(model, repository, error=DataError)


def test_task_of_the_harness_without_its_data(
    model: LM, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tools are offline; whoever names a task must be told how its data get there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    named = CHOOSE.model_copy(update={"task": "piqa"})
    message = refusal(model, repository, named, DataError)
    assert "python -m lm_eval run --model dummy --limit 1 --tasks piqa" in message


def test_digest_covers_what_the_scores_rest_on(pristine: Path, repository: Path) -> None:
    """An action digest that misses a file would reuse the scores of other documents."""
    assert task_digest(CHOOSE, repository) == task_digest(CHOOSE, pristine)
    found = {task_digest(CHOOSE, repository)}
    for name in ("choose.yaml", "common.yaml", "data/dates.jsonl"):
        with (repository / "tasks" / name).open("a") as file:
            file.write("\n")
        found.add(task_digest(CHOOSE, repository))
    found.add(task_digest(CHOOSE.model_copy(update={"limit": 3}), repository))
    found.add(task_digest(CHOOSE.model_copy(update={"task": "piqa"}), repository))
    found.add(task_digest(CHOOSE.model_copy(update={"task": "hellaswag"}), repository))
    assert len(found) == 7
