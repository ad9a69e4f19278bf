"""A double of `examples/models/core/llama/convert_checkpoint.py`.

Of the llama family only, which Mixtral uses as well: the flags of other families are not
known in full.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from llmops_assets_tests.toolchains.tensorrt_llm.doubles.behaviour import (
    LOG_LEVELS,
    Behaviour,
    strict_parser,
)
from llmops_assets_tests.toolchains.tensorrt_llm.doubles.layouts import (
    checkpoint_config,
    mapping_of,
    read_hugging_face,
    require_local,
    write_checkpoint,
    write_json,
)

TOOL = "convert_checkpoint.py"
WEIGHT_ONLY = {
    "int8": "W8A16",
    "int4": "W4A16",
    "int8_gptq": "W8A16_GPTQ",
    "int4_gptq": "W4A16_GPTQ",
    "int4_awq": "W4A16_AWQ",
}
# What the real script makes of `--n_head 32` and the like, when it is given no model.
MADE_UP = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}


def parser() -> argparse.ArgumentParser:
    flags = strict_parser(TOOL)
    add = flags.add_argument
    for name in ("--model_dir", "--meta_ckpt_dir", "--quant_ckpt_path"):
        add(name, type=str, default=None)
    for name in ("--tp_size", "--pp_size", "--cp_size", "--workers"):
        add(name, type=int, default=1)
    for name in ("--moe_tp_size", "--moe_ep_size"):
        add(name, type=int, default=-1)
    add("--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto")
    for name, default in {
        "--vocab_size": 32000, "--n_positions": 2048, "--n_layer": 32, "--n_head": 32,
        "--n_embd": 4096, "--inter_size": 11008, "--calib_size": 512,
        "--calib_max_seq_length": 512, "--group_size": 128, "--moe_num_experts": 0,
        "--moe_top_k": 0,
    }.items():  # fmt: skip
        add(name, type=int, default=default)
    for name in ("--n_kv_head", "--multiple_of", "--moe_renorm_mode"):
        add(name, type=int, default=None)
    add("--ffn_dim_multiplier", type=float, default=None)
    add("--rms_norm_eps", type=float, default=1e-6)
    add("--rotary_base", type=float, default=10000.0)
    for name in (
        "--use_weight_only", "--disable_weight_only_quant_plugin", "--use_qserve",
        "--per_channel", "--per_token", "--int8_kv_cache", "--fp8_kv_cache", "--use_fp8",
        "--use_nvfp4", "--use_fp8_rowwise", "--use_meta_fp8_rowwise_recipe", "--per_group",
        "--load_by_shard", "--load_model_on_cpu", "--use_parallel_embedding",
        "--save_config_only", "--remove_duplicated_kv_heads",
    ):  # fmt: skip
        add(name, action="store_true")
    add("--weight_only_precision", choices=tuple(WEIGHT_ONLY), default="int8")
    add("--calib_dataset", type=str, default="ccdv/cnn_dailymail")
    add("--smoothquant", "-sq", type=float, default=None)
    add("--hidden_act", type=str, default="silu")
    add("--embedding_sharding_dim", type=int, choices=(0, 1), default=0)
    add("--output_dir", type=str, default="tllm_checkpoint")
    add("--log_level", choices=LOG_LEVELS, default="info")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)
    behaviour = Behaviour(TOOL)
    if flags.quant_ckpt_path is not None:
        _refuse_activation_order(behaviour, Path(flags.quant_ckpt_path))
    mapping = mapping_of(
        flags.tp_size, flags.pp_size, flags.cp_size, flags.moe_tp_size, flags.moe_ep_size
    )
    quantization = _quantization(flags)
    output = Path(flags.output_dir)
    source = flags.model_dir or flags.meta_ckpt_dir
    if source is None:
        # The trap: a configuration without a model, and exit code 0.
        made_up = {
            **MADE_UP,
            "vocab_size": flags.vocab_size,
            "hidden_size": flags.n_embd,
            "num_hidden_layers": flags.n_layer,
            "num_attention_heads": flags.n_head,
            "intermediate_size": flags.inter_size,
            "max_position_embeddings": flags.n_positions,
        }
        output.mkdir(parents=True, exist_ok=True)
        write_json(
            output / "config.json",
            checkpoint_config(
                made_up, dtype=flags.dtype, mapping=mapping, quantization=quantization
            ),
        )
        return 0
    if flags.smoothquant is not None or flags.int8_kv_cache:
        require_local(flags.calib_dataset)
    model, seed = read_hugging_face(behaviour, Path(source))
    config = checkpoint_config(model, dtype=flags.dtype, mapping=mapping, quantization=quantization)
    config["use_parallel_embedding"] = flags.use_parallel_embedding
    config["embedding_sharding_dim"] = flags.embedding_sharding_dim
    if flags.save_config_only:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "config.json", config)
        return 0
    write_checkpoint(behaviour, output, config, f"{seed} {quantization}")
    print("Total time of converting checkpoints: 00:00:00", flush=True)
    behaviour.leave()
    return 0


def _quantization(flags: argparse.Namespace) -> dict[str, str | int | None]:
    algorithm = None
    if flags.use_weight_only:
        algorithm = WEIGHT_ONLY[flags.weight_only_precision]
    elif flags.smoothquant is not None:
        kind = ("PER_CHANNEL" if flags.per_channel else "PER_TENSOR") + (
            "_PER_TOKEN" if flags.per_token else "_PER_TENSOR"
        )
        algorithm = f"W8A8_SQ_{kind}_PLUGIN"
    elif flags.use_fp8_rowwise:
        algorithm = "FP8_PER_CHANNEL_PER_TOKEN"
    elif flags.use_fp8:
        algorithm = "FP8"
    elif flags.use_nvfp4:
        algorithm = "NVFP4"
    cache = "INT8" if flags.int8_kv_cache else "FP8" if flags.fp8_kv_cache else None
    return {
        "quant_algo": algorithm, "kv_cache_quant_algo": cache, "group_size": flags.group_size
    }  # fmt: skip


def _refuse_activation_order(behaviour: Behaviour, checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("quantization_config", {}).get("desc_act"):
            behaviour.fail("gptq_desc_act")


if __name__ == "__main__":
    raise SystemExit(main())
