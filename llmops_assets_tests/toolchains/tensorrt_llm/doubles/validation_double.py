"""A double of our own validation: it writes what that writes, of an engine without a fault.

The real one needs the LLM API and weights that answer; `test_validation.py` runs it.
"""

from __future__ import annotations

import json
import sys

from llmops_assets.toolchains.tensorrt_llm.validation import options_of


def main(arguments: list[str]) -> int:
    options = options_of(arguments)
    asked = json.loads(options.questions.read_text(encoding="utf-8"))
    settings = json.loads(options.settings.read_text(encoding="utf-8"))
    assert settings["kv_cache_config"]["free_gpu_memory_fraction"] < 1
    assert (options.tokenizer / "tokenizer.json").is_file()
    assert any(options.engine.iterdir())
    number = len(asked["prompts"])
    times = {
        "time_to_first_token": 0.005, "inter_token_latency": 0.005, "end_to_end": 0.01,
        "output_tokens": 2,
    }  # fmt: skip
    answers = {
        "tensorrt_llm": "1.2.1",
        "agreement": {
            "prompts": number,
            "token_agreement": 1.0,
            "prompts_equal": number,
            "logit_distance": {"largest": 0.01, "mean": 0.001},
        },
        "tokenizer_parity": {"prompts": number, "equal": number},
        "rows": [
            {
                "prediction": completion,
                "loss": 0.1,
                "tokens": 2,
                "times": times if row < options.timed_rows else None,
            }
            for row, completion in enumerate(asked["completions"])
        ],
    }
    options.output.write_text(json.dumps(answers), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
