"""Answers in batches are those alone, token for token, and nobody's trouble is another's."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llmops_assets.toolchains.onnxruntime_genai.engine_directory import TOKENIZER
from llmops_assets.toolchains.onnxruntime_genai.triton_model import generation
from llmops_assets.toolchains.onnxruntime_genai.triton_model.batching import (
    CANCELLATION_INTERVAL_SECONDS,
    Batcher,
    Limits,
    UnavailableError,
)
from llmops_assets.toolchains.onnxruntime_genai.triton_model.generation import (
    GENERATION_CONFIG,
    Sampling,
    TextGenerator,
)
from llmops_assets_tests.tiny_llama import TinyLlama, tiny_llama

LIMITS = Limits(batch_size=8, window_seconds=0.05, queue_size=64, drain_seconds=20)
BEGIN = 1
WAIT_SECONDS = 20


class WatchedGenerator(TextGenerator):
    """The real engine, which counts its forward passes, and can be slow or fail."""

    def __init__(self, engine: Path) -> None:
        self.passes = 0
        self.seconds_of_a_pass = 0.0
        self.poison: int | None = None
        """A token; the engine fails in the third pass of a batch with it in a prompt."""
        super().__init__(engine, engine / TOKENIZER, threads=1)

    def steps(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
    ) -> Iterator[list[int | None]]:
        poisoned = any(self.poison in prompt for prompt in prompts)
        for number, step in enumerate(super().steps(prompts, samplings)):
            if poisoned and number == 2:
                raise RuntimeError("poisoned")
            self.passes += 1
            time.sleep(self.seconds_of_a_pass)
            yield step


class CollectingReply:
    """Somebody who waits for an answer."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.found: list[int] = []
        self.error: RuntimeError | None = None
        self.gone = False
        self.cannot_use: int | None = None
        """How many tokens it takes before one that it cannot."""
        self.ended = threading.Event()

    @property
    def count(self) -> int:
        return len(self.found)

    def take(self, token: int) -> bool:
        if self.count == self.cannot_use:
            raise RuntimeError("no such character")
        self.found.append(token)
        more = token != 2 and self.count < self.sampling.max_tokens
        if not more:
            self.ended.set()
        return more

    def is_gone(self) -> bool:
        if self.gone:
            self.ended.set()
        return self.gone

    def fail(self, error: RuntimeError) -> None:
        self.error = error
        self.ended.set()


