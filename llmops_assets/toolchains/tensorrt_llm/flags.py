"""The flags of TensorRT-LLM's tools, typed, and rendered as argument lists.

Read in sources close to, not provably at, version 1.2.1: the scripts
`convert_checkpoint.py` of each family and `quantize.py`, and `tensorrt_llm/commands/build.py`
with `plugin/plugin.py` for `trtllm-build`. A flag that is not given is left to the tool's
default. Left out are flags that invent a model instead of converting one (`--n_layer`
and the like), flags that the tools call deprecated, and those removed on the way to 1.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from llmops_assets.toolchains.tensorrt_llm.families import FamilyName


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(
            f"{path} is relative: the tool would look for it in its working directory, and "
            "take a data set of that name from the network"
        )
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Count = Annotated[int, Field(ge=1)]
DType = Literal["auto", "float16", "bfloat16", "float32"]
LogLevel = Literal["internal_error", "error", "warning", "info", "verbose", "debug"]
WeightOnlyPrecision = Literal[
    "int8", "int4", "int8_gptq", "int4_gptq", "int4_awq", "w4a8_awq", "w4a16_awq"
]
Switch = Literal["enable", "disable"]
PluginType = Literal["auto", "float16", "float32", "bfloat16", "int32", "disable"]

# quantize.py reads data sets whose name or path holds these in ways of their own, some of
# them from the network (`tensorrt_llm/quantization/quantize_by_modelopt.py`).
SPECIAL_DATA_SETS = ("cnn_dailymail", "scienceqa", "science_qa", "pileval")


def special_data_set(path: Path) -> str | None:
    """The name of a public data set that `quantize.py` would see in this path, if any."""
    return next((name for name in SPECIAL_DATA_SETS if name in str(path).lower()), None)


class Flags(BaseModel):
    """Flags of one tool. A field's name is its flag's, but where an alias says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def arguments(self) -> list[str]:
        """The flags as an argument list, in the order of the fields.

        True is the flag alone; False and None are no flag; a tuple is one flag with
        several values.
        """
        rendered: list[str] = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value is None or value is False or value == ():
                continue
            rendered.append(field.serialization_alias or f"--{name}")
            if isinstance(value, tuple):
                rendered += [str(part) for part in value]
            elif value is not True:
                rendered.append(str(value))
        return rendered


class ConversionFlags(Flags):
    """What every family's `convert_checkpoint.py` takes.

    `model_dir` is required though most scripts do not ask for it: without it that of Llama
    writes the `config.json` of a model that does not exist, and exits with 0.
    """

    precisions: ClassVar[tuple[WeightOnlyPrecision, ...]] = ("int8", "int4")

    model_dir: AbsolutePath
    output_dir: AbsolutePath
    dtype: DType = "auto"
    use_weight_only: bool = False
    weight_only_precision: WeightOnlyPrecision | None = None

    @model_validator(mode="after")
    def _known_precision(self) -> ConversionFlags:
        if self.use_weight_only != (self.weight_only_precision is not None):
            raise ValueError(
                "use_weight_only and weight_only_precision have an impact only together"
            )
        if self.weight_only_precision not in {None, *self.precisions}:
            raise ValueError(f"weight_only_precision is one of {', '.join(self.precisions)}")
        return self


class ParallelConversionFlags(ConversionFlags):
    """With the ranks that most scripts write."""

    tp_size: Count = 1
    pp_size: Count = 1
    workers: Count = 1


class LlamaFlags(ParallelConversionFlags):
    """Of `models/core/llama/convert_checkpoint.py`, also for Mistral and Mixtral."""

    precisions = ("int8", "int4", "int8_gptq", "int4_gptq", "int4_awq")

    cp_size: Count = 1
    moe_tp_size: Count | None = None
    moe_ep_size: Count | None = None
    disable_weight_only_quant_plugin: bool = False
    calib_dataset: AbsolutePath | None = None
    calib_size: Count | None = None
    calib_max_seq_length: Count | None = None
    smoothquant: Annotated[float, Field(ge=0, le=1)] | None = None
    per_channel: bool = False
    per_token: bool = False
    int8_kv_cache: bool = False
    fp8_kv_cache: bool = False
    quant_ckpt_path: AbsolutePath | None = None
    use_fp8: bool = False
    use_nvfp4: bool = False
    use_fp8_rowwise: bool = False
    per_group: bool = False
    group_size: Count | None = None
    load_by_shard: bool = False
    load_model_on_cpu: bool = False
    use_parallel_embedding: bool = False
    embedding_sharding_dim: Literal[0, 1] | None = None
    remove_duplicated_kv_heads: bool = False
    log_level: LogLevel | None = None

    @model_validator(mode="after")
    def _consistent(self) -> LlamaFlags:
        _check_experts(self.tp_size, self.moe_tp_size, self.moe_ep_size)
        _check_calibration(self.smoothquant, self.int8_kv_cache, self.calib_dataset)
        return self


