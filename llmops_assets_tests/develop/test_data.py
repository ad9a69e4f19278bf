"""Data directories: the same bytes for the same input, and mistakes named by file and row."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from llmops_assets.develop.data import Leakage, build_data, leakage, main, read_data
from llmops_assets.errors import LLMOpsError, ToolError
from llmops_assets.spec import DataFiles, GeneratedDates, Split

ROWS = [
    {"prompt": "3 mars 2024", "completion": "2024-03-03", "slice": "fr"},
    {"prompt": "July 4, 2031", "completion": "2031-07-04", "slice": "en"},
]


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def files(training: Path) -> DataFiles:
    return DataFiles(source="files", training=training, evaluation=Path("unused.parquet"))


def built(tmp_path: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    source = write_json_lines(tmp_path / f"{name}.jsonl", rows)
    build_data(files(source), "training", tmp_path / name, tmp_path)
    return tmp_path / name


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    """A write-once column depends on it: the same action must give the same digest."""
    data = GeneratedDates(
        source="dates",
        locales=("en", "de"),
        training=Split(rows=500, seed=1),
        evaluation=Split(rows=50, seed=2),
    )
    for name in ("first", "second"):
        subprocess.run(
            [
                sys.executable, "-m", "llmops_assets.develop.data",
                "--data", data.model_dump_json(),
                "--split", "training", "--output", str(tmp_path / name),
            ],
            check=True, timeout=60,
        )  # fmt: skip
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    assert set(digests(tmp_path / "first")) == {"data.parquet", "schema.json"}


def test_schema_says_columns_rows_and_slices(tmp_path: Path) -> None:
    """Auditors and the schema gate read this file, not the Parquet."""
    directory = built(tmp_path, "data", ROWS)
    assert json.loads((directory / "schema.json").read_text()) == {
        "columns": {"prompt": "string", "completion": "string", "slice": "string"},
        "rows": 2,
        "slices": {"en": 1, "fr": 1},
    }
    assert read_data(directory).to_pylist() == ROWS


def test_parquet_and_json_lines_give_the_same_bytes(tmp_path: Path) -> None:
    """The form a team keeps its data in must not change what is trained."""
    # Other types of the same strings, another order of columns, and one column more.
    parquet.write_table(
        pa.table(
            {
                "slice": pa.array(["fr", "en"]).dictionary_encode(),
                "prompt": pa.array([row["prompt"] for row in ROWS], pa.large_string()),
                "completion": [row["completion"] for row in ROWS],
                "annotator": ["a", "b"],
            }
        ),
        tmp_path / "rows.parquet",
    )
    build_data(files(Path("rows.parquet")), "training", tmp_path / "from_parquet", tmp_path)
    assert digests(tmp_path / "from_parquet") == digests(built(tmp_path, "from_lines", ROWS))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "x", "completion": "y"}, "row 3: no 'slice'"),
        ({"prompt": "", "completion": "y", "slice": "s"}, "row 3: 'prompt' is empty"),
        ({"prompt": "x", "completion": "  ", "slice": "s"}, "row 3: 'completion' is empty"),
        ({"prompt": "x", "completion": None, "slice": "s"}, "row 3: 'completion' is null"),
        ({"prompt": "x", "completion": 5, "slice": "s"}, "row 3: 'completion' is int"),
    ],
)
def test_bad_rows_of_json_lines_are_named(
    tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    """With a million rows, "invalid data" helps nobody: file and row have to be named."""
    source = write_json_lines(tmp_path / "rows.jsonl", [*ROWS, bad])
    with pytest.raises(LLMOpsError, match=r"rows\.jsonl") as error:
        build_data(files(source), "training", tmp_path / "data", tmp_path)
    assert message in str(error.value)
    assert not (tmp_path / "data").exists()


def test_lines_that_are_no_json_are_named(tmp_path: Path) -> None:
    """A file cut off in the middle ends with half a line."""
    source = write_json_lines(tmp_path / "rows.jsonl", ROWS)
    source.write_text(source.read_text() + '{"prompt": "3 ma')
    with pytest.raises(LLMOpsError, match="row 3: not JSON"):
        build_data(files(source), "training", tmp_path / "data", tmp_path)


def test_bad_parquet_is_refused_by_column_and_row(tmp_path: Path) -> None:
    """Parquet has nulls and types of its own; they end in the same clear errors."""
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), path)
    with pytest.raises(LLMOpsError, match=r"rows\.parquet.*no column 'slice'"):
        build_data(files(path), "training", tmp_path / "data", tmp_path)
    parquet.write_table(
        pa.table({"prompt": ["a", None], "completion": ["b", "c"], "slice": [1, 2]}), path
    )
    with pytest.raises(LLMOpsError, match=r"row 1: 'slice' is int.*row 2: 'prompt' is null"):
        build_data(files(path), "training", tmp_path / "data", tmp_path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(LLMOpsError, match="cannot be read"):
        build_data(files(path), "training", tmp_path / "data", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("rows.csv", "of a kind that is not read"), ("gone.jsonl", "There is no data file")],
)
def test_files_that_cannot_be_data_are_refused(tmp_path: Path, name: str, message: str) -> None:
    """Both mistakes are made in the spec, so the message points back to it."""
    with pytest.raises(LLMOpsError, match=f"{message}.*spec"):
        build_data(files(Path(name)), "training", tmp_path / "data", tmp_path)


def test_no_rows_are_refused(tmp_path: Path) -> None:
    """Exact match over nothing is no number, and would surface three steps later."""
    with pytest.raises(LLMOpsError, match="no rows"):
        built(tmp_path, "data", [])


def test_an_output_is_never_overwritten_and_a_leftover_never_kept(tmp_path: Path) -> None:
    """What a killed run left beside must not get into the next one's output."""
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "leftover").touch()
    directory = built(tmp_path, "data", ROWS)
    assert set(digests(directory)) == {"data.parquet", "schema.json"}
    with pytest.raises(ToolError, match="exists already"):
        built(tmp_path, "data", ROWS)


def test_the_command_shows_the_message_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tool runner shows a tool's last lines: they should be the cure, not a traceback."""
    data = files(Path("gone.jsonl")).model_dump_json()
    arguments = ["--data", data, "--split", "training", "--output", str(tmp_path / "data")]
    assert main(arguments) == 1
    assert "There is no data file" in capsys.readouterr().err


def test_leakage_sees_through_case_and_white_space(tmp_path: Path) -> None:
    """The gate must not trust the generator, nor be fooled by a copy with other spaces."""
    training = built(tmp_path, "training", ROWS)
    seen = {"prompt": " JULY  4, 2031", "completion": "2031-07-04", "slice": "en"}
    new = {"prompt": "July 5, 2031", "completion": "2031-07-05", "slice": "en"}
    assert leakage(training, built(tmp_path, "leaky", [new, seen])) == Leakage(
        rows=1, examples=(" JULY  4, 2031",)
    )
    assert leakage(training, built(tmp_path, "clean", [new])) == Leakage(rows=0, examples=())
