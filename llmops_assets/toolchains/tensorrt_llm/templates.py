"""The Triton model templates in the serving image, and how their placeholders are filled.

The set of placeholders changes between versions, so none is assumed: all are found by
pattern in the template of the very image that serves, and each must be accounted for. What
`fill_template.py` leaves over it leaves over silently, and Triton then fails to parse the
configuration (`Expected integer…, got: $`, triton-inference-server/server#8592).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.containers import Backend

# Of the Triton image (tensorrtllm_backend, dockerfile/Dockerfile.triton.trt_llm_backend),
# then of a TensorRT-LLM source tree, as NVIDIA's release image has one.
PLACES = ("app/all_models", "app/tensorrt_llm/triton_backend/all_models")
FOLDERS: Mapping[Backend, str] = {"engine": "inflight_batcher_llm", "llmapi": "llmapi"}

INNER_MODELS = ("preprocessing", "postprocessing", "tensorrt_llm", "tensorrt_llm_bls")
"""Models that are in every package of an engine beside the one that clients ask."""

PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
_COMMENT = re.compile(r"^\s*#.*$", re.MULTILINE)
_QUOTED = re.compile(r'"[^"\n]*"')
# What would end a quoted string of a text-format protobuf, or mean something inside it.
_UNSAFE = re.compile(r'["\\\n$]')


@dataclass(frozen=True)
class Placeholders:
    """Names of the placeholders of a template.

    An unquoted one is a number, a boolean or an enumerator: empty, it does not parse.
    """

    quoted: frozenset[str]
    unquoted: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        return self.quoted | self.unquoted


def find_templates(backend: Backend, root: Path = Path("/")) -> Path:
    """The folder of a backend's templates in the image this runs in.

    Args:
        backend: which templates.
        root: of the image's file system.

    Raises:
        ToolchainError: the image has none, so it cannot serve this backend.
    """
    for place in PLACES:
        folder = root / place / FOLDERS[backend]
        if folder.is_dir():
            return folder
    raise ToolchainError(
        f"This image cannot serve the backend {backend}: it has no templates for it",
        expected=" or ".join(f"{root / place / FOLDERS[backend]}" for place in PLACES),
        found="neither",
        cure="package in the Triton image that serves, or choose the other backend in the spec",
    )


def find_placeholders(text: str) -> Placeholders:
    """All placeholders of a template's text; those in comments count as quoted ones."""
    outside_strings = _QUOTED.sub("", _COMMENT.sub("", text))
    unquoted = frozenset(PLACEHOLDER.findall(outside_strings))
    return Placeholders(quoted=frozenset(PLACEHOLDER.findall(text)) - unquoted, unquoted=unquoted)


def fill(
    text: str,
    values: Mapping[str, str],
    unset: Collection[str],
    required: Collection[str],
    name: str,
) -> str:
    """A template's text with a value for every placeholder.

    Args:
        text: of the template's `config.pbtxt`.
        values: by placeholder; may hold more than the template has.
        unset: placeholders of optional parameters that stay empty. The backends take an
            empty string for "not set" (TensorRT-LLM, triton_backend, model_state.cc).
        required: placeholders that the template must have, as nothing else would say what
            they say.
        name: what errors call the template.

    Raises:
        ToolchainError: a placeholder is not accounted for, a required one is not there, a
            value does not fit, or something that looks like a placeholder is left.
    """
    found = find_placeholders(text)
    unknown = sorted(found.all - values.keys() - set(unset))
    if unknown:
        raise ToolchainError(
            f"The template of {name} has placeholders that nobody accounted for",
            expected="only known ones",
            found=", ".join(unknown),
            cure="look up what they mean in this image's version, and add each to packaging.py",
        )
    empty = sorted(key for key in found.unquoted if not values.get(key))
    if empty:
        raise ToolchainError(
            f"The template of {name} needs a value where there is none",
            expected="a number, a boolean or an enumerator, as it is not in quotes",
            found=f"nothing for {', '.join(empty)}",
            cure="give these a value in packaging.py",
        )
    missing = sorted(set(required) - found.all)
    if missing:
        raise ToolchainError(
            f"The template of {name} is not one that this toolchain knows",
            expected=f"placeholders {', '.join(sorted(required))}",
            found=f"no {', '.join(missing)}",
            cure="compare the image's templates with packaging.py; somebody may have filled them",
        )
    for key in sorted(found.all):
        if _UNSAFE.search(values.get(key, "")):
            raise ToolchainError(
                f"The value of {key} cannot be written into the template of {name}",
                expected="no quotes, backslashes, dollar signs or line breaks",
                found=repr(values[key]),
                cure="choose another value",
            )
    filled = PLACEHOLDER.sub(lambda match: values.get(match.group(1), ""), text)
    if "${" in filled:
        line = next(line for line in filled.splitlines() if "${" in line)
        raise ToolchainError(
            f"The template of {name} has something left to fill in",
            expected="placeholders such as ${engine_dir}",
            found=line.strip(),
            cure="look into the image's template; this toolchain does not know such placeholders",
        )
    return filled


def rename(text: str, old: str, new: str) -> str:
    """A configuration's text with another model name.

    Raises:
        ToolchainError: the text does not name the model exactly once.
    """
    renamed, count = re.subn(
        rf'^name:\s*"{re.escape(old)}"', f'name: "{new}"', text, flags=re.MULTILINE
    )
    if count != 1:
        raise ToolchainError(
            f"The template of {old} is not one that this toolchain knows",
            expected=f'one line name: "{old}"',
            found=f"{count} of them",
            cure="look into the image's templates",
        )
    return renamed
