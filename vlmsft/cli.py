"""The door of every command: Hydra composes, and what the user got wrong comes out as one message with exit code 2.

    @command("train")
    def main(cfg: DictConfig) -> None: ...

Imports neither torch nor NeMo.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathElement
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmsft.config_files import register_resolvers, root
from vlmsft.errors import USER_ERROR_EXIT_CODE, Problem, UserError, format_problems, nearest

INTERRUPTED_EXIT_CODE = 130
"""128 + SIGINT, as a shell has it."""


def command(
    config_name: str, after_all: Callable[[], None] | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """hydra.main on conf/<config_name>.yaml, with the house's error messages.

    UserError, raised while composing or by the command itself, is printed without a traceback and ends the process with
    exit code 2. Any other exception is a bug and keeps its traceback. A KeyboardInterrupt ends it with 130.

    In a multirun (-m) the command is called once for each job, and the UserErrors of all jobs come in one message. What
    it returns goes to Hydra's launcher, which can ask for that message before it starts anything.
    after_all: called once when no job had one
    """
    register_resolvers()
    _without_words_of_msc()

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def task_with_messages(cfg: DictConfig) -> Any:
            with _raw_hydra_errors(False), _messages(), _jobs.job():
                return task(cfg)

        run = hydra.main(config_path=str(root() / "conf"), config_name=config_name, version_base="1.3")(
            task_with_messages
        )

        @functools.wraps(task)
        def main() -> None:
            with _messages(), _raw_hydra_errors(True):
                _jobs.clear()
                sys.argv[1:] = [quoted_beyond_ascii(argument) for argument in sys.argv[1:]]
                try:
                    run()
                except (CompactHydraException, OmegaConfBaseException, ValueError) as error:
                    if isinstance(error, ValueError) and not _is_about_a_group(error):
                        raise
                    raise UserError(explain(config_name, _overrides_on_command_line(), error)) from None
                raise_multirun_problems()
                if after_all is not None:
                    with _raw_hydra_errors(False):
                        after_all()

        return main

    return decorate


def _without_words_of_msc() -> None:
    """Energon's multi-storage client puts its own place into each Hydra's search path, and says with a traceback that
    it isn't configured whenever there is a hydra.searchpath.
    """
    logging.getLogger("multistorageclient.contrib.hydra").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "provider=msc-universal", UserWarning)


@contextmanager
def _messages() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        print(format_problems(error), file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)


def multirun_job() -> tuple[int, list[str]] | None:
    """Number and overrides of this job of a multirun; None outside one."""
    hydra_config = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra_config is None or hydra_config.mode != RunMode.MULTIRUN:
        return None
    return hydra_config.job.num, list(hydra_config.overrides.task)


class Jobs:
    """What is wrong with the jobs of a multirun, each problem once, with the jobs that have it."""

    def __init__(self) -> None:
        self._overrides: dict[int, list[str]] = {}
        self._problems: dict[Problem, list[int]] = {}

    def clear(self) -> None:
        self.__init__()

    @contextmanager
    def job(self) -> Iterator[None]:
        """Keeps a UserError back where this is a job of a multirun."""
        job = multirun_job()
        try:
            yield
        except UserError as error:
            if job is None:
                raise
            for problem in error.problems:
                self._problems.setdefault(problem, []).append(job[0])
        finally:
            if job is not None:
                self._overrides[job[0]] = job[1]

    def raise_problems(self) -> None:
        if self._problems:
            raise UserError(self._labelled(problem, jobs) for problem, jobs in self._problems.items())

    def _labelled(self, problem: Problem, jobs: list[int]) -> Problem:
        if len(jobs) == len(self._overrides):
            return problem
        labels = ", ".join(f"job {number} ({' '.join(self.varying(number))})" for number in jobs)
        return replace(problem, where=f"{labels}: {problem.where}")

    def varying(self, number: int) -> list[str]:
        """The overrides of a job that not all jobs have."""
        common = set.intersection(*(set(overrides) for overrides in self._overrides.values()))
        return [override for override in self._overrides[number] if override not in common]


_jobs = Jobs()
"""Of this process's multirun."""


def raise_multirun_problems() -> None:
    """Raises UserError with what is wrong with the jobs of this multirun that the command was called with so far."""
    _jobs.raise_problems()


