"""Lays the doubles out where an image of TensorRT-LLM has the tools."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from llmops_assets_tests.toolchains.tensorrt_llm.doubles.behaviour import FAILS

REPOSITORY = Path(__file__).parents[4]
PACKAGE = "llmops_assets_tests.toolchains.tensorrt_llm.doubles"
COMMANDS = {
    "trtllm-build": "trtllm_build_double",
    "trtllm-bench": "trtllm_bench_double",
}
SCRIPTS = {
    "models/core/llama/convert_checkpoint.py": "convert_checkpoint_double",
    "quantization/quantize.py": "quantize_double",
}

STARTER = '''#!{python} -S
"""Starts a double, which stands for a tool of TensorRT-LLM and computes nothing."""

import json
import os
import sys
from pathlib import Path

behaviour = Path({behaviour!r})
if behaviour.is_file():
    for name, value in json.loads(behaviour.read_text()).items():
        os.environ.setdefault(name, value)
sys.path.insert(0, {repository!r})

from {package}.{module} import main  # noqa: E402

sys.exit(main())
'''


@dataclass(frozen=True)
class Installation:
    """The installed doubles: `bin` belongs on the PATH, `examples` holds the scripts."""

    root: Path

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    @property
    def examples(self) -> Path:
        return self.root / "app" / "tensorrt_llm" / "examples"

    @property
    def convert_checkpoint(self) -> Path:
        return self.examples / "models/core/llama/convert_checkpoint.py"

    @property
    def quantize(self) -> Path:
        return self.examples / "quantization/quantize.py"

    def command(self, tool: str, *arguments: object) -> list[str]:
        """A command line: `tool` is one of the commands or the name of a script."""
        texts = [str(argument) for argument in arguments]
        for script in (self.convert_checkpoint, self.quantize):
            if tool == script.name:
                return [sys.executable, "-S", str(script), *texts]
        return [str(self.bin / tool), *texts]

    def behave(self, **environment: str) -> None:
        """Sets variables for every later run, since the tool runner passes few on."""
        (self.root / "behaviour.json").write_text(json.dumps(environment), encoding="utf-8")

    def fail(self, tool: str, failure: str) -> None:
        """Lets every later run of a tool fail; see `behaviour.FAILURES`."""
        self.behave(**{FAILS: f"{tool}:{failure}"})


def install(root: Path) -> Installation:
    """Writes an executable starter for each double below `root`."""
    installation = Installation(root)
    places = {
        **{installation.bin / name: module for name, module in COMMANDS.items()},
        **{installation.examples / name: module for name, module in SCRIPTS.items()},
    }
    for path, module in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = STARTER.format(
            python=sys.executable,
            behaviour=str(root / "behaviour.json"),
            repository=str(REPOSITORY),
            package=PACKAGE,
            module=module,
        )
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    return installation
