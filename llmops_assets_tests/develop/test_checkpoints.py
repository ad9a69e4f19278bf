"""Hostile and broken checkpoints: each is refused by name, and none runs its code."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from llmops_assets.develop.checkpoints import CHUNK_BYTES, import_checkpoint, inspect
from llmops_assets.develop.tokenizer import build_tokenizer, save_tokenizer
from llmops_assets.errors import LLMOpsError, ToolError


class Bomb:
    """Leaves a file when unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small good one."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_tokenizer(build_tokenizer([]), directory, max_tokens=64)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "README.md").write_text("# A model, à la carte\n")
    (directory / "LICENSE").write_text("Apache-2.0\n")
    save_file({"w": np.zeros((3, 4), np.float32)}, directory / "model.safetensors")
    return directory


def only_problem(directory: Path) -> str:
    problems = inspect(directory).problems
    assert len(problems) == 1, problems
    return problems[0]


def test_a_good_checkpoint_has_no_problems(checkpoint: Path) -> None:
    """A gate that refuses everything is no gate."""
    report = inspect(checkpoint)
    assert report.problems == ()
    assert (report.parameters, report.dtypes) == (12, ("F32",))
    assert report.size == sum(path.stat().st_size for path in checkpoint.iterdir())
    assert "model.safetensors" in report.files


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "weights.txt", "vocab.json", "notes.model", "deep/er/x.md", "w"]
)
@pytest.mark.parametrize("how", ["plain", "zip"])
def test_a_pickle_is_found_under_any_name_and_not_run(
    checkpoint: Path, tmp_path: Path, name: str, how: str
) -> None:
    """Renaming is the cheapest disguise there is."""
    proof = tmp_path / "it_ran"
    content = pickle.dumps(Bomb(proof))
    if how == "zip":
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archive/data.pkl", content)
        content = archive.getvalue()
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    (checkpoint / name).write_bytes(content)
    assert only_problem(checkpoint).startswith(f"{name}: ")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(proof)))  # noqa: S301 - our own bomb, to see it works
    assert proof.exists(), "the bomb is a dud, so this test proves nothing"


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_pickles_have_no_magic_but_no_allowed_name_either(
    checkpoint: Path, protocol: int
) -> None:
    """Protocols 0 and 1 start like any text; what is unknown is refused."""
    (checkpoint / "weights").write_bytes(pickle.dumps([1.0], protocol=protocol))
    assert "weights: not a kind of file" in only_problem(checkpoint)


def test_a_pickle_named_safetensors_is_refused(checkpoint: Path) -> None:
    """The one name that is always loaded."""
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Bomb(checkpoint / "ran")))
    assert "model.safetensors: not a whole safetensors file" in only_problem(checkpoint)
    assert not (checkpoint / "ran").exists()


@pytest.mark.parametrize("name", ["modeling_llama.py", "kernel.so", "a.py.txt", "run.sh"])
def test_code_is_refused(checkpoint: Path, name: str) -> None:
    """`trust_remote_code` would import it."""
    (checkpoint / name).write_text("print('hello')\n")
    assert f"{name}: code" in only_problem(checkpoint)


