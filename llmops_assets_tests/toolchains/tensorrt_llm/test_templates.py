"""How templates are filled: everything by pattern, nothing left, nothing guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.serving.model_repository import parse_configuration
from llmops_assets.toolchains.tensorrt_llm.templates import (
    FOLDERS,
    PLACES,
    fill,
    find_placeholders,
    find_templates,
    rename,
)

TEMPLATE = """\
name: "some"
# set ${in_comment} as you like
backend: "${backend}"
max_batch_size: ${size}
parameters { key: "a" value: { string_value: "before ${optional} after" } }
"""
VALUES = {"backend": "python", "size": "8", "in_comment": "it"}


def filled(text: str = TEMPLATE, **changes: str) -> str:
    return fill(text, VALUES | changes, unset={"optional"}, required={"size"}, name="some")


def test_placeholders_are_told_apart_by_quotes() -> None:
    """An unquoted one that stays empty does not parse; a quoted one is just an empty string."""
    found = find_placeholders(TEMPLATE)
    assert found.unquoted == {"size"}
    assert found.quoted == {"backend", "optional", "in_comment"}


def test_every_placeholder_is_filled() -> None:
    """Text and comments of the template stay as they are, for whoever compares."""
    text = filled()
    assert "# set it as you like" in text
    assert '"before  after"' in text
    configuration = parse_configuration(text, "some")
    assert (configuration.backend, configuration.max_batch_size) == ("python", 8)


@pytest.mark.parametrize(
    ("text", "changes", "problem"),
    [
        # A newer image's template may need what nobody has thought of.
        (TEMPLATE + 'x: "${new_in_1_3}"\n', {}, "nobody accounted for.*new_in_1_3"),
        (TEMPLATE + "x: ${optional}\n", {}, "needs a value where there is none.*optional"),
        (TEMPLATE, {"size": ""}, "needs a value where there is none.*size"),
        (TEMPLATE.replace("${size}", "8"), {}, "not one that this toolchain knows.*size"),
        (TEMPLATE, {"backend": 'a" b: "c'}, "cannot be written"),
        (TEMPLATE, {"backend": "${size}"}, "cannot be written"),
        # server#8592, server#7950, tensorrtllm_backend#501: `Expected integer…, got: $`
        (TEMPLATE + "x: ${not-a-word}\n", {}, r"left to fill in.*x: \$\{not-a-word\}"),
    ],
)
def test_template_is_refused(text: str, changes: dict[str, str], problem: str) -> None:
    """fill_template.py is silent about each; Triton is not, in front of an empty slot."""
    with pytest.raises(ToolchainError, match=problem):
        filled(text, **changes)


def test_configuration_that_triton_cannot_read_is_refused() -> None:
    """This is what an unfilled number looks like to Triton."""
    with pytest.raises(ToolchainError, match="could not read the configuration of some"):
        parse_configuration(TEMPLATE, "some")


def test_only_the_models_own_name_is_changed() -> None:
    """An ensemble names other models and its platform too."""
    text = 'name: "ensemble"\nplatform: "ensemble"\ninput [ { name: "ensemble" } ]\n'
    assert rename(text, "ensemble", "chat") == text.replace(
        'name: "ensemble"\npl', 'name: "chat"\npl'
    )
    for wrong in ('name: "other"\n', text + text):
        with pytest.raises(ToolchainError, match="not one that this toolchain knows"):
            rename(wrong, "ensemble", "chat")


@pytest.mark.parametrize("place", PLACES)
def test_templates_are_found_where_images_have_them(tmp_path: Path, place: str) -> None:
    """NVIDIA's documentation and its Dockerfile name different places."""
    folder = tmp_path / place / FOLDERS["engine"]
    folder.mkdir(parents=True)
    assert find_templates("engine", tmp_path) == folder
    with pytest.raises(ToolchainError, match="cannot serve the backend llmapi"):
        find_templates("llmapi", tmp_path)
