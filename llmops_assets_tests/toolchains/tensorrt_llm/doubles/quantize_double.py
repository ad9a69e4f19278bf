"""A double of `examples/quantization/quantize.py`, which quantises with ModelOpt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llmops_assets_tests.toolchains.tensorrt_llm.doubles.behaviour import Behaviour, strict_parser
from llmops_assets_tests.toolchains.tensorrt_llm.doubles.layouts import (
    checkpoint_config,
    mapping_of,
    read_hugging_face,
    require_local,
    write_checkpoint,
)

TOOL = "quantize.py"
ALGORITHMS: dict[str, str | None] = {
    "nvfp4": "NVFP4",
    "fp8": "FP8",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "int4_awq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
    "int8_wo": "W8A16",
    "int4_wo": "W4A16",
    "full_prec": None,
}
WITHOUT_CALIBRATION = ("int8_wo", "int4_wo", "full_prec")


def parser() -> argparse.ArgumentParser:
    flags = strict_parser(TOOL)
    add = flags.add_argument
    for name in (
        "--model_dir", "--nemo_ckpt_path", "--medusa_model_dir", "--autoq_format",
    ):  # fmt: skip
        add(name, type=str, default=None)
    add("--output_dir", type=str, default="exported_model")
    add("--qformat", choices=tuple(ALGORITHMS), default="full_prec")
    for name, choices in {
        "--dtype": ("auto", "float16", "bfloat16", "float32"),
        "--device": ("cuda", "cpu"),
        "--device_map": ("auto", "sequential", "cpu", "gpu"),
        "--decoder_type": ("gptnext", "llama"),
    }.items():
        add(name, choices=choices, default=choices[0])
    add("--kv_cache_dtype", choices=("int8", "fp8"), default=None)
    for name, default in {
        "--calib_dataset": "cnn_dailymail", "--medusa_hidden_act": "silu",
    }.items():  # fmt: skip
        add(name, type=str, default=default)
    for name, default in {
        "--calib_size": 512, "--calib_max_seq_length": 512, "--tokenizer_max_seq_length": 2048,
        "--batch_size": 1, "--tp_size": 1, "--pp_size": 1, "--cp_size": 1,
        "--awq_block_size": 128, "--seed": 1234, "--calib_tp_size": 1, "--calib_pp_size": 1,
        "--num_medusa_heads": 4, "--num_medusa_layers": 1, "--max_draft_len": 63,
    }.items():  # fmt: skip
        add(name, type=int, default=default)
    add("--auto_quantize_bits", type=float, default=None)
    for name in ("--quantize_lm_head", "--quant_medusa_head"):
        add(name, action="store_true")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(arguments)
    if flags.model_dir is None:
        # Checked behind the parser, so not with its exit code.
        raise ValueError("One of source checkpoint (model_dir, nemo_ckpt_path) must be specified")
    behaviour = Behaviour(TOOL)
    mixed = flags.auto_quantize_bits is not None
    calibrates = mixed or flags.kv_cache_dtype or flags.qformat not in WITHOUT_CALIBRATION
    if calibrates:
        require_local(flags.calib_dataset)
    model, seed = read_hugging_face(behaviour, Path(flags.model_dir))
    if calibrates:
        print("Starting quantization...", flush=True)
        for batch in range(2):
            print(f"Calibrating batch {batch}", flush=True)
        print("Quantization done. Total time used: 0.01 s.", flush=True)
    config = checkpoint_config(
        model,
        dtype=flags.dtype,
        mapping=mapping_of(flags.tp_size, flags.pp_size, flags.cp_size),
        quantization={
            "quant_algo": "MIXED_PRECISION" if mixed else ALGORITHMS[flags.qformat],
            "kv_cache_quant_algo": flags.kv_cache_dtype and flags.kv_cache_dtype.upper(),
            "group_size": flags.awq_block_size,
        },
    )
    write_checkpoint(behaviour, Path(flags.output_dir), config, f"{seed} {flags.qformat}")
    behaviour.leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
