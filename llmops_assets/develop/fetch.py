"""Fetches a checkpoint from MLflow's model registry or from the Hugging Face Hub.

Run as `python -m llmops_assets.develop.fetch …`, through the tool runner. Credentials come
by environment only: MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD; HF_TOKEN.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmops_assets.develop.checkpoints import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    import_checkpoint,
    parts,
)
from llmops_assets.develop.directory import whole_directory
from llmops_assets.errors import DataError, LLMOpsError, RegistryError, ToolError
from llmops_assets.storage.store import hash_file

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

# As `mlflow.transformers.log_model` lays a model out (mlflow/transformers/model_io.py).
MLFLOW_MODEL_FILE = "MLmodel"
MLFLOW_TOKENIZER = Path("components") / "tokenizer"

DOWNLOADS_AT_ONCE = 4
FILES_SHOWN = 20


def fetch_mlflow(url: str, model: str, version: int, work: Path, output: Path) -> None:
    """Writes the checkpoint of a version in MLflow's model registry.

    Sets the MLflow that this whole process works with.

    Args:
        url: of MLflow.
        work: folder for the download; MLflow cannot resume one, so it begins anew.
        output: directory to write; must not exist.

    Raises:
        RegistryError: MLflow does not answer, or has no such version.
        DataError: the version holds no checkpoint, or several.
    """
    import mlflow
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    # Given to `download_artifacts` instead, MLflow 3.17 asks its default for the version. The
    # registry is the same one.
    mlflow.set_tracking_uri(url)
    shutil.rmtree(work, ignore_errors=True)
    try:
        downloaded = download_artifacts(f"models:/{model}/{version}", dst_path=str(work))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            cure = "correct weights.model and weights.version in the model's spec"
        else:
            cure = (
                "check that MLflow and its artifact store answer, and that the environment has "
                "the MLFLOW_TRACKING_… credentials they ask for; then materialize again"
            )
        raise RegistryError(
            f"Version {version} of {model} cannot be fetched from MLflow", found=error, cure=cure
        ) from error
    files = checkpoint_files(Path(downloaded), f"Version {version} of {model} in MLflow")
    with whole_directory(output) as folder:
        for file in files:
            shutil.move(file, folder / file.name)


def checkpoint_files(folder: Path, what: str) -> list[Path]:
    """The files of the one checkpoint in a folder that people and tools lay out differently.

    That is a Hugging Face directory, or one in a folder of it, or what
    `mlflow.transformers.log_model` writes, with the tokenizer beside the model.

    Args:
        what: what errors call the folder.

    Raises:
        DataError: there is none, or several, or its weights are not safetensors.
    """
    found = [place for place in _places(folder) if (place / CONFIG_FILE).is_file()]
    # What lies deeper in a checkpoint is for other programs.
    found = found[:1] if found[:1] == [folder] else found
    if len(found) != 1:
        raise DataError(
            f"{what} holds {'several checkpoints' if found else 'no checkpoint'}",
            expected=f"one Hugging Face directory with {CONFIG_FILE}, at the top or one folder "
            "below, or what mlflow.transformers.log_model writes",
            found=_listed(
                file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
            ),
            cure="register a version that holds one, and name that one in the model's spec",
        )
    (checkpoint,) = found
    files = _part_files(checkpoint)
    if (
        TOKENIZER_FILE not in {file.name for file in files}
        and (checkpoint.parent / MLFLOW_MODEL_FILE).is_file()
        and (tokenizer := checkpoint.parent / MLFLOW_TOKENIZER).is_dir()
    ):
        known = {file.name for file in files}
        files += [file for file in _part_files(tokenizer) if file.name not in known]
    _require_weights(what, (file.name for file in checkpoint.iterdir()))
    return files


def fetch_huggingface(repository: str, revision: str, work: Path, output: Path) -> None:
    """Writes a repository's checkpoint as it stands at a commit.

    Every file is compared with what the commit says of it, so the revision names the bytes.

    Args:
        repository: `organisation/name`.
        revision: the commit, 40 hex digits.
        work: folder that keeps the files of an unfinished download; whole ones are not
            fetched again.
        output: directory to write; must not exist.

    Raises:
        DataError: there is no such repository or commit, its conditions were not accepted,
            its weights are not safetensors, or the bytes are not those of the commit.
        ToolError: the Hub does not answer, or not as it should.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    # Never the token that somebody left in the home folder.
    token = os.environ.get("HF_TOKEN") or False
    with _hub_errors_explained(repository, revision):
        top = HfApi(token=token).list_repo_tree(repository, revision=revision)
        listed = {entry.path: entry for entry in top if isinstance(entry, RepoFile)}
        _require_weights(f"{repository} on the Hugging Face Hub", listed)
        wanted = parts(listed)
        size = sum(listed[name].size for name in wanted)
        print(f"fetching {len(wanted)} files, {size / 1e9:.3f} GB", flush=True)
        folder = snapshot_download(
            repository,
            revision=revision,
            cache_dir=work,
            allow_patterns=[glob.escape(name) for name in wanted],
            token=token,
            max_workers=DOWNLOADS_AT_ONCE,
        )
    for name in wanted:
        _verify(Path(folder, name), listed[name], revision)
    import_checkpoint(Path(folder), output)


