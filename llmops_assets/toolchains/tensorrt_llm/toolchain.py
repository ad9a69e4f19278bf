"""The toolchain for NVIDIA GPUs: what is in the other modules, in the order of the lifecycle.

Each step refuses what is impossible before it starts a tool, as GPU minutes are dear. The
tools are commands of the image that the step runs in; TensorRT-LLM is never imported here.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from llmops_assets.develop.data import read_data
from llmops_assets.develop.sources import find_source, hold_still
from llmops_assets.errors import ToolchainError
from llmops_assets.settings import Settings
from llmops_assets.spec import ModelSpec, TensorRTLLMEngine, canonical, requests_needed
from llmops_assets.storage.store import content_digest
from llmops_assets.toolchains.base import Facts, ServingImage, Step, Target
from llmops_assets.toolchains.tensorrt_llm.checkpoints import check_checkpoint, weight_files
from llmops_assets.toolchains.tensorrt_llm.combinations import refuse_impossible
from llmops_assets.toolchains.tensorrt_llm.commands import (
    build_command,
    conversion_command,
    conversion_script,
)
from llmops_assets.toolchains.tensorrt_llm.compatibility import (
    BuiltEngine,
    Node,
    check_engine,
    check_engine_server,
)
from llmops_assets.toolchains.tensorrt_llm.conversion import (
    Conversion,
    read_conversion,
    write_conversion,
)
from llmops_assets.toolchains.tensorrt_llm.image import Image, image_digest, image_here
from llmops_assets.toolchains.tensorrt_llm.image_python import with_our_modules
from llmops_assets.toolchains.tensorrt_llm.inputs import (
    OFFLINE_CALIBRATION,
    calibration_data,
    refuse_code,
)
from llmops_assets.toolchains.tensorrt_llm.memory import (
    MemoryEstimate,
    check_memory,
    estimate,
    stored_bytes,
)
from llmops_assets.toolchains.tensorrt_llm.model_yaml import (
    MODEL_YAML,
    LlmApiModel,
    read_llmapi_model,
)
from llmops_assets.toolchains.tensorrt_llm.outputs import (
    CheckpointConfig,
    check_converted_weights,
    check_engine_directory,
)
from llmops_assets.toolchains.tensorrt_llm.packaging import (
    PACKAGE_FILE,
    EngineServing,
    ServedBy,
    copy_tokenizer,
    copy_tree,
    package_engine,
    package_llmapi,
)
from llmops_assets.toolchains.tensorrt_llm.prompts import tokenized_prompts
from llmops_assets.toolchains.tensorrt_llm.running import run_listening
from llmops_assets.toolchains.tensorrt_llm.shape import check_shape, read_shape
from llmops_assets.toolchains.tensorrt_llm.sidecar import (
    NAME,
    Cost,
    Sidecar,
    open_engine,
    portable,
    read_sidecar,
    write_sidecar,
)
from llmops_assets.toolchains.tensorrt_llm.throughput import measure_throughput
from llmops_assets.toolchains.tensorrt_llm.timing_cache import TimingCache
from llmops_assets.toolchains.tensorrt_llm.validation_report import write_report
from llmops_assets.tools import ToolRunner
from llmops_assets.versions import source_version

VALIDATION = "llmops_assets.toolchains.tensorrt_llm.validation"
FEWEST_TIMED_ROWS = 110
"""Prompts that are answered one after the other, to be timed; the gate may need more."""
SOURCES: Mapping[Step, tuple[str, ...]] = {
    "converted_weights": (
        "checkpoints", "commands", "conversion", "families", "flags", "quantizations", "scripts",
    ),
    "engine": ("commands", "flags", "model_yaml", "sidecar"),
    "engine_validation": (
        "benchmark", "prompts", "throughput", "validation", "validation_report",
    ),
    "packaged_model": ("model_yaml", "packaging", "templates"),
}  # fmt: skip
"""Modules that decide what a step writes. Others refuse, look on or hand through: what is
mended in them is no reason to spend GPU hours again."""


class TensorRTLLMToolchain(ABC):
    """What both backends share; see `toolchains.base.EngineToolchain` for each method."""

    name = NAME
    # The image that serves brings all of them.
    serving_distributions: tuple[str, ...] = ()
    backend: Literal["engine", "llmapi"]

    def __init__(self, section: TensorRTLLMEngine, settings: Settings) -> None:
        """
        Args:
            section: of the spec; the methods are given it again.
            settings: of the platform.
        """
        self._section = section
        self._settings = settings
        reference, _, digest = section.image.partition("@")
        name, _, tag = reference.rpartition(":")
        self.serving_image: ServingImage | None = ServingImage(
            name, tag, digest or settings.gpu_image_digest
        )

    @cached_property
    def image(self) -> Image:
        """Where this step runs.

        Raises:
            ToolchainError: see `image.image_here`.
        """
        return image_here(self._settings)

    def versions(self, step: Step) -> Mapping[str, str]:
        """The image and our own sources; where a GPU takes part, the toolkit and the GPU.

        Raises:
            ToolchainError: see `image.image_here`.
        """
        ours = {
            "image": image_digest(self._settings),
            "llmops_assets": source_version(Path(__file__).parent, SOURCES[step]),
        }
        if step == "packaged_model":
            # Templates, which are in the image: a package that is there already is found
            # without a GPU.
            return ours
        toolkit, gpus = self.image.toolkit, self.image.gpus
        return {
            **ours,
            "tensorrt_llm": toolkit.tensorrt_llm,
            "tensorrt": toolkit.tensorrt or "absent",
            # An engine runs on its own compute capability only, and kernels are chosen by
            # what is fast on the very model.
            "architecture": gpus.architecture,
            "gpu": gpus.name,
        }

    def validation_parameters(self, spec: ModelSpec) -> Mapping[str, Any]:
        gate = spec.gates.latency
        return {
            "llm": self._llm_settings(),
            "timed_rows": _timed_rows(spec),
            "benchmark": {
                "concurrencies": list(gate.measured_concurrencies),
                "requests": gate.requests,
                "objective": None if gate.objective is None else canonical(gate.objective),
                "confidence": spec.gates.confidence,
            },
        }

    def target(self) -> Target:
        node = Node.of(self._section)
        return Target(architecture=node.architecture, gpus=node.gpus)

    def compatible(self, engine_directory: Path, target: Target) -> None:
        node = Node.of(self._section)
        check_engine(
            self._built(engine_directory),
            replace(node, architecture=target.architecture, gpus=target.gpus),
        )

    def validate(
        self,
        checkpoint: Path,
        engine_directory: Path,
        evaluation_data: Path,
        output: Path,
        spec: ModelSpec,
        repository: Path,
        tools: ToolRunner,
    ) -> Facts:
        """Compares engine and checkpoint, then measures the engine under load.

        Writes `benchmark.json` beside what every toolchain writes: an
        `evidence.latency.LatencySummary` of `trtllm-bench`, which is also the fact
        `throughput`. Tasks of lm-evaluation-harness are not run; a spec whose gates need them
        is refused.
        """
        self._refuse(self._section)
        self._check_built_here(engine_directory)
        refuse_code(checkpoint)
        rows = read_data(evaluation_data)
        prompts = tokenized_prompts(checkpoint, rows, spec.constraints.max_input_tokens)
        work = tools.work
        work.mkdir(parents=True, exist_ok=True)
        settings, questions, answers = (
            work / f"{name}.json" for name in ("llm-settings", "questions", "answers")
        )
        answers.unlink(missing_ok=True)  # of a killed step
        settings.write_text(json.dumps(self._llm_settings()), encoding="utf-8")
        asked = {f"{name}s": rows.column(name).to_pylist() for name in ("prompt", "completion")}
        questions.write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")
        command = [
            str(self.image.python), "-m", VALIDATION,
            "--backend", self.backend,
            "--checkpoint", str(checkpoint),
            "--engine", str(engine_directory),
            "--tokenizer", str(self._served_tokenizer(checkpoint, engine_directory, work)),
            "--settings", str(settings),
            "--questions", str(questions),
            "--output", str(answers),
            "--max-output-tokens", str(spec.constraints.max_output_tokens),
            "--timed-rows", str(_timed_rows(spec)),
        ]  # fmt: skip
        ours = with_our_modules(work / "modules")
        heard = run_listening(tools, "the engine validation", command, ours)
        found = write_report(answers, rows, self.backend, output)
        measured = measure_throughput(
            self.backend, checkpoint, engine_directory, prompts, self._bench_options(work), spec,
            tools,
        )  # fmt: skip
        (output / "benchmark.json").write_text(
            measured.summary.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
        return {
            "seconds": heard.run.seconds + measured.seconds,
            **self._cost(heard.run.seconds + measured.seconds),
            **found,
            "throughput": measured.summary.model_dump(mode="json"),
        }

    @abstractmethod
    def _llm_settings(self) -> dict[str, Any]:
        """Settings of the LLM API with which it serves as Triton does, as in a YAML file of
        its options.
        """

    @abstractmethod
    def _served_tokenizer(self, checkpoint: Path, engine_directory: Path, work: Path) -> Path:
        """The directory that a server takes its tokenizer from, as the package will have it."""

    @abstractmethod
    def _bench_options(self, work: Path) -> Path | None:
        """See `benchmark.Benchmark.llm_options`."""

    @abstractmethod
    def _built(self, engine_directory: Path) -> BuiltEngine:
        """A whole engine directory, as the compatibility gate sees it.

        Raises:
            ToolchainError: it is not whole.
        """

    def _check_built_here(self, engine_directory: Path) -> None:
        """Checks that an engine was built in the image that this step runs in.

        Raises:
            ToolchainError: it was not, or is not whole.
        """
        here = replace(Node.of(self._section), image_digest=self.image.toolkit.image_digest)
        check_engine(self._built(engine_directory), here)

    def _served(self, engine_directory: Path) -> ServedBy:
        """What serves an engine: the image that built it, on the GPUs that it was built for."""
        built = self._built(engine_directory)
        reference, _, _ = self._section.image.partition("@")
        name, _, tag = reference.rpartition(":")
        return ServedBy(
            image=ServingImage(name, tag, built.image_digest),
            tensorrt_llm=built.tensorrt_llm,
            architecture=built.architecture,
            world_size=built.world_size,
        )

    def _refuse(self, engine: TensorRTLLMEngine) -> None:
        """Stops a step that could only fail, before it takes a GPU minute."""
        refuse_impossible(engine)
        self.image.check(engine)
        # What could not be served need not be built.
        self.image.templates(self.backend)

    def _fits(self, checkpoint: Path, engine: TensorRTLLMEngine) -> MemoryEstimate:
        shape = read_shape(checkpoint)
        check_shape(shape, engine)
        found = estimate(shape, engine, stored_bytes(checkpoint))
        check_memory(found, engine)
        return found

    def _cost_of(self, seconds: float) -> Cost:
        world_size = self._section.parallelism.world_size
        return Cost.of(seconds, world_size, self._settings.gpu_hour_price)

    def _cost(self, seconds: float) -> dict[str, float]:
        """GPU seconds and, where the settings have a price, what they cost; for people."""
        cost = self._cost_of(seconds)
        amount = {} if cost.amount is None else {"gpu_cost": float(cost.amount)}
        return {"gpu_seconds": cost.gpu_seconds, **amount}


class BuiltEngines(TensorRTLLMToolchain):
    """Backend `engine`: `convert_checkpoint.py` or `quantize.py`, then `trtllm-build`."""

    backend = "engine"

    def check_weights(self, converted: Path) -> None:
        self._check_mapping(check_converted_weights(converted), converted)

    def conversion_parameters(self, engine: TensorRTLLMEngine) -> Mapping[str, Any]:
        parameters: dict[str, Any] = {
            "family": engine.family,
            "dtype": engine.dtype,
            "quantization": engine.quantization,
            "kv_cache": engine.kv_cache.dtype,
            "parallelism": canonical(engine.parallelism),
        }
        if (calibration := engine.calibration) is not None:
            # Other rows at the same path give other weights.
            data = canonical(calibration) | {"digest": self._calibration[1]}
            parameters["calibration"] = {key: value for key, value in data.items() if key != "data"}
        return parameters

    def build_parameters(self, engine: TensorRTLLMEngine) -> Mapping[str, Any]:
        return {
            "backend": engine.backend,
            "limits": canonical(engine.limits),
            "plugins": canonical(engine.built_with),
            "tokens_per_block": engine.kv_cache.tokens_per_block,
            "world_size": engine.parallelism.world_size,
        }

    def package_parameters(self, engine: TensorRTLLMEngine) -> Mapping[str, Any]:
        return {"engine_serving": EngineServing.of(engine).model_dump(mode="json")}

    def convert(
        self, checkpoint: Path, output: Path, engine: TensorRTLLMEngine, tools: ToolRunner
    ) -> Facts:
        self._refuse(engine)
        refuse_code(checkpoint)
        memory = self._fits(checkpoint, engine)
        data, digest = (None, None) if engine.calibration is None else self._calibration
        script = self.image.script(conversion_script(engine))
        command = conversion_command(engine, self.image.python, script, checkpoint, output, data)
        heard = run_listening(tools, script.name, command, OFFLINE_CALIBRATION)
        if data is not None and digest is not None:
            hold_still(data, digest)
        self.check_weights(output)
        seconds = heard.run.seconds
        folders = {"checkpoint": checkpoint, "converted": output, "work": tools.work}
        if data is not None:
            folders["calibration"] = data
        write_conversion(
            output,
            Conversion(
                toolkit=self.image.toolkit,
                parameters=self.conversion_parameters(engine),
                command=portable(command, **folders),
                seconds=seconds,
            ),
        )
        return {
            "seconds": seconds,
            **self._cost(seconds),
            "bytes": _size(output),
            "estimated_weights_bytes": memory.weights,
            "estimated_kv_cache_tokens": memory.tokens,
            "warnings": list(heard.warnings),
        }

    def build(
        self,
        converted: Path,
        output: Path,
        engine: TensorRTLLMEngine,
        sources: Mapping[str, str],
        tools: ToolRunner,
    ) -> Facts:
        self._refuse(engine)
        self.check_weights(converted)
        conversion = read_conversion(converted)
        toolkit, gpus = self.image.toolkit, self.image.gpus
        timings = TimingCache.of(
            self._settings.timing_cache_folder,
            tools.work,
            gpu=gpus.name,
            tensorrt=toolkit.tensorrt or "absent",
        )
        known = timings.prepare()
        command = build_command(engine, converted, output, timings.written, known)
        heard = run_listening(tools, "trtllm-build", command)
        limits = engine.limits
        check_engine_directory(
            output,
            version=toolkit.tensorrt_llm,
            converted=converted,
            asked={
                "max_batch_size": limits.max_batch_size,
                "max_input_len": limits.max_input_len,
                "max_seq_len": limits.max_seq_len,
                "max_num_tokens": limits.max_num_tokens,
                "max_beam_width": limits.max_beam_width,
            },
        )
        seconds = heard.run.seconds
        size = _size(output)
        folders = {"converted": converted, "engine": output, "work": tools.work}
        sidecar = write_sidecar(
            output,
            toolkit=toolkit,
            gpu=gpus,
            parameters={
                "conversion": conversion.parameters,
                "build": self.build_parameters(engine),
            },
            commands=[conversion.command, portable(command, **folders)],
            sources=sources,
            cost=self._cost_of(conversion.seconds + seconds),
        )
        # A lost cache costs the next build time; the engine is whole.
        lost = timings.keep()
        return {
            "seconds": seconds,
            **self._cost(seconds),
            "bytes": size,
            "converted_bytes": _size(converted),
            "timing_cache": "cold" if known is None else "warm",
            "warnings": [*heard.warnings, *([] if lost is None else [lost])],
            **_told(sidecar),
        }

    def package(
        self, engine_directory: Path, checkpoint: Path, output: Path, spec: ModelSpec
    ) -> Facts:
        self._check_built_here(engine_directory)
        package_engine(
            engine_directory,
            checkpoint,
            self.image.templates(self.backend),
            output,
            model=spec.name,
            constraints=spec.constraints,
            serving=EngineServing.of(self._section),
            served=self._served(engine_directory),
        )
        return _packaged(output)

    def check_server(self, package: Path, metrics: str) -> None:
        """See `toolchains.base.ServerCheck`."""
        check_engine_server(package, metrics)

    def _llm_settings(self) -> dict[str, Any]:
        section = self._section
        return {
            "tensor_parallel_size": section.parallelism.tensor,
            "pipeline_parallel_size": section.parallelism.pipeline,
            "enable_chunked_prefill": section.chunked_context,
            "kv_cache_config": {
                "free_gpu_memory_fraction": section.kv_cache.free_gpu_mem_fraction,
                "enable_block_reuse": section.kv_cache.reuse,
            },
            "scheduler_config": {"capacity_scheduler_policy": section.scheduler.upper()},
        }

    def _served_tokenizer(self, checkpoint: Path, engine_directory: Path, work: Path) -> Path:
        folder = work / "tokenizer"
        shutil.rmtree(folder, ignore_errors=True)  # of a killed step
        copy_tokenizer(checkpoint, folder)
        return folder

    def _bench_options(self, work: Path) -> Path | None:
        return None  # trtllm-bench has flags for what an engine leaves open

    @cached_property
    def _calibration(self) -> tuple[Path, str]:
        """Where the calibration data are, and their digest when this step began."""
        calibration = self._section.calibration
        if calibration is None:
            raise ToolchainError(
                "The engine section names no calibration data",
                expected="engine.calibration",
                found="nothing",
                cure="report this with the spec: the step should not have asked for them",
            )
        folder = calibration_data(find_source(self._settings, calibration.data))
        return folder, content_digest(folder)

    def _built(self, engine_directory: Path) -> BuiltEngine:
        return BuiltEngine.of(*open_engine(engine_directory))

    def _check_mapping(self, config: CheckpointConfig, converted: Path) -> None:
        ways, mapping = self._section.parallelism, config.mapping
        wanted = {"tp_size": ways.tensor, "pp_size": ways.pipeline, "cp_size": ways.context}
        found = {name: getattr(mapping, name) for name in wanted}
        if found != wanted:
            raise ToolchainError(
                f"{converted} was converted for another parallelism",
                expected=wanted,
                found=found,
                cure="materialize converted_weights again",
            )


class ServedCheckpoints(TensorRTLLMToolchain):
    """Backend `llmapi`: the checkpoint as it is, with its frozen `model.yaml`."""

    backend = "llmapi"

    def check_weights(self, converted: Path) -> None:
        check_checkpoint(converted)

    def conversion_parameters(self, engine: TensorRTLLMEngine) -> Mapping[str, Any]:
        return {"backend": engine.backend}

    def build_parameters(self, engine: TensorRTLLMEngine) -> Mapping[str, Any]:
        return {
            "backend": engine.backend,
            "model_yaml": LlmApiModel.of(engine).model_dump(mode="json"),
        }

    def package_parameters(self, engine: TensorRTLLMEngine) -> Mapping[str, Any]:
        return {}  # all of it is in the engine's model.yaml

    def convert(
        self, checkpoint: Path, output: Path, engine: TensorRTLLMEngine, tools: ToolRunner
    ) -> Facts:
        """Takes the checkpoint over; no tool is run."""
        self._refuse(engine)
        check_checkpoint(checkpoint)
        memory = self._fits(checkpoint, engine)
        # The same weights once more, which nothing loads.
        loaded = {path.name for path in weight_files(checkpoint)}
        copies = {path.name for path in checkpoint.glob("*.safetensors")} - loaded
        copy_tree(checkpoint, output, leave=copies)
        return {
            "bytes": _size(output),
            "estimated_weights_bytes": memory.weights,
            "estimated_kv_cache_tokens": memory.tokens,
        }

    def build(
        self,
        converted: Path,
        output: Path,
        engine: TensorRTLLMEngine,
        sources: Mapping[str, str],
        tools: ToolRunner,
    ) -> Facts:
        """Freezes what Triton's `llmapi` model is told; no tool is run."""
        self._refuse(engine)
        check_checkpoint(converted)
        copy_tree(converted, output, leave=set())
        (output / MODEL_YAML).write_text(LlmApiModel.of(engine).as_yaml(), encoding="utf-8")
        size = _size(output)
        sidecar = write_sidecar(
            output,
            toolkit=self.image.toolkit,
            gpu=self.image.gpus,
            parameters={"build": self.build_parameters(engine)},
            commands=[],
            sources=sources,
            cost=self._cost_of(0.0),
        )
        return {"bytes": size, "converted_bytes": _size(converted), **_told(sidecar)}

    def package(
        self, engine_directory: Path, checkpoint: Path, output: Path, spec: ModelSpec
    ) -> Facts:
        self._check_built_here(engine_directory)
        package_llmapi(
            engine_directory,
            self.image.templates(self.backend),
            output,
            model=spec.name,
            constraints=spec.constraints,
            served=self._served(engine_directory),
        )
        return _packaged(output)

    def _llm_settings(self) -> dict[str, Any]:
        # All that model.yaml says but what Triton and the path are told by it.
        return LlmApiModel.of(self._section).model_dump(
            mode="json", exclude={"model", "backend", "triton_config"}
        )

    def _served_tokenizer(self, checkpoint: Path, engine_directory: Path, work: Path) -> Path:
        return engine_directory

    def _bench_options(self, work: Path) -> Path | None:
        options = work / "llm-options.yaml"
        options.write_text(yaml.safe_dump(self._llm_settings()), encoding="utf-8")
        return options

    def _built(self, engine_directory: Path) -> BuiltEngine:
        sidecar = read_sidecar(engine_directory)
        check_checkpoint(engine_directory)
        frozen = read_llmapi_model(engine_directory / MODEL_YAML)
        return BuiltEngine(
            tensorrt_llm=sidecar.toolkit.tensorrt_llm,
            tensorrt=sidecar.toolkit.tensorrt,
            architecture=sidecar.target.architecture,
            image_digest=sidecar.toolkit.image_digest,
            world_size=frozen.tensor_parallel_size * frozen.pipeline_parallel_size,
            backend="llmapi",
        )


def toolchain_of(
    section: TensorRTLLMEngine, settings: Settings
) -> BuiltEngines | ServedCheckpoints:
    """The toolchain of the backend that a spec's engine section picks."""
    backend = BuiltEngines if section.backend == "engine" else ServedCheckpoints
    return backend(section, settings)


def _timed_rows(spec: ModelSpec) -> int:
    """How many prompts are answered one after the other: as many as the gate needs to judge."""
    gates = spec.gates
    needed = [requests_needed(bound.percentile, gates.confidence) for bound in gates.latency.build]
    return max([FEWEST_TIMED_ROWS, *needed])


def _told(sidecar: Sidecar) -> dict[str, Any]:
    """What people want to know of a sidecar."""
    return {
        "architecture": sidecar.target.architecture,
        "gpu": sidecar.target.gpu.name,
        "tensorrt_llm": sidecar.toolkit.tensorrt_llm,
        "image_digest": sidecar.toolkit.image_digest,
    }


def _packaged(output: Path) -> dict[str, Any]:
    described = json.loads((output / PACKAGE_FILE).read_text(encoding="utf-8"))
    return {"bytes": _size(output), **described}


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
