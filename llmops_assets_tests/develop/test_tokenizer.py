"""The convention of prompt ids holds from training to serving, by way of files."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmops_assets.develop.tokenizer import SPECIAL, build_tokenizer, save_tokenizer

PAD_ID, BEGIN_ID, END_ID, SEPARATOR_ID, UNKNOWN_ID = range(5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(build_tokenizer(["3 mars 2024", "Łódź"]), directory, max_tokens=64)
    return directory


@pytest.fixture(scope="module")
def saved(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def test_templates_survive_saving(directory: Path, saved: PreTrainedTokenizerBase) -> None:
    """Serving reads tokenizer.json by `tokenizers`, evaluation by transformers; a class that
    rebuilds the tokenizer on loading would drop the template in one of them."""
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt, answer = "le 3 août 2024", "2024-08-03"
    characters = [plain.token_to_id(character) for character in prompt]
    completion = [plain.token_to_id(character) for character in answer]
    assert UNKNOWN_ID not in characters
    assert plain.encode(prompt).ids == [BEGIN_ID, *characters, SEPARATOR_ID]
    assert saved.encode(prompt) == plain.encode(prompt).ids
    pair = [BEGIN_ID, *characters, SEPARATOR_ID, *completion, END_ID]
    assert plain.encode(prompt, answer).ids == pair
    assert saved.encode(prompt, answer) == pair
    # How anyone builds the same ids for a model whose pair template they do not know.
    assert saved.encode(answer, add_special_tokens=False) == completion


def test_special_tokens_have_their_roles(saved: PreTrainedTokenizerBase) -> None:
    """Generation stops at `</s>` and pads with `<pad>`, by what the files say."""
    roles = (saved.pad_token_id, saved.bos_token_id, saved.eos_token_id, saved.sep_token_id)
    assert roles == (PAD_ID, BEGIN_ID, END_ID, SEPARATOR_ID)
    assert saved.unk_token_id == UNKNOWN_ID
    assert "token_type_ids" not in saved("3 mars 2024")


def test_decoding_gives_the_text_back(saved: PreTrainedTokenizerBase) -> None:
    """Decoders like to put spaces between tokens, or to tidy those before punctuation."""
    text = "Mi., 3. März 2024 ,  n'importe !"
    assert saved.decode(saved.encode(text), skip_special_tokens=True) == text


def test_decomposed_letters_are_the_same_prompt(saved: PreTrainedTokenizerBase) -> None:
    """macOS types é as two code points; the model has only seen one."""
    text = "3 août 2024"
    assert saved.encode(unicodedata.normalize("NFD", text)) == saved.encode(text)


def test_the_vocabulary_depends_on_the_characters_alone() -> None:
    """Ids in another order would be another model for the same data."""
    first = build_tokenizer(["Łódź", "żaba"]).to_str()
    assert first == build_tokenizer(["żaba", "Łódź"]).to_str()
    tokenizer = build_tokenizer([])
    assert [tokenizer.id_to_token(number) for number in range(5)] == list(SPECIAL)
    assert tokenizer.encode("aŁ").ids[1:-1] == [tokenizer.token_to_id("a"), UNKNOWN_ID]