class QwenFlags(ParallelConversionFlags):
    """Of `models/core/qwen/convert_checkpoint.py`."""

    precisions = ("int8", "int4", "int8_gptq", "int4_gptq")

    cp_size: Count = 1
    moe_tp_size: Count | None = None
    moe_ep_size: Count | None = None
    disable_weight_only_quant_plugin: bool = False
    calib_dataset: AbsolutePath | None = None
    smoothquant: Annotated[float, Field(ge=0, le=1)] | None = None
    per_channel: bool = False
    per_token: bool = False
    int8_kv_cache: bool = False
    per_group: bool = False
    group_size: Count | None = None
    load_model_on_cpu: bool = False
    use_parallel_embedding: bool = False
    embedding_sharding_dim: Literal[0, 1] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> QwenFlags:
        _check_experts(self.tp_size, self.moe_tp_size, self.moe_ep_size)
        _check_calibration(self.smoothquant, self.int8_kv_cache, self.calib_dataset)
        return self


class GPTFlags(ParallelConversionFlags):
    """Of `models/core/gpt/convert_checkpoint.py`: GPT-2, StarCoder, Nemotron."""

    gpt_variant: (
        Literal["gpt2", "santacoder", "starcoder", "starcoder2", "persimmon", "nemotron"] | None
    ) = None
    calib_dataset: AbsolutePath | None = None
    smoothquant: Annotated[float, Field(ge=0, le=1)] | None = None
    per_channel: bool = False
    per_token: bool = False
    int8_kv_cache: bool = False
    load_model_on_cpu: bool = False
    use_parallel_embedding: bool = False
    embedding_sharding_dim: Literal[0, 1] | None = None
    log_level: LogLevel | None = None

    @model_validator(mode="after")
    def _consistent(self) -> GPTFlags:
        _check_calibration(self.smoothquant, self.int8_kv_cache, self.calib_dataset)
        return self


class GemmaFlags(ConversionFlags):
    """Of `models/core/gemma/convert_checkpoint.py`: tensor parallelism only, one worker."""

    precisions = ("int8", "int4", "w4a8_awq", "w4a16_awq")

    ckpt_type: Literal["hf"] = Field(default="hf", serialization_alias="--ckpt-type")
    world_size: Count = Field(default=1, serialization_alias="--world-size")
    calib_dataset: AbsolutePath | None = None
    smoothquant: Annotated[float, Field(ge=0, le=1)] | None = None
    per_channel: bool = False
    per_token: bool = False
    int8_kv_cache: bool = False
    fp8_kv_cache: bool = False
    enable_fp8: bool = False
    quant_ckpt_path: AbsolutePath | None = None
    load_model_on_cpu: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> GemmaFlags:
        _check_calibration(self.smoothquant, self.int8_kv_cache, self.calib_dataset)
        return self


class PhiFlags(ParallelConversionFlags):
    """Of `models/core/phi/convert_checkpoint.py`, which asserts `pp_size` 1."""

    moe_tp_size: Count | None = None
    moe_ep_size: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> PhiFlags:
        if self.pp_size != 1:
            raise ValueError("pp_size must be 1")
        _check_experts(self.tp_size, self.moe_tp_size, self.moe_ep_size)
        return self


class CommandRFlags(ParallelConversionFlags):
    """Of `models/core/commandr/convert_checkpoint.py`."""

    disable_weight_only_quant_plugin: bool = False
    load_model_on_cpu: bool = False
    use_parallel_embedding: bool = False
    embedding_sharding_dim: Literal[0, 1] | None = None
    log_level: LogLevel | None = None


class FalconFlags(ParallelConversionFlags):
    """Of `models/contrib/falcon/convert_checkpoint.py`."""

    load_by_shard: bool = False
    use_parallel_embedding: bool = False
    embedding_sharding_dim: Literal[0, 1] | None = None
    log_level: LogLevel | None = None


CONVERSION_FLAGS: Mapping[FamilyName, type[ConversionFlags]] = {
    "llama": LlamaFlags,
    "qwen": QwenFlags,
    "gpt": GPTFlags,
    "gemma": GemmaFlags,
    "phi": PhiFlags,
    "commandr": CommandRFlags,
    "falcon": FalconFlags,
}


class QuantizeFlags(Flags):
    """Of `examples/quantization/quantize.py`, which calibrates with ModelOpt.

    Its output is a TensorRT-LLM checkpoint that feeds `trtllm-build`. Left out are NeMo,
    Medusa and the automatic search for a format. `calib_dataset` is required, as its
    default is downloaded: a directory of a local data set, of which the column `text` of
    the split `train` is read.
    """

    model_dir: AbsolutePath
    output_dir: AbsolutePath
    qformat: Literal[
        "nvfp4", "fp8", "fp8_pc_pt", "int8_sq", "int4_awq", "w4a8_awq", "int8_wo", "int4_wo",
        "full_prec",
    ]  # fmt: skip
    calib_dataset: AbsolutePath
    kv_cache_dtype: Literal["int8", "fp8"] | None = None
    dtype: DType = "auto"
    tp_size: Count = 1
    pp_size: Count = 1
    cp_size: Count = 1
    device: Literal["cuda", "cpu"] | None = None
    device_map: Literal["auto", "sequential", "cpu", "gpu"] | None = None
    calib_size: Count | None = None
    calib_max_seq_length: Count | None = None
    tokenizer_max_seq_length: Count | None = None
    batch_size: Count | None = None
    awq_block_size: Count | None = None
    quantize_lm_head: bool = False
    seed: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _local_data(self) -> QuantizeFlags:
        if (name := special_data_set(self.calib_dataset)) is not None:
            raise ValueError(f"{self.calib_dataset} reads as the public data set {name}")
        return self


