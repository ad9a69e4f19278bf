"""Model specs: every mistake is found before a run is queued, and names its line."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from llmops_assets.errors import SpecError
from llmops_assets.spec import ModelSpec, canonical, json_schema, parse_spec, read_spec

EXAMPLE = Path(__file__).parent.parent / "models" / "date-normalizer.yaml"
VALID = """\
name: tiny
use_case: Answers nonsense in tests, always the same.
owner: team:tests
metrics: [exact_match]
constraints:
  max_input_tokens: 64
  max_output_tokens: 12
weights:
  source: train
  steps: 10
data:
  source: dates
  locales: [en]
  training: {rows: 10, seed: 1}
  evaluation: {rows: 5, seed: 2}
engine:
  toolchain: onnxruntime_genai
serving:
  known_answers:
    - {prompt: a, answer: b}
gates:
  accuracy: {exact_match: {at_least: 0.9}}
  engine_accuracy: {exact_match: {at_least: 0.9}}
  fairness: null
  latency:
    evaluation: [{measure: end_to_end, at_most: 1}]
    build: [{measure: end_to_end, at_most: 1}]
    staging: [{measure: end_to_end, at_most: 1}]
"""


def mistakes(text: str, expected_name: str | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "models/tiny.yaml", expected_name)
    assert "llmops spec validate models/tiny.yaml" in caught.value.cure
    return str(caught.value.found)


def line_of(text: str, part: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), start=1) if part in line)


def test_the_example_is_valid() -> None:
    """It is where every team starts from."""
    assert read_spec(EXAMPLE).name == EXAMPLE.stem


@pytest.mark.parametrize(
    ("right", "wrong", "line_with", "message"),
    [
        ("  steps: 10", "  stepss: 10", "stepss", "weights.train.stepss: Extra inputs"),
        ("  steps: 10", "  steps: 0", "steps", "greater than or equal to 1"),
        ("  steps: 10", "  steps: 2h", "steps", "valid integer"),
        ("name: tiny", "name: tiny\nlatency: 3", "latency", "latency: Extra inputs"),
        ("owner: team:tests", "owner: tests", "owner", "pattern"),
        ("at_least: 0.9}}\n  e", "at_least: 90%}}\n  e", "  accuracy", "valid number"),
        ("at_least: 0.9}}\n  e", "at_least: .nan}}\n  e", "  accuracy", "finite"),
        ("at_least: 0.9}}\n  e", "every_slice: 0.9}}\n  e", "  accuracy", "at_least or at_most"),
        ("at_least: 0.9}}\n  e", "at_most: 0.9}}\n  e", "  accuracy", "needs at_least, as high"),
        ("metrics: [exact_match]", "metrics: [loss]", "  accuracy", "not among the spec's metrics"),
        (
            "metrics: [exact_match]",
            "metrics: [exact_match, {name: a, function: os.system}]",
            "metrics",
            "function: String should match",
        ),
        (
            "metrics: [exact_match]",
            "metrics: [exact_match, {name: exact_match, task: t}]",
            "metrics",
            "a name is given twice",
        ),
        ("  fairness: null\n", "", "gates", "fairness: Field required"),
        ("  latency:\n    e", "  latency:\n    goodput: 0.9\n    e", "latency:", "an objective"),
        ("  latency:\n    e", "  latency:\n    goodput: 1\n    e", "goodput", "less than 1"),
        ("evaluation: [{", "evaluation: [{concurrency: 4, ", "concurrency", "concurrency 1 only"),
        ("evaluation: [{", "evaluation: [{percentile: p99, ", "p99", "a p99 needs 368"),
        ("staging: [{", "staging: [{percentile: p99, ", "p99", "set requests to 368 or more"),
        ("  latency:\n    e", "  latency:\n    objective: {}\n    e", "objective", "for nothing"),
        (
            "  latency:\n    e",
            "  latency:\n    objective: {end_to_end: null}\n    e",
            "objective",
            "asks for nothing",
        ),
        ("  latency:\n    e", "  latency:\n    concurrencies: [0]\n    e", "concurrencies", "than"),
        (
            "metrics: [exact_match]",
            "metrics: [exact_match, {name: macro_f1, function: 'a:b'}]",
            "metrics",
            "macro_f1 is the name of a built-in metric",
        ),
        ("metrics: [exact_match]", "metrics: [exact_match, null]", "metrics", "'exact_match'"),
        ("metrics: [exact_match]", "metrics: [exact_match, [5]]", "metrics", "'exact_match'"),
        ("{prompt: a, answer: b}", "{prompt: a, answer: 2024-03-03}", "prompt", "valid string"),
        ("{prompt: a, answer: b}", "{prompt: a}", "prompt", "answer: Field required"),
        ("metrics: [exact_match]", "metrics: []", "metrics", "at least 1"),
        ("metrics: [exact_match]", "metrics: [bleu]", "metrics", "'exact_match'"),
        ("  source: train", "  source: download", "weights", "'train', 'path'"),
        ("  steps: 10", "  architecture: {hidden_size: 20}", "architecture", "multiple of 2"),
        ("  - {prompt", "  - oops\n    - {prompt", "oops", "known_answers.0"),
        ("name: tiny", "name: Tiny_1", "name", "DNS label"),
    ],
)
def test_mistakes_name_their_line(right: str, wrong: str, line_with: str, message: str) -> None:
    """A spec of a hundred lines is mended at the line, not by reading a stack trace."""
    text = VALID.replace(right, wrong)
    assert text != VALID
    found = mistakes(text)
    assert found.startswith(f"line {line_of(text, line_with)}: ")
    assert message in found


def test_perplexity_alone_passes_no_quantised_engine() -> None:
    """An engine can keep its perplexity and answer differently; full precision cannot."""
    text = VALID.replace("metrics: [exact_match]", "metrics: [exact_match, perplexity]")
    text = text.replace("engine_accuracy: {exact_match: {at_least: 0.9}}",
                        "engine_accuracy: {perplexity: {at_most: 2}}")  # fmt: skip
    assert "needs a metric of answers" in mistakes(text)
    parse_spec(text.replace("onnxruntime_genai", "onnxruntime_genai\n  precision: fp32"), "t")


def test_date_that_does_not_exist_is_a_mistake() -> None:
    """YAML turns it into a Python error of another kind than its own."""
    with pytest.raises(SpecError, match="not valid YAML"):
        parse_spec(VALID + "use_case: 2024-13-45\n", "models/tiny.yaml")


def test_all_mistakes_are_named_at_once() -> None:
    """Mending one to be shown the next costs a team its afternoon."""
    text = VALID.replace("rows: 10", "rows: -1").replace("steps: 10", "steps: no")
    found = mistakes(text.replace("owner: team:tests", "owner: x\nowner: y"))
    assert "line 4: 'owner' is given twice" in found
    assert "line 11: weights.train.steps" in found
    assert "line 15: data.dates.training.rows" in found


def test_tag_that_is_also_a_key_keeps_the_line() -> None:
    """`source: path` has a key `path`; a mistake elsewhere must not be shown there."""
    text = VALID.replace("  source: train\n  steps: 10", "  source: path\n  path: here\n  sha: abc")
    assert mistakes(text).startswith(f"line {line_of(text, 'sha')}: weights.path.sha")
    text = VALID.replace("  source: train\n  steps: 10", "  source: path\n  path: 7")
    assert mistakes(text).startswith(f"line {line_of(text, 'path: 7')}: weights.path.path")


def test_keys_of_another_kind_are_errors() -> None:
    """A spec that imports weights and also asks for steps would silently not train."""
    text = VALID.replace("source: train", "source: path\n  path: here")
    assert "weights.path.steps" in mistakes(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [unclosed", "line 1"),
        ("- a list", "list"),
        ("", "NoneType"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("? [a, b]\n: c", "unhashable"),
    ],
)
def test_what_is_no_spec_at_all(text: str, message: str) -> None:
    """Including YAML that would run code with an unsafe loader."""
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "models/tiny.yaml")
    assert message in str(caught.value.found)


@pytest.mark.timeout(20)
def test_aliases_can_neither_loop_nor_explode() -> None:
    """A pushed spec is read by the platform; ten lines of it must not stop that."""
    assert "line 1" in mistakes("name: &a [*a]\n")
    layers = ["l0: &l0 [x, x]"]
    layers += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "line 10: l9: Extra inputs" in mistakes("\n".join(layers))
    merges = ["a0: &a0 {x: 1}"]
    merges += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
    with pytest.raises(SpecError, match=r"line \d+: keys may not be merged with <<"):
        parse_spec("\n".join(merges), "t")
    shared = VALID.replace("accuracy: {", "accuracy: &a {", 1)
    text = shared.replace("engine_accuracy: {exact_match: {at_least: 0.9}}", "engine_accuracy: *a")
    assert text != shared
    assert parse_spec(text, "t").gates.engine_accuracy["exact_match"].at_least == 0.9


def test_name_must_be_the_file_name(tmp_path: Path) -> None:
    """`llmops release NAME` finds the spec by its file's name."""
    assert "line 1: name is 'tiny', but the file is named 'other'" in mistakes(VALID, "other")
    (tmp_path / "tiny.yaml").write_text(VALID)
    assert read_spec(tmp_path / "tiny.yaml").name == "tiny"


