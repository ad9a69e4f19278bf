"""What our typed flags can say is what the doubles understand.

Both were written from what is known of the tools, apart from each other; where they
disagree, one is wrong.
"""

from __future__ import annotations

import argparse
import json
import types
import typing
from pathlib import Path

import pytest

from llmops_assets.toolchains.tensorrt_llm.commands import build_command
from llmops_assets.toolchains.tensorrt_llm.flags import (
    BuildFlags,
    Flags,
    LlamaFlags,
    QuantizeFlags,
)
from llmops_assets.tools import ToolRunner

from .doubles import convert_checkpoint_double, quantize_double, trtllm_build_double
from .doubles.installation import Installation
from .engines import engine as engine_section
from .test_commands import CASES

PARSERS: dict[type[Flags], argparse.ArgumentParser] = {
    LlamaFlags: convert_checkpoint_double.parser(),
    QuantizeFlags: quantize_double.parser(),
    BuildFlags: trtllm_build_double.parser(),
}
FIELDS = [(flags, name) for flags in PARSERS for name in flags.model_fields]


def members(annotation: object) -> list[object]:
    """The types and literal values that a union, an optional or an annotated type allows."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in members(part)]
    if origin is typing.Annotated:
        return members(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return list(typing.get_args(annotation))
    return [annotation]


@pytest.mark.parametrize(("flags", "name"), FIELDS)
def test_every_field_is_a_flag_of_the_tool(flags: type[Flags], name: str) -> None:
    """By its name, by whether it takes a value, and by the values it may have."""
    field = flags.model_fields[name]
    flag = field.serialization_alias or f"--{name}"
    actions = {option: action for action in PARSERS[flags]._actions
               for option in action.option_strings}  # fmt: skip
    assert flag in actions
    allowed = members(field.annotation)
    if name == "weight_only_precision":  # declared for all families, narrowed by each
        allowed = list(LlamaFlags.precisions)
    assert (actions[flag].nargs == 0) == (bool in allowed)
    if actions[flag].choices is not None:
        values = [value for value in allowed if value is not type(None)]
        assert set(values) <= set(actions[flag].choices or ())


UNDERSTOOD = {
    name: case
    for name, case in CASES.items()
    if "core/llama" in case.script or "quantize.py" in case.script
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_conversions_of_the_table_are_understood(name: str) -> None:
    """Families other than Llama have scripts of their own, whose flags no double knows."""
    case = UNDERSTOOD[name]
    tool = QuantizeFlags if "quantize.py" in case.script else LlamaFlags
    parsed = PARSERS[tool].parse_args(case.flags.split())
    assert parsed.output_dir in case.flags


def test_build_command_builds_an_engine(
    installation: Installation, converted: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """A section of a spec, down to the engine's config.json."""
    section = engine_section(limits={"max_batch_size": 4, "max_input_len": 100,
                                     "max_seq_len": 200})  # fmt: skip
    command = build_command(section, converted, tmp_path / "engine", tmp_path / "times.cache")
    tools.run("build", [str(installation.bin / command[0]), *command[1:]])
    built = json.loads((tmp_path / "engine" / "config.json").read_text())["build_config"]
    assert (built["max_batch_size"], built["max_input_len"], built["max_seq_len"]) == (4, 100, 200)
    assert (tmp_path / "times.cache").is_file()