@contextmanager
def _raw_hydra_errors(raw: bool) -> Iterator[None]:
    """HYDRA_FULL_ERROR makes Hydra raise what it otherwise prints before it exits with 1.

    Off again while the command's own code runs, so that its child processes don't inherit it.
    """
    before = os.environ.get("HYDRA_FULL_ERROR")
    if raw:
        os.environ["HYDRA_FULL_ERROR"] = "1"
    else:
        os.environ.pop("HYDRA_FULL_ERROR", None)
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _is_about_a_group(error: ValueError) -> bool:
    """Hydra's own, for a group that is overridden by null."""
    return str(error).startswith("Config group override must be")


def _overrides_on_command_line() -> list[str]:
    return get_args_parser().parse_args().overrides


def quoted_beyond_ascii(argument: str) -> str:
    """data.image_folder=写真 with its value in quotes, as Hydra's grammar has ASCII only beside them.

    What holds anything that Hydra may read as more than text stays as it is.
    """
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals or value.isascii() or re.search(r"[\s,=:\[\]{}()'\"\\$]", value):
        return argument
    return f"{key}={quoted(value)}"


def quoted(text: str) -> str:
    """Any text as a value of Hydra's grammar that is this text, and no interpolation."""
    escaped = re.sub(r"(\\*)(\"|$)", lambda match: match[1] * 2 + match[2].replace('"', '\\"'), text)
    return '"' + escaped.replace("${", "\\${") + '"'


# --- what is wrong with a composition ---------------------------------------------------------------------------------


def explain(config_name: str, overrides: list[str], error: Exception) -> list[Problem]:
    """All that is wrong with `overrides`, where Hydra stops at the first and names no neighbour.

    error: what Hydra said; it is passed on when nothing better is found.
    """
    parsed, problems = _parse(overrides)
    with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
        _add_searchpath([*_config_dir(), *_searchpath(parsed)])
        loader = GlobalHydra.instance().config_loader()
        groups = [override for override in parsed if _is_group(loader, override)]
        group_problems = [problem for override in groups for problem in _wrong_options(loader, override)]
        problems += group_problems
        usable = (
            []
            if group_problems
            else [str(override.input_line) for override in groups if not override.is_sweep_override()]
        )
        try:
            base = hydra.compose(config_name, usable, return_hydra_config=True)
        except (CompactHydraException, OmegaConfBaseException) as broken:
            return problems or [_as_hydra_said(broken)]
        for override in parsed:
            if override not in groups and override.key_or_group != "hydra.searchpath":
                problems += _wrong_value(config_name, usable, base, loader, override)
    return problems or [_as_hydra_said(error)]


def _config_dir() -> list[str]:
    folder = get_args_parser().parse_args().config_dir
    return [] if folder is None else [os.path.abspath(folder)]


def _searchpath(parsed: list[Override]) -> list[str]:
    """The user's own folders of YAML."""
    values = [override.value() for override in parsed if override.key_or_group == "hydra.searchpath"]
    return [str(folder) for value in values if isinstance(value, list) for folder in value]


def _add_searchpath(folders: list[str]) -> None:
    """To the Hydra that is set up now, before its schemas, which have to be last."""
    path = GlobalHydra.instance().config_loader().get_search_path()
    path.get_path()[-1:-1] = [SearchPathElement("command-line", folder) for folder in folders]
    instance = GlobalHydra.instance().hydra
    assert instance is not None
    instance.config_loader = ConfigLoaderImpl(path)


def _parse(overrides: list[str]) -> tuple[list[Override], list[Problem]]:
    parser = OverridesParser.create()
    parsed, problems = [], []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except OverrideParseException as error:
            reason = str(error).split("\nSee https")[0].splitlines()[0]
            problems.append(
                Problem(
                    where=text.split("=")[0],
                    found=repr(text),
                    expected="an override key=value",
                    remedy=f"Hydra says: {reason}. Quote what holds , = : [ ] {{ }}, spaces or letters beyond ASCII: "
                    "'key=\"a, b\"'",
                )
            )
    return parsed, problems


def _is_group(loader, override: Override) -> bool:
    return (
        bool(loader.get_group_options(override.key_or_group, results_filter=None)) and "." not in override.key_or_group
    )


def _wrong_options(loader, override: Override) -> Iterator[Problem]:
    group = override.key_or_group
    options = loader.get_group_options(group, results_filter=ObjectType.CONFIG)
    for choice in _choices(override):
        if choice not in options:
            yield Problem(
                where=group,
                found="null" if choice is None else repr(choice),
                expected=f"one of {', '.join(options)}",
                remedy=nearest(str(choice), options),
            )