def _places(folder: Path) -> list[Path]:
    return [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]


def _part_files(folder: Path) -> list[Path]:
    names = (file.name for file in folder.iterdir() if file.is_file())
    return [folder / name for name in parts(names)]


def _require_weights(what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if not any(name.endswith(".safetensors") for name in names):
        raise DataError(
            f"{what} holds no weights that may be used",
            expected="*.safetensors; other formats are pickles, which run code when loaded",
            found=_listed(names),
            cure="save the model with `save_pretrained(…, safe_serialization=True)`, then name "
            "the new version or revision in the model's spec",
        )


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = len(names) - FILES_SHOWN
    shown = ", ".join(names[:FILES_SHOWN]) or "no files"
    return shown + (f" and {more} more" if more > 0 else "")


def _verify(file: Path, listed: RepoFile, revision: str) -> None:
    """Compares a file with its commit, where git names it or the pointer of its large file."""
    if listed.lfs is not None:
        expected, found = f"sha256:{listed.lfs.sha256}", hash_file(file)
    else:
        content = file.read_bytes()
        # Git's name of a file's content (git-hash-object(1)); a name, not a protection.
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        expected, found = listed.blob_id, blob.hexdigest()
    if found != expected:
        file.unlink()  # or the next attempt would take it for fetched
        raise DataError(
            f"{file.name} is not what commit {revision} holds",
            expected=expected,
            found=found,
            cure="materialize again; if it stays so, somebody changes files on the way here",
        )


@contextmanager
def _hub_errors_explained(repository: str, revision: str) -> Iterator[None]:
    import httpx2
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise DataError(
            f"{repository} is given only to those who accepted its conditions",
            expected="HF_TOKEN, a token of an account that may read it",
            found=_reason(error),
            cure=f"accept the conditions on {ENDPOINT}/{repository}, and set HF_TOKEN in the "
            "platform's environment",
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"There is no repository {repository} at {ENDPOINT}, or only for others to see",
            found=_reason(error),
            cure="correct weights.repository in the model's spec; for a private one set HF_TOKEN "
            "in the platform's environment",
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"{repository} has no commit {revision}",
            found=_reason(error),
            cure="take weights.revision from the repository's list of commits",
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            cure = "set HF_TOKEN in the platform's environment to a token that may read it"
        else:
            cure = "materialize again once it answers; what was fetched whole is kept"
        raise ToolError(
            f"{ENDPOINT} did not give {repository}", found=_reason(error), cure=cure
        ) from error
    except (OSError, httpx2.HTTPError) as error:
        raise ToolError(
            f"{repository} could not be fetched from {ENDPOINT}",
            found=_reason(error),
            cure="check that the Hub answers from here, or set HF_ENDPOINT to a mirror; then "
            "materialize again: what was fetched whole is kept",
        ) from error


def _reason(error: BaseException) -> str:
    """An error in one line: the last lines of the log are all that a failed step shows."""
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llmops_assets.develop.fetch", description=__doc__)
    sources = parser.add_subparsers(dest="source", required=True)
    mlflow = sources.add_parser("mlflow", help="a version in MLflow's model registry")
    mlflow.add_argument("--url", required=True, help="of MLflow")
    mlflow.add_argument("--model", required=True, help="name of the registered model")
    mlflow.add_argument("--version", required=True, type=int)
    huggingface = sources.add_parser("huggingface", help="a repository of the Hugging Face Hub")
    huggingface.add_argument("--repository", required=True, help="organisation/name")
    huggingface.add_argument("--revision", required=True, help="full commit hash")
    for source in (mlflow, huggingface):
        source.add_argument("--work", required=True, type=Path, help="folder for the download")
        source.add_argument("--output", required=True, type=Path, help="directory to write")
    options = vars(parser.parse_args(None if arguments is None else list(arguments)))
    fetch = {"mlflow": fetch_mlflow, "huggingface": fetch_huggingface}[options.pop("source")]
    try:
        fetch(**options)
    except LLMOpsError as error:
        print(_reason(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
