"""The files that the doubles read and write: checkpoints and engines, in their real layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmops_assets_tests.toolchains.tensorrt_llm.doubles.behaviour import Behaviour

WEIGHT_BYTES = 4096
"""Of one rank."""
ENGINE_MAGIC = b"a double of a TensorRT engine\n"
ENGINE_END = b"\nend of the double"
TENSORRT = "10.14.1.48"

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def read_hugging_face(behaviour: Behaviour, directory: Path) -> tuple[dict[str, Any], str]:
    """A model's configuration, and a digest of its weights.

    Its `auto_map` is obeyed, as the real tools do (`trust_remote_code=True`): the Python
    file that it names is run.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for name in config.get("auto_map", {}).values():
        source = (directory / (name.partition(".")[0] + ".py")).read_text(encoding="utf-8")
        exec(compile(source, name, "exec"), {})
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"no *.safetensors in {directory}")
    digest = hashlib.sha256()
    for path in weights:
        digest.update(path.read_bytes())
    print(f"[{behaviour.tool}] loaded {directory}", flush=True)
    return config, digest.hexdigest()


def checkpoint_config(
    model: Mapping[str, Any],
    *,
    dtype: str,
    mapping: Mapping[str, int],
    quantization: Mapping[str, Any],
) -> dict[str, Any]:
    """`config.json` of a converted checkpoint."""
    heads = model["num_attention_heads"]
    return {
        "architecture": model["architectures"][0],
        "dtype": model.get("torch_dtype", "float16") if dtype == "auto" else dtype,
        "logits_dtype": "float32",
        "vocab_size": model["vocab_size"],
        "hidden_size": model["hidden_size"],
        "num_hidden_layers": model["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": model.get("num_key_value_heads") or heads,
        "head_size": model.get("head_dim") or model["hidden_size"] // heads,
        "intermediate_size": model["intermediate_size"],
        "hidden_act": model.get("hidden_act", "silu"),
        "norm_epsilon": model.get("rms_norm_eps", 1e-6),
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": model["max_position_embeddings"],
        "rotary_embedding_dim": None,
        "qk_layernorm": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "runtime_defaults": None,
        "mapping": dict(mapping),
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": None,
            "group_size": 128,
            "smoothquant_val": 0.5,
            "clamp_val": None,
            "use_meta_recipe": False,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": ["lm_head"],
            **quantization,
        },
        "producer": {"name": "a double of TensorRT-LLM"},
    }


def mapping_of(tp: int, pp: int, cp: int, moe_tp: int = -1, moe_ep: int = -1) -> dict[str, int]:
    """`mapping` of a configuration, with the experts' parallelism worked out."""
    if moe_tp == -1 and moe_ep == -1:
        moe_tp, moe_ep = tp, 1
    elif moe_tp == -1:
        moe_tp = tp // moe_ep
    elif moe_ep == -1:
        moe_ep = tp // moe_tp
    assert moe_tp * moe_ep == tp, f"moe_tp_size * moe_ep_size must equal tp_size {tp}"
    return {
        "world_size": tp * pp * cp,
        "tp_size": tp,
        "pp_size": pp,
        "cp_size": cp,
        "moe_tp_size": moe_tp,
        "moe_ep_size": moe_ep,
    }


