"""What may be wrong with data, by kind."""

from __future__ import annotations

from typing import NamedTuple

REFUSED, LOST, REMARK = "refused", "lost", "remark"
"""What becomes of such a sample in training: it stops the run (or is skipped), loses something, or nothing at all."""


class Kind(NamedTuple):
    title: str
    outcome: str


KINDS = {
    "broken JSON": Kind("broken JSON", REFUSED),
    "no turns": Kind("no list of turns", REFUSED),
    "image names": Kind("image names that aren't text", REFUSED),
    "role": Kind("unknown roles, or roles in a wrong order", REFUSED),
    "content": Kind("content that is neither text nor parts", REFUSED),
    "empty text": Kind("empty answers or questions", REFUSED),
    "no answer": Kind("no answer, or a last question without one", REFUSED),
    "markers": Kind("image tokens and images differ in number", REFUSED),
    "missing image": Kind("missing image files", REFUSED),
    "unreadable image": Kind("corrupt or truncated images", REFUSED),
    "missing part": Kind("shard samples without a json part", REFUSED),
    "too long": Kind("an image or all answers behind decoder_seq_length", REFUSED),
    "truncated": Kind("answers cut by decoder_seq_length", LOST),
    "merged": Kind("shard samples merged into one: a key repeated in a row", LOST),
    "shard": Kind("shards that can't be read to their end", LOST),
    "same id": Kind("ids that several records have", REMARK),
    "same record": Kind("records that stand there twice", REMARK),
    "in both": Kind("validation records that training holds as well", REMARK),
}
"""In the order of the report."""


class Finding(NamedTuple):
    """One thing found. `image`: the sample's first picture, as the path of a file or as a thumbnail."""

    kind: str
    where: str
    text: str
    image: str | bytes | None = None

    @property
    def outcome(self) -> str:
        return KINDS[self.kind].outcome
