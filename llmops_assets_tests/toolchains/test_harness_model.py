"""Engine and checkpoint under the lm-evaluation-harness: what they say must be comparable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer

from llmops_assets.develop.evaluate import load_checkpoint
from llmops_assets.develop.harness import run_tasks, scores
from llmops_assets.develop.harness_model import CheckpointModel, LocalModel, prefix_token
from llmops_assets.errors import DataError, SpecError
from llmops_assets.toolchains.onnxruntime_genai.engine_directory import TOKENIZER
from llmops_assets.toolchains.onnxruntime_genai.harness_model import EngineModel
from llmops_assets.toolchains.onnxruntime_genai.triton_model.generation import TextGenerator
from llmops_assets_tests.harness_repository import (
    CHOOSE,
    EXPECTED,
    QUESTIONS,
    WRITE,
    likelihood,
    write_repository,
)
from llmops_assets_tests.tiny_llama import CONTEXT, TinyLlama, tiny_llama

PAIRS = [
    ("1 août 1951", "1951-08-01"),
    ("1 août 1951", "1951-08-0é"),
    ("a trailing space ", "is the prompt's own"),
    ("", "without a prompt"),
    ("one token", "N"),
    ("one token", "m"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return tiny_llama(tmp_path_factory.getbasetemp() / "tiny_llama")


@pytest.fixture(scope="module")
def checkpoint(tiny: TinyLlama) -> LocalModel:
    return CheckpointModel(*load_checkpoint(tiny.checkpoint))


@pytest.fixture(scope="module")
def engine(tiny: TinyLlama, checkpoint: LocalModel) -> EngineModel:
    generator = TextGenerator(tiny.engine, tiny.engine / TOKENIZER, threads=1)
    return EngineModel(generator, checkpoint.max_length, checkpoint.prefix_token_id)


def asked(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # pyright: ignore[reportArgumentType]


def likelihoods(model: LocalModel, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return model.loglikelihood([asked("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)


def test_engine_and_checkpoint_score_alike(
    tiny: TinyLlama, checkpoint: LocalModel, engine: EngineModel, tmp_path: Path
) -> None:
    """Without quantisation any difference is a fault of ours, and a gate would blame the engine."""
    repository = write_repository(tmp_path / "repository", tiny.checkpoint)
    for model, name in ((checkpoint, "checkpoint"), (engine, "engine")):
        (tmp_path / name).mkdir()
        run_tasks(model, [CHOOSE, WRITE], repository, tmp_path / name)
        assert scores(tmp_path / name, "choosing") == EXPECTED
        assert scores(tmp_path / name, "writing") == EXPECTED


def test_likelihoods_agree(checkpoint: LocalModel, engine: EngineModel) -> None:
    """Equal choices could hide likelihoods that are shifted by a token."""
    of_checkpoint, of_engine = likelihoods(checkpoint, *PAIRS), likelihoods(engine, *PAIRS)
    for (expected, greedy), (found, also_greedy) in zip(of_checkpoint, of_engine, strict=True):
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy == also_greedy
    text = [asked("loglikelihood_rolling", "a text " * 900)]  # longer than the context
    assert len(engine.tok_encode(text[0].args[0])) > CONTEXT
    (expected,), (found,) = (model.loglikelihood_rolling(text) for model in (checkpoint, engine))
    assert found == pytest.approx(expected, rel=1e-5)


def test_likelihood_is_of_the_whole_continuation_after_the_served_prompt(
    tiny: TinyLlama, engine: EngineModel
) -> None:
    """The harness's split takes `<sep>` for the answer's first character and loses that."""
    for context, continuation in PAIRS[:3]:
        ((found, _),) = likelihoods(engine, (context, continuation))
        assert found == pytest.approx(likelihood(tiny.checkpoint, context, continuation), abs=1e-3)


def test_greedy_continuation_is_recognised(engine: EngineModel) -> None:
    """Tasks of one right ending are scored by nothing else."""
    prompt = engine.tok_encode(QUESTIONS[0])
    answer = engine.decode(engine.answer(prompt, 5, []), skip_special_tokens=True)
    found = likelihoods(engine, (QUESTIONS[0], answer), (QUESTIONS[0], answer[:-1] + "§"))
    assert [greedy for _, greedy in found] == [True, False]


def test_tokenizer_that_does_not_close_prompts_is_split_as_by_the_harness(
    tiny: TinyLlama, tmp_path: Path
) -> None:
    """Figures of other people's models must be those that others publish."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint, directory)
    content = json.loads((directory / TOKENIZER).read_text())
    content["post_processor"]["single"].pop()
    (directory / TOKENIZER).write_text(json.dumps(content))
    model = CheckpointModel(*load_checkpoint(directory))
    bare = Tokenizer.from_file(str(directory / TOKENIZER))
    begin, space = bare.token_to_id("<s>"), bare.token_to_id(" ")
    context, continuation = model._encode_pair("ab ", "c")
    assert context == [begin, bare.token_to_id("a"), bare.token_to_id("b")]
    assert continuation == [space, bare.token_to_id("c")]
    assert model.tok_encode("<s>a") == [begin, bare.token_to_id("a")]


@pytest.mark.parametrize("until", [["N"], ["", "mN", "È"], "x", []])
def test_answers_agree_and_end_before_a_stop_text(
    checkpoint: LocalModel, engine: EngineModel, until: object
) -> None:
    """Both must stop at the same place, or exact match differs for no fault of the weights."""
    requests = [
        asked("generate_until", question, {"until": until, "max_gen_toks": 8})
        for question in QUESTIONS[:6]
    ]
    answers = engine.generate_until(requests)
    assert answers == checkpoint.generate_until(requests)
    stops = [until] if isinstance(until, str) else until
    assert isinstance(stops, list)
    assert not any(stop in answer for stop in stops if stop for answer in answers)
    assert len(set(answers)) > 1


def test_engine_refuses_what_it_would_do_otherwise(engine: EngineModel) -> None:
    """A setting that is silently ignored gives figures that are not those asked for."""
    for settings in ({"do_sample": True}, {"temperature": 0.5}, {"repetition_penalty": 2.0}):
        with pytest.raises(SpecError, match="does not generate greedily"):
            engine.generate_until([asked("generate_until", "a", settings)])
    with pytest.raises(DataError, match="does not fit"):
        engine.generate_until([asked("generate_until", "a" * CONTEXT, {})])
    with pytest.raises(DataError, match="does not fit"):
        likelihoods(engine, ("a" * CONTEXT, "b"))
    with pytest.raises(DataError, match="empty text"):
        likelihoods(engine, ("a", ""))


def test_text_without_a_prompt_follows_the_end_where_there_is_no_beginning(
    tiny: TinyLlama,
) -> None:
    """Many tokenizers have no token for the beginning; the harness takes the end's."""
    tokenizer, _ = load_checkpoint(tiny.checkpoint)
    assert prefix_token(tokenizer) == tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert prefix_token(tokenizer) == tokenizer.eos_token_id
