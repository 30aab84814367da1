"""The sample encoder: conversation and images in, tokens, labels and image tiles out. Every data path uses this one.

Tokens. The conversation is rendered by the processor's own chat template, with images as image parts, so that a
training prompt equals the inference prompt. Two things keep the labels right whatever the answer says (a search for the
answer's tokens in the whole text fails when it starts with a newline, ends the question, is empty, ...):
- answers are stripped and tokenised on their own: the prompt up to and including the assistant header is exactly what
  generation sees, and [answer, end-of-turn token] is exactly what it should produce;
- special tokens come from the template only. "<|eot_id|>" typed in a record is text.

Images. PIL's resize and a split into uint8 tiles; after (x/255 - mean)/std they equal transformers'
MllamaImageProcessor to 2.4e-7. Normalising on the device keeps a batch at a quarter of the bytes.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from vlmsft.data.records import Turn
from vlmsft.data.skips import Skip
from vlmsft.errors import Problem, UserError

IGNORE = -100  # label of a token without loss
NO_DATE = "26 Jul 2024"  # the template's own fallback: today's date would make tokens depend on the day of the run


@dataclass(frozen=True)
class EncodedSample:
    """One sample of L tokens, N images and T tiles (the sum of the images' tiles; each may be 0, L may not)."""

    tokens: torch.Tensor  # (L,) int64
    labels: torch.Tensor  # (L,) int64, already shifted: labels[t] is the token after tokens[t]; -100 without loss
    tiles: torch.Tensor  # (T, 3, tile, tile) uint8, not normalised, 0 where the image doesn't fill its last tiles
    num_tiles: torch.Tensor  # (N,) int64
    aspect_ratio_ids: torch.Tensor  # (N,) int64, from 1
    visible_from: torch.Tensor  # (N,) int64, position of the image's token
    visible_until: torch.Tensor  # (N,) int64, one past the last token that sees the image
    num_truncated_tokens: int = 0  # tokens cut off the end to fit decoder_seq_length
    skipped: Skip | None = None  # what this one stands in for

    def without_loss(self) -> EncodedSample:
        """The same sample with nothing to learn: fills up a batch."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE))


class SampleEncoder:
    """Encodes conversations for one processor.

    processor: folder or hub id of a transformers processor (fast tokenizer with chat template, Mllama image processor)
    decoder_seq_length: most text tokens of a sample; longer ones are cut at the end and say so in num_truncated_tokens
    Pickles as its two arguments; the processor is loaded at first use, so each worker process loads its own.
    """

    def __init__(self, processor: str, decoder_seq_length: int):
        self.processor_path = str(processor)
        self.decoder_seq_length = decoder_seq_length
        self._loaded: _Loaded | None = None

    def __reduce__(self):
        return (SampleEncoder, (self.processor_path, self.decoder_seq_length))

    @property
    def _parts(self) -> _Loaded:
        if self._loaded is None:
            self._loaded = _load(self.processor_path)
        return self._loaded

    @property
    def processor(self) -> Any:
        """transformers' processor."""
        return self._parts.processor

    @property
    def image_token_id(self) -> int:
        return self._parts.image_token_id

    @property
    def pad_token_id(self) -> int:
        return self._parts.pad_token_id

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self._parts.tile_size

    @property
    def max_tiles(self) -> int:
        """Most tiles of an image."""
        return self._parts.max_tiles

    def with_limit(self, decoder_seq_length: int) -> SampleEncoder:
        """An encoder of another length, with this one's processor if that is loaded."""
        encoder = SampleEncoder(self.processor_path, decoder_seq_length)
        encoder._loaded = self._loaded
        return encoder

    def encode(self, turns: Sequence[Turn], images: Sequence[Image.Image], where: str = "") -> EncodedSample:
        """The encoded sample. `images` in the order of the image parts; `where` stands in front of errors.

        Raises UserError when image parts and images differ in number, when decoder_seq_length cuts an image token or
        all answers, or when there is no answer.
        """
        num_parts = sum(turn.num_images for turn in turns)
        if num_parts != len(images):
            raise UserError(
                Problem(where, f"{num_parts} image marker(s) for {len(images)} image(s)", "as many as images")
            )
        text = self.encode_text(turns, where)
        tiled = [self.tile_image(image) for image in images]
        size = self._parts.tile_size
        none = np.zeros((0, 3, size, size), np.uint8)
        return replace(
            text,
            tiles=torch.from_numpy(np.concatenate([none, *(tiles for tiles, _ in tiled)])),
            num_tiles=torch.tensor([len(tiles) for tiles, _ in tiled], dtype=torch.int64),
            aspect_ratio_ids=torch.tensor([ratio for _, ratio in tiled], dtype=torch.int64),
        )

    def encode_text(self, turns: Sequence[Turn], where: str = "") -> EncodedSample:
        """`encode` without its images: all fields about tokens, no tile."""
        ids, is_answer = self._parts.tokenize(turns)
        length = min(len(ids) - 1, self.decoder_seq_length)
        num_truncated = len(ids) - 1 - length
        full = torch.tensor(ids, dtype=torch.int64)
        tokens = full[:length]
        learned = torch.tensor(is_answer)[1 : length + 1]
        labels = torch.where(learned, full[1 : length + 1], IGNORE)
        positions = [position for position, token in enumerate(ids[:-1]) if token == self.image_token_id]
        self._check_truncation(positions, labels, length, num_truncated, where)
        return EncodedSample(
            tokens=tokens,
            labels=labels,
            tiles=torch.zeros((0, 3, self._parts.tile_size, self._parts.tile_size), dtype=torch.uint8),
            num_tiles=torch.zeros(0, dtype=torch.int64),
            aspect_ratio_ids=torch.zeros(0, dtype=torch.int64),
            visible_from=torch.tensor(positions, dtype=torch.int64),
            visible_until=torch.tensor(visible_until(positions, length), dtype=torch.int64),
            num_truncated_tokens=num_truncated,
        )

    def stand_in(self, skip: Skip) -> EncodedSample:
        """What takes the place of a sample that can't be read: a few tokens without image and without loss."""
        ids, _ = self._parts.tokenize([Turn("user", ("?",)), Turn("assistant", (".",))])
        none = torch.zeros(0, dtype=torch.int64)
        tokens = torch.tensor(ids[: self.decoder_seq_length], dtype=torch.int64)
        return EncodedSample(
            tokens=tokens,
            labels=torch.full_like(tokens, IGNORE),
            tiles=torch.zeros((0, 3, self._parts.tile_size, self._parts.tile_size), dtype=torch.uint8),
            num_tiles=none,
            aspect_ratio_ids=none,
            visible_from=none,
            visible_until=none,
            skipped=skip,
        )

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids that generation starts from: the conversation up to a user turn, and the assistant header."""
        return self._parts.tokenize([*turns, Turn("assistant", ("",))], prompt_only=True)[0]

    def tile_image(self, image: Image.Image) -> tuple[np.ndarray, int]:
        """(tiles (T, 3, tile, tile) uint8, aspect ratio id)."""
        return self._parts.tile(image)

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tiles that an image of this size gets."""
        return self._parts.canvas(width, height)

    def _check_truncation(
        self, positions: list[int], labels: torch.Tensor, length: int, num_truncated: int, where: str
    ) -> None:
        remedy = "Raise data.decoder_seq_length or drop the sample"
        limit = f"decoder_seq_length = {self.decoder_seq_length}"
        if positions and positions[-1] >= length:
            raise UserError(Problem(where, f"an image at token {positions[-1]}", f"all images within {limit}", remedy))
        if not (labels != IGNORE).any():
            if not num_truncated:
                raise UserError(Problem(where, "no answer", "at least one assistant turn"))
            found = f"{length + num_truncated} tokens, whose answers all lie behind the limit"
            raise UserError(Problem(where, found, f"an answer within {limit}", remedy))


def visible_until(positions: Sequence[int], length: int) -> list[int]:
    """For image tokens at `positions` in a text of `length` tokens: one past the last token that sees each image.

    A text sees the images right before it; images in a row are one group. Equals the ends of NeMo's
    create_vision_mask_tensor and transformers' get_cross_attention_token_mask.
    """
    ends: list[int] = []
    for position, following in zip(reversed(positions), [length, *reversed(positions)], strict=False):
        in_a_row = bool(ends) and following == position + 1
        ends.append(ends[-1] if in_a_row else following)
    return ends[::-1]


def load_image(source: str | os.PathLike | BinaryIO, where: str = "", name: str | None = None) -> Image.Image:
    """The picture as RGB, turned as its EXIF orientation says (as transformers' load_image does), transparent pixels on
    white (as its image processor does). Raises UserError with `where` and the name when it can't be read whole.

    source: path, or a file that is open for reading
    name: for the message; the path if None
    """
    try:
        with Image.open(source) as file:
            return _to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        found = f"unreadable image {name or source} ({type(error).__name__}: {error})"
        raise UserError(
            Problem(where, found, "a whole image file that Pillow opens", "Replace the file or drop the record")
        ) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255)), rgba).convert("RGB")


