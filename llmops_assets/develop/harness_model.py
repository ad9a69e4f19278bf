"""Models as EleutherAI's lm-evaluation-harness asks them: checkpoints, and what is alike in all.

The harness's own class for Hugging Face models is not used. It splits a text into prompt
and continuation by the number of the prompt's tokens, which is wrong for a tokenizer that
closes a prompt with a token of its own (see `tokenizer`); it shortens what does not fit;
and checkpoint and engine have to be asked in the very same way to be compared.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmops_assets.errors import DataError, SpecError

GREEDY_SETTINGS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"})
"""What greedy generation knows; temperature and top_p, top_k have no effect on it."""


class LocalModel(TemplateLM):
    """A model in this process, asked one request at a time.

    Prompts are encoded as they are served. Log-likelihoods are natural logarithms.
    """

    def __init__(self, max_length: int, prefix_token: int) -> None:
        """See `prefix_token`.

        Args:
            max_length: the longest sequence the model takes, tokens.
            prefix_token: stands before a text that has no prompt.
        """
        super().__init__()
        self.max_length = max_length
        self._prefix_token = prefix_token
        self._begin = self.decode([prefix_token], skip_special_tokens=False)
        bare = self.encode("a", add_special_tokens=False)
        self._closes_prompts = self.encode("a", add_special_tokens=True)[-len(bare) :] != bare

    @abc.abstractmethod
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """A text's token ids."""

    @abc.abstractmethod
    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids."""

    @abc.abstractmethod
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits after each of the tokens; shape (tokens, vocabulary)."""

    @abc.abstractmethod
    def answer(self, prompt: Sequence[int], max_tokens: int, until: Sequence[str]) -> list[int]:
        """The likeliest tokens after a prompt, up to an end token or a text in `until`."""

    @property
    def eot_token_id(self) -> int:
        # The harness uses it for nothing but its `prefix_token_id`.
        return self._prefix_token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        if add_special_tokens is None:
            # A chat template has written the special tokens already.
            add_special_tokens = not string.startswith(self._begin)
        return self.encode(string, add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._closes_prompts:
            return self.tok_encode(context), self.encode(continuation, add_special_tokens=False)
        return super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(
        self,
        requests: Iterable[tuple[tuple[str, str] | None, list[int], list[int]]],
        **_: object,
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        last: list[int] = []
        likelihoods = torch.empty(0)
        for _text, context, continuation in requests:
            if not continuation:
                raise DataError(
                    "A harness task asks for the likelihood of an empty text",
                    expected="choices and targets of at least one token",
                    found=repr(_text),
                    cure="correct the task's documents or its doc_to_choice",
                )
            tokens = [*context, *continuation][:-1]
            # Choices of one token follow the same tokens.
            if tokens != last:
                self._check_length(len(context), len(continuation))
                likelihoods = torch.log_softmax(self.logits(tokens).double(), dim=-1)
                last = tokens
            of_continuation = likelihoods[-len(continuation) :]
            chosen = torch.tensor(continuation)
            likelihood = of_continuation.gather(1, chosen[:, None]).sum()
            greedy = bool((of_continuation.argmax(dim=1) == chosen).all())
            found.append((float(likelihood), greedy))
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, natural logarithm, in windows as the harness cuts them."""
        found: list[float] = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                # The token before a window counts as well.
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            parts = self._loglikelihood_tokens(
                (None, *utils.make_disjoint_window(window)) for window in windows
            )
            found.append(sum(likelihood for likelihood, _ in parts))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut off before the first of its stop texts.

        Raises:
            SpecError: a task wants to sample, or something else that is not known here.
            DataError: a prompt is too long for the model.
        """
        found: list[str] = []
        for request in requests:
            context, asked = request.arguments
            until, max_tokens = _greedy_settings(request.task_name, asked)
            prompt = self.tok_encode(context)
            self._check_length(len(prompt), max_tokens)
            tokens = self.answer(prompt, max_tokens, until)
            text = self.decode(tokens, skip_special_tokens=True)
            found.append(postprocess_generated_text(text, until, think_end_token=None))
        return found

    def _check_length(self, prompt: int, answer: int) -> None:
        if prompt + answer > self.max_length:
            raise DataError(
                "A document of a harness task does not fit into the model's context",
                expected=f"at most {self.max_length} tokens",
                found=f"{prompt} of the prompt and {answer} for the answer",
                cure="lower the task's generation_kwargs.max_gen_toks or num_fewshot, or take "
                "the document out",
            )


class CheckpointModel(LocalModel):
    """A Hugging Face checkpoint on the CPU."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        """Takes what `evaluate.load_checkpoint` gives."""
        self._model = model
        self._tokenizer = tokenizer
        super().__init__(model.config.max_position_embeddings, prefix_token(tokenizer))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)  # one sequence, not several
        return text

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        return self._model(input_ids=torch.tensor([tokens])).logits[0]

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], max_tokens: int, until: Sequence[str]) -> list[int]:
        ids = torch.tensor([prompt])
        generate: Any = self._model.generate  # declared as an attribute of any kind
        tokenizer: Any = self._tokenizer  # declared as one without its shared base
        sequence = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            # Whole, so that no sampling default of the checkpoint is mixed in.
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_tokens,
                eos_token_id=self._tokenizer.eos_token_id,
                pad_token_id=self._tokenizer.pad_token_id,
            ),
            stopping_criteria=stop_sequences_criteria(tokenizer, list(until), len(prompt), 1),
        )
        return sequence[0, len(prompt) :].tolist()


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before a text that has no prompt: the beginning of a sequence, or its end."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    token = end if begin is None else begin
    assert isinstance(token, int)  # a checkpoint without an end is not loaded
    return token


def _greedy_settings(task: str | None, asked: Mapping[str, Any]) -> tuple[list[str], int]:
    """Stop texts, and the most tokens of an answer."""
    settings: Any = normalize_gen_kwargs(dict(asked), DEFAULT_MAX_GEN_TOKS)
    if settings["do_sample"] or settings.keys() - GREEDY_SETTINGS:
        raise SpecError(
            f"The harness task {task} does not generate greedily",
            expected=f"generation_kwargs among {', '.join(sorted(GREEDY_SETTINGS))}, with "
            "do_sample: false or temperature: 0",
            found=", ".join(f"{key}: {json.dumps(value)}" for key, value in asked.items()),
            cure="correct generation_kwargs; a gate must not depend on chance",
        )
    # An empty text would stop every answer at once.
    return [text for text in settings["until"] if text], settings["max_gen_toks"]
