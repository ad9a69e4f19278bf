"""Checkpoints from MLflow, as people really register them, and from a double of the Hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from safetensors.numpy import save

from llmops_assets.develop.checkpoints import inspect
from llmops_assets.develop.fetch import checkpoint_files, fetch_mlflow
from llmops_assets.develop.weights import from_huggingface
from llmops_assets.errors import DataError, RegistryError, ToolError
from llmops_assets.spec import HuggingFaceWeights, parse_spec
from llmops_assets.storage.columns import Workshop
from llmops_assets.storage.store import content_digest
from llmops_assets.tools import ToolRunner

from ..hub_double import HubDouble, Repository, hub_double
from ..tiny_llama import SPEC, write_checkpoint

pytestmark = pytest.mark.timeout(120)
REVISION = "ab" * 20
REPOSITORY = "tiny/llama"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint, as `save_pretrained` writes it."""
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_checkpoint(directory)
    return directory


@pytest.fixture(autouse=True)
def mlflow_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a fetch sets for its whole process ends with the test; so does what MLflow writes."""
    monkeypatch.chdir(tmp_path)
    yield
    mlflow.set_tracking_uri("")


@pytest.fixture(scope="module")
def client(mlflow_url: str) -> MlflowClient:
    return MlflowClient(mlflow_url, mlflow_url)


def registered(client: MlflowClient, folder: Path, model: str, path: str, source: str) -> int:
    """Plain MLflow, as in a notebook: artifacts logged, a version registered."""
    run = client.create_run("0").info.run_id
    client.log_artifacts(run, str(folder), path)
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    version = client.create_model_version(model, f"runs:/{run}/{source}", run_id=run)
    return int(version.version)


def written_by_transformers_flavor(folder: Path, checkpoint: Path) -> Path:
    """The layout of `mlflow.transformers.log_model`, which keeps the tokenizer apart."""
    model, tokenizer = folder / "model", folder / "components" / "tokenizer"
    model.mkdir(parents=True)
    tokenizer.mkdir(parents=True)
    for file in checkpoint.iterdir():
        shutil.copy(file, tokenizer if file.name.startswith("tokenizer") else model)
    (folder / "MLmodel").write_text("flavors:\n  transformers:\n    model_binary: model\n")
    (folder / "requirements.txt").write_text("torch\n")
    (folder / "conda.yaml").write_text("name: mlflow-env\n")
    (folder / "model_card.md").write_text("# a card\n")
    return folder


def test_a_logged_directory_is_fetched_as_it_was(
    client: MlflowClient, mlflow_url: str, tiny: Path, tmp_path: Path
) -> None:
    """`log_artifacts` and `register_model` is what a notebook does; nothing may be lost."""
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (source / "optimizer.pt").write_bytes(b"\x80\x04.")
    version = registered(client, source, "logged", "model", "model")
    fetch_mlflow(mlflow_url, "logged", version, tmp_path / "work", tmp_path / "output")
    assert content_digest(tmp_path / "output") == content_digest(tiny)


def test_one_folder_below_and_the_transformers_flavor(
    client: MlflowClient, mlflow_url: str, tiny: Path, tmp_path: Path
) -> None:
    """A run's whole artifacts registered, and what the flavor's own function writes."""
    version = registered(client, tiny, "below", "deep", "")
    fetch_mlflow(mlflow_url, "below", version, tmp_path / "work", tmp_path / "one")
    assert content_digest(tmp_path / "one") == content_digest(tiny)

    flavor = written_by_transformers_flavor(tmp_path / "flavor", tiny)
    version = registered(client, flavor, "flavor", "model", "model")
    fetch_mlflow(mlflow_url, "flavor", version, tmp_path / "work", tmp_path / "two")
    assert content_digest(tmp_path / "two") == content_digest(tiny)
    assert inspect(tmp_path / "two").problems == ()


def test_a_model_logged_by_the_transformers_flavor(
    mlflow_url: str, tiny: Path, tmp_path: Path
) -> None:
    """The layout above is written by hand, and MLflow may change its own."""
    from mlflow.transformers import log_model
    from transformers import AutoTokenizer, LlamaForCausalLM

    mlflow.set_tracking_uri(mlflow_url)
    with mlflow.start_run():
        log_model(
            {
                "model": LlamaForCausalLM.from_pretrained(tiny),
                "tokenizer": AutoTokenizer.from_pretrained(tiny),
            },
            name="model",
            task="text-generation",
            pip_requirements=["transformers"],
            registered_model_name="notebook",
        )
    fetch_mlflow(mlflow_url, "notebook", 1, tmp_path / "work", tmp_path / "output")
    assert inspect(tmp_path / "output").problems == ()
    weights = "model.safetensors"
    assert (tmp_path / "output" / weights).read_bytes() == (tiny / weights).read_bytes()


def test_what_a_version_lacks_is_said(
    client: MlflowClient, mlflow_url: str, tiny: Path, tmp_path: Path
) -> None:
    """The author sees a version in MLflow's page, and must learn why it is none for us."""
    with pytest.raises(RegistryError, match=r"Version 99 of logged .*weights\.version"):
        fetch_mlflow(mlflow_url, "logged", 99, tmp_path / "work", tmp_path / "output")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.json").write_text("{}")
    version = registered(client, tmp_path / "empty", "empty", "model", "model")
    with pytest.raises(DataError, match=r"no checkpoint.*Found: manifest\.json"):
        fetch_mlflow(mlflow_url, "empty", version, tmp_path / "work", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_an_mlflow_that_does_not_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage must not look like a version that does not exist."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_"):
        fetch_mlflow("http://127.0.0.1:9", "m", 1, tmp_path / "work", tmp_path / "output")