def _choices(override: Override) -> list:
    if override.is_delete():
        return []
    if override.is_sweep_override():
        return list(override.sweep_iterator())
    value = override.value()
    return list(value) if isinstance(value, list) else [value]


def _wrong_value(config_name: str, usable: list[str], base: DictConfig, loader, override: Override) -> list[Problem]:
    key = override.key_or_group
    owner = _behind_interpolations(base, key)
    if owner != key:
        remedy = f"Write {str(override.input_line).replace(key, owner, 1)}"
        return [Problem(key, "a key below an interpolation", f"the key that it stands for, {owner}", remedy)]
    if not override.is_add() and not override.is_force_add() and not key_exists(base, key):
        return [_unknown_key(base, loader, override)]
    if override.is_sweep_override():
        return []
    try:
        hydra.compose(config_name, [*usable, str(override.input_line)])
    except (CompactHydraException, OmegaConfBaseException) as error:
        return [_as_hydra_said(error, where=key)]
    return []


def key_exists(cfg: DictConfig, key: str) -> bool:
    """Whether the dotted `key` stands in `cfg`; its own value is not resolved."""
    parent, _, name = key.rpartition(".")
    node = _select(cfg, parent)
    if isinstance(node, ListConfig):
        return name.isdigit() and int(name) < len(node)
    return isinstance(node, DictConfig) and name in list(node)  # `name in node` is false for ???


def _behind_interpolations(cfg: DictConfig, key: str) -> str:
    """trainer.strategy.x where trainer.strategy is ${strategy}: strategy.x. Hydra doesn't override through it."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        parent, name = _select(cfg, ".".join(parts[: end - 1])), parts[end - 1]
        referent = _select(cfg, ".".join(parts[:end]))
        if not isinstance(parent, DictConfig) or not isinstance(referent, DictConfig):
            return key
        if OmegaConf.is_interpolation(parent, name):
            return _behind_interpolations(cfg, ".".join([referent._get_full_key(None), *parts[end:]]))
    return key


def _select(cfg: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(cfg, key) if key else cfg
    except OmegaConfBaseException:
        return None


def _unknown_key(base: DictConfig, loader, override: Override) -> Problem:
    key = override.key_or_group
    parent, _, name = key.rpartition(".")
    node = _select(base, parent)
    siblings = [str(child) for child in node] if isinstance(node, DictConfig) else []
    shown = [child for child in siblings if not child.startswith("_") and child != "hydra"]
    groups = [group for group in loader.get_group_options("", results_filter=ObjectType.GROUP)] if not parent else []
    hint = _nearest_path(parent, name, shown + groups, base)
    value = "" if override.is_delete() else f" (={str(override.input_line).partition('=')[2]})"
    expected = f"a key of {parent}" if shown and parent else "a key of the configuration"
    if shown and parent and not hint:
        expected += f": {', '.join(shown)}"
    remedy = hint or f"To pass an argument that the YAML doesn't show, write +{override.input_line}"
    return Problem(where=key, found=f"no such key{value}", expected=expected, remedy=remedy)


def _nearest_path(parent: str, name: str, siblings: list[str], base: DictConfig) -> str:
    """The closest sibling, or else the same or a similar name anywhere in the tree; as a full path."""
    hint = nearest(name, siblings)
    if hint:
        return hint.replace("'", f"'{parent}.", 1) if parent else hint
    paths = list(leaf_paths(base))
    same = [path for path in paths if path.rpartition(".")[2] == name]
    if same:
        return f"Did you mean {same[0]!r}?"
    key = f"{parent}.{name}" if parent else name
    return nearest(key, paths)


def leaf_paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Each key of the tree as it is typed, Hydra's own left out; interpolations are not followed."""
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return
    for key in node:
        path = f"{prefix}{key}"
        if path == "hydra" or str(key).startswith("_"):
            continue
        yield path
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            yield from leaf_paths(child, f"{path}.")


def _as_hydra_said(error: Exception, where: str = "the configuration") -> Problem:
    lines = [line.strip() for text in (error, error.__cause__) if text is not None for line in str(text).splitlines()]
    said = ". ".join(line.rstrip(".") for line in lines if line and not line.startswith(("full_key", "object_type")))
    return Problem(
        where=where, found="what Hydra refuses", expected="what it can compose", remedy=f"Hydra says: {said}"
    )