def write_checkpoint(
    behaviour: Behaviour, output: Path, config: Mapping[str, Any], seed: str
) -> None:
    """`config.json`, then `rank{r}.safetensors`; with the failures that leave them broken."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", config)
    behaviour.hang("hang_after_config")
    behaviour.speak()
    mapping = config["mapping"]
    ranks = mapping["tp_size"] * mapping["pp_size"]
    write_ranks(
        behaviour,
        [output / f"rank{rank}.safetensors" for rank in range(ranks)],
        [safetensors(f"{seed} {rank}") for rank in range(ranks)],
    )
    if config["quantization"]["quant_algo"] == "MIXED_PRECISION":
        write_json(output / "quant_cfg.json", {"quant_algo": "MIXED_PRECISION"})


def write_ranks(behaviour: Behaviour, paths: list[Path], contents: list[bytes]) -> None:
    """The files of all ranks, as whole as the behaviour allows."""
    if behaviour.is_to("only_config"):
        return
    if behaviour.is_to("extra_rank"):
        paths = [*paths, paths[0].with_name(f"rank{len(paths)}{paths[0].suffix}")]
        contents = [*contents, contents[0]]
    for number, (path, content) in enumerate(zip(paths, contents, strict=True), start=1):
        if number == len(paths):
            if behaviour.is_to("missing_rank"):
                return
            if behaviour.is_to("empty_rank"):
                content = b""
            if behaviour.is_to("cut_off_rank"):
                content = content[: len(content) // 4]
            if behaviour.is_to("hang_in_last_rank"):
                # All but the last byte: the size of the file gives nothing away.
                path.write_bytes(content[:-1])
                behaviour.hang("hang_in_last_rank")
        if path.suffix == ".engine":
            print(f"[TRT-LLM] [I] Serializing engine to {path}...", flush=True)
        path.write_bytes(content)
        if path.suffix == ".engine":
            print("[TRT-LLM] [I] Engine serialized. Total time: 00:00:00", flush=True)


def safetensors(seed: str) -> bytes:
    """A file with one tensor, whose bytes follow from the seed."""
    block = hashlib.sha256(seed.encode()).digest()
    data = (block * (WEIGHT_BYTES // len(block) + 1))[:WEIGHT_BYTES]
    header = json.dumps(
        {
            "__metadata__": {"made_by": "a double of TensorRT-LLM"},
            "transformer.vocab_embedding.weight": {
                "dtype": "U8",
                "shape": [WEIGHT_BYTES],
                "data_offsets": [0, WEIGHT_BYTES],
            },
        }
    ).encode()
    return len(header).to_bytes(8, "little") + header + data


def engine_file(behaviour: Behaviour, rank: int, weights: bytes) -> bytes:
    """`rank{r}.engine`: what TensorRT would want to know when it loads it, and the weights."""
    header = {
        "tensorrt": TENSORRT,
        "compute_capability": behaviour.compute_capability,
        "rank": rank,
    }
    return ENGINE_MAGIC + json.dumps(header).encode() + b"\n" + weights + ENGINE_END


def load_engine(behaviour: Behaviour, directory: Path) -> dict[str, Any]:
    """Loads an engine directory as the runtime does, with its complaints.

    Returns its `config.json`.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "pretrained_config" not in config:
        behaviour.fail("not_an_engine_directory")
    if config["version"] != behaviour.version:
        behaviour.fail(
            "other_tensorrt",
            f"expecting library version {behaviour.version} got {config['version']}, "
            "please rebuild",
        )
    mapping = config["pretrained_config"]["mapping"]
    if mapping["world_size"] > behaviour.gpus:
        behaviour.fail(
            "other_world_size",
            f"AssertionError: Engine world size ({mapping['tp_size']} * {mapping['pp_size']}) "
            f"!= Runtime world size ({behaviour.gpus})",
        )
    for rank in range(mapping["world_size"]):
        path = directory / f"rank{rank}.engine"
        content = path.read_bytes() if path.is_file() else b""
        if not (content.startswith(ENGINE_MAGIC) and content.endswith(ENGINE_END)):
            behaviour.fail("cannot_deserialize")
        header = json.loads(content[len(ENGINE_MAGIC) :].split(b"\n", 1)[0])
        built_for = header["compute_capability"]
        if built_for != behaviour.compute_capability:
            behaviour.fail(
                "other_gpu",
                "The engine plan file is generated on an incompatible device, expecting compute "
                f"{behaviour.compute_capability} got compute {built_for}, please rebuild.",
            )
    return config


def require_local(dataset: str) -> None:
    """The real tools download a dataset that is no folder; here there is no network."""
    if not Path(dataset).is_dir():
        raise ConnectionError(f"Couldn't reach '{dataset}' on the Hub (OfflineModeIsEnabled)")


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """As trtllm-bench reports them."""
    ordered = sorted(values)
    return {
        "minimum": ordered[0],
        "maximum": ordered[-1],
        "average": sum(ordered) / len(ordered),
        **{f"p{share}": ordered[len(ordered) * share // 100] for share in (50, 90, 95, 99)},
    }