class BuildFlags(Flags):
    """Of `trtllm-build`.

    It has no flag for parallelism, which comes from the checkpoint, none for the GPU,
    which is the one it runs on, and none for the tokenizer, which no engine holds.
    `output_timing_cache` is required, as its default lands in the working directory.
    """

    checkpoint_dir: AbsolutePath
    output_dir: AbsolutePath
    output_timing_cache: AbsolutePath
    input_timing_cache: AbsolutePath | None = None

    max_batch_size: Count | None = None
    max_input_len: Count | None = None
    max_seq_len: Count | None = None
    max_num_tokens: Count | None = None
    opt_num_tokens: Count | None = None
    max_beam_width: Count | None = None
    max_encoder_input_len: Count | None = None
    max_prompt_embedding_table_size: Annotated[int, Field(ge=0)] | None = None
    kv_cache_type: Literal["continuous", "paged", "disabled"] | None = None
    tokens_per_block: Count | None = None
    logits_dtype: Literal["float16", "float32"] | None = None
    gather_context_logits: bool = False
    gather_all_token_logits: bool = False

    profiling_verbosity: Literal["layer_names_only", "detailed", "none"] | None = None
    strip_plan: bool = False
    weight_sparsity: bool = False
    weight_streaming: bool = False
    fast_build: bool = False
    workers: Count | None = None
    log_level: LogLevel | None = None
    enable_debug_output: bool = False
    visualize_network: AbsolutePath | None = None
    dry_run: bool = False
    monitor_memory: bool = False

    lora_dir: tuple[AbsolutePath, ...] = ()
    lora_ckpt_source: Literal["hf", "nemo"] | None = None
    lora_target_modules: tuple[str, ...] = ()
    max_lora_rank: Count | None = None
    speculative_decoding_mode: (
        Literal[
            "draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens",
            "eagle",
        ] | None
    ) = None  # fmt: skip
    max_draft_len: Annotated[int, Field(ge=0)] | None = None

    bert_attention_plugin: PluginType | None = None
    gpt_attention_plugin: PluginType | None = None
    gemm_plugin: PluginType | Literal["fp8", "nvfp4"] | None = None
    gemm_swiglu_plugin: Literal["fp8", "disable"] | None = None
    fp8_rowwise_gemm_plugin: PluginType | None = None
    lora_plugin: PluginType | None = None
    moe_plugin: PluginType | None = None
    mamba_conv1d_plugin: PluginType | None = None
    nccl_plugin: PluginType | None = None
    low_latency_gemm_plugin: Literal["fp8", "disable"] | None = None
    low_latency_gemm_swiglu_plugin: Literal["fp8", "disable"] | None = None
    gemm_allreduce_plugin: Literal["float16", "bfloat16", "disable"] | None = None

    dora_plugin: Switch | None = None
    context_fmha: Switch | None = None
    bert_context_fmha_fp32_acc: Switch | None = None
    remove_input_padding: Switch | None = None
    use_paged_context_fmha: Switch | None = None
    use_fp8_context_fmha: Switch | None = None
    fuse_fp4_quant: Switch | None = None
    multiple_profiles: Switch | None = None
    paged_state: Switch | None = None
    # "StreamingLLM is no longer supported" is all that "enable" brings.
    streamingllm: Literal["disable"] | None = None
    norm_quant_fusion: Switch | None = None
    reduce_fusion: Switch | None = None
    user_buffer: Switch | None = None
    use_fused_mlp: Switch | None = None
    pp_reduce_scatter: Switch | None = None


def _check_experts(tensor: int, expert_tensor: int | None, expert: int | None) -> None:
    """The scripts assert that `moe_tp_size * moe_ep_size == tp_size`; one alone is deduced."""
    given = [size for size in (expert_tensor, expert) if size is not None]
    product = given[0] * given[1] if len(given) == 2 else None
    if (product is not None and product != tensor) or any(tensor % size for size in given):
        raise ValueError(f"moe_tp_size * moe_ep_size must be tp_size, which is {tensor}")


def _check_calibration(smoothquant: float | None, int8_kv_cache: bool, data: Path | None) -> None:
    if (smoothquant is not None or int8_kv_cache) and data is None:
        raise ValueError("calib_dataset is needed: its default is downloaded")
