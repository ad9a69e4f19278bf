"""How a packaged model is asked through Triton's generate extension, and how it answers.

Triton takes a key that is no input of the model for a parameter of the request, and loses it
without a word: a length under another name is no length. So nobody outside a toolchain names
inputs or outputs; they ask through the contract that is in the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

WHOLE = ("stop", "length")
"""Values of a finish reason that end a whole answer. Others are no end: models leave it empty,
or say `None`, while they go on, and `cancelled` when they were stopped."""


class RequestContract(BaseModel):
    """Names of inputs and outputs. The default is what the embedded toolchain's model takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(default="text_input", description="Input with the prompt.")
    max_tokens: str = Field(
        default="max_tokens", description="Input with the longest answer, tokens."
    )
    streaming: str = Field(
        default="stream", description="Input that is true for an answer in pieces."
    )
    inputs: Mapping[str, bool | int | float | str] = Field(
        default={}, description="What every request has besides, such as to be told counts."
    )
    text: str = Field(default="text_output", description="Output with the answer.")
    text_so_far: bool = Field(
        default=False,
        description="Whether a piece of a stream repeats the answer from its beginning.",
    )
    output_tokens: str | None = Field(
        default="output_tokens",
        description="Output with the number of tokens; null where the model does not count.",
    )
    tokens_so_far: bool = Field(
        default=True, description="Whether a piece counts the pieces before it as well."
    )
    finish_reason: str | None = Field(
        default="finish_reason",
        description="Output that says why an answer ended; null where a stream just ends.",
    )

    def body(self, prompt: str, max_tokens: int | None, *, stream: bool) -> dict[str, Any]:
        """The JSON of a request.

        Args:
            prompt: what is asked.
            max_tokens: longest answer, tokens; None for the model's own limit.
            stream: whether the answer is to come in pieces.
        """
        body: dict[str, Any] = {self.prompt: prompt, **self.inputs}
        if max_tokens is not None:
            body[self.max_tokens] = max_tokens
        if stream:
            body[self.streaming] = True
        return body

    def tokens(self, piece: Mapping[str, Any], before: int) -> int:
        """Tokens of an answer up to and with a piece of its stream.

        A model that does not count is taken to send each token in a piece of its own.

        Args:
            piece: outputs by name.
            before: tokens up to the piece before.
        """
        if self.output_tokens is None or self.output_tokens not in piece:
            return before + bool(piece.get(self.text))
        count = int(piece[self.output_tokens])
        return count if self.tokens_so_far else before + count

    def ends(self, piece: Mapping[str, Any]) -> bool:
        """Whether a piece says that with it the answer is whole.

        Without a finish reason no piece does: then the clean end of the stream is the end.
        """
        return self.finish_reason is not None and piece.get(self.finish_reason) in WHOLE


EMBEDDED = RequestContract()
"""How packages of the embedded toolchain are asked."""