def test_numpy_objects_are_refused(checkpoint: Path) -> None:
    """An array of objects is a pickle inside."""
    np.save(checkpoint / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "x.npy: may hold a pickle" in only_problem(checkpoint)
    (checkpoint / "x.npy").rename(checkpoint / "x.txt")
    assert "x.txt: its content is a NumPy file" in only_problem(checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("config.json", {"model_type": "x", "auto_map": {"AutoModel": "m.M"}}, "auto_map"),
        ("config.json", {"model_type": "x", "text": [{"auto_map": {"A": "m.M"}}]}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": ["t.T", None]}, "auto_map"),
        ("extra.json", {"trust_remote_code": True}, "trust_remote_code"),
        ("config.json", {"model_type": "x", "custom_pipelines": {"p": {}}}, "custom_pipelines"),
    ],
)
def test_configs_that_ask_for_code_are_refused(
    checkpoint: Path, name: str, content: object, key: str
) -> None:
    """The code may lie in another repository, so that no file of it is here to be seen."""
    (checkpoint / name).write_text(json.dumps(content))
    assert f"{name}: {key} asks transformers to run code" in only_problem(checkpoint)


def test_a_vocabulary_may_hold_any_word(checkpoint: Path) -> None:
    """Models trained on code know the word auto_map."""
    (checkpoint / "vocab.json").write_text(json.dumps({"auto_map": 7, "trust_remote_code": 8}))
    assert inspect(checkpoint).problems == ()


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"{", "not JSON"), (b"[" * 200_000, "not JSON"), (b'{"a": "\xff"}', "not JSON")],
)
def test_broken_and_hostile_json_is_a_problem_not_a_crash(
    checkpoint: Path, content: bytes, found: str
) -> None:
    """A gate that crashes is retried; one that judges is final."""
    (checkpoint / "extra.json").write_bytes(content)
    assert f"extra.json: {found}" in only_problem(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_parts_are_named(checkpoint: Path, name: str) -> None:
    """Better here than as a traceback of the toolchain, hours later."""
    (checkpoint / name).unlink()
    assert f"{name}: missing" in only_problem(checkpoint)


def test_a_config_that_names_no_model_is_refused(checkpoint: Path) -> None:
    """transformers would guess the architecture from the folder's name."""
    (checkpoint / "config.json").write_text("[]")
    assert "config.json: names no model_type" in only_problem(checkpoint)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda content: content[:-1],
        lambda content: content + b"more",
        lambda content: content[:4],
        lambda content: struct.pack("<Q", 2**60) + content[8:],
        lambda content: content[:8] + b"x" + content[9:],
        # The header promises another shape than the bytes hold.
        lambda content: content.replace(b"[3,4]", b"[3,5]"),
        lambda content: content[:0],
    ],
)
def test_damaged_weights_are_found(checkpoint: Path, break_it: Callable[[bytes], bytes]) -> None:
    """Half a download, a bad disk, or a header made to read outside its file."""
    path = checkpoint / "model.safetensors"
    path.write_bytes(break_it(path.read_bytes()))
    assert "not a whole safetensors file" in only_problem(checkpoint)


IEEE_FORMATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        *itertools.product(IEEE_FORMATS, ["nan", "inf", "-inf"]),
        (torch.float8_e4m3fn, "nan"),  # it has no infinity
    ],
)
def test_non_finite_weights_are_found(checkpoint: Path, dtype: torch.dtype, bad: str) -> None:
    """One NaN poisons every answer. NumPy has no type for half of these formats."""
    path = checkpoint / "model.safetensors"
    info = torch.finfo(dtype)
    # The largest finite numbers and subnormal ones lie next to the bits looked for.
    values = [0.0, -1.0, info.max, info.min, info.tiny]
    good = torch.tensor(values, dtype=torch.float64).to(dtype)
    save_torch({"good": good}, path)
    assert inspect(checkpoint).problems == ()
    poisoned = torch.tensor([1.0, float(bad)], dtype=torch.float64).to(dtype)
    save_torch({"good": good, "poisoned": poisoned}, path)
    assert "model.safetensors: poisoned holds NaN" in only_problem(checkpoint)


