"""The text of an answer while its tokens come, with tokens that are less than a character."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmops_assets.toolchains.onnxruntime_genai.triton_model.generation import Answer


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """One token a byte, as byte-level tokenizers fall back to for rare characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces(
    tokenizer: Tokenizer, tokens: Sequence[int], stop_words: Sequence[str] = ()
) -> list[str]:
    answer = Answer(tokenizer, stop_words)
    given: list[str] = []
    for token in tokens:
        given.append(answer.add(token))
        if answer.stopped:
            return given
    return [*given, answer.finish()]


def test_no_half_character_is_given_out(byte_tokenizer: Tokenizer) -> None:
    """A client that shows pieces as they come must not see replacement characters."""
    text = "é€😀z"
    given = pieces(byte_tokenizer, byte_tokenizer.encode(text).ids)
    assert [piece for piece in given if piece] == ["é", "€", "😀", "z"]


def test_character_cut_off_by_the_limit_shows_at_the_end(byte_tokenizer: Tokenizer) -> None:
    """An answer that ends inside a character must not hang on to it silently."""
    given = pieces(byte_tokenizer, byte_tokenizer.encode("a€").ids[:-1])
    assert "".join(given) == "a\ufffd"


def test_stop_word_over_several_tokens_is_not_given_out(byte_tokenizer: Tokenizer) -> None:
    """The beginning of a stop word must be held back until it is known to be one."""
    tokens = byte_tokenizer.encode("one END two").ids
    given = pieces(byte_tokenizer, tokens, ["END"])
    assert "".join(given) == "one "
    assert len(given) == len("one END")


def test_text_that_only_begins_like_a_stop_word_is_kept(byte_tokenizer: Tokenizer) -> None:
    """Held-back text must come when it turns out otherwise, or when the answer ends."""
    tokens = byte_tokenizer.encode("EENDE EN").ids
    assert "".join(pieces(byte_tokenizer, tokens, ["ENDED"])) == "EENDE EN"


def test_first_of_several_stop_words_ends_the_answer(byte_tokenizer: Tokenizer) -> None:
    """The order of the list must not decide, but what comes first in the text."""
    tokens = byte_tokenizer.encode("a, b. c").ids
    assert "".join(pieces(byte_tokenizer, tokens, [".", ","])) == "a"
