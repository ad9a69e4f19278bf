"""Packages made from doubles of the image's templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmops_assets.errors import ToolchainError
from llmops_assets.serving.model_repository import parse_configuration, read_repository
from llmops_assets.serving.package_description import read_package
from llmops_assets.spec import Constraints, TensorRTLLMEngine
from llmops_assets.toolchains.base import ServingImage
from llmops_assets.toolchains.tensorrt_llm.model_yaml import (
    CHECKPOINT,
    PACKAGE_MOUNT,
    LlmApiModel,
    read_llmapi_model,
)
from llmops_assets.toolchains.tensorrt_llm.packaging import (
    REQUIRED,
    UNSET,
    EngineServing,
    ServedBy,
    check_package,
    package_engine,
    package_llmapi,
)
from llmops_assets.toolchains.tensorrt_llm.templates import INNER_MODELS, find_placeholders

from .built_engine import write_engine, write_tokenizer

DOUBLES = Path(__file__).parent / "template_doubles"
TEMPLATES = DOUBLES / "inflight_batcher_llm"
MODEL = "chat-8b"
LIMITS = Constraints(max_input_tokens=1024, max_output_tokens=1024)
SERVING = EngineServing(max_batch_size=64)
IMAGE = ServingImage("registry/tritonserver", "26.07", "sha256:" + "a" * 64)
SERVED = ServedBy(IMAGE, "1.2.1", "sm_90", world_size=2)

# As the facts list them, by template; those that are not in quotes first.
PLACEHOLDERS = {
    "ensemble": ("triton_max_batch_size logits_datatype", ""),
    "preprocessing": (
        "triton_max_batch_size max_queue_delay_microseconds max_queue_size "
        "preprocessing_instance_count",
        "tokenizer_dir add_special_tokens multimodal_model_path engine_dir max_num_images "
        "hf_model_path",
    ),
    "postprocessing": (
        "triton_max_batch_size postprocessing_instance_count",
        "tokenizer_dir skip_special_tokens",
    ),
    "tensorrt_llm": (
        "triton_max_batch_size decoupled_mode max_queue_delay_microseconds max_queue_size "
        "encoder_input_features_data_type logits_datatype prompt_embedding_table_data_type",
        "triton_backend engine_dir batching_strategy encoder_engine_dir max_beam_width "
        "max_tokens_in_paged_kv_cache max_attention_window_size sink_token_length "
        "batch_scheduler_policy kv_cache_free_gpu_mem_fraction cross_kv_cache_fraction "
        "kv_cache_host_memory_bytes kv_cache_onboard_blocks exclude_input_in_output "
        "cancellation_check_period_ms stats_check_period_ms iter_stats_max_iterations "
        "request_stats_max_iterations enable_kv_cache_reuse normalize_log_probs "
        "enable_chunked_context gpu_device_ids participant_ids num_nodes "
        "lora_cache_optimal_adapter_size lora_cache_max_adapter_size "
        "lora_cache_gpu_memory_fraction lora_cache_host_memory_bytes lora_prefetch_dir "
        "decoding_mode lookahead_window_size lookahead_ngram_size "
        "lookahead_verification_set_size medusa_choices eagle_choices gpu_weights_percent "
        "enable_context_fmha_fp32_acc multi_block_mode cuda_graph_mode cuda_graph_cache_size "
        "speculative_decoding_fast_logits tokenizer_dir guided_decoding_backend "
        "xgrammar_tokenizer_info_path enable_trt_overlap",
    ),
    "tensorrt_llm_bls": (
        "triton_max_batch_size decoupled_mode bls_instance_count logits_datatype "
        "prompt_embedding_table_data_type",
        "accumulate_tokens tensorrt_llm_model_name tensorrt_llm_draft_model_name "
        "multimodal_encoders_name",
    ),
}


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine", tensor_parallel=2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "checkpoint")


def package(
    engine: Path, checkpoint: Path, templates: Path = TEMPLATES, *, output: str = "package",
    model: str = MODEL, limits: Constraints = LIMITS, serving: EngineServing = SERVING,
) -> Path:  # fmt: skip
    folder = engine.parent / output
    package_engine(
        engine, checkpoint, templates, folder, model=model, constraints=limits, serving=serving,
        served=SERVED,
    )  # fmt: skip
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def configuration(folder: Path, model: str) -> Any:
    return parse_configuration((folder / "repository" / model / "config.pbtxt").read_text(), model)


def copied_templates(tmp_path: Path) -> Path:
    return shutil.copytree(TEMPLATES, tmp_path / "templates")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, "the double has changed"
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("template", PLACEHOLDERS)
def test_doubles_have_every_documented_placeholder(template: str) -> None:
    """A double with fewer would let a missing value pass."""
    unquoted, quoted = PLACEHOLDERS[template]
    found = find_placeholders((TEMPLATES / template / "config.pbtxt").read_text())
    assert found.unquoted == set(unquoted.split())
    assert found.quoted == set(quoted.split())
    assert found.all >= REQUIRED[template]


@pytest.mark.parametrize(
    "name", sorted({name for both in PLACEHOLDERS.values() for name in " ".join(both).split()})
)
def test_placeholder_that_nobody_knows_stops_the_package(
    name: str, engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Each of them is found by pattern: under another name each is a refusal."""
    templates = copied_templates(tmp_path)
    for template in templates.iterdir():
        path = template / "config.pbtxt"
        path.write_text(path.read_text().replace("${" + name + "}", "${unheard_of}"))
    with pytest.raises(ToolchainError, match=r"unheard_of|not one that this toolchain knows"):
        package(engine, checkpoint, templates)


