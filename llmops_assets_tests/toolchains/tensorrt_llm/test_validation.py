"""How an engine is compared with its checkpoint, without either.

The LLM API is a double: it takes exactly the arguments that TensorRT-LLM documents.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from llmops_assets.develop.metrics import PREDICTION_COLUMNS, TIME_COLUMNS
from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm import validation
from llmops_assets.toolchains.tensorrt_llm.packaging import copy_tokenizer
from llmops_assets.toolchains.tensorrt_llm.validation import (
    Answer,
    Backend,
    ServedModel,
    TimedAnswer,
    compare,
    loss,
    served_model,
    spread,
    tokenizer_parity,
    until_end,
)
from llmops_assets.toolchains.tensorrt_llm.validation_report import write_report
from llmops_assets_tests.tiny_llama import write_checkpoint

from .built_engine import write_engine

END = 2
VOCABULARY = 5


def answer(tokens: list[int], value: float = 1.0, vocabulary: int = VOCABULARY) -> Answer:
    return Answer(tokens, np.full((len(tokens), vocabulary), value, dtype=np.float32))


def test_equal_answers_agree() -> None:
    """Padding of the vocabulary, which TensorRT-LLM adds for tensor parallelism, is no
    difference.
    """
    found = compare([answer([3, 4, END])] * 2, [answer([3, 4, END], vocabulary=8)] * 2)
    assert (found.prompts, found.token_agreement, found.prompts_equal) == (2, 1.0, 2)
    assert (found.logit_distance.largest, found.logit_distance.mean) == (0.0, 0.0)


def test_logits_are_compared_while_both_have_read_the_same() -> None:
    """After the first other token they answer different questions."""
    left, right = answer([3, 4, END]), answer([3, 1, END])
    right.logits[1] += 0.5  # the row that chose the other token counts
    right.logits[2] += 100.0  # what follows it does not
    found = compare([left], [right])
    assert found.token_agreement == pytest.approx(2 / 3)
    assert found.prompts_equal == 0
    assert found.logit_distance.largest == pytest.approx(0.5)
    assert found.logit_distance.mean == pytest.approx(0.25)


def test_engine_may_leave_out_the_row_of_the_end_token() -> None:
    """The LLM API may not count the end token as part of the answer; all else is compared."""
    right = Answer([3, 4, END], answer([3, 4], value=1.25).logits)
    found = compare([answer([3, 4, END])], [right])
    assert found.token_agreement == 1.0
    assert found.logit_distance.mean == pytest.approx(0.25)


def test_shorter_answer_disagrees_where_it_ends() -> None:
    """An engine that stops early would agree with everything otherwise."""
    assert compare([answer([3, 4, 1, 1])], [answer([3, 4])]).token_agreement == 0.5


@pytest.mark.parametrize(
    ("left", "right", "problem"),
    [
        (answer([3]), answer([3], vocabulary=4), "do not fit"),
        (answer([3, 4, 1]), Answer([3, 4, 1], answer([3]).logits), "do not fit"),
        (answer([3]), answer([3], math.nan), "not finite"),
        (answer([3]), answer([3], math.inf), "not finite"),
        (answer([]), answer([]), "nothing to compare"),
    ],
)
def test_logits_are_refused(left: Answer, right: Answer, problem: str) -> None:
    """A distance of NaN is below no bound and above none."""
    with pytest.raises(ToolchainError, match=problem):
        compare([left], [right])


@pytest.mark.parametrize(
    ("tokens", "ended", "expected"),
    [
        ([3, 4], True, [3, 4, END]),
        ([3, 4, END], True, [3, 4, END]),
        ([3, END, 0, 0], False, [3, END]),
        ([3, 4], False, [3, 4]),
        ([], True, [END]),
    ],
)
def test_end_token_counts_once(tokens: list[int], ended: bool, expected: list[int]) -> None:
    """The LLM API and transformers write the end of an answer differently."""
    assert until_end(tokens, END, ended) == expected


@pytest.mark.parametrize(("rows", "chosen"), [(1, 1), (10, 10), (50, 50), (1000, 50)])
def test_compared_prompts_are_spread_over_the_data(rows: int, chosen: int) -> None:
    """The first fifty may be of one slice."""
    found = spread(rows, 50)
    assert len(found) == chosen
    assert (found[0], found[-1]) == (0, rows - 1)


class StartingTokenizer:
    """A double of a tokenizer that begins with a start token, as Llama's does."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(character) for character in text]
        return [1, *ids] if add_special_tokens else ids


