"""Training and evaluation data: one Parquet file with its schema beside it.

Run as `python -m llmops_assets.develop.data --data JSON --split training --output DIR`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as parquet
from pydantic import TypeAdapter

from llmops_assets.develop.directory import whole_directory
from llmops_assets.errors import DataError, LLMOpsError
from llmops_assets.spec import Data, DataFiles, GeneratedDates

SplitName = Literal["training", "evaluation"]

DATA_FILE = "data.parquet"
SCHEMA_FILE = "schema.json"
COLUMNS = ("prompt", "completion", "slice")
SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in COLUMNS])
MISTAKES_SHOWN = 5


@dataclass(frozen=True)
class Leakage:
    """Evaluation rows whose prompt occurs in training: how many, and a few of the prompts."""

    rows: int
    examples: tuple[str, ...]


def build_data(
    data: GeneratedDates | DataFiles, split: SplitName, output: Path, root: Path
) -> None:
    """Writes a data directory: `data.parquet` and `schema.json`.

    Equal input gives equal bytes (with the same version of pyarrow).

    Args:
        data: the spec's data section.
        split: which of its splits.
        output: a directory that does not exist yet.
        root: folder that relative paths of data files count from.

    Raises:
        DataError: the data are not valid; the message names file and rows.
    """
    if isinstance(data, GeneratedDates):
        # Babel is needed for the example only.
        from llmops_assets.develop.dates import generate

        rows = generate(data, split)
        table = pa.table(
            {name: [getattr(row, name) for row in rows] for name in COLUMNS}, schema=SCHEMA
        )
    else:
        table = _read_file(root / (data.training if split == "training" else data.evaluation))
    with whole_directory(output) as folder:
        parquet.write_table(table, folder / DATA_FILE, compression="zstd")
        (folder / SCHEMA_FILE).write_text(
            json.dumps(_facts(table), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_data(directory: Path) -> pa.Table:
    """The rows of a data directory, with columns prompt, completion and slice (strings).

    Raises:
        DataError: it is not a data directory.
    """
    return _read_file(directory / DATA_FILE)


def leakage(training: Path, evaluation: Path, examples: int = 5) -> Leakage:
    """Finds evaluation prompts that training has seen, but for case and white space.

    Args:
        training: data directory that a model learns from.
        evaluation: data directory that it is judged by.
        examples: how many of the prompts to show at most.

    Raises:
        DataError: one of them is not a data directory.
    """
    seen = {_normalised(prompt) for prompt in read_data(training)["prompt"].to_pylist()}
    leaked = [
        prompt
        for prompt in read_data(evaluation)["prompt"].to_pylist()
        if _normalised(prompt) in seen
    ]
    return Leakage(rows=len(leaked), examples=tuple(dict.fromkeys(leaked))[:examples])


def _normalised(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def _facts(table: pa.Table) -> dict[str, Any]:
    slices = Counter(table["slice"].to_pylist())
    return {
        "columns": {field.name: str(field.type) for field in table.schema},
        "rows": table.num_rows,
        "slices": dict(sorted(slices.items())),
    }


def _read_file(path: Path) -> pa.Table:
    readers = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".ndjson": _read_json_lines}
    if path.suffix not in readers:
        raise DataError(
            f"The data file {path} is of a kind that is not read",
            expected=f"a name that ends in {', '.join(readers)}",
            cure="convert it, and name the new file in the model's spec",
        )
    if not path.is_file():
        raise DataError(
            f"There is no data file {path}",
            cure="check `data` in the model's spec, or put the file there",
        )
    columns = readers[path.suffix](path)
    _check_values(path, columns)
    return pa.table(dict(columns), schema=SCHEMA)


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    try:
        names = parquet.read_schema(path).names
        if missing := [name for name in COLUMNS if name not in names]:
            raise _invalid(path, [f"no column {name!r}" for name in missing])
        table = parquet.read_table(path, columns=list(COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"The data file {path} cannot be read",
            expected="Parquet",
            found=error,
            cure="write it again, or name another file in the model's spec",
        ) from error
    return {name: table[name].to_pylist() for name in COLUMNS}


def _read_json_lines(path: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    mistakes: list[str] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                mistakes.append(f"row {number}: not JSON ({error})")
                continue
            if not isinstance(row, dict):
                mistakes.append(f"row {number}: not a JSON object")
                continue
            mistakes += [f"row {number}: no {name!r}" for name in COLUMNS if name not in row]
            for name in COLUMNS:
                columns[name].append(row.get(name))
    if mistakes:
        raise _invalid(path, mistakes)
    return columns


def _check_values(path: Path, columns: dict[str, list[Any]]) -> None:
    """Checks that there are rows, and that every value is a string that says something."""
    if not columns["prompt"]:
        raise _invalid(path, ["no rows"])
    mistakes = [
        f"row {number}: {name!r} is {problem}"
        for number, values in enumerate(zip(*columns.values(), strict=True), start=1)
        for name, value in zip(columns, values, strict=True)
        if (problem := _problem(value)) is not None
    ]
    if mistakes:
        raise _invalid(path, mistakes)


def _problem(value: object) -> str | None:
    if value is None:
        return "null"
    if not isinstance(value, str):
        return f"{type(value).__name__}, not a string"
    if not value.strip():
        return "empty"
    return None


def _invalid(path: Path, mistakes: Sequence[str]) -> DataError:
    shown = "; ".join(mistakes[:MISTAKES_SHOWN])
    more = len(mistakes) - MISTAKES_SHOWN
    return DataError(
        f"The data file {path} is not valid",
        expected=f"rows with non-empty strings {', '.join(COLUMNS)} (rows count from 1)",
        found=shown + (f"; and {more} more" if more > 0 else ""),
        cure="mend these rows, then materialize the data again",
    )


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llmops_assets.develop.data", description=__doc__)
    parser.add_argument("--data", required=True, help="the spec's data section, JSON")
    parser.add_argument("--split", required=True, choices=("training", "evaluation"))
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument(
        "--root", type=Path, default=Path(), help="folder that relative data files count from"
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    data: GeneratedDates | DataFiles = TypeAdapter(Data).validate_json(options.data)
    try:
        build_data(data, options.split, options.output, options.root)
    except LLMOpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
