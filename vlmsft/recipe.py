"""Hydra's grammar into NeMo-Run's: a DictConfig becomes run.Config / run.Partial. The only file that knows both.

    _target_: pkg.Class             run.Config(pkg.Class, key=value, ...)
    _target_: pkg.f                 run.Config(pkg.f, ...); a recipe function (one that returns a run.Config) is called
    _target_, _partial_: true       run.Partial(...)
    _target_, _call_: false         the object itself: a class, a function, a dtype
    _args_: [a, b]                  positional arguments
    a: ${b}                         the very object that b became, when b is a mapping: built once

The class's own signature is the schema. Values are read by its annotations: "bf16" for a torch.dtype, a name for an
Enum, a dotted name for a function, a list for a tuple, a mapping for a dataclass or a timedelta ({minutes: 15}). Where
a list is wanted a mapping may stand: its keys are only names to override by, and its null entries are left out.

What is wrong is collected and raised at once as UserError; each problem names the key where the value is written, which
for trainer.strategy: ${strategy} is strategy.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import enum
import functools
import importlib
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Optional, Union
from unittest import mock

import fiddle as fdl
import nemo_run as run
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from vlmsft.errors import Problem, UserError, nearest
from vlmsft.paths import with_absolute_paths

TARGET, PARTIAL, CALL, ARGS = "_target_", "_partial_", "_call_", "_args_"
REFUSED = {"_recursive_": "everything is translated recursively", "_convert_": "containers always become plain Python"}
NESTED_KEYS_OF_TIMEDELTA = ("days", "seconds", "microseconds", "milliseconds", "minutes", "hours", "weeks")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
PARTS = ("model", "data", "trainer", "log", "optim", "resume", "peft")
KWARGS_GO_TO = {
    "lightning.pytorch.strategies.ddp.DDPStrategy": "torch.nn.parallel.DistributedDataParallel",
}
"""Classes whose **kwargs go elsewhere than to their base, so that these names are known as well."""
CLOSE = 0.85
"""Likeness of two names from which an argument that **kwargs would swallow is taken for a typing error."""


def finetune_recipe(cfg: DictConfig) -> run.Partial:
    """What conf/train.yaml describes, as the task that NeMo-Run runs: run.Partial(llm.finetune, ...).

    Relative paths of vlmsft.paths.PATHS become absolute: the task may run in another folder.

    Raises UserError with every problem of model, data, trainer, log, optim, resume and peft.
    """
    from nemo.collections import llm

    cfg = with_absolute_paths(cfg)
    translator = Translator()
    parts = {name: translator.child(cfg, name) for name in PARTS}
    translator.raise_problems()
    # Passed as keywords, None would become Config(AutoResume): NeMo-Run 0.11.1 fills in Annotated arguments.
    late = {name: parts.pop(name) for name in ("log", "resume", "peft")}
    # The data's tokenizer, and not the model's as by default: a fresh model has none, and from a checkpoint without one
    # NeMo restores nothing (looking for it, it reads the whole context and refuses what isn't its own).
    recipe = run.Partial(llm.finetune, **parts, tokenizer="data")
    for name, part in late.items():
        setattr(recipe, name, part)
    return recipe


def translate(node: DictConfig | ListConfig | dict | list) -> Any:
    """One node of a config, e.g. cfg.launch.executor, translated. Raises UserError with every problem below it."""
    if isinstance(node, (dict, list)):
        node = OmegaConf.create(node)
    translator = Translator()
    result = translator.value(node, Any)
    translator.raise_problems()
    return result


# --- signatures -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parameter:
    annotation: Any  # Any where there is none, or where it can't be evaluated
    default: Any  # inspect.Parameter.empty when the argument is required
    factory: Callable | None = None  # a dataclass field's default_factory

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty and self.factory is None


@dataclasses.dataclass(frozen=True)
class Schema:
    """What a class or function takes."""

    parameters: dict[str, Parameter]
    takes_more: bool  # **kwargs go somewhere that no signature tells (wandb.init, torch's SummaryWriter)

    def problem_with(self, name: str) -> str | None:
        """None when `name` may be passed, else a hint (possibly empty)."""
        if name in self.parameters:
            return None
        if not self.takes_more:
            return nearest(name, self.parameters)
        similar = difflib.get_close_matches(name, self.parameters, n=1, cutoff=CLOSE)
        return f"Did you mean {similar[0]!r}?" if similar else None


@functools.cache
def schema_of(target: Callable) -> Schema:
    """The union of __init__'s parameters over the MRO up to the first __init__ without **kwargs.

    MegatronStrategy and ModelCheckpoint hand **kwargs to their base; their own signature would let anything through.
    """
    if target is timedelta:
        return Schema({key: Parameter(float, 0) for key in NESTED_KEYS_OF_TIMEDELTA}, takes_more=False)
    if not inspect.isclass(target):
        parameters, takes_more = _own_parameters(target, target)
        return Schema(parameters, takes_more)
    parameters: dict[str, Parameter] = {}
    for owner in target.__mro__:
        if owner is object:
            return Schema(parameters, takes_more=bool(parameters) or target.__init__ is not object.__init__)
        if "__init__" not in vars(owner):
            continue
        own, passes_on = _own_parameters(owner.__init__, owner)
        sink = KWARGS_GO_TO.get(f"{owner.__module__}.{owner.__qualname__}")
        if sink is not None:
            own |= _own_parameters(locate(sink).__init__, locate(sink))[0]
        parameters = {**(own if owner is target else _not_required(own)), **parameters}
        if not passes_on:
            return Schema(parameters, takes_more=False)
    raise AssertionError("every MRO ends in object")


def _not_required(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """A base's parameters: the subclass hands it what it requires."""
    return {
        name: dataclasses.replace(parameter, default=None) if parameter.is_required else parameter
        for name, parameter in parameters.items()
    }


