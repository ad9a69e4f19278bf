"""The tokenizer of models trained from nothing: one token a character.

What the platform relies on, for any model: the ids of a prompt are
`tokenizer.encode(prompt)`, and the model answers with its completion and the
end-of-sequence token. Here a prompt becomes `<s> prompt <sep>`, and a prompt with its
completion, encoded as a pair, `<s> prompt <sep> completion </s>`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, normalizers, processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END, SEPARATOR, UNKNOWN = "<pad>", "<s>", "</s>", "<sep>", "<unk>"
SPECIAL = (PAD, BEGIN, END, SEPARATOR, UNKNOWN)

ASCII = string.digits + string.ascii_letters + string.punctuation + " "
LATIN_1_LETTERS = "".join(
    character for character in map(chr, range(0xA0, 0x100)) if character.isalpha()
)


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer that knows printable ASCII, the letters of Latin-1, and what `texts` hold.

    The special tokens have ids 0 to 4 in the order of `SPECIAL`; characters follow by
    code point.
    """
    normalizer = normalizers.NFC()
    characters = set(ASCII + LATIN_1_LETTERS)
    for text in texts:
        characters.update(normalizer.normalize_str(text))
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *sorted(characters)))}
    # Byte-pair encoding without any merge splits into characters.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {SEPARATOR}",
        pair=f"{BEGIN} $A {SEPARATOR} $B {END}",
        special_tokens=[(token, vocabulary[token]) for token in (BEGIN, SEPARATOR, END)],
    )
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, max_tokens: int) -> PreTrainedTokenizerFast:
    """The same tokenizer for transformers, which writes the files that `AutoTokenizer` reads.

    Args:
        tokenizer: what `build_tokenizer` gave.
        max_tokens: the model's longest sequence, tokens.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        sep_token=SEPARATOR,
        padding_side="left",
        model_max_length=max_tokens,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_tokens: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` into a Hugging Face directory."""
    wrap_tokenizer(tokenizer, max_tokens).save_pretrained(directory)
