"""The typed flags refuse by themselves what a tool would take wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from llmops_assets.toolchains.tensorrt_llm.flags import (
    BuildFlags,
    CommandRFlags,
    FalconFlags,
    Flags,
    GemmaFlags,
    GPTFlags,
    LlamaFlags,
    PhiFlags,
    QuantizeFlags,
    QwenFlags,
)

PLACES = {"model_dir": "/a", "output_dir": "/b"}
BUILD = {"checkpoint_dir": "/a", "output_dir": "/b", "output_timing_cache": "/c"}
QUANTIZE = {**PLACES, "qformat": "fp8", "calib_dataset": "/d"}


@pytest.mark.parametrize(
    ("flags", "values", "message"),
    [
        # Without a model, Llama's script invents one and exits with 0.
        (LlamaFlags, {"output_dir": "/b"}, "model_dir"),
        (LlamaFlags, {**PLACES, "n_layer": 2}, "n_layer"),
        (LlamaFlags, {**PLACES, "output_dir": "b"}, "is relative"),
        (LlamaFlags, {**PLACES, "use_weight_only": True}, "only together"),
        (LlamaFlags, {**PLACES, "weight_only_precision": "int8"}, "only together"),
        (LlamaFlags, {**PLACES, "tp_size": 4, "moe_tp_size": 2, "moe_ep_size": 4}, "tp_size"),
        (LlamaFlags, {**PLACES, "tp_size": 4, "moe_ep_size": 3}, "tp_size"),
        (LlamaFlags, {**PLACES, "smoothquant": 0.5}, "calib_dataset is needed"),
        (LlamaFlags, {**PLACES, "smoothquant": 1.5}, "less than or equal to 1"),
        (LlamaFlags, {**PLACES, "tp_size": 0}, "greater than or equal to 1"),
        (QwenFlags, {**PLACES, "int8_kv_cache": True}, "calib_dataset is needed"),
        (QwenFlags, {**PLACES, "int8_kv_cache": True, "calib_dataset": "c4"}, "is relative"),
        (QwenFlags, {**PLACES, "fp8_kv_cache": True}, "fp8_kv_cache"),
        (QwenFlags, {**PLACES, "tp_size": 2, "moe_tp_size": 4}, "tp_size"),
        (GPTFlags, {**PLACES, "int8_kv_cache": True}, "calib_dataset is needed"),
        (GPTFlags, {**PLACES, "cp_size": 2}, "cp_size"),
        (GemmaFlags, {**PLACES, "tp_size": 2}, "tp_size"),
        (GemmaFlags, {**PLACES, "smoothquant": 0.5}, "calib_dataset is needed"),
        (PhiFlags, {**PLACES, "pp_size": 2}, "pp_size must be 1"),
        (PhiFlags, {**PLACES, "tp_size": 4, "moe_ep_size": 8}, "tp_size"),
        (
            PhiFlags,
            {**PLACES, "use_weight_only": True, "weight_only_precision": "int4_gptq"},
            "int8, int4",
        ),
        (CommandRFlags, {**PLACES, "smoothquant": 0.5}, "smoothquant"),
        (FalconFlags, {**PLACES, "load_model_on_cpu": True}, "load_model_on_cpu"),
        (QuantizeFlags, {**PLACES, "qformat": "fp8"}, "calib_dataset"),
        (QuantizeFlags, {**QUANTIZE, "calib_dataset": "cnn_dailymail"}, "is relative"),
        (QuantizeFlags, {**QUANTIZE, "calib_dataset": "/d/pileval"}, "public data set pileval"),
        (QuantizeFlags, {**QUANTIZE, "qformat": "int4"}, "qformat"),
        (QuantizeFlags, {**QUANTIZE, "kv_cache_dtype": "nvfp4"}, "kv_cache_dtype"),
        # Its default lands in the working directory.
        (BuildFlags, {"checkpoint_dir": "/a", "output_dir": "/b"}, "output_timing_cache"),
        (BuildFlags, {**BUILD, "output_timing_cache": "model.cache"}, "is relative"),
        (BuildFlags, {**BUILD, "tp_size": 2}, "tp_size"),
        (BuildFlags, {**BUILD, "max_output_len": 2}, "max_output_len"),
        (BuildFlags, {**BUILD, "auto_parallel": 2}, "auto_parallel"),
        (BuildFlags, {**BUILD, "paged_kv_cache": "enable"}, "paged_kv_cache"),
        (BuildFlags, {**BUILD, "streamingllm": "enable"}, "streamingllm"),
        (BuildFlags, {**BUILD, "gemm_swiglu_plugin": "auto"}, "gemm_swiglu_plugin"),
    ],
)
def test_refused(flags: type[Flags], values: Mapping[str, Any], message: str) -> None:
    """Each of these would be an argparse error, a download, or a checkpoint of nothing."""
    with pytest.raises(ValidationError, match=message):
        flags.model_validate(values)


def test_how_flags_are_rendered() -> None:
    """A flag alone, with a value, with several; none for what is left to the tool."""
    flags = BuildFlags.model_validate(
        {**BUILD, "max_batch_size": 8, "dry_run": True, "lora_target_modules": ("attn_q", "attn_v")}
    )
    assert flags.arguments() == [
        *("--checkpoint_dir", "/a", "--output_dir", "/b", "--output_timing_cache", "/c"),
        *("--max_batch_size", "8", "--dry_run", "--lora_target_modules", "attn_q", "attn_v"),
    ]
    assert GemmaFlags.model_validate(PLACES).arguments()[-4:] == [
        *("--ckpt-type", "hf", "--world-size", "1")
    ]