def _own_parameters(function: Callable, owner: Any) -> tuple[dict[str, Parameter], bool]:
    """Parameters by name (self and *args left out), and whether there are **kwargs."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # builtins
        return {}, True
    fields = {field.name: field for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else {}
    parameters, takes_more = {}, False
    for index, (name, parameter) in enumerate(signature.parameters.items()):
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_more = True
        elif parameter.kind is not parameter.VAR_POSITIONAL and not (index == 0 and function is not owner):
            annotation = _evaluate(parameter.annotation, _namespaces(function, owner, name))
            factory = fields[name].default_factory if name in fields else dataclasses.MISSING
            if factory is dataclasses.MISSING:
                parameters[name] = Parameter(annotation, parameter.default)
            else:
                parameters[name] = Parameter(annotation, inspect.Parameter.empty, factory)
    return parameters, takes_more


def _namespaces(function: Callable, owner: Any, name: str) -> Iterator[dict]:
    """Where an annotation written as a string may find its names: the class that wrote it, its bases, the function."""
    for base in getattr(owner, "__mro__", ()):
        if name in inspect.get_annotations(base):
            yield vars(sys.modules[base.__module__])
    yield getattr(inspect.unwrap(function), "__globals__", {})
    if getattr(owner, "__module__", None) in sys.modules:
        yield vars(sys.modules[owner.__module__])


def _evaluate(annotation: Any, namespaces: Iterator[dict]) -> Any:
    # One by one: typing.get_type_hints gives up on the whole of MegatronStrategy because of one name that is only
    # imported for type checkers.
    if annotation is inspect.Parameter.empty:
        return Any
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if not isinstance(annotation, str):
        return annotation
    for namespace in namespaces:
        try:
            value = eval(annotation, namespace)
        except Exception:  # an expression from upstream's source: whatever it raises, it tells no type
            continue
        return _evaluate(value, iter(())) if not isinstance(value, str) else Any
    return Any


def returns_config(function: Any) -> bool:
    """Whether `function` is a recipe: it returns a run.Config / run.Partial by its annotation, or is a cli.factory."""
    if inspect.isclass(function) or not callable(function):
        return False
    if getattr(function, "__factory__", False):
        return True
    written = getattr(function, "__annotations__", {}).get("return", Any)
    annotation = _evaluate(written, _namespaces(function, function, "return"))
    kinds = [typing.get_origin(member) or member for member in members_of(annotation)]
    return any(inspect.isclass(kind) and issubclass(kind, fdl.Buildable) for kind in kinds)


def members_of(annotation: Any) -> list[Any]:
    """The alternatives of an annotation: those of a Union, flattened; Annotated, NewType and the like unpacked."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [member for argument in typing.get_args(annotation) for member in members_of(argument)]
    if origin is typing.Annotated:
        return members_of(typing.get_args(annotation)[0])
    if annotation in (Any, object, Optional, Union) or isinstance(annotation, (typing.TypeVar, typing.ForwardRef, str)):
        return [Any]  # a bare Optional is NeMo's
    if hasattr(annotation, "__supertype__"):
        return members_of(annotation.__supertype__)
    return [type(None)] if annotation is None else [annotation]