def test_package_is_complete(engine: Path, checkpoint: Path) -> None:
    """Every file that a server needs, and nothing of the checkpoint's weights or the sidecar."""
    found = files(package(engine, checkpoint))
    assert sorted(found) == sorted([
        "package.json",
        "engine/config.json", "engine/rank0.engine", "engine/rank1.engine",
        "tokenizer/config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
        f"repository/{MODEL}/config.pbtxt", f"repository/{MODEL}/version/VERSION.txt",
        *[f"repository/{name}/{file}" for name in INNER_MODELS
          for file in ("config.pbtxt", "1/model.py")],
        "repository/tensorrt_llm_bls/1/lib/decode.py",
    ])  # fmt: skip
    assert found["engine/rank1.engine"] == b"engine of rank 1"
    assert not [name for name, content in found.items() if b"${" in content]


def test_gate_on_packages_can_read_it(engine: Path, checkpoint: Path) -> None:
    """It is the same for all toolchains, and knows neither templates nor inner models."""
    assert not read_repository(package(engine, checkpoint) / "repository", MODEL).problems


def test_every_version_folder_survives_object_storage(engine: Path, checkpoint: Path) -> None:
    """Git and S3 keep no empty folder; an ensemble's would be gone, and the model with it."""
    repository = package(engine, checkpoint) / "repository"
    for model in repository.iterdir():
        versions = [path for path in model.iterdir() if path.is_dir()]
        assert len(versions) == 1
        assert any(path.stat().st_size for path in versions[0].rglob("*") if path.is_file())


def test_same_inputs_give_same_bytes(engine: Path, checkpoint: Path) -> None:
    """Staging and production get one package; its digest must not depend on the day."""
    assert files(package(engine, checkpoint)) == files(package(engine, checkpoint, output="again"))


def test_configurations_say_what_was_meant(engine: Path, checkpoint: Path) -> None:
    """Read by Triton's protobuf; the paths are those of the mount."""
    serving = EngineServing(
        max_batch_size=32, kv_cache_free_gpu_mem_fraction=0.5,
        batch_scheduler_policy="max_utilization", enable_kv_cache_reuse=False,
        enable_chunked_context=True, max_queue_size=7,
    )  # fmt: skip
    folder = package(engine, checkpoint, serving=serving)
    found = configuration(folder, "tensorrt_llm")
    assert found.backend == "tensorrtllm"
    assert found.max_batch_size == 32
    assert found.model_transaction_policy.decoupled
    assert found.dynamic_batching.max_queue_delay_microseconds == 0
    assert found.dynamic_batching.default_queue_policy.max_queue_size == 7
    parameters = {key: value.string_value for key, value in found.parameters.items()}
    assert {key: value for key, value in parameters.items() if value} == {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": "/opt/llmops/package/engine",
        "tokenizer_dir": "/opt/llmops/package/tokenizer",
        "max_beam_width": "1",
        "batch_scheduler_policy": "max_utilization",
        "kv_cache_free_gpu_mem_fraction": "0.5",
        "exclude_input_in_output": "true",
        "enable_kv_cache_reuse": "false",
        "enable_chunked_context": "true",
    }
    for inner in ("preprocessing", "postprocessing"):
        assert configuration(folder, inner).instance_group[0].count == 1
    bls = configuration(folder, "tensorrt_llm_bls")
    assert bls.parameters["tensorrt_llm_model_name"].string_value == "tensorrt_llm"
    assert bls.model_transaction_policy.decoupled
    entry = configuration(folder, MODEL)
    assert entry.platform == "ensemble"
    assert [step.model_name for step in entry.ensemble_scheduling.step] == [
        "preprocessing", "tensorrt_llm", "postprocessing",
    ]  # fmt: skip


