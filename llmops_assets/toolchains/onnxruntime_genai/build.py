"""Builds an engine from converted weights; run through the tool runner.

Run as `python -m llmops_assets.toolchains.onnxruntime_genai.build …`. int8 and int4
replace every matrix multiplication with constant weights by `MatMulNBits` of ONNX Runtime's
contributed operators: weights of so many bits, symmetric, one scale per block, and int8
accumulation (accuracy level 4). fp32 keeps the model as it is. The result depends on
nothing but the input's bytes and the parameters.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from onnxruntime.quantization.quant_utils import QuantFormat

from llmops_assets.develop.directory import whole_directory
from llmops_assets.errors import LLMOpsError
from llmops_assets.toolchains.onnxruntime_genai.engine_directory import MODEL
from llmops_assets.tools import report_progress

BITS = {"int8": 8, "int4": 4}
"""Of one weight, by the precisions that quantise."""


def build(converted: Path, output: Path, precision: str, block_size: int) -> None:
    """Writes the engine's files, all but its sidecar.

    Args:
        converted: what the model builder wrote, in fp32.
        output: directory to write; must not exist.
        precision: `int4`, `int8` or `fp32`.
        block_size: weights that share one scale; not for fp32.

    Raises:
        LLMOpsError: the output exists.
    """
    bits = None if precision == "fp32" else BITS[precision]
    with whole_directory(output) as folder:
        for source in sorted(converted.iterdir()):
            # The model's external data is named after it: model.onnx.data.
            if bits is None or not source.name.startswith(MODEL):
                shutil.copyfile(source, folder / source.name)
        if bits is not None:
            _quantise(converted / MODEL, folder / MODEL, bits, block_size)


def _quantise(source: Path, target: Path, bits: int, block_size: int) -> None:
    report_progress(stage="loading")
    quantizer = MatMulNBitsQuantizer(
        onnx.load(str(source)),
        algo_config=DefaultWeightOnlyQuantConfig(
            bits=bits,
            block_size=block_size,
            is_symmetric=True,
            accuracy_level=4,
            quant_format=QuantFormat.QOperator,
        ),
    )
    report_progress(stage="quantising")
    quantizer.process()
    report_progress(stage="saving")
    quantised: Any = quantizer.model  # an ONNXModel by now, declared as a ModelProto
    quantised.save_model_to_file(str(target), use_external_data_format=True)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="llmops_assets.toolchains.onnxruntime_genai.build", description=__doc__
    )
    parser.add_argument("--converted", required=True, type=Path, help="converted weights")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--precision", required=True, choices=(*BITS, "fp32"))
    parser.add_argument(
        "--block-size", required=True, type=int, help="weights that share one scale"
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        build(options.converted, options.output, options.precision, options.block_size)
    except LLMOpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
