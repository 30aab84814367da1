"""Answers to prompts: batched, sampled or greedy, streamed or whole, with HF's `generate` and its key-value cache.

What HF's `generate` (4.57.6) does with this model, and what is done about it:
- rows of one batch end at different lengths, so prompts are padded on the left: HF continues the cross-attention mask
  of a batch with its last column, which for padding on the right is a pad token's;
- rows of left padding see no image and attend to nothing real; their positions don't count;
- the repetition penalty looks up the prompt's tokens among the logits, where <|image|> has none: an index error (on a
  GPU one that ends the process), so the token is hidden from it;
- one random number generator serves a whole batch, so that an answer depends on its neighbours. Here each row has its
  own: argmax(scores + Gumbel noise) draws from softmax(scores).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmsft.data.encode import visible_until
from vlmsft.data.records import Turn
from vlmsft.errors import Problem, UserError
from vlmsft.generation.model import LoadedModel

FinishReason = Literal["stop", "length", "cancelled"]
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; names and meanings are HF's.

    max_new_tokens: most tokens of an answer; one that reaches it ends with finish_reason "length"
    temperature: 0 = greedy: the most likely token each time; top_p, top_k and seed then change nothing
    top_p: draw from the fewest tokens that have this probability together; 1.0 = from all
    top_k: draw from so many tokens; 0 = from all
    repetition_penalty: divides the scores of tokens that prompt or answer hold already; 1.0 = none
    seed: the same seed, prompt and settings give the same answer, whatever else is in the batch
    stop: an answer ends before the first of these texts
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def problems(self) -> list[Problem]:
        """Values that mean nothing; empty when all is well."""
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0 (0 = greedy)"),
            ("top_p", 0 < self.top_p <= 1, "over 0, at most 1 (1.0 = all tokens)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 = all tokens)"),
            ("repetition_penalty", self.repetition_penalty > 0, "over 0 (1.0 = none)"),
            ("stop", all(self.stop), "no empty text"),
        ]
        return [Problem(name, repr(getattr(self, name)), expected) for name, holds, expected in rules if not holds]


@dataclass(frozen=True)
class Prompt:
    """A conversation up to a user turn, and the images of its image parts in the order of reading."""

    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...] = ()

    @classmethod
    def from_text(cls, text: str, images: Sequence[Image.Image] = ()) -> Prompt:
        """One user turn. `<image>` in the text marks where an image stands; without a marker they come first."""
        turn = Turn.from_text("user", text)
        if images and not turn.num_images:
            turn = Turn("user", (*(None for _ in images), *turn.parts))
        return cls((turn,), tuple(images))


@dataclass(frozen=True)
class Answer:
    """text: without the token that ended it, or what the stop text cut off
    finish_reason: "stop" (the model, or a stop text), "length" (max_new_tokens: the answer is cut) or "cancelled"
    num_prompt_tokens, num_tokens: of the prompt, and generated, the ending token included
    """

    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_tokens: int


OnAnswer = Callable[[int, Answer], None]


class Generator:
    """Generates with one model. Calls from several threads are safe; they run side by side, not as one batch."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self._encoder = loaded.encoder
        image_processor = loaded.encoder.processor.image_processor
        shape = (1, 3, 1, 1)
        self._scale = 1 / 255
        self._mean = torch.tensor(image_processor.image_mean, device=loaded.device).view(shape)
        self._std = torch.tensor(image_processor.image_std, device=loaded.device).view(shape)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling],
        cancel: threading.Event | Sequence[threading.Event] | None = None,
        on_text: OnText | None = None,
        on_answer: OnAnswer | None = None,
        use_cache: bool = True,
    ) -> list[Answer]:
        """The prompts' answers, computed as one batch.

        sampling: one for all prompts, or one for each
        cancel: once set, each unfinished answer ends with the tokens that it has; one for all, or one for each
        on_text: called with (number of the prompt, text) as text comes; the pieces of an answer add up to its text
        on_answer: called with (number of the prompt, Answer) as soon as an answer ends, before the batch does
        use_cache: without the key-value cache each token costs a whole forward pass: for comparisons only
        Raises UserError where a prompt's image parts and images differ in number, or a sampling value means nothing.
        """
        if not prompts:
            return []
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        raise_problems(prompts, samplings)
        token_ids = [self._encoder.prompt_ids(prompt.turns) for prompt in prompts]
        pairs = enumerate(zip(token_ids, samplings, strict=True))
        rows = [self._row(number, ids, sampling, on_text) for number, (ids, sampling) in pairs]
        cancels = list(cancel) if isinstance(cancel, Sequence) else [cancel] * len(prompts)
        model: Any = self.loaded.model  # HF's annotations know no inputs of a single model
        with torch.inference_mode():
            model.generate(
                **self.model_inputs(token_ids, prompts),
                generation_config=GenerationConfig(
                    max_new_tokens=max(s.max_new_tokens for s in samplings),
                    do_sample=False,
                    use_cache=use_cache,
                    pad_token_id=self._encoder.pad_token_id,
                ),
                logits_processor=LogitsProcessorList([_PerRow(samplings, self._encoder, self.loaded.device)]),
                stopping_criteria=StoppingCriteriaList([_Rows(rows, cancels, on_answer)]),
            )
        return [row.answer() for row in rows]

    def stream(self, prompt: Prompt, sampling: Sampling) -> AnswerStream:
        """The prompt's answer as it comes; generation runs in a thread of its own."""
        return AnswerStream(self, prompt, sampling)

    def model_inputs(self, token_ids: Sequence[Sequence[int]], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """What the model's forward takes, padded on the left: B prompts, S tokens, N image slots, 4 tiles.

        input_ids, attention_mask (B, S) int64; with images also pixel_values (B, N, 4, 3, tile, tile),
        aspect_ratio_ids (B, N), aspect_ratio_mask (B, N, 4) and cross_attention_mask (B, S, N, 4).
        """
        size = max(len(ids) for ids in token_ids)
        pad, device = self._encoder.pad_token_id, self.loaded.device
        padded = [F.pad(torch.tensor(ids), (size - len(ids), 0), value=pad) for ids in token_ids]
        seen = [F.pad(torch.ones(len(ids), dtype=torch.int64), (size - len(ids), 0)) for ids in token_ids]
        inputs = {"input_ids": torch.stack(padded).to(device), "attention_mask": torch.stack(seen).to(device)}
        if any(prompt.images for prompt in prompts):
            inputs |= self._image_inputs(token_ids, prompts, size)
        return inputs

    def _image_inputs(
        self, token_ids: Sequence[Sequence[int]], prompts: Sequence[Prompt], size: int
    ) -> dict[str, Tensor]:
        encoder, device, dtype = self._encoder, self.loaded.device, self.loaded.dtype
        slots = (len(prompts), max(len(prompt.images) for prompt in prompts))
        pixels = torch.zeros(*slots, encoder.max_tiles, 3, encoder.tile_size, encoder.tile_size, dtype=dtype)
        pixels = pixels.to(device)
        ratios = torch.zeros(slots, dtype=torch.int64)
        counts = torch.ones(slots, dtype=torch.int64)  # HF's processor gives an unused slot one real tile
        cross = torch.zeros(len(prompts), size, slots[1], encoder.max_tiles, dtype=dtype)
        for row, (ids, prompt) in enumerate(zip(token_ids, prompts, strict=True)):
            offset = size - len(ids)
            starts = [place for place, token in enumerate(ids) if token == encoder.image_token_id]
            ends = visible_until(starts, len(ids))
            for slot, image in enumerate(prompt.images):
                tiles, ratio = encoder.tile_image(image)
                pixels[row, slot, : len(tiles)] = self._normalise(torch.from_numpy(tiles)).to(dtype)
                ratios[row, slot], counts[row, slot] = ratio, len(tiles)
                cross[row, offset + starts[slot] : offset + ends[slot], slot, : len(tiles)] = 1
        tile_numbers = torch.arange(encoder.max_tiles)
        return {
            "pixel_values": pixels,
            "aspect_ratio_ids": ratios.to(device),
            "aspect_ratio_mask": (tile_numbers < counts.unsqueeze(-1)).long().to(device),
            "cross_attention_mask": cross.to(device),
        }

    def _normalise(self, tiles: Tensor) -> Tensor:
        """(T, 3, tile, tile) uint8 -> float32 on the model's device."""
        return (tiles.to(self.loaded.device).float() * self._scale - self._mean) / self._std

    def _row(self, number: int, ids: list[int], sampling: Sampling, on_text: OnText | None) -> _Row:
        tokenizer = self._encoder.processor.tokenizer.backend_tokenizer
        emit = None if on_text is None else lambda text: on_text(number, text)
        return _Row(tokenizer, self.loaded.end_token_ids, sampling, len(ids), emit)


def raise_problems(prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> None:
    """Raises UserError with all that is wrong with the prompts and how to sample."""
    problems = [problem for sampling in dict.fromkeys(samplings) for problem in sampling.problems()]
    for number, prompt in enumerate(prompts):
        markers = sum(turn.num_images for turn in prompt.turns)
        if markers != len(prompt.images):
            found = f"{markers} image marker(s) for {len(prompt.images)} image(s)"
            problems.append(Problem(f"prompt {number}", found, "as many as images"))
    if problems:
        raise UserError(problems)


class AnswerStream:
    """An answer's text, piece by piece: iterate over it once.

    answer: after the last piece, the whole Answer
    cancel() ends it early; so does leaving the loop and dropping the iterator.
    """

    def __init__(self, generator: Generator, prompt: Prompt, sampling: Sampling):
        self.answer: Answer | None = None
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._arguments = (generator, prompt, sampling)
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)

    def cancel(self) -> None:
        """Ends generation at the next token; safe from another thread."""
        self._cancelled.set()

    def __iter__(self) -> Iterator[str]:
        """Pieces of valid text, none empty. Raises what generation raised."""
        self._thread.start()
        try:
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.cancel()
            self._thread.join()

    def _work(self) -> None:
        generator, prompt, sampling = self._arguments
        try:
            on_text = lambda _, text: self._pieces.put(text)  # noqa: E731
            self.answer = generator.generate([prompt], sampling, cancel=self._cancelled, on_text=on_text)[0]
            self._pieces.put(None)
        except BaseException as error:
            self._pieces.put(error)


class _PerRow(LogitsProcessor):
    """Penalty, temperature, top k, top p and noise of each row by its own Sampling."""

    def __init__(self, samplings: Sequence[Sampling], encoder: Any, device: torch.device):
        self._image_token, self._stand_in = encoder.image_token_id, encoder.pad_token_id
        # HF's annotations say LongTensor and FloatTensor, which no GPU tensor is
        self._rows: list[Any] = [self._processors(sampling, device) for sampling in samplings]

    @staticmethod
    def _processors(sampling: Sampling, device: torch.device) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        if sampling.temperature == 0:
            return processors
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(float(sampling.top_p)))
        processors.append(_GumbelNoise(sampling.seed, device))
        return processors

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, S) tokens and (B, vocab_size) float32 scores -> scores whose largest is the next token."""
        if not any(self._rows):
            return scores
        ids = input_ids.masked_fill(input_ids == self._image_token, self._stand_in)
        return torch.cat([process(ids[i : i + 1], scores[i : i + 1]) for i, process in enumerate(self._rows)])


class _GumbelNoise(LogitsProcessor):
    """Makes the argmax a draw from the softmax."""

    def __init__(self, seed: int, device: torch.device):
        self._random = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores).exponential_(generator=self._random).clamp_min(1e-30)
        return scores - noise.log()


class _Rows(StoppingCriteria):
    """Hands each new token to its row; a row that is finished stays so."""

    def __init__(self, rows: Sequence[_Row], cancels: Sequence[threading.Event | None], on_answer: OnAnswer | None):
        self._rows, self._cancels, self._on_answer = rows, cancels, on_answer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, S) tokens, the last one new -> (B,) whether the row is finished."""
        for number, (row, token) in enumerate(zip(self._rows, input_ids[:, -1].tolist(), strict=True)):
            if row.finish_reason is not None:
                continue
            cancel = self._cancels[number]
            if cancel is not None and cancel.is_set():
                row.finish("cancelled")
            row.push(token)
            if row.finish_reason is not None and self._on_answer is not None:
                self._on_answer(number, row.answer())
        return torch.tensor([row.finish_reason is not None for row in self._rows], device=input_ids.device)