def test_start_tokens_are_added(engine: Path, checkpoint: Path) -> None:
    """tensorrtllm_backend#234, #445: models answered garbage without."""
    found = configuration(package(engine, checkpoint), "preprocessing")
    assert found.parameters["add_special_tokens"].string_value == "true"


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "TYPE_FP32"), ("float16", "TYPE_FP16")]
)
def test_logits_type_is_the_engines(
    tmp_path: Path, checkpoint: Path, dtype: str, expected: str
) -> None:
    """Triton would read float16 as float32 and answer nonsense logits."""
    from tritonclient.grpc import model_config_pb2

    proto: Any = model_config_pb2
    engine = write_engine(tmp_path / "engine", logits_dtype=dtype)
    folder = package(engine, checkpoint)
    for model in (MODEL, "tensorrt_llm", "tensorrt_llm_bls"):
        logits = {one.name: one.data_type for one in configuration(folder, model).output}
        assert logits["context_logits"] == proto.DataType.Value(expected)


def test_unset_parameters_are_not_also_set() -> None:
    """A name in both tables would make one of them a lie."""
    from llmops_assets.toolchains.tensorrt_llm import packaging

    config = {
        "pretrained_config": {"logits_dtype": "float32"},
        "build_config": {"max_beam_width": 1},
    }
    assert not UNSET & packaging._values(config, SERVING).keys()


@pytest.mark.parametrize(
    ("config", "limits", "serving", "problem"),
    [
        ({"max_input_len": 1023}, LIMITS, SERVING, "max_input_len of at least 1024"),
        ({"max_seq_len": 2047}, LIMITS, SERVING, "max_seq_len of at least 2048"),
        ({"max_batch_size": 63}, LIMITS, SERVING, "max_batch_size of at least 64"),
        ({"logits_dtype": "bfloat16"}, LIMITS, SERVING, "no type for the engine's logits"),
    ],
)
def test_engine_that_keeps_no_promise_is_refused(
    tmp_path: Path, checkpoint: Path, config: dict[str, Any], limits: Constraints,
    serving: EngineServing, problem: str,
) -> None:  # fmt: skip
    """It would serve until the first request of the promised length."""
    engine = write_engine(tmp_path / "engine", **config)
    with pytest.raises(ToolchainError, match=problem):
        package(engine, checkpoint, limits=limits, serving=serving)


def test_name_of_an_inner_model_is_refused(engine: Path, checkpoint: Path) -> None:
    """The entry would overwrite the tokenizer's model."""
    with pytest.raises(ToolchainError, match="cannot be called preprocessing"):
        package(engine, checkpoint, model="preprocessing")


def test_checkpoints_configuration_is_no_engines(engine: Path, checkpoint: Path) -> None:
    """A checkpoint's config.json over the engine's ends in `No weight files found`."""
    (engine / "config.json").write_text('{"architecture": "LlamaForCausalLM"}')
    with pytest.raises(ToolchainError, match=r"not the config\.json of an engine"):
        package(engine, checkpoint)
    (engine / "config.json").write_text("{")
    with pytest.raises(ToolchainError, match="cannot be read"):
        package(engine, checkpoint)


def test_tokenizer_with_code_is_refused(engine: Path, tmp_path: Path) -> None:
    """Triton's preprocessing loads tokenizers with trust_remote_code=True."""
    checkpoint = write_tokenizer(
        tmp_path / "code", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}
    )
    with pytest.raises(ToolchainError, match="auto_map"):
        package(engine, checkpoint)