class Rig:
    """A batcher at work."""

    def __init__(self, generator: WatchedGenerator, limits: Limits = LIMITS) -> None:
        self.batches: list[int] = []
        self.tokens = 0
        self.in_progress = 0
        self.batcher = Batcher(generator, limits, self)
        self.thread = threading.Thread(target=self.batcher.run)
        self.thread.start()

    def began(self, requests: int, in_progress: int) -> None:
        self.batches.append(requests)
        self.in_progress = in_progress

    def ended(self, tokens: int, in_progress: int) -> None:
        self.tokens += tokens
        self.in_progress = in_progress

    def ask(self, prompt: Sequence[int], sampling: Sampling) -> CollectingReply:
        reply = CollectingReply(prompt, sampling)
        self.batcher.submit(reply)
        return reply

    def close(self) -> None:
        self.batcher.close()
        self.thread.join(WAIT_SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return tiny_llama(tmp_path_factory.getbasetemp() / "tiny_llama")


@pytest.fixture
def generator(tiny: TinyLlama) -> WatchedGenerator:
    return WatchedGenerator(tiny.engine)


@pytest.fixture
def rig(generator: WatchedGenerator) -> Iterator[Rig]:
    rig = Rig(generator)
    yield rig
    rig.close()


def prompt_of(length: int, draw: random.Random, vocabulary: int) -> list[int]:
    return [BEGIN, *(draw.randrange(5, vocabulary) for _ in range(length - 1))]


def ended(reply: CollectingReply) -> CollectingReply:
    assert reply.ended.wait(WAIT_SECONDS)
    return reply


def test_mixed_batches_answer_as_alone(generator: WatchedGenerator, rig: Rig) -> None:
    """Who else asks must not change an answer, not even the last bit of a logit.

    Lengths that are one more than a multiple of a block (33, 65) are drawn often: alone, their
    last row goes through another routine of the runtime.
    """
    draw = random.Random(1)
    asked: list[CollectingReply] = []
    for _ in range(40):
        round_of = [
            rig.ask(
                prompt_of(draw.choice((draw.randint(2, 90), 9, 33, 65)), draw, 160),
                Sampling(draw.randint(1, 24)),
            )
            for _ in range(draw.randint(2, 8))
        ]
        asked += [ended(reply) for reply in round_of]
    assert sum(rig.batches) == len(asked)
    assert len(rig.batches) < 0.5 * len(asked)
    rig.close()
    assert rig.tokens == sum(reply.count for reply in asked)
    assert rig.in_progress == 0
    for reply in asked:
        assert reply.found == list(generator.tokens(reply.prompt, reply.sampling))


def test_logits_of_a_batch_are_those_alone(generator: WatchedGenerator) -> None:
    """Equal tokens by luck are not enough: any difference flips a token some day."""
    draw = random.Random(2)

    def logits_of(prompts: Sequence[Sequence[int]]) -> list[list[bytes]]:
        found: list[list[bytes]] = [[] for _ in prompts]
        samplings = [Sampling(3)] * len(prompts)
        inner = generator._generator(prompts, samplings)
        for number in range(3):
            logits = inner.get_logits()
            for row, prompt in enumerate(prompts):
                # The first pass of a prompt with its last token held back is about that.
                if number >= generator._held_back(prompt):
                    found[row].append(logits[row].tobytes())
            if number == 0:
                held = {r: p[-1] for r, p in enumerate(prompts) if generator._held_back(p)}
                if held:
                    inner.set_logits(generation._certain(logits, held))
            inner.generate_next_token()
        return found

    for _ in range(25):
        lengths = [draw.choice((draw.randint(2, 140), 33, 65, 97)) for _ in range(5)]
        prompts = [prompt_of(length, draw, 160) for length in lengths]
        for prompt, together in zip(prompts, logits_of(prompts), strict=True):
            assert together == logits_of([prompt])[0], len(prompt)


def test_what_cannot_be_exact_in_a_batch_is_not_mixed(
    generator: WatchedGenerator, tiny: TinyLlama, tmp_path: Path
) -> None:
    """Padding or an end token inside a prompt, random draws, penalties on repetition."""
    greedy, drawn = Sampling(4), Sampling(4, temperature=1.0, seed=3)
    usual, longer = [BEGIN, 7, 8], [BEGIN, 7, 8, 9]
    assert generator.mixes_lengths
    assert generator.together([usual, longer], [greedy, greedy])
    assert not generator.together([usual, longer], [greedy, drawn])
    for odd in ([BEGIN], [BEGIN, 0, 8], [BEGIN, 2, 8]):
        assert generator.together([odd], [greedy])
        assert not generator.together([odd, longer], [greedy, greedy])
    whole = Sampling(generator.context_length - 3)
    assert generator.together([usual], [whole])
    assert not generator.together([usual, longer], [whole, greedy])
    engine = tmp_path / "engine"
    shutil.copytree(tiny.engine, engine)
    configuration = json.loads((engine / GENERATION_CONFIG).read_text())
    configuration["search"]["repetition_penalty"] = 1.2
    (engine / GENERATION_CONFIG).write_text(json.dumps(configuration))
    penalising = WatchedGenerator(engine)
    assert not penalising.mixes_lengths
    assert not penalising.together([usual, longer], [greedy, greedy])
    assert penalising.together([usual, [BEGIN, 9, 8]], [greedy, greedy])
    alone = [list(penalising.tokens(prompt, Sampling(20))) for prompt in (usual, [BEGIN, 9, 8])]
    steps = list(penalising.steps([usual, [BEGIN, 9, 8]], [Sampling(20)] * 2))
    assert [[step[row] for step in steps if step[row] is not None] for row in (0, 1)] == alone


def test_engine_that_sees_padding_is_not_given_any(
    tiny: TinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine with another attention must be found out at the load, not by its users."""
    plain = WatchedGenerator._generator

    def padded_on_the_left(
        self: WatchedGenerator, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
    ) -> object:
        longest = max(map(len, prompts))
        return plain(self, [[0] * (longest - len(p)) + list(p) for p in prompts], samplings)

    monkeypatch.setattr(WatchedGenerator, "_generator", padded_on_the_left)
    assert not WatchedGenerator(tiny.engine).mixes_lengths


def test_random_draws_keep_their_seed_beside_others(generator: WatchedGenerator, rig: Rig) -> None:
    """A seed is a promise, also in a crowd; and 9 tokens are fed in two passes."""
    draw = random.Random(4)
    for length in (5, 9):
        prompt = prompt_of(length, draw, 160)
        drawn = Sampling(12, temperature=1.0, seed=5)
        replies = [rig.ask(prompt, Sampling(12)), rig.ask(prompt, drawn), rig.ask(prompt, drawn)]
        greedy, first, second = (ended(reply).found for reply in replies)
        assert greedy == list(generator.tokens(prompt, Sampling(12)))
        assert first == second == list(generator.tokens(prompt, drawn)) != greedy


def test_batch_ends_within_a_token_of_its_last_client(
    generator: WatchedGenerator, rig: Rig
) -> None:
    """A model that talks on to nobody keeps everybody else waiting."""
    generator.seconds_of_a_pass = 2 * CANCELLATION_INTERVAL_SECONDS
    prompts = [[BEGIN, 7, 8], [BEGIN, 9, 8]]
    replies = [rig.ask(prompt, Sampling(1000)) for prompt in prompts]
    while replies[0].count < 5:
        time.sleep(0.001)
    for reply in replies:
        reply.gone = True
    had, passes = replies[0].count, generator.passes
    for reply in replies:
        ended(reply)
    next_one = ended(rig.ask([BEGIN, 7, 8], Sampling(1)))
    assert replies[0].count <= had + 1
    assert generator.passes <= passes + 2
    assert next_one.found == replies[0].found[:1]
    assert rig.batches == [2, 1]


def test_one_who_leaves_does_not_disturb_the_rest(generator: WatchedGenerator, rig: Rig) -> None:
    """Others of the batch go on, and whoever left while waiting takes no place at all."""
    generator.seconds_of_a_pass = 0.01
    stays, leaves = (rig.ask([BEGIN, 7, last], Sampling(30)) for last in (8, 9))
    while leaves.count < 3:
        time.sleep(0.001)
    never = rig.ask([BEGIN, 5, 5], Sampling(30))
    leaves.gone = never.gone = True
    assert ended(stays).found == list(generator.tokens(stays.prompt, stays.sampling))
    assert ended(leaves).count < 10
    assert ended(never).count == 0
    assert rig.batches == [2]


def test_what_fails_for_one_fails_for_nobody_else(generator: WatchedGenerator, rig: Rig) -> None:
    """One poisonous request must not take its batch along, nor break what was streamed."""
    generator.poison = 77
    good, bad, unusable = (rig.ask([BEGIN, 7, last], Sampling(10)) for last in (8, 77, 9))
    unusable.cannot_use = 1
    assert str(ended(bad).error) == "poisoned"
    assert str(ended(unusable).error) == "no such character"
    assert ended(good).error is None
    generator.poison = None
    assert good.found == list(generator.tokens(good.prompt, good.sampling))
    assert rig.batches == [3]
    assert ended(rig.ask([BEGIN, 7, 8], Sampling(10))).found == good.found


def test_queue_has_a_bound(generator: WatchedGenerator) -> None:
    """Who would wait for ever is better told at once; whoever is in is answered."""
    limits = Limits(batch_size=2, window_seconds=0, queue_size=3, drain_seconds=20)
    generator.seconds_of_a_pass = 0.02
    rig = Rig(generator, limits)
    first = rig.ask([BEGIN, 7, 8], Sampling(10))
    while first.count == 0:
        time.sleep(0.001)
    waiting = [rig.ask([BEGIN, 7, 8], Sampling(3)) for _ in range(3)]
    assert rig.in_progress == 1, "it is told when a batch begins, and when a request ends"
    with pytest.raises(UnavailableError, match="3 requests wait already"):
        rig.ask([BEGIN, 7, 8], Sampling(3))
    assert [ended(reply).found for reply in waiting] == [first.found[:3]] * 3
    rig.close()
    assert rig.batches == [1, 2, 1]
    assert rig.in_progress == 0


def test_close_answers_what_it_took(generator: WatchedGenerator) -> None:
    """A slot that stops must not cut streams, nor forget who waits."""
    generator.seconds_of_a_pass = 0.01
    rig = Rig(generator, Limits(batch_size=1, window_seconds=0, queue_size=9, drain_seconds=20))
    replies = [rig.ask([BEGIN, 7, last], Sampling(8)) for last in (8, 9, 10)]
    rig.batcher.close()
    with pytest.raises(UnavailableError, match="stopping"):
        rig.ask([BEGIN, 7, 8], Sampling(1))
    rig.close()
    assert [reply.error for reply in replies] == [None] * 3
    generator.seconds_of_a_pass = 0
    for reply in replies:
        assert reply.found == list(generator.tokens(reply.prompt, reply.sampling))


def test_close_ends_all_when_its_time_is_up(generator: WatchedGenerator) -> None:
    """Whoever cannot be answered in time is told so, and the process can end."""
    generator.seconds_of_a_pass = 0.01
    limits = Limits(batch_size=1, window_seconds=0, queue_size=9, drain_seconds=0.2)
    rig = Rig(generator, limits)
    running, waiting = (rig.ask([BEGIN, 7, last], Sampling(500)) for last in (8, 9))
    while running.count == 0:
        time.sleep(0.001)
    started = time.monotonic()
    rig.close()
    assert time.monotonic() - started < 2
    assert running.count > 5
    assert "before the answer's end" in str(running.error)
    assert waiting.count == 0
    assert "before it came to this" in str(waiting.error)
