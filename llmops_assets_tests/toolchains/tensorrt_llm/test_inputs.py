"""No tool gets a checkpoint with code, or data from a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.inputs import calibration_data, refuse_code


def test_plain_checkpoint_passes(hugging_face: Path) -> None:
    """The word auto_map in a vocabulary is a token and asks for nothing."""
    refuse_code(hugging_face)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("modeling_parrot.py", "", "modeling_parrot.py is code"),
        ("nested/MODEL.PY", "", "nested/MODEL.PY is code"),
        ("kernel.so", "", "kernel.so is code"),
        ("extra.json", '{"auto_map": {"AutoConfig": "evil.Config"}}', "extra.json has auto_map"),
        ("extra.json", '{"deep": [{"auto_map": "a--b"}]}', "extra.json has auto_map"),
        ("extra.json", '{"trust_remote_code": true}', "extra.json has trust_remote_code"),
        ("extra.json", "{", "extra.json cannot be read"),
    ],
)
def test_checkpoint_that_could_run_code_is_refused(
    name: str, content: str, found: str, hugging_face: Path
) -> None:
    """The conversion scripts load it with remote code trusted."""
    path = hugging_face / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ToolchainError, match="could run code") as caught:
        refuse_code(hugging_face)
    assert found in str(caught.value.found)


def test_auto_map_of_the_configuration_is_refused(hugging_face: Path) -> None:
    """It names code on the Hub, so that the directory itself holds none."""
    config = json.loads((hugging_face / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "somebody/parrot--configuration.Config"}
    (hugging_face / "config.json").write_text(json.dumps(config))
    with pytest.raises(ToolchainError, match=r"config\.json has auto_map"):
        refuse_code(hugging_face)


def test_calibration_data_are_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool runs in another working directory."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"text": "hello"}\n')
    monkeypatch.chdir(tmp_path)
    assert calibration_data(Path("rows")) == tmp_path / "rows"


def test_calibration_data_are_never_downloaded(tmp_path: Path) -> None:
    """The default of the tools is such a name."""
    for name in ("cnn_dailymail", "ccdv/cnn_dailymail", str(tmp_path / "nothing")):
        with pytest.raises(ToolchainError, match="nothing is downloaded"):
            calibration_data(Path(name))


def test_calibration_data_without_rows_or_with_a_script_are_refused(tmp_path: Path) -> None:
    """`datasets` runs a script of that kind when it loads the folder."""
    with pytest.raises(ToolchainError, match=r"hold no rows.*Found: none"):
        calibration_data(tmp_path)
    (tmp_path / "train.parquet").touch()
    with pytest.raises(ToolchainError, match=r"hold no rows.*Found: train.parquet"):
        calibration_data(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    # Rows, one a line, are no JSON document.
    (tmp_path / "more.json").write_text("{}\n{}\n")
    assert calibration_data(tmp_path) == tmp_path
    (tmp_path / "cnn_dailymail.py").touch()
    with pytest.raises(ToolchainError, match=r"cnn_dailymail\.py is code"):
        calibration_data(tmp_path)