def test_unreadable_files_are_explained(tmp_path: Path) -> None:
    """Each of these happens: a wrong name, a wrong encoding, a folder."""
    with pytest.raises(SpecError, match="There is no spec"):
        read_spec(tmp_path / "tiny.yaml")
    (tmp_path / "latin.yaml").write_bytes("use_case: Größe".encode("latin-1"))
    with pytest.raises(SpecError, match="UTF-8"):
        read_spec(tmp_path / "latin.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(SpecError, match="cannot be read"):
        read_spec(tmp_path / "folder.yaml")


def test_schema_accepts_the_example_and_refuses_mistakes() -> None:
    """Editors complete and check specs by it; it must say what the platform says."""
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    content = yaml.safe_load(EXAMPLE.read_text())
    validator.validate(content)
    for wrong in (
        {**content, "owner": "nobody"},
        {**content, "unknown": 1},
        {**content, "engine": {"toolchain": "onnxruntime_genai", "precision": "int3"}},
        {**content, "weights": {"source": "path"}},
    ):
        assert not validator.is_valid(wrong)


def test_frozen_form_reads_back_equal() -> None:
    """A release's spec is kept as JSON with all defaults, and decides until it is removed."""
    spec = read_spec(EXAMPLE)
    assert ModelSpec.model_validate_json(json.dumps(canonical(spec))) == spec
    assert canonical(spec)["gates"]["parity"]["token_agreement"] == 0.98