# --- values -----------------------------------------------------------------------------------------------------------


class Mismatch(Exception):
    """A value that the annotation doesn't take."""


def coerce(value: Any, annotation: Any) -> Any:
    """A leaf of the YAML (str, int, float, bool) as `annotation` wants it. Raises Mismatch(what was expected).

    Exact matches come first: in Union[str, Path] a str stays one.
    """
    members = members_of(annotation)
    if Any in members or any(type(value) is member for member in members):
        return value
    for member in members:
        for matches, convert in CONVERSIONS:
            if matches(member):
                try:
                    return convert(value, member)
                except Mismatch:
                    break
    raise Mismatch(describe(annotation))


def _literal(value: Any, member: Any) -> Any:
    choices = typing.get_args(member)
    if any(type(choice) is type(value) and choice == value for choice in choices):
        return value
    if not isinstance(value, bool) and str(value) in choices:
        return str(value)  # YAML reads precision: 32 as a number
    raise Mismatch


def _float(value: Any, member: Any) -> float:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise Mismatch


def _text(value: Any, member: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # id=12345, name=2024, precision=32: typed as text, read as a number
    raise Mismatch


def _enum(value: Any, member: Any) -> enum.Enum:
    if value in member.__members__:
        return member[value]
    try:
        return member(value)
    except ValueError:
        raise Mismatch from None


def _dtype(value: Any, member: Any) -> Any:
    import torch

    name = str(value).removeprefix("torch.")
    dtype = getattr(torch, DTYPES.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise Mismatch
    return dtype


def _path(value: Any, member: Any) -> run.Config:
    if isinstance(value, str):
        return run.Config(member, value)  # a Path itself doesn't serialize
    raise Mismatch


def _by_name(value: Any, member: Any) -> Any:
    if not isinstance(value, str) or "." not in value:
        raise Mismatch
    try:
        found = locate(value)
    except LookupError:
        raise Mismatch from None
    if not callable(found):
        raise Mismatch
    return found


def _is_dtype(member: Any) -> bool:
    return getattr(member, "__module__", "") == "torch" and getattr(member, "__name__", "") == "dtype"


def _is_callable_or_type(member: Any) -> bool:
    return (typing.get_origin(member) or member) in (collections.abc.Callable, Callable, typing.Callable, type)


CONVERSIONS: list[tuple[Callable[[Any], bool], Callable[[Any, Any], Any]]] = [
    (lambda member: typing.get_origin(member) is Literal, _literal),
    (lambda member: member is float, _float),
    (lambda member: member is str, _text),
    (lambda member: inspect.isclass(member) and issubclass(member, enum.Enum), _enum),
    (_is_dtype, _dtype),
    (lambda member: inspect.isclass(member) and issubclass(member, Path), _path),
    (_is_callable_or_type, _by_name),
]


def describe(annotation: Any) -> str:
    """An annotation in words: "int or float", "'pre' or 'post'", "a nemo.lightning.ModelCheckpoint (_target_: ...)"."""
    words = []
    for member in members_of(annotation):
        if typing.get_origin(member) is Literal:
            words += [repr(choice) for choice in typing.get_args(member)]
        elif member is type(None):
            words.append("null")
        elif _is_dtype(member):
            words.append("a torch dtype such as bfloat16")
        elif member is timedelta:
            words.append("a time such as {minutes: 15}")
        elif inspect.isclass(member) and issubclass(member, enum.Enum):
            words.append("one of " + ", ".join(member.__members__))
        elif inspect.isclass(member) and issubclass(member, Path):
            words.append("a path")
        elif _is_callable_or_type(member):
            words.append("a dotted name such as package.module.function")
        elif typing.get_origin(member) is not None:
            words.append(str(member).replace("typing.", ""))
        elif member in (int, float, str, bool, list, dict, tuple, set):
            words.append(member.__name__)
        else:
            words.append(f"a mapping with _target_ for a {getattr(member, '__name__', member)}")
    return " or ".join(dict.fromkeys(words))


def locate(name: str) -> Any:
    """The object behind a dotted name. Raises LookupError with a message that names the nearest."""
    parts = name.split(".")
    found, depth = _longest_module(parts)
    if found is None:
        raise LookupError(f"no module {parts[0]!r}. Is it installed?")
    for index in range(depth, len(parts)):
        if not hasattr(found, parts[index]):
            hint = nearest(parts[index], dir(found))
            raise LookupError(f"{'.'.join(parts[:index])} has no {parts[index]!r}. {hint}".strip())
        found = getattr(found, parts[index])
    return found


def _longest_module(parts: list[str]) -> tuple[types.ModuleType | None, int]:
    module, depth = None, 0
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if module is not None and hasattr(module, parts[end - 1]) and name not in sys.modules:
            break  # an attribute; importing it as a module could only fail
        try:
            module, depth = importlib.import_module(name), end
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # the module is there, something that it imports is not
            break
    return module, depth


# --- the tree ---------------------------------------------------------------------------------------------------------

INVALID = object()
"""Stands for what could not be translated; its problem is recorded already."""


class Translator:
    """Translates nodes of one config and collects their problems."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._done: dict[tuple[int, str], tuple[Node, Any]] = {}  # the node is kept so that its id stays its own
        self._open: set[int] = set()

    def raise_problems(self) -> None:
        if self.problems:
            raise UserError(list(dict.fromkeys(self.problems)))

    def child(self, parent: DictConfig | ListConfig, key: Any, annotation: Any = Any, default: Any = None) -> Any:
        """The value of parent[key], translated for a parameter with this annotation and default; or INVALID."""
        node = self._resolve(parent._get_node(key))
        return INVALID if node is INVALID else self.value(node, annotation, default)

    def value(self, node: Any, annotation: Any, default: Any = None, base: fdl.Config | None = None) -> Any:
        """base: what a dataclass field's default_factory makes; a mapping without _target_ overrides its arguments."""
        if node is None or node._is_none():
            members = members_of(annotation)
            if Any in members or type(None) in members or default is None:
                return None  # NeMo writes `x: int = None`
            return self._problem(path_of(node), "null", describe(annotation))
        if not isinstance(node, (DictConfig, ListConfig)):
            return self._leaf(node, annotation)
        if node._is_missing():
            return self._missing(path_of(node))
        is_target = isinstance(node, DictConfig) and TARGET in node
        memo = (id(node), "" if is_target else str(annotation))
        if memo not in self._done:
            if id(node) in self._open:
                return self._problem(path_of(node), "a node that refers to itself", "a tree")
            self._open.add(id(node))
            self._done[memo] = (node, self._container(node, annotation, base, is_target))
            self._open.remove(id(node))
        result = self._done[memo][1]
        if is_target and not self._fits(result, annotation):
            return self._problem(path_of(node), f"{TARGET} {_target_name(result)}", describe(annotation))
        return result

    # -- leaves

    def _leaf(self, node: Node, annotation: Any) -> Any:
        value = node._value()
        if value == "???":
            return self._missing(path_of(node), describe(annotation))
        if isinstance(value, float) and math.isnan(value):
            return self._problem(path_of(node), "nan", "a number", "nan doesn't survive NeMo-Run's serialization")
        try:
            return coerce(value, annotation)
        except Mismatch as mismatch:
            return self._problem(path_of(node), repr(value), str(mismatch), _nearest_choice(value, annotation))

    # -- containers

    def _container(self, node: Any, annotation: Any, base: fdl.Config | None, is_target: bool) -> Any:
        if is_target:
            return self._target(node)
        if isinstance(node, ListConfig):
            return self._list(node, annotation)
        return self._mapping(node, annotation, base)

    def _list(self, node: ListConfig, annotation: Any) -> Any:
        members = members_of(annotation)
        kinds = [(member, typing.get_origin(member) or member) for member in members]
        for member, kind in kinds:
            if kind is tuple:
                return self._tuple(node, member)
            if inspect.isclass(kind) and kind is not str and issubclass(kind, collections.abc.Iterable):
                if issubclass(kind, collections.abc.Mapping):
                    continue
                items = self._items(node, typing.get_args(member))
                return set(items) if issubclass(kind, collections.abc.Set) else items
        if Any in members:
            return self._items(node, ())
        return self._problem(path_of(node), "a list", describe(annotation))

    def _items(self, node: ListConfig, arguments: tuple) -> list:
        return [self.child(node, index, arguments[0] if arguments else Any) for index in range(len(node))]

    def _tuple(self, node: ListConfig, member: Any) -> Any:
        arguments = typing.get_args(member)
        if not arguments or arguments[-1] is Ellipsis:
            return tuple(self._items(node, arguments))
        if len(arguments) != len(node):
            return self._problem(path_of(node), f"{len(node)} items", f"{len(arguments)}: {describe(member)}")
        return tuple(self.child(node, index, argument) for index, argument in enumerate(arguments))

    def _mapping(self, node: DictConfig, annotation: Any, base: fdl.Config | None) -> Any:
        """A mapping without _target_: by the annotation a dataclass, a timedelta, a dict or a list with named items."""
        if base is not None:
            return self._config(node, base.__fn_or_cls__, run.Config, base.__arguments__)
        members = members_of(annotation)
        for member in members:
            if member is timedelta or (inspect.isclass(member) and dataclasses.is_dataclass(member)):
                return self._config(node, member, run.Config, {})
        kinds = [(member, typing.get_origin(member) or member) for member in members]
        for member, kind in kinds:
            if inspect.isclass(kind) and issubclass(kind, collections.abc.Mapping):
                arguments = typing.get_args(member)
                return {key: self.child(node, key, arguments[1] if arguments else Any) for key in _keys(node)}
        if Any in members:
            return {key: self.child(node, key) for key in _keys(node)}
        for member, kind in kinds:
            if inspect.isclass(kind) and issubclass(kind, (list, collections.abc.Sequence)) and kind is not str:
                arguments = typing.get_args(member)
                element = Optional[arguments[0]] if arguments else Any  # noqa: UP045 (a value, not an annotation)
                items = [self.child(node, key, element) for key in _keys(node)]
                return [item for item in items if item is not None]
        return self._problem(path_of(node), "a mapping", describe(annotation))

    def _target(self, node: DictConfig) -> Any:
        where, name = path_of(node), self.child(node, TARGET, str)
        if name is INVALID:
            return INVALID
        try:
            target = locate(name)
        except LookupError as error:
            return self._problem(f"{where}.{TARGET}".lstrip("."), repr(name), "an importable name", str(error))
        for key, reason in REFUSED.items():
            if key in node:
                self._problem(f"{where}.{key}".lstrip("."), str(node[key]), f"no {key}", reason)
        if CALL in node and self.child(node, CALL, bool) is False:
            return target
        if not callable(target):
            remedy = f"Write {CALL}: false for the object itself"
            return self._problem(f"{where}.{TARGET}".lstrip("."), repr(name), "a class or function", remedy)
        partial = PARTIAL in node and self.child(node, PARTIAL, bool)
        return self._config(node, target, run.Partial if partial else run.Config, {})

    def _config(self, node: DictConfig, target: Callable, kind: type, base: dict) -> Any:
        """kind(target, **base, **what stands in node), checked against the signature of `target`."""
        schema, where, before = schema_of(target), path_of(node), len(self.problems)
        positional = self._positional(node, schema)
        arguments = dict(base)
        for key in _keys(node):
            hint = schema.problem_with(str(key))
            if hint is not None:
                remedy = hint.replace("mean '", f"mean '{where}.", 1) if where else hint
                expected = f"an argument of {_name(target)}"
                self._problem(f"{where}.{key}".lstrip("."), _shown(node, key), expected, remedy)
            else:
                arguments[str(key)] = self._argument(node, key, schema.parameters.get(str(key)))
        if kind is run.Config:
            taken = {*arguments, *list(schema.parameters)[: len(positional)]}
            for name, parameter in schema.parameters.items():
                if parameter.is_required and name not in taken:
                    remedy = f"Set it: {f'{where}.{name}'.lstrip('.')}=..."
                    self._problem(f"{where}.{name}".lstrip("."), "nothing", describe(parameter.annotation), remedy)
        if len(self.problems) > before:
            return INVALID
        return self._build(where, target, kind, positional, arguments)

    def _positional(self, node: DictConfig, schema: Schema) -> list:
        if ARGS not in node:
            return []
        annotations = [parameter.annotation for parameter in schema.parameters.values()]
        args = node._get_node(ARGS)
        assert isinstance(args, ListConfig), "a list: an interpolation was followed before"
        annotations += [Any] * len(args)
        return [self.child(args, index, annotations[index]) for index in range(len(args))]

    def _argument(self, node: DictConfig, key: Any, parameter: Parameter | None) -> Any:
        if parameter is None:
            return self.child(node, key)
        child = self._resolve(node._get_node(key))
        if child is INVALID:
            return INVALID
        base = None
        if parameter.factory and isinstance(child, DictConfig) and not child._is_none() and TARGET not in child:
            base = made_by(parameter.factory)
        return self.value(child, parameter.annotation, parameter.default, base)

    def _build(self, where: str, target: Callable, kind: type, positional: list, arguments: dict[str, Any]) -> Any:
        if kind is run.Config and returns_config(target):
            try:
                return target(*positional, **arguments)
            except (TypeError, ValueError, KeyError, AssertionError) as error:
                return self._problem(where, str(arguments), f"arguments that {_name(target)} takes", str(error))
        names = list(schema_of(target).parameters)
        named = {**dict(zip(names, positional, strict=False)), **arguments}
        result = kind(target, *positional[len(names) :], **named)
        for key, value in named.items():
            if not value:  # NeMo-Run 0.11.1 replaces a falsy Annotated argument by its default Config
                setattr(result, key, value)
        return result

    # -- nodes and problems

    def _resolve(self, node: Any) -> Any:
        """The node that an interpolation stands for; itself for any other."""
        if node is None or not node._is_interpolation():
            return node
        try:
            return node._dereference_node()
        except InterpolationToMissingValueError as error:
            missing = re.search(r"Missing mandatory value: (\S+)", str(error))
            return self._missing(missing.group(1) if missing else path_of(node))
        except OmegaConfBaseException as error:
            key = re.search(r"Interpolation key '([^']+)' not found", str(error))
            hint = nearest(key.group(1), _paths(node._get_root())) if key else str(error).splitlines()[0]
            return self._problem(path_of(node), str(node._value()), "an interpolation that can be resolved", hint)

    def _missing(self, where: str, expected: str = "") -> Any:
        return self._problem(where, "??? (not set)", expected or "a value", f"Set it: {where}=...")

    def _problem(self, where: str, found: str, expected: str, remedy: str = "") -> Any:
        self.problems.append(Problem(where or "the configuration", found, expected, remedy))
        return INVALID

    def _fits(self, result: Any, annotation: Any) -> bool:
        """False only when the annotation names classes and the Config's class is none of them."""
        if type(result) is not run.Config or not inspect.isclass(result.__fn_or_cls__):
            return True
        members = [member for member in members_of(annotation) if member is not type(None)]
        if Any in members:
            return True
        kinds = [typing.get_origin(member) or member for member in members]
        if not kinds or any(not inspect.isclass(kind) or kind is object or _is_protocol(kind) for kind in kinds):
            return True
        return issubclass(result.__fn_or_cls__, tuple(kinds))


def made_by(factory: Callable) -> fdl.Config | None:
    """The dataclass that a field's default_factory makes, as a Config of the arguments that the factory itself spells.

    None for a factory of anything else (dict, list).

    The instance's fields won't do: __post_init__ has derived some from others (kv_channels from hidden_size), and they
    would stay when the user changes the others.
    """
    made = type(factory())
    if not dataclasses.is_dataclass(made):
        return None
    spelled: dict[str, Any] = {}

    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        spelled.update(zip(schema_of(made).parameters, args, strict=False), **kwargs)

    schema_of(made)  # before __init__ is replaced
    with mock.patch.object(made, "__init__", record):
        factory()
    return run.Config(made, **spelled)


def path_of(node: Node | None) -> str:
    """Where the node stands, as one types it: 'optim.max_lr', 'data.paths[0]'."""
    return "" if node is None else node._get_full_key(None)


def _keys(node: DictConfig) -> list:
    return [key for key in node if key not in (TARGET, PARTIAL, CALL, ARGS, *REFUSED)]


def _shown(node: DictConfig, key: Any) -> str:
    child = node._get_node(key)
    return "a mapping" if isinstance(child, DictConfig) else repr(child._value()) if isinstance(child, Node) else "?"


def _name(target: Any) -> str:
    return getattr(target, "__name__", str(target))


def _target_name(result: Any) -> str:
    return _name(result.__fn_or_cls__)


def _is_protocol(kind: Any) -> bool:
    return getattr(kind, "_is_protocol", False)


def _nearest_choice(value: Any, annotation: Any) -> str:
    choices = [c for m in members_of(annotation) if typing.get_origin(m) is Literal for c in typing.get_args(m)]
    return nearest(str(value), [str(choice) for choice in choices])


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node if isinstance(node, DictConfig) and not node._is_none() else ():
        child = node._get_node(key)
        yield f"{prefix}{key}"
        if isinstance(child, DictConfig) and not (child._is_interpolation() or child._is_missing()):
            yield from _paths(child, f"{prefix}{key}.")