def test_the_last_of_many_weights_is_looked_at(checkpoint: Path) -> None:
    """Weights are read in chunks; a loop that stops early sees most of them."""
    values = np.zeros(CHUNK_BYTES // 4 + 1, np.float32)
    values[-1] = np.nan
    save_file({"w": values}, checkpoint / "model.safetensors")
    assert "w holds NaN" in only_problem(checkpoint)


def test_integers_are_never_non_finite(checkpoint: Path) -> None:
    """Quantised weights hold every bit pattern."""
    save_file({"w": np.full(4, -1, np.int32)}, checkpoint / "model.safetensors")
    assert inspect(checkpoint).problems == ()


def shard(checkpoint: Path, places: object) -> None:
    (checkpoint / "model.safetensors").unlink()
    save_file({"a": np.zeros(2, np.float32)}, checkpoint / "one.safetensors")
    save_file({"b": np.zeros(3, np.float16)}, checkpoint / "two.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards_are_counted_once_each(checkpoint: Path) -> None:
    """A sharded model is the normal form of every large one."""
    shard(checkpoint, {"a": "one.safetensors", "b": "two.safetensors"})
    report = inspect(checkpoint)
    assert report.problems == ()
    assert (report.parameters, report.dtypes) == (5, ("F16", "F32"))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "one.safetensors", "b": "gone.safetensors"}, "names 'gone.safetensors'"),
        ({"a": "../../../etc/passwd"}, "names '../../../etc/passwd'"),
        ({"c": "one.safetensors"}, "one.safetensors does not hold c"),
        ({}, "no weight_map"),
        (["a"], "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(checkpoint: Path, places: object, message: str) -> None:
    """transformers fills what is missing with random numbers and a warning."""
    shard(checkpoint, places)
    assert message in only_problem(checkpoint)


def test_names_that_cannot_be_shown_are_refused(checkpoint: Path) -> None:
    """A name can hide an ending or break the record of the verdict (bytes that are no UTF-8)."""
    (checkpoint / "a\u202etxt.md").touch()
    Path(os.fsdecode(os.fsencode(checkpoint) + b"/b\xff.md")).touch()
    problems = inspect(checkpoint).problems
    assert len(problems) == 2
    json.dumps(problems).encode("ascii")


def test_import_copies_everything(checkpoint: Path, tmp_path: Path) -> None:
    """What import drops nobody judges; what it changes nobody asked for."""
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (checkpoint / "sub").mkdir()
    (checkpoint / "sub" / "link.md").symlink_to("../README.md")
    import_checkpoint(checkpoint, tmp_path / "copy")
    copied = {path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*")}
    assert copied == {path.relative_to(checkpoint) for path in checkpoint.rglob("*")}
    link = tmp_path / "copy" / "sub" / "link.md"
    assert not link.is_symlink()
    assert link.read_bytes() == (checkpoint / "README.md").read_bytes()
    assert only_problem(tmp_path / "copy").startswith("pytorch_model.bin: ")
    with pytest.raises(ToolError, match="exists already"):
        import_checkpoint(checkpoint, tmp_path / "copy")


def leave(checkpoint: Path) -> None:
    (checkpoint.parent / "secret.txt").write_text("secret")
    (checkpoint / "x.txt").symlink_to("../secret.txt")


def pipe(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "x.txt")


def folder_link(checkpoint: Path) -> None:
    (checkpoint / "sub").mkdir()
    (checkpoint / "x.txt").symlink_to("sub")


def dangling(checkpoint: Path) -> None:
    (checkpoint / "x.txt").symlink_to("nothing")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (leave, "x.txt .* links to .*secret.txt, which is outside"),
        (pipe, "x.txt is not a regular file"),
        (folder_link, "sub is not a regular file"),
        (dangling, "nothing cannot be copied"),
    ],
)
def test_import_takes_nothing_but_files_of_the_folder(
    checkpoint: Path, tmp_path: Path, plant: Callable[[Path], None], message: str
) -> None:
    """A link could publish a secret of this machine; a pipe would block for ever."""
    plant(checkpoint)
    with pytest.raises(LLMOpsError, match=message):
        import_checkpoint(checkpoint, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.timeout(20)
def test_inspect_itself_follows_no_link(checkpoint: Path) -> None:
    """It may be pointed at a folder that nobody imported."""
    pipe(checkpoint)
    assert "x.txt: not a regular file" in only_problem(checkpoint)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The path comes from a spec, where it is easily mistyped."""
    with pytest.raises(LLMOpsError, match=r"There is no checkpoint folder.*weights\.path"):
        import_checkpoint(tmp_path / "gone", tmp_path / "copy")