def test_checkpoint_without_tokenizer_is_refused(engine: Path, checkpoint: Path) -> None:
    """An engine directory has none, so nothing else could bring it."""
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ToolchainError, match="has no tokenizer"):
        package(engine, checkpoint)


def test_links_are_refused(engine: Path, checkpoint: Path) -> None:
    """A package holds bytes; what a link leads to may change or stay behind."""
    (engine / "rank0.engine").unlink()
    (engine / "rank0.engine").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(ToolchainError, match="is a link"):
        package(engine, checkpoint)


def test_template_that_fixes_the_backend_elsewhere_is_refused(
    engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """All placeholders may be there and the engine's path still be under another key."""
    templates = copied_templates(tmp_path)
    edit(templates / "tensorrt_llm/config.pbtxt", '"gpt_model_path"', '"engine_path"')
    with pytest.raises(ToolchainError, match="parameters elsewhere"):
        package(engine, checkpoint, templates)


@pytest.mark.parametrize("missing", ["triton_backend", "engine_dir", "decoupled_mode"])
def test_template_that_somebody_filled_is_refused(
    missing: str, engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """TensorRT-LLM#1803 the other way round: somebody else's values would serve."""
    templates = copied_templates(tmp_path)
    edit(templates / "tensorrt_llm/config.pbtxt", "${" + missing + "}", "false")
    with pytest.raises(ToolchainError, match=f"no {missing}"):
        package(engine, checkpoint, templates)


@pytest.mark.parametrize("versions", [["1", "2"], ["01"]])
def test_template_with_other_versions_is_refused(
    versions: list[str], engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Triton ignores names that begin with 0, and would serve the highest of two."""
    templates = copied_templates(tmp_path)
    shutil.rmtree(templates / "preprocessing/1")
    for version in versions:
        (templates / "preprocessing" / version).mkdir()
    with pytest.raises(ToolchainError, match="one version folder, or none"):
        package(engine, checkpoint, templates)


def test_image_without_a_template_is_refused(
    engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """A package without the model would start and answer nothing."""
    templates = copied_templates(tmp_path)
    shutil.rmtree(templates / "tensorrt_llm_bls")
    with pytest.raises(ToolchainError, match="no template for tensorrt_llm_bls"):
        package(engine, checkpoint, templates)


@pytest.mark.parametrize(
    ("path", "old", "new", "problem"),
    [
        ("repository/preprocessing/config.pbtxt", "/opt/llmops/package/tokenizer", "/tmp/x",
         "preprocessing reads /tmp/x"),
        ("repository/preprocessing/config.pbtxt", "package/tokenizer", "package/../tokenizer",
         "preprocessing reads"),
        ("repository/tensorrt_llm/config.pbtxt", "/opt/llmops/package/engine",
         "/opt/llmops/package/engine2", "tensorrt_llm reads"),
        ("repository/tensorrt_llm/config.pbtxt", 'name: "tensorrt_llm"', 'name: "llm"',
         "names the model llm"),
        ("repository/tensorrt_llm/config.pbtxt", '"1"', '"${left}"', "has a placeholder left"),
    ],
)  # fmt: skip
def test_changed_package_is_refused(
    engine: Path, checkpoint: Path, path: str, old: str, new: str, problem: str
) -> None:
    """tensorrtllm_backend#181, #615, #727: paths that the server does not have."""
    folder = package(engine, checkpoint)
    edit(folder / path, old, new)
    with pytest.raises(ToolchainError, match=problem):
        check_package(folder, MODEL)


def test_package_that_lost_a_version_folder_is_refused(engine: Path, checkpoint: Path) -> None:
    """What object storage does to an empty folder, and what is left of a cut-off copy."""
    folder = package(engine, checkpoint)
    note = folder / "repository" / MODEL / "version" / "VERSION.txt"
    note.write_bytes(b"")
    with pytest.raises(ToolchainError, match=f"version folder of {MODEL} is empty"):
        check_package(folder, MODEL)
    note.unlink()
    note.parent.rmdir()
    with pytest.raises(ToolchainError, match="not the one version folder version"):
        check_package(folder, MODEL)
    with pytest.raises(ToolchainError, match="there is no model other"):
        check_package(folder, "other")


def test_description_says_how_to_serve_it(engine: Path, checkpoint: Path) -> None:
    """Whoever starts a server needs the world size and the mount, and has only the package."""
    folder = package(engine, checkpoint)
    found = json.loads((folder / "package.json").read_text())
    assert found["backend"] == "engine"
    assert found["mount"] == str(PACKAGE_MOUNT)
    assert found["tensorrt_llm"] == "1.2.1"
    described = read_package(folder)
    assert (described.image, described.architecture, described.world_size) == (IMAGE, "sm_90", 2)


def test_package_says_how_it_is_asked(engine: Path, checkpoint: Path, frozen: Path) -> None:
    """By the names of NVIDIA's templates: Triton loses a key that a model has not, and the
    longest answer and the stream with it.
    """
    ensemble = read_package(package(engine, checkpoint)).asked
    assert ensemble.body("p", 7, stream=True) == {
        "text_input": "p", "max_tokens": 7, "stream": True, "return_num_output_tokens": True,
    }  # fmt: skip
    assert (ensemble.output_tokens, ensemble.finish_reason) == ("num_output_tokens", None)
    llmapi = read_package(package_checkpoint(frozen)).asked
    assert llmapi.body("p", 7, stream=True) == {
        "text_input": "p", "sampling_param_max_tokens": 7, "streaming": True,
        "return_finish_reason": True, "sampling_param_exclude_input_from_output": True,
    }  # fmt: skip
    assert llmapi.text_so_far
    assert not llmapi.ends({"finish_reason": "None"})
    assert llmapi.ends({"finish_reason": "length"})


@pytest.mark.parametrize("name", ["return_num_output_tokens", "num_output_tokens", "stream"])
def test_template_that_is_asked_otherwise_is_refused(
    name: str, engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Another version may call an input something else; nothing would fail but the answers."""
    templates = copied_templates(tmp_path)
    edit(templates / "ensemble/config.pbtxt", f'put [ {{ name: "{name}"', 'put [ { name: "new"')
    with pytest.raises(ToolchainError, match=f"no {name}"):
        package(engine, checkpoint, templates)


FROZEN = LlmApiModel(
    tensor_parallel_size=2, max_batch_size=64, max_num_tokens=8192, max_seq_len=2048
)


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    directory = write_tokenizer(tmp_path / "llmapi-engine")
    (directory / "model.yaml").write_text(FROZEN.as_yaml())
    (directory / "engine.json").write_text("{}")
    return directory


def package_checkpoint(frozen: Path, limits: Constraints = LIMITS) -> Path:
    folder = frozen.parent / "package"
    package_llmapi(
        frozen, DOUBLES / "llmapi", folder, model=MODEL, constraints=limits, served=SERVED
    )
    return folder


def test_llmapi_package_is_complete(frozen: Path) -> None:
    """The frozen model.yaml replaces the template's, byte for byte, and is nowhere else."""
    folder = package_checkpoint(frozen)
    found = files(folder)
    assert sorted(found) == [
        "checkpoint/config.json", "checkpoint/model.safetensors", "checkpoint/tokenizer.json",
        "checkpoint/tokenizer_config.json", "package.json",
        f"repository/{MODEL}/config.pbtxt", f"repository/{MODEL}/version/helpers.py",
        f"repository/{MODEL}/version/model.py", f"repository/{MODEL}/version/model.yaml",
    ]  # fmt: skip
    assert found[f"repository/{MODEL}/version/model.yaml"] == FROZEN.as_yaml().encode()
    assert configuration(folder, MODEL).backend == "python"
    assert json.loads(found["package.json"])["world_size"] == 2


def test_frozen_model_says_what_the_llm_api_reads() -> None:
    """Streaming must be on, the model does not batch itself, and the path is the mount's."""
    content = yaml.safe_load(FROZEN.as_yaml())
    assert content["model"] == str(PACKAGE_MOUNT / CHECKPOINT)
    assert content["backend"] == "pytorch"
    assert content["tensor_parallel_size"] == 2
    assert content["triton_config"] == {"decoupled": True, "max_batch_size": 0}
    assert content["kv_cache_config"]["free_gpu_memory_fraction"] == 0.9


@pytest.mark.parametrize(
    "change",
    [
        {"model": "meta-llama/Llama-3.1-8B"},
        {"backend": "tensorrt"},
        {"trust_remote_code": True},
        {"triton_config": {"max_batch_size": 0, "decoupled": False}},
        {"max_seq_len": 0},
    ],
)
def test_other_model_yaml_is_refused(frozen: Path, change: dict[str, Any]) -> None:
    """It would download a model, run its code, or not stream."""
    content = yaml.safe_load(FROZEN.as_yaml()) | change
    (frozen / "model.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ToolchainError, match=r"not a frozen model\.yaml"):
        package_checkpoint(frozen)


@pytest.mark.parametrize("text", [None, "a: [", "!!python/object:os.system {}", "- 1"])
def test_unreadable_model_yaml_is_refused(frozen: Path, text: str | None) -> None:
    """YAML can be many things; only one of them is served."""
    (frozen / "model.yaml").unlink()
    if text is not None:
        (frozen / "model.yaml").write_text(text)
    with pytest.raises(ToolchainError, match=r"not a frozen model\.yaml"):
        read_llmapi_model(frozen / "model.yaml")


def test_llmapi_model_that_is_too_short_is_refused(frozen: Path) -> None:
    """As with an engine: the promise is longer than what was fixed."""
    with pytest.raises(ToolchainError, match="max_seq_len of at least 2049"):
        package_checkpoint(frozen, Constraints(max_input_tokens=1024, max_output_tokens=1025))


def test_llmapi_checkpoint_with_code_is_refused(frozen: Path) -> None:
    """It would travel to every server that the package goes to."""
    (frozen / "modeling_evil.py").write_text("")
    with pytest.raises(ToolchainError, match=r"modeling_evil\.py"):
        package_checkpoint(frozen)


def test_llmapi_template_with_placeholders_is_refused(frozen: Path, tmp_path: Path) -> None:
    """It has none today; if a version brings some, nobody has said what they mean."""
    templates = shutil.copytree(DOUBLES / "llmapi", tmp_path / "templates")
    edit(templates / "tensorrt_llm/config.pbtxt", "count: 1", "count: ${instances}")
    with pytest.raises(ToolchainError, match="nobody accounted for"):
        package_llmapi(
            frozen, templates, tmp_path / "package", model=MODEL, constraints=LIMITS, served=SERVED
        )


def spec_engine(**changes: Any) -> TensorRTLLMEngine:
    return TensorRTLLMEngine.model_validate(
        {"toolchain": "tensorrt_llm", "gpu": "h100-sxm", **changes}
    )


def test_serving_follows_the_spec() -> None:
    """What a team writes under engine: must reach the server."""
    engine = spec_engine(
        limits={"max_batch_size": 16}, chunked_context=True, scheduler="max_utilization",
        kv_cache={"free_gpu_mem_fraction": 0.8, "reuse": False}, max_queue_size=7,
    )  # fmt: skip
    assert EngineServing.of(engine) == EngineServing(
        max_batch_size=16, kv_cache_free_gpu_mem_fraction=0.8, enable_kv_cache_reuse=False,
        enable_chunked_context=True, batch_scheduler_policy="max_utilization", max_queue_size=7,
    )  # fmt: skip
    llmapi = {"backend": "llmapi", "dtype": "bfloat16", "max_queue_size": None}
    model = LlmApiModel.of(engine.model_copy(update=llmapi))
    assert model.max_batch_size == 16
    assert model.dtype == "bfloat16"
    assert model.enable_chunked_prefill
    assert model.kv_cache_config.free_gpu_memory_fraction == 0.8
    assert not model.kv_cache_config.enable_block_reuse
    assert model.scheduler_config.capacity_scheduler_policy == "MAX_UTILIZATION"


@pytest.mark.parametrize(
    "change",
    [
        {"parallelism": {"context": 2}},
        {"parallelism": {"tensor": 2, "expert": 2}},
        {"limits": {"max_beam_width": 2}},
        {"kv_cache": {"dtype": "int8"}},
    ],
)
def test_llmapi_cannot_say_everything(change: dict[str, Any]) -> None:
    """What is dropped silently would be believed to be served."""
    (section, fields), *_ = change.items()
    with pytest.raises(ToolchainError, match=rf"{section}\.{list(fields)[-1]}"):
        LlmApiModel.of(spec_engine(backend="llmapi", **change))
