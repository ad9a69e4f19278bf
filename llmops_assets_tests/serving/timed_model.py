"""A model for Triton's Python backend that takes known times and no processor.

Inputs and outputs are those of a packaged model. Requests are answered side by side: the
first token after `FIRST_SECONDS`, then one each `NEXT_SECONDS`, then the end token.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

FIRST_SECONDS = 0.06
NEXT_SECONDS = 0.015
TOKENS = 12


class TritonPythonModel:
    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            threading.Thread(target=_answer, args=(sender, time.monotonic())).start()


def _answer(sender: Any, asked: float) -> None:
    for token in range(1, TOKENS + 1):
        due = asked + FIRST_SECONDS + (token - 1) * NEXT_SECONDS
        time.sleep(max(0.0, due - time.monotonic()))
        last = token == TOKENS
        sender.send(
            pb_utils.InferenceResponse(
                output_tensors=[
                    _tensor("text_output", "" if last else "1"),
                    _tensor("finish_reason", "stop" if last else ""),
                    pb_utils.Tensor("input_tokens", np.array([1], dtype=np.int32)),
                    pb_utils.Tensor("output_tokens", np.array([token], dtype=np.int32)),
                ]
            ),
            flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0,
        )


def _tensor(name: str, text: str) -> Any:
    return pb_utils.Tensor(name, np.array([text.encode()], dtype=np.object_))