def test_several_checkpoints_are_refused(tiny: Path, tmp_path: Path) -> None:
    """Which one was evaluated by whom, nobody could say."""
    for step in ("step-100", "step-200"):
        shutil.copytree(tiny, tmp_path / step)
    with pytest.raises(DataError, match=r"several checkpoints.*step-100/config\.json"):
        checkpoint_files(tmp_path, "it")


def test_pickled_weights_are_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    """Dropped silently they would leave a checkpoint without weights."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(DataError, match=r"no weights that may be used.*pytorch_model\.bin"):
        checkpoint_files(tmp_path / "model", "it")


def test_what_lies_deeper_in_a_checkpoint_is_no_second_one(tiny: Path, tmp_path: Path) -> None:
    """Many repositories hold the model once more for another program, such as onnx/."""
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copytree(tiny, tmp_path / "model" / "onnx")
    files = checkpoint_files(tmp_path / "model", "it")
    assert {file.parent for file in files} == {tmp_path / "model"}


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """A Hub with one repository, which the fetch process finds by HF_ENDPOINT."""
    with hub_double() as double:
        files = {file.name: file.read_bytes() for file in tiny.iterdir()}
        others = {"original/params.json": b"{}", "onnx/model.safetensors": b"x", "a.py": b""}
        double.repositories[REPOSITORY] = Repository(REVISION, files | others)
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield double
        assert double.unexpected == []


def fetch(folder: Path, revision: str = REVISION) -> Path:
    """What the asset does: the real process with its scrubbed environment."""
    weights = HuggingFaceWeights(source="huggingface", repository=REPOSITORY, revision=revision)
    spec = parse_spec(SPEC, "tiny").model_copy(update={"weights": weights})
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    # As the store does: of one attempt only the scratch folder is there in the next.
    attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=folder))
    workshop = Workshop(scratch=folder / "scratch", output=attempt / "output")
    from_huggingface(
        spec,
        weights,
        lambda workshop: ToolRunner(workshop.scratch, folder / "log", timeout_seconds=60),
    ).make(workshop)
    return workshop.output


def test_a_repository_is_fetched_without_what_nobody_needs(
    hub: HubDouble, tiny: Path, tmp_path: Path
) -> None:
    """Some repositories hold the weights three times."""
    assert content_digest(fetch(tmp_path)) == content_digest(tiny)
    assert not any("a.py" in path or "onnx" in path for path in hub.requests)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    hub: HubDouble, tmp_path: Path
) -> None:
    """Large files take hours; the client asks for the rest of them."""
    weights = save({"w": np.arange(5 * 2**20, dtype=np.float32)})  # 20 MiB, two chunks of its
    files = {**hub.repositories[REPOSITORY].files, "model.safetensors": weights}
    hub.repositories[REPOSITORY] = Repository(REVISION, files)
    hub.breaks_once_at = 12 * 2**20
    assert (fetch(tmp_path) / "model.safetensors").read_bytes() == weights
    assert hub.ranges == ["bytes=10485760-"]


def test_a_second_attempt_fetches_only_what_is_missing(
    hub: HubDouble, tiny: Path, tmp_path: Path
) -> None:
    """Killed or cut off, hours of download must not be lost."""
    hub.unavailable = True
    with pytest.raises(ToolError, match="materialize again"):
        fetch(tmp_path)
    hub.unavailable = False
    assert content_digest(fetch(tmp_path)) == content_digest(tiny)
    path = f"GET /{REPOSITORY}/resolve/{REVISION}/tokenizer.json"
    assert hub.requests[path] == 1


def test_a_gated_repository_names_the_token_it_needs(
    hub: HubDouble, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its list of files is public, so it looks reachable until the first file."""
    hub.repositories[REPOSITORY].gated = True
    with pytest.raises(ToolError, match=r"accepted its conditions.*HF_TOKEN"):
        fetch(tmp_path / "without")
    monkeypatch.setenv("HF_TOKEN", "hf_somebody-else's-token")
    with pytest.raises(ToolError, match=r"accepted its conditions.*HF_TOKEN"):
        fetch(tmp_path / "wrong")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert content_digest(fetch(tmp_path / "right")) == content_digest(tiny)


def test_what_is_not_there_is_named(hub: HubDouble, tmp_path: Path) -> None:
    """A revision mistyped or deleted, a private repository, and one with pickles only."""
    with pytest.raises(ToolError, match=r"no commit cdcd.*weights\.revision"):
        fetch(tmp_path / "revision", "cd" * 20)
    hub.repositories[REPOSITORY].private = True
    with pytest.raises(ToolError, match=r"no repository tiny/llama.*HF_TOKEN"):
        fetch(tmp_path / "private")
    hub.repositories[REPOSITORY] = Repository(
        REVISION, {"config.json": json.dumps({}).encode(), "pytorch_model.bin": b"\x80\x04."}
    )
    with pytest.raises(ToolError, match=r"no weights that may be used.*pytorch_model\.bin"):
        fetch(tmp_path / "pickles")


def test_bytes_that_are_not_the_commits_are_refused(
    hub: HubDouble, tiny: Path, tmp_path: Path
) -> None:
    """A mirror could serve others; the revision stands for the bytes in the action."""
    hub.tampered = True
    with pytest.raises(ToolError, match=r"model\.safetensors is not what commit"):
        fetch(tmp_path)
    hub.tampered = False
    assert content_digest(fetch(tmp_path)) == content_digest(tiny)