def test_missing_start_token_is_found() -> None:
    """tensorrtllm_backend#234, #445: garbage until add_special_tokens was true."""
    one = StartingTokenizer()
    assert tokenizer_parity(one, one, ["a", "b"], add_special_tokens=True) == 2
    assert tokenizer_parity(one, one, ["a", "b"], add_special_tokens=False) == 0


def test_tokenizer_that_lost_something_on_its_way_is_found(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The server has the package's files, not the checkpoint's: compared with itself, a
    tokenizer is always right.
    """
    copy_tokenizer(checkpoint, tmp_path / "packaged")
    trained = validation.load_tokenizer(checkpoint)
    texts = ["1 août", "2 mai"]
    whole = validation.load_tokenizer(tmp_path / "packaged")
    assert tokenizer_parity(trained, whole, texts, add_special_tokens=True) == 2
    path = tmp_path / "packaged" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    other = validation.load_tokenizer(tmp_path / "packaged")
    assert tokenizer_parity(trained, other, texts, add_special_tokens=True) == 0


@dataclass
class TableModel:
    """A double that served: always the same logits after every token."""

    row: np.ndarray | None
    asked: list[list[int]] = field(default_factory=list)

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        raise NotImplementedError

    def timed_answer(self, prompt: Sequence[int], max_tokens: int) -> TimedAnswer:
        raise NotImplementedError

    def texts(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
        raise NotImplementedError

    def prompt_logits(self, token_ids: Sequence[int]) -> Any:
        self.asked.append(list(token_ids))
        return None if self.row is None else np.tile(self.row, (len(token_ids), 1))


def test_loss_is_that_of_the_completion() -> None:
    """Of its tokens alone, the end token included, each foretold by what is before it."""
    logits = np.log(np.array([0.5, 0.25, 0.25], dtype=np.float32)) + 7
    model = TableModel(logits)
    assert loss(model, [0, 0], [1, END]) == pytest.approx(-2 * math.log(0.25), rel=1e-6)
    assert model.asked == [[0, 0, 1]]


def test_loss_is_not_made_up() -> None:
    """0 would be a perfect model's."""
    assert loss(TableModel(None), [0], [1, END]) is None


class Tensor:
    """A double of a torch tensor on a GPU."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def float(self) -> Tensor:
        return Tensor(self._values.astype(np.float32))

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return self._values


@dataclass(frozen=True)
class SamplingParamsDouble:
    """A double of `tensorrt_llm.SamplingParams`."""

    max_tokens: int
    temperature: float
    return_generation_logits: bool = False
    return_context_logits: bool = False


class LLMDouble:
    """A double of the LLM API: answers 3, 4 and ends, one token at a time."""

    made: list[LLMDouble]

    def __init__(
        self, *, model: str, tokenizer: str, tensor_parallel_size: int,
        pipeline_parallel_size: int, gather_generation_logits: bool, **settings: Any,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.parallel = (tensor_parallel_size, pipeline_parallel_size)
        self.gathers = gather_generation_logits
        self.settings = settings
        self.running = True
        self.made.append(self)

    def shutdown(self) -> None:
        self.running = False

    def generate(
        self, inputs: list[dict[str, list[int]]], sampling: SamplingParamsDouble, use_tqdm: bool
    ) -> list[Any]:
        assert self.running
        assert sampling.temperature == 0.0, "greedy"
        assert not use_tqdm
        logits = None
        if sampling.return_generation_logits and self.gathers:
            logits = Tensor(np.zeros((1, 2, VOCABULARY), dtype=np.float16))
        contexts = [
            Tensor(np.ones((len(prompt["prompt_token_ids"]), VOCABULARY))) for prompt in inputs
        ]
        return [self._result([3, 4], "stop", logits, context) for context in contexts]

    def generate_async(
        self, inputs: dict[str, list[int]], sampling: SamplingParamsDouble, streaming: bool
    ) -> Any:
        assert streaming
        assert inputs["prompt_token_ids"]
        for count in (1, 2):
            yield self._result([3, 4][:count], None, None, None)

    @staticmethod
    def _result(tokens: list[int], reason: str | None, logits: Any, context: Any) -> Any:
        output = types.SimpleNamespace(
            token_ids=tokens, text="ab"[: len(tokens)], finish_reason=reason,
            generation_logits=logits,
        )  # fmt: skip
        return types.SimpleNamespace(outputs=[output], context_logits=context)


@pytest.fixture
def loaded_by(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[LLMDouble]]:
    """Doubles of the two classes; which one was made says which API was asked."""
    made: dict[str, list[LLMDouble]] = {"engine": [], "llmapi": []}
    package: Any = types.ModuleType("tensorrt_llm")
    package.__version__ = "1.2.1"
    package.SamplingParams = SamplingParamsDouble
    package.LLM = type("PyTorchDouble", (LLMDouble,), {"made": made["llmapi"]})
    engines: Any = types.ModuleType("tensorrt_llm._tensorrt_engine")
    engines.LLM = type("EngineDouble", (LLMDouble,), {"made": made["engine"]})
    utilities: Any = types.ModuleType("tensorrt_llm.llmapi.llm_utils")
    utilities.update_llm_args_with_extra_dict = lambda arguments, extra: {**arguments, **extra}
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi.llm_utils", utilities)
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi", types.ModuleType("llmapi"))
    monkeypatch.setitem(sys.modules, "tensorrt_llm", package)
    monkeypatch.setitem(sys.modules, "tensorrt_llm._tensorrt_engine", engines)
    return made


def model(backend: Backend = "engine", context_logits: bool = True) -> ServedModel:
    arguments = {
        "model": "engine", "tokenizer": "hf", "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
    }  # fmt: skip
    return ServedModel(backend, arguments, END, context_logits=context_logits)


@pytest.mark.parametrize(("backend", "other"), [("engine", "llmapi"), ("llmapi", "engine")])
def test_each_backend_has_its_own_class(
    backend: Backend, other: str, loaded_by: dict[str, list[LLMDouble]]
) -> None:
    """TensorRT-LLM#8223: `tensorrt_llm.LLM` is PyTorch and does not load engines."""
    assert model(backend).version == "1.2.1"
    assert not loaded_by[other]
    (llm,) = loaded_by[backend]
    assert (llm.model, llm.tokenizer, llm.parallel) == ("engine", "hf", (2, 1))


def test_answer_has_tokens_and_logits(loaded_by: dict[str, list[LLMDouble]]) -> None:
    """A dimension for the one beam is taken away; float32, as the checkpoint's are."""
    found = model().answer([1, 5], 16)
    assert found.token_ids == [3, 4, END]
    assert found.logits.shape == (2, VOCABULARY)
    assert found.logits.dtype == np.float32
    loaded_by["engine"][0].gathers = False
    with pytest.raises(ToolchainError, match="gave no logits"):
        model_of(loaded_by).answer([1, 5], 16)


def model_of(loaded_by: dict[str, list[LLMDouble]]) -> ServedModel:
    """A model whose LLM gives no logits."""
    found = model()
    loaded_by["engine"][-1].gathers = False
    return found


def test_streamed_answer_is_timed(loaded_by: dict[str, list[LLMDouble]]) -> None:
    """Text and count are those of the last part, which repeats all before it."""
    found = model().timed_answer([1, 5], 16)
    assert (found.text, found.times.output_tokens) == ("ab", 2)
    assert 0 <= found.times.time_to_first_token <= found.times.end_to_end
    assert found.times.inter_token_latency is not None
    assert loaded_by["engine"]


def test_prompt_logits_only_of_engines_that_gather_them(
    loaded_by: dict[str, list[LLMDouble]],
) -> None:
    """Asking another engine fails inside TensorRT-LLM."""
    assert model(context_logits=False).prompt_logits([1, 2, 3]) is None
    found = model().prompt_logits([1, 2, 3])
    assert found is not None
    assert found.shape == (3, VOCABULARY)
    assert loaded_by["engine"]


SETTINGS = {
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "kv_cache_config": {"free_gpu_memory_fraction": 0.5},
}


@pytest.mark.parametrize("gathers", [True, False])
def test_engine_is_loaded_as_it_serves_and_ended(
    tmp_path: Path, gathers: bool, loaded_by: dict[str, list[LLMDouble]]
) -> None:
    """With the cache of the server, which decides what fits; its workers would keep the GPUs'
    memory, also after a failure.
    """
    engine = write_engine(tmp_path / "engine", tensor_parallel=4, gather_context_logits=gathers)
    with (
        pytest.raises(ToolchainError, match="on the way"),
        served_model("engine", engine, tmp_path, SETTINGS, END) as served,
    ):
        assert (served.prompt_logits([1]) is None) == (not gathers)
        raise ToolchainError("on the way", cure="none")
    (llm,) = loaded_by["engine"]
    assert llm.parallel == (2, 2)
    assert llm.settings["kv_cache_config"] == {"free_gpu_memory_fraction": 0.5}
    assert not llm.running


def test_llmapi_is_loaded_as_it_serves(
    tmp_path: Path, loaded_by: dict[str, list[LLMDouble]]
) -> None:
    """What is validated must be spread and limited as what serves; only the path differs."""
    with served_model("llmapi", tmp_path, tmp_path / "hf", SETTINGS, END) as served:
        assert served.prompt_logits([1, 2]) is not None
    (llm,) = loaded_by["llmapi"]
    assert llm.parallel == (2, 2)
    assert (llm.model, llm.tokenizer) == (str(tmp_path), str(tmp_path / "hf"))
    assert llm.settings["kv_cache_config"] == {"free_gpu_memory_fraction": 0.5}
    assert not llm.running


class FaithfulLLMDouble(LLMDouble):
    """A double that answers as the checkpoint does, by transformers, on the CPU."""

    def __init__(self, **arguments: Any) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(**arguments)
        self._reference: Any = AutoModelForCausalLM.from_pretrained(self.tokenizer)

    def _greedy(self, prompt: list[int], sampling: SamplingParamsDouble) -> Any:
        import torch

        generated = self._reference.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=sampling.max_tokens, eos_token_id=END, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return generated.sequences[0, len(prompt) :].tolist(), torch.cat(generated.logits)

    def generate(
        self, inputs: list[dict[str, list[int]]], sampling: SamplingParamsDouble, use_tqdm: bool
    ) -> list[Any]:
        import torch

        results: list[Any] = []
        for prompt in inputs:
            tokens, logits = self._greedy(prompt["prompt_token_ids"], sampling)
            context = None
            if sampling.return_context_logits:
                with torch.inference_mode():
                    ids = torch.tensor([prompt["prompt_token_ids"]])
                    context = self._reference(ids).logits[0]
            results.append(self._result(tokens, None, logits[None], context))
        return results

    def generate_async(
        self, inputs: dict[str, list[int]], sampling: SamplingParamsDouble, streaming: bool
    ) -> Any:
        tokens, _ = self._greedy(inputs["prompt_token_ids"], sampling)
        for count in range(1, len(tokens) + 1):
            yield self._result(tokens[:count], None, None, None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


QUESTIONS = {"prompts": ["1 août", "2 mai", "3 mai"], "completions": ["08-01", "05-02", "05-03"]}


@pytest.fixture
def arguments(checkpoint: Path, tmp_path: Path) -> list[str]:
    """A command line of the script, with an engine that gathers logits of prompts."""
    copy_tokenizer(checkpoint, tmp_path / "tokenizer")
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    settings = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    engine = write_engine(tmp_path / "engine", gather_context_logits=True)
    arguments = [
        "--backend", "engine", "--checkpoint", checkpoint, "--engine", engine,
        "--tokenizer", tmp_path / "tokenizer", "--settings", tmp_path / "settings.json",
        "--questions", tmp_path / "questions.json", "--output", tmp_path / "answers.json",
        "--max-output-tokens", 8, "--timed-rows", 2,
    ]  # fmt: skip
    return [str(argument) for argument in arguments]


@pytest.mark.parametrize("gathers", [True, False])
def test_engine_that_is_its_checkpoint_agrees_with_it(
    gathers: bool, checkpoint: Path, arguments: list[str], tmp_path: Path,
    loaded_by: dict[str, list[LLMDouble]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The whole way but TensorRT-LLM: a faithful engine shows no difference, and its loss is the
    checkpoint's. Without logits of prompts there is none, and no gate on it passes. Two rows
    are timed, and the third is answered with the batch.
    """
    faithful = type("EngineDouble", (FaithfulLLMDouble,), {"made": loaded_by["engine"]})
    monkeypatch.setattr(sys.modules["tensorrt_llm._tensorrt_engine"], "LLM", faithful)
    if not gathers:
        shutil.rmtree(tmp_path / "engine")
        write_engine(tmp_path / "engine", gather_context_logits=False)
    assert validation.main(arguments) == 0
    asked = pa.table(
        {
            "prompt": QUESTIONS["prompts"],
            "completion": QUESTIONS["completions"],
            "slice": ["a", "b", "b"],
        }
    )
    answers, output = tmp_path / "answers.json", tmp_path / "output"
    report = write_report(answers, asked, "engine", output)
    assert json.loads((output / "validation.json").read_text()) == report
    assert (report["backend"], report["tensorrt_llm"]) == ("engine", "1.2.1")
    assert (report["prompts"], report["token_agreement"], report["prompts_equal"]) == (3, 1.0, 3)
    assert report["logit_distance"]["largest"] < 1e-5
    assert report["tokenizer_parity"] == {"prompts": 3, "equal": 3}
    predictions = pd.read_parquet(output / "predictions.parquet")
    assert list(predictions.columns) == [*PREDICTION_COLUMNS, *TIME_COLUMNS]
    assert predictions["latency_seconds"].notna().tolist() == [True, False, True]
    assert report["latency"]["levels"][0]["requests"] == 2
    if not gathers:
        assert (report["loss"], report["perplexity"]) == (None, None)
        assert not np.isfinite(predictions["loss"]).any()
        return
    assert report["loss"] == pytest.approx(reference_loss(checkpoint), rel=1e-4)


def test_answers_to_other_data_are_refused(tmp_path: Path) -> None:
    """Of a killed step, or half written: they would become the predictions of other rows."""
    asked = pa.table({"prompt": ["p"], "completion": ["c"], "slice": ["s"]})
    answers = tmp_path / "answers.json"
    for text in (None, "{", json.dumps({
        "tensorrt_llm": "1.2.1", "agreement": {}, "tokenizer_parity": {}, "rows": [],
    })):  # fmt: skip
        if text is not None:
            answers.write_text(text)
        with pytest.raises(ToolchainError, match="does not hold the answers"):
            write_report(answers, asked, "engine", tmp_path / "output")
    assert not (tmp_path / "output").exists()


# What NVIDIA's image has, as TensorRT-LLM requires it, and the script may import.
IN_THE_IMAGE = ("numpy", "torch", "transformers", "tensorrt_llm", "llmops_assets")
IMPORTED = """
import json, sys
import llmops_assets.toolchains.tensorrt_llm.validation
found = {name for name, module in sys.modules.items() if getattr(module, "__spec__", None)}
print(json.dumps(sorted({name.partition(".")[0] for name in found})))
"""


def test_script_imports_only_what_the_image_has() -> None:
    """It is run by the image's Python, where this platform is not installed."""
    answer = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    plain = subprocess.run(
        [sys.executable, "-c", IMPORTED.replace("import llmops", "# import llmops")],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    found = set(json.loads(answer)) - set(json.loads(plain)) - sys.stdlib_module_names
    assert found <= set(IN_THE_IMAGE)


def reference_loss(checkpoint: Path) -> float:
    """Mean loss per token as transformers computes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    reference: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    total = tokens = 0.0
    for question, answer in zip(*QUESTIONS.values(), strict=True):
        prompt = tokenizer.encode(question)
        completion = [*tokenizer.encode(answer, add_special_tokens=False), END]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        with torch.inference_mode():
            mean = reference(torch.tensor([[*prompt, *completion]]), labels=labels).loss
        total += float(mean) * len(completion)
        tokens += len(completion)
    return total / tokens


def test_failure_is_told_in_one_line(
    arguments: list[str], tmp_path: Path, loaded_by: dict[str, list[LLMDouble]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The tool runner shows the last lines; a traceback would hide what to do."""

    def mute(self: LLMDouble, *_: Any, **__: Any) -> list[Any]:
        return [self._result([], "stop", None, None)]

    monkeypatch.setattr(LLMDouble, "generate", mute)
    assert validation.main(arguments) == 1
    assert "To do:" in capsys.readouterr().err
    assert not (tmp_path / "answers.json").exists()
