"""The pods of GPU steps ask for what the spec says, in a form that dagster-k8s takes."""

from __future__ import annotations

import json

import pytest
from dagster import Permissive, Shape
from dagster._config import validate_config

from llmops_assets.definitions import definitions_for
from llmops_assets.errors import ToolchainError
from llmops_assets.platform import Platform
from llmops_assets.settings import Settings
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUS
from llmops_assets.toolchains.tensorrt_llm.step_pod import gpu_step_config, step_configs

from .engines import engine

DIGEST = "sha256:" + "a" * 64
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
# USER_DEFINED_K8S_CONFIG_SCHEMA of dagster_k8s/job.py 0.29, without its `merge_behavior`.
# Where dagster-k8s is installed, its own is asked, and Kubernetes' models behind it.
SCHEMA = Shape(
    {
        name: Permissive()
        for name in (
            "container_config", "pod_template_spec_metadata", "pod_spec_config", "job_config",
            "job_metadata", "job_spec_config",
        )
    }
)  # fmt: skip


def test_pod_is_what_the_spec_says() -> None:
    """All of it, exactly: a key that Kubernetes does not know is dropped without a word."""
    section = engine(parallelism={"tensor": 4}, gpu="a100-80gb")
    assert gpu_step_config(section, Settings(gpu_image_digest=DIGEST)) == {
        "container_config": {
            "image": f"{IMAGE}@{DIGEST}",
            "resources": {"limits": {"nvidia.com/gpu": "4"}, "requests": {"nvidia.com/gpu": "4"}},
            "env": [{"name": "LLMOPS_GPU_IMAGE_DIGEST", "value": DIGEST}],
            "volume_mounts": [{"name": "shared-memory", "mount_path": "/dev/shm"}],
        },
        "pod_spec_config": {
            "affinity": {
                "node_affinity": {
                    "required_during_scheduling_ignored_during_execution": {
                        "node_selector_terms": [
                            {
                                "match_expressions": [
                                    {
                                        "key": "nvidia.com/gpu.product",
                                        "operator": "In",
                                        "values": [
                                            "NVIDIA-A100-SXM4-80GB",
                                            "NVIDIA-A100-80GB-PCIe",
                                        ],
                                    }
                                ]
                            }
                        ]
                    }
                }
            },
            "tolerations": [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
            ],
            "volumes": [
                {
                    "name": "shared-memory",
                    "empty_dir": {"medium": "Memory", "size_limit": "32Gi"},
                }
            ],
        },
    }


def test_digest_of_the_spec_wins() -> None:
    """It is what the release was asked for; the settings are those of today."""
    other = "sha256:" + "f" * 64
    config = gpu_step_config(engine(image=f"{IMAGE}@{other}"), Settings(gpu_image_digest=DIGEST))
    assert config["container_config"]["image"] == f"{IMAGE}@{other}"
    assert config["container_config"]["env"][0]["value"] == other


def test_image_without_a_digest_starts_no_pod() -> None:
    """A tag may move between the pod that builds and the one that validates."""
    with pytest.raises(ToolchainError, match="which bytes"):
        gpu_step_config(engine(), Settings(gpu_image_digest=None))


def test_every_gpu_has_nodes() -> None:
    """A pod that no node fits waits for ever; each product is one GPU of ours alone."""
    products = [product for gpu in GPUS.values() for product in gpu.products]
    assert all(gpu.products for gpu in GPUS.values())
    assert len(products) == len(set(products))
    # As read on one: NVIDIA H100 80GB HBM3.
    assert GPUS["h100-sxm"].products == ("NVIDIA-H100-80GB-HBM3",)


def test_ops_are_those_of_the_job() -> None:
    """A config for an op that does not exist is ignored, and its step would have no GPU."""
    configs = step_configs(engine(), Settings(gpu_image_digest=DIGEST))
    ops = {
        node.name for node in definitions_for(Platform(Settings())).resolve_job_def("release").nodes
    }
    assert set(configs) <= ops
    assert set(configs) == {"converted_weights", "engine", "engine_validation", "packaged_model"}


def test_config_fits_the_schema() -> None:
    """It is JSON, of the keys that dagster-k8s takes."""
    config = gpu_step_config(engine(), Settings(gpu_image_digest=DIGEST))
    assert validate_config(SCHEMA, json.loads(json.dumps(config))).success
    assert not validate_config(SCHEMA, {**config, "node_selector": {}}).success


def test_config_is_what_kubernetes_takes() -> None:
    """Keys of containers and pods, by Kubernetes' own models."""
    job = pytest.importorskip("dagster_k8s.job", reason="dagster-k8s comes with a cluster")
    config = gpu_step_config(engine(), Settings(gpu_image_digest=DIGEST))
    job.UserDefinedDagsterK8sConfig.from_dict(dict(config))
