"""Where things run and live: read from the environment, each with a default.

Set a value as `LLMOPS_<NAME>`, for example `LLMOPS_STATE=/srv/llmops`. `llmops
settings` prints the effective ones.
"""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from llmops_assets.errors import SettingsError


class Settings(BaseSettings):
    """Effective settings; immutable once read."""

    model_config = SettingsConfigDict(env_prefix="LLMOPS_", frozen=True, extra="ignore")

    state: Path = Field(
        default=Path(".llmops"),
        description="Folder of everything the local stack keeps: store, databases, slots, logs.",
    )
    models: Path = Field(
        default=Path("models"),
        description="Folder of model specs, `<name>.yaml` each.",
    )
    sources: Path | None = Field(
        default=None,
        description="Folder that specs may take weights and data from, beside the one that "
        "holds the folder of specs.",
    )
    git_repository: str | None = Field(
        default=None,
        description="Repository whose pushes make releases: a path, or an https or ssh URL. "
        "Unset: pushes make none.",
    )
    git_branch: str = Field(
        default="main", min_length=1, description="Branch of LLMOPS_GIT_REPOSITORY that counts."
    )
    git_models: str = Field(
        default="models",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$",
        description="Folder of model specs in LLMOPS_GIT_REPOSITORY, from its root.",
    )
    git_timeout_seconds: float = Field(
        default=30.0, gt=0, description="Limit of one call of git to LLMOPS_GIT_REPOSITORY."
    )
    registry: str = Field(
        default="mlflow",
        pattern=r"^(mlflow|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*)$",
        description="Model registry: mlflow, or package.module:factory of another one; see "
        "docs/registries.md.",
    )
    registry_poll_seconds: float = Field(
        default=60.0,
        gt=0,
        description="How often the model registry is asked for new versions; a webhook asks at "
        "once.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="Secret that MLflow signs its webhooks with. Unset: no receiver is started.",
    )
    webhook_port: int | None = Field(
        default=None, description="Receiver of webhooks. Unset: 8082, or a free port."
    )
    alertmanager_url: str | None = Field(
        default=None,
        description="Alertmanager whose alerts roll back or scale. Unset: the specs' service "
        "objectives, measured here, take its place.",
    )
    keys: Path | None = Field(
        default=None,
        description="Folder of the keys that sign evidence and packages. Unset: keys in the "
        "state folder.",
    )
    signer: str | None = Field(
        default=None,
        description="What signs evidence and packages: unix:/path of `llmops signer`, or a URI of "
        "a key service such as awskms:... Unset: the key files in LLMOPS_KEYS.",
    )
    openlineage_url: str | None = Field(
        default=None,
        description="OpenLineage server that is told what was made from what. Unset: none is.",
    )
    policy: Path | None = Field(
        default=None,
        description="YAML file of the organisation's policy: allowed licences, and floors that "
        "a spec's gates may not be below.",
    )
    approvers_ref: str | None = Field(
        default=None,
        pattern=r"^refs/(heads|remotes)/[A-Za-z0-9][A-Za-z0-9._/-]*$",
        description="Protected git ref, such as refs/heads/approvers, whose approvers.yaml says "
        "who may approve what: of LLMOPS_GIT_REPOSITORY, or of the repository that holds "
        "LLMOPS_MODELS. Unset: anybody may, unsigned.",
    )
    approval_days: float = Field(
        default=7.0, gt=0, description="How long an approval that is signed here counts."
    )
    unsigned_approvals: bool = Field(
        default=True,
        description="Whether approvals in a name that somebody typed count. With "
        "LLMOPS_APPROVERS_REF they never do.",
    )
    aiperf: Path | None = Field(
        default=None,
        description="The aiperf command of a virtual environment of its own; needed by specs "
        "whose latency AIPerf measures.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address that local servers bind. Loopback, as none of them authenticates.",
    )
    dagster_port: int | None = Field(
        default=None, description="Dagster UI. Unset: 3000, or a free port when that is taken."
    )
    mlflow_port: int | None = Field(
        default=None, description="MLflow. Unset: 5000, or a free port when that is taken."
    )
    gateway_port: int | None = Field(
        default=None,
        description="Production traffic. Unset: 8080, or a free port when that is taken.",
    )
    staging_gateway_port: int | None = Field(
        default=None,
        description="Staging traffic. Unset: 8081, or a free port when that is taken.",
    )
    http_timeout_seconds: float = Field(
        default=10.0, gt=0, description="Limit of one HTTP call between parts of the platform."
    )
    slot_ready_timeout_seconds: float = Field(
        default=120.0, gt=0, description="How long a serving slot may take to load a package."
    )
    drain_seconds: float = Field(
        default=5.0,
        ge=0,
        description="How long a slot that left the route may finish its running requests.",
    )
    tool_timeout_seconds: float = Field(
        default=4 * 3600.0, gt=0, description="Limit of one training, conversion or build."
    )
    tool_niceness: int = Field(
        default=10,
        ge=0,
        le=19,
        description="Niceness of training and builds, so that what serves here keeps its latency.",
    )
    gpu_hour_price: Decimal | None = Field(
        default=None,
        ge=0,
        description="Price of one GPU for an hour, in any one currency; unset: engines are "
        "reported with GPU seconds and no cost.",
    )
    gpu_image_digest: str | None = Field(
        default=None,
        pattern=r"^sha256:[0-9a-f]{64}$",
        description="Digest of the TensorRT-LLM image that steps on GPUs run in, which must be "
        "the one that serves. No process can find out its own; TensorRT-LLM needs it.",
    )
    tensorrt_llm_python: Path | None = Field(
        default=None,
        description="Python that has TensorRT-LLM, where this platform runs in a virtual "
        "environment beside it. Unset: the one of this process if it has TensorRT-LLM, else "
        "python3 on the PATH outside of that environment.",
    )
    timing_caches: Path | None = Field(
        default=None,
        description="Folder of TensorRT's timing caches, kept between builds. Unset: "
        "timing-caches in the state folder.",
    )
    threads: int = Field(
        default=2, ge=1, description="CPU threads of one training, evaluation or serving process."
    )

    @field_validator("state", "models", "sources", "keys", "policy", "aiperf", "timing_caches")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # Servers run with other working directories than the person who set this.
        return None if value is None else value.expanduser().resolve()

    @property
    def store(self) -> Path:
        """Folder of the artifact store."""
        return self.state / "store"

    @property
    def key_folder(self) -> Path:
        """Folder of the keys that sign evidence and packages, and of the trust root."""
        return self.keys or self.state / "keys"

    @property
    def evidence_index(self) -> Path:
        """The local index of the evidence log; outside the store, as it remembers the log."""
        return self.state / "evidence" / "index.sqlite"

    @property
    def work(self) -> Path:
        """Folder of unfinished work, one folder per action."""
        return self.state / "work"

    @property
    def timing_cache_folder(self) -> Path:
        """Folder of TensorRT's timing caches."""
        return self.timing_caches or self.state / "timing-caches"

    @property
    def slots(self) -> Path:
        """Folder of serving slots: `<environment>/<model>/<colour>`."""
        return self.state / "slots"

    @property
    def gateway(self) -> Path:
        """Folder of the gateway's configuration files and admin socket."""
        return self.state / "gateway"

    @property
    def cold(self) -> Path:
        """Folder that stands for cold storage on one machine."""
        return self.state / "cold"

    @property
    def logs(self) -> Path:
        """Folder of the logs of servers and tools."""
        return self.state / "logs"

    @property
    def dagster_home(self) -> Path:
        """`DAGSTER_HOME` of the local stack."""
        return self.state / "dagster"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once from the environment.

    Raises:
        SettingsError: a value is not valid.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError(
            "The settings in the environment are not valid",
            found="; ".join(
                f"LLMOPS_{detail['loc'][0]}".upper()
                + f"={_shown(detail['loc'][0], detail['input'])}: {detail['msg']}"
                for detail in error.errors()
            ),
            cure="correct or unset these variables",
        ) from error


def _shown(name: int | str, value: object) -> object:
    """A value as messages may have it: also a secret that is not valid stays one."""
    return "(hidden)" if "SecretStr" in str(Settings.model_fields[str(name)].annotation) else value