class _Row:
    """One answer while it grows: text comes out as soon as it is whole characters and can't begin a stop text."""

    def __init__(
        self,
        tokenizer: Any,
        end_token_ids: frozenset[int],
        sampling: Sampling,
        num_prompt_tokens: int,
        emit: Callable[[str], None] | None,
    ):
        self.finish_reason: FinishReason | None = None
        self._tokenizer, self._ends, self._sampling, self._emit = tokenizer, end_token_ids, sampling, emit
        self._num_prompt_tokens = num_prompt_tokens
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._held_back = max((len(stop) for stop in sampling.stop), default=1) - 1
        self._text = ""  # what is decoded
        self._num_sent = 0  # characters of it that were emitted

    def push(self, token: int) -> None:
        """The next token; ignored once the row is finished."""
        if self.finish_reason is not None:
            return
        self._ids.append(token)
        if token in self._ends:
            self.finish("stop")
            return
        before = len(self._text)
        self._text += self._decoder.step(self._tokenizer, token) or ""
        if self._cut_at_stop(before):
            self.finish("stop")
        elif len(self._ids) >= self._sampling.max_new_tokens:
            self.finish("length")
        else:
            self._send(len(self._text) - self._held_back)

    def finish(self, reason: FinishReason) -> None:
        """Ends the row; what was held back is emitted."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self._send(len(self._text))

    def answer(self) -> Answer:
        assert self.finish_reason is not None, "generation has ended"
        return Answer(self._text, self.finish_reason, self._num_prompt_tokens, len(self._ids))

    def _cut_at_stop(self, before: int) -> bool:
        """Whether a stop text came up; it and what follows it are gone then."""
        start = max(0, before - self._held_back)
        found = [place for stop in self._sampling.stop if (place := self._text.find(stop, start)) >= 0]
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    def _send(self, end: int) -> None:
        if self._emit is not None and end > self._num_sent:
            self._emit(self._text[self._num_sent : end])
            self._num_sent = end
