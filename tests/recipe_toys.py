# ruff: noqa: UP007, UP037, UP045, RUF013 (annotations as NeMo writes them are the point)
"""Classes with the habits of NeMo's that translation must cope with. Named in test_recipe.py as recipe_toys.X."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

import nemo_run as run
import torch

if TYPE_CHECKING:
    from somewhere import OnlyForTypeCheckers


class Mode(enum.Enum):
    FAST = 1
    SAFE = "safe"


@dataclass
class Inner:
    width: int = 8
    heads: int = 2
    depth: int = field(init=False, default=0)

    def __post_init__(self):
        self.depth = self.width // self.heads  # derived


@dataclass
class WideInner(Inner):
    width: int = 16


@dataclass
class Outer:
    name: str
    inner: Optional[Inner] = field(default_factory=lambda: WideInner(heads=4))
    plain: Optional[Inner] = None
    sizes: dict[str, int] = field(default_factory=dict)


class Base:
    def __init__(self, root: str, depth: int = 1, **kwargs: Any):
        self.root, self.depth, self.kwargs = root, depth, kwargs


class Root(Base):
    """Stops the **kwargs: nothing else is known."""

    def __init__(self, root: str = "r", level: int = 0):
        super().__init__(root)


class Swallows(Root):
    """MegatronStrategy's habit."""

    def __init__(self, own: OnlyForTypeCheckers = None, sampler: Optional["OnlyForTypeCheckers"] = None, **kwargs: Any):
        super().__init__(**kwargs)


class Passes:
    """WandbLogger's habit: **kwargs go where no signature is seen."""

    def __init__(self, project: str, save_dir: str = ".", **kwargs: Any):
        self.kwargs = kwargs


class Everything:
    """Every kind of annotation."""

    def __init__(
        self,
        integer: int = 0,
        real: float = 0.0,
        flag: bool = False,
        text: str = "",
        either: Union[int, float, None] = None,
        word: Literal["pre", "post"] = "pre",
        numeral: Literal["16", "32"] = "32",
        dtype: torch.dtype = None,
        mode: Mode = Mode.FAST,
        path: Path = Path("."),
        text_or_path: Union[str, Path] = "",
        pair: tuple[int, int] = (1, 1),
        many: tuple[float, ...] = (),
        names: list[str] = (),
        unique: set[int] = (),
        table: Optional[dict[str, float]] = None,
        time: Optional[timedelta] = None,
        function: Optional[Callable[[int], int]] = None,
        kind: Optional[type] = None,
        nested: Optional[Outer] = None,
        parts: Union[list[Inner], Inner, None] = None,
        anything: Any = None,
        wrong_default: int = None,
        bare: Optional = None,
    ):
        self.arguments = dict(locals())


def double(number: int) -> int:
    return 2 * number


def recipe(width: int, heads: int = 2) -> run.Config[Inner]:
    """A recipe function."""
    if width < 0:
        raise ValueError("width can't be negative")
    return run.Config(Inner, width=width, heads=heads)


def maybe(width: Optional[int]) -> Optional[run.Config[Inner]]:
    return None if width is None else run.Config(Inner, width=width)


def task(model: Optional[Inner], log: Annotated[Optional[Inner], run.Config[Inner]] = None, steps: int = 1) -> None:
    """llm.finetune's habit: log=None becomes Config(Inner)."""


task.__annotations__["log"] = Annotated[Optional[Inner], run.Config[Inner]]  # NeMo-Run looks at objects, not at strings