@functools.lru_cache(maxsize=4)
def _load(path: str) -> _Loaded:
    """Once a process, however many data sets use it."""
    return _Loaded(path)


class _Loaded:
    """The processor, taken apart into what encoding needs."""

    def __init__(self, path: str):
        from transformers import AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(path)
            self.tokenizer = self.processor.tokenizer
            self.tile_size: int = self.processor.image_processor.size["height"]
            self.max_tiles: int = self.processor.image_processor.max_image_tiles
            self.image_token = self.processor.image_token
        except Exception as error:
            remedy = "Name a folder with tokenizer and preprocessor files, or a hub id that this machine can download"
            raise UserError(
                Problem("processor", f"{path} ({type(error).__name__}: {error})", "a processor of MLlama", remedy)
            ) from error
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        pad = self.tokenizer.pad_token_id
        self.pad_token_id = pad if pad is not None else self.tokenizer.eos_token_id
        # Our own copy: typed special tokens stay text in it, which must not change how others use the tokenizer.
        self._text_tokenizer = copy.deepcopy(self.tokenizer.backend_tokenizer)
        self._text_tokenizer.encode_special_tokens = True
        self._text_tokenizer.no_truncation()
        self._text_tokenizer.no_padding()
        self._special_ids = {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._check_template()

    def tokenize(self, turns: Sequence[Turn], prompt_only: bool = False) -> tuple[list[int], list[bool]]:
        """(token ids, whether each token is to be learnt: the answers and the token that ends each).

        prompt_only: stop before the first token of the last turn, an assistant turn."""
        escape = _Escape(turns, self._special_pattern)
        answer_marks = {
            escape.mark(f"answer{n}"): turn.text.strip() for n, turn in enumerate(turns) if turn.role == "assistant"
        }
        marks = iter(answer_marks)
        rendered = self._render([(t, next(marks) if t.role == "assistant" else None) for t in turns], escape)
        ids: list[int] = []
        is_answer: list[bool] = []
        rest = rendered
        for number, (mark, answer) in enumerate(answer_marks.items()):
            before, rest = rest.split(mark, 1)
            ids += self._tokenize(before, escape)
            is_answer += [False] * (len(ids) - len(is_answer))
            if prompt_only and number == len(answer_marks) - 1:
                return ids, is_answer
            end = self._special_pattern.match(rest)
            assert end, "checked by _check_template"
            rest = rest[end.end() :]
            ids += [*self._text_ids(answer), self._special_ids[end[0]]]
            is_answer += [True] * (len(ids) - len(is_answer))
        ids += self._tokenize(rest, escape)
        is_answer += [False] * (len(ids) - len(is_answer))
        return ids, is_answer

    def _render(self, turns: list[tuple[Turn, str | None]], escape: _Escape) -> str:
        """The template's text; each answer is the mark given with it."""
        messages = []
        for turn, mark in turns:
            if turn.role == "system":
                content: Any = escape(turn.text.strip())
            elif mark is not None:
                content = [{"type": "text", "text": mark}]
            else:
                content = [
                    {"type": "image"} if part is None else {"type": "text", "text": escape(part)} for part in turn.parts
                ]
            messages.append({"role": turn.role, "content": content})
        if any(turn.num_images for turn, _ in turns):
            return self._apply_template(messages)
        # Without an image Llama's template puts a system block with today's date in front. A text-only sample should
        # read like the others, so render it with one image and take its token out again.
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"}, *first["content"]]
        return self._apply_template(messages).replace(self.image_token, "", 1)

    def _apply_template(self, messages: list[dict], **kwargs) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, date_string=NO_DATE, **kwargs)

    def _tokenize(self, rendered: str, escape: _Escape) -> list[int]:
        ids: list[int] = []
        for piece in self._special_pattern.split(rendered):
            if piece in self._special_ids:
                ids.append(self._special_ids[piece])
            elif piece:
                ids += self._text_ids(escape.undo(piece))
        return ids

    def _text_ids(self, text: str) -> list[int]:
        return self._text_tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def _check_template(self) -> None:
        """Labels are built on: prompt, answer, one special token that ends the turn."""
        messages: list[dict] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
        try:
            prompt = self._apply_template(messages, add_generation_prompt=True)
            whole = self._apply_template([*messages, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}])
        except Exception as error:
            found = f"a chat template that fails: {error}"
            raise UserError(Problem("processor", found, "a template that takes image parts")) from error
        if not whole.startswith(prompt + "A") or not self._special_pattern.match(whole[len(prompt) + 1 :]):
            found = f"a chat template that renders {whole!r} for a prompt {prompt!r}"
            expected = "the prompt, the answer and a special token that ends the turn, one after the other"
            raise UserError(Problem("processor", found, expected))

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        from transformers.models.mllama.image_processing_mllama import get_optimal_tiled_canvas

        canvas_height, canvas_width = get_optimal_tiled_canvas(height, width, self.max_tiles, self.tile_size)
        return int(canvas_height) // self.tile_size, int(canvas_width) // self.tile_size

    def tile(self, image: Image.Image) -> tuple[np.ndarray, int]:
        from transformers.models.mllama.image_processing_mllama import (
            get_all_supported_aspect_ratios,
            get_image_size_fit_to_canvas,
            split_to_tiles,
        )

        settings = self.processor.image_processor
        size, max_tiles = self.tile_size, self.max_tiles
        image = _to_rgb(image)
        rows, columns = self.canvas(image.width, image.height)
        height, width = get_image_size_fit_to_canvas(image.height, image.width, rows * size, columns * size, size)
        resized = image.resize((int(width), int(height)), resample=settings.resample)
        canvas = np.zeros((rows * size, columns * size, 3), np.uint8)
        canvas[: int(height), : int(width)] = np.asarray(resized)
        ratio_id = get_all_supported_aspect_ratios(max_tiles).index((rows, columns)) + 1
        return split_to_tiles(canvas.transpose(2, 0, 1), rows, columns), ratio_id


class _Escape:
    """Hides special-token strings that are typed in a text from the template's output, and brings them back."""

    def __init__(self, turns: Sequence[Turn], special_pattern: re.Pattern):
        self._pattern = special_pattern
        self._hidden: list[str] = []
        self._fence = "\ufdd0"  # a noncharacter; longer should a text hold it after all
        while any(self._fence in turn.text for turn in turns):
            self._fence += "\ufdd0"

    def mark(self, name: str) -> str:
        return f"{self._fence}{name}\ufdd1"

    def __call__(self, text: str) -> str:
        return self._pattern.sub(self._hide, text)

    def _hide(self, match: re.Match) -> str:
        self._hidden.append(match[0])
        return self.mark(str(len(self._hidden) - 1))

    def undo(self, text: str) -> str:
        for number, hidden in enumerate(self._hidden):
            text = text.replace(self.mark(str(number)), hidden)
        return text
