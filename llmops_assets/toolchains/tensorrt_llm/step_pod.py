"""The pods in which a release's GPU steps run on Kubernetes.

Which image, how many GPUs and of which kind stands in the release's spec, so it cannot be in
tags of the code. Of all that Dagster offers, the run config of `k8s_job_executor` reaches the
pods of single steps and wins over the rest (`execution.config.per_step_k8s_config`; tags of a
run do not reach them). Whoever requests a run of the job `release` puts `step_configs` there,
once the executor is `k8s_job_executor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from llmops_assets.errors import ToolchainError
from llmops_assets.settings import Settings
from llmops_assets.spec import TensorRTLLMEngine
from llmops_assets.toolchains.base import Step
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUS

GPU = "nvidia.com/gpu"
"""Resource and taint, as NVIDIA's device plugin and operator name them."""
PRODUCT = "nvidia.com/gpu.product"
"""Label of nodes, by NVIDIA's GPU feature discovery."""
SHARED_MEMORY = "shared-memory"
SHARED_MEMORY_GIB_PER_RANK = 8
"""Assumed of what the ranks exchange through /dev/shm, of which a pod has 64 MiB unasked."""


def step_configs(engine: TensorRTLLMEngine, settings: Settings) -> Mapping[str, Mapping[str, Any]]:
    """`per_step_k8s_config` of a run, by op: `gpu_step_config` for each step of the toolchain.

    Raises:
        ToolchainError: see `gpu_step_config`.
    """
    config = gpu_step_config(engine, settings)
    return dict.fromkeys(get_args(Step), config)


def gpu_step_config(engine: TensorRTLLMEngine, settings: Settings) -> Mapping[str, Any]:
    """A step's pod, in the form of the tag `dagster-k8s/config`.

    The spec's image by digest; the platform's own environment must be in it, see
    docs/tensorrt_llm.md. A GPU for each rank, on a node that has the spec's kind.

    Args:
        engine: the spec's section.
        settings: name the image's digest where the spec does not.

    Raises:
        ToolchainError: nobody fixed the image's digest.
    """
    image, _, digest = engine.image.partition("@")
    digest = digest or settings.gpu_image_digest
    if digest is None:
        raise ToolchainError(
            f"Nobody said which bytes {image} is",
            expected="an image by its digest, as an engine runs only in the one that built it",
            found="a tag, which can move between two steps",
            cure="append @sha256:… to engine.image in the spec, or set LLMOPS_GPU_IMAGE_DIGEST",
        )
    ranks = engine.parallelism.world_size
    gpus = {GPU: str(ranks)}
    products = {"key": PRODUCT, "operator": "In", "values": list(GPUS[engine.gpu].products)}
    return {
        "container_config": {
            "image": f"{image}@{digest}",
            "resources": {"limits": gpus, "requests": gpus},
            "env": [{"name": "LLMOPS_GPU_IMAGE_DIGEST", "value": digest}],
            "volume_mounts": [{"name": SHARED_MEMORY, "mount_path": "/dev/shm"}],
        },
        "pod_spec_config": {
            # One name of ours may be several products, which a node selector cannot say.
            "affinity": {
                "node_affinity": {
                    "required_during_scheduling_ignored_during_execution": {
                        "node_selector_terms": [{"match_expressions": [products]}]
                    }
                }
            },
            "tolerations": [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}],
            "volumes": [
                {
                    "name": SHARED_MEMORY,
                    "empty_dir": {
                        "medium": "Memory",
                        "size_limit": f"{SHARED_MEMORY_GIB_PER_RANK * ranks}Gi",
                    },
                }
            ],
        },
    }
