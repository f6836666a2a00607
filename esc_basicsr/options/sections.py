"""Checking sections by what is declared of them, or by the signature and the constructor of a class."""

import contextlib
import copy
import inspect
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from esc_basicsr.common.suggestion import hint, nearest
from esc_basicsr.options import schema
from esc_basicsr.options.kinds import (
    ANYTHING,
    BOOL,
    INTEGER,
    NUMBER,
    SECTION,
    TEXT,
    Kind,
    as_written,
    is_number,
    is_whole,
    misfit,
)
from esc_basicsr.options.release import NOT_HERE
from esc_basicsr.options.schema import Option, lookup, required_keys

_ANNOTATED: dict[Any, Kind] = {bool: BOOL, int: INTEGER, float: NUMBER, str: TEXT}
_ANNOTATED |= {kind.__name__: accepted for kind, accepted in _ANNOTATED.items()}
# A parameter that has a number as default may take lists and more, but hardly a number as text.
_NO_NUMBER_AS_TEXT = Kind("a number", lambda value: ": write " not in misfit(value, NUMBER))

_DOWNLOAD = ("PerceptualLoss", "VGGFeatureExtractor")  # as soon as they are made

FOREIGN = "If another package provides it, that package must be imported first."


class SectionCheck:
    """Collects what is wrong in sections."""

    def __init__(self, opt: Mapping[str, Any], is_train: bool) -> None:
        self.opt = opt
        self.is_train = is_train
        self.problems: list[str] = []
        # Only these models' keys are all known.
        self.is_known_model = opt.get("model_type") in schema.KNOWN_MODELS

    def add(self, where: str, message: str) -> None:
        self.problems.append(f"{where}: {message}".rstrip())

    def section(self, where: str) -> Mapping[str, Any] | None:
        """Return the section at ``where``; None if it is none, which is reported with its parent."""
        value = lookup(self.opt, where)
        return value if isinstance(value, Mapping) else None

    def is_section(self, where: str, value: Any) -> bool:
        """Tell whether ``value``, of a name of the user's own, is a section; report it if not."""
        if not isinstance(value, Mapping):
            self.add(where, misfit(value, SECTION))
        return isinstance(value, Mapping)

    def check_keys(
        self,
        where: str,
        section: Mapping[str, Any],
        kinds: Mapping[str, Kind],
        required: Iterable[str] = (),
        open_ended: bool = False,
    ) -> None:
        """Report keys of a section that are unknown (unless ``open_ended``), missing, or hold a misfit."""
        prefix = f"{where}." if where else ""
        meant = set()
        for key, value in section.items():
            if key in kinds and not kinds[key].accepts(value):
                self.add(f"{prefix}{key}", misfit(value, kinds[key]))
            elif key not in kinds and not open_ended:
                meant.add(nearest(key, kinds))
                declared = schema.SECTIONS.get(where, {}).get(key)
                is_escs = declared is not None and "ESCModel" in declared.models
                remedy = "With model_type: ESCModel it is known." if is_escs else hint(key, kinds)
                self.add(f"{prefix}{key}", f"unknown key. {remedy}")
        for key in required:
            if key not in section and key not in meant:
                self.add(f"{prefix}{key}", f"missing; expected {kinds[key].expected}.")

    def check_section(
        self,
        where: str,
        section: Mapping[str, Any],
        table: Mapping[str, Option],
        open_ended: bool = False,
        is_train: bool | None = None,
    ) -> None:
        """Report what is wrong with the keys of a section by their declarations in ``table``.

        ``open_ended``: there may be others; ``is_train``: it is one to train by, by default if the file is.
        """
        model = self.opt.get("model_type")
        kinds = {
            key: option.kind for key, option in table.items() if not option.models or model in option.models
        }
        is_train = self.is_train if is_train is None else is_train
        required = required_keys(table, is_train, self.is_known_model)
        self.check_keys(where, section, kinds, required, open_ended)

    def check_call(
        self,
        where: str,
        section: Mapping[str, Any],
        function: Callable[..., Any],
        supplied: Sequence[str] = (),
        declared: Mapping[str, Option] | None = None,
    ) -> None:
        """Compare a section with the parameters of what its ``type`` stands for, and will be called with it.

        ``supplied``: parameters that the caller gives; ``declared``: what is known better than from there.
        """
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        named = [p for p in named if p.name not in supplied]
        # BasicSR's own metrics take **kwargs and use none of them.
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
        kinds = {"type": TEXT, **{p.name: _kind_of(p, function) for p in named}}
        for name, option in (declared or {}).items():
            if name in kinds or takes_any:
                kinds[name] = option.kind
        required = [p.name for p in named if p.default is p.empty]
        is_open = takes_any and not function.__module__.startswith("basicsr.metrics.")
        self.check_keys(where, section, kinds, required, is_open)

    def look_up(
        self, where: str, section: Mapping[str, Any], names: Iterable[str], what: str, remedy: str = ""
    ) -> str | None:
        """Return the section's ``type`` if it is among ``names``; else report it."""
        name, names = section.get("type"), list(names)
        if name in names:
            return str(name)
        if "type" not in section:
            self.add(f"{where}.type", f"missing; expected the name of {what}.")
        else:
            self.add(
                f"{where}.type", f"got {as_written(name)}, no known {what}. {instead(name, names, remedy)}"
            )
        return None

    def find(self, where: str, section: Mapping[str, Any], registry: Any, what: str) -> Any:
        """Find what the section's ``type`` names in a registry of BasicSR; None, and reported, if nothing."""
        classes = registered(registry)
        name = self.look_up(where, section, classes, what, FOREIGN)
        return None if name is None else classes[name]

    def check_class(
        self, where: str, section: Mapping[str, Any], registry: Any, what: str, declared: Any = None
    ) -> Any:
        """Check a section by which a registry's class is constructed; return one if it is of this package."""
        before = len(self.problems)
        cls = self.find(where, section, registry, what)
        if cls is None:
            return None
        self.check_call(where, section, cls, declared=declared)
        is_tried = cls.__module__.startswith(("basicsr.", "esc_basicsr.")) and cls.__name__ not in _DOWNLOAD
        return self.build(where, section, cls) if is_tried and len(self.problems) == before else None

    def build(self, where: str, section: Mapping[str, Any], cls: type) -> Any:
        """Make a class on the meta device, and report what it raises; return it if it is of this package."""
        is_ours = cls.__module__.startswith("esc_basicsr.")
        options = {str(key): copy.deepcopy(value) for key, value in section.items() if key != "type"}
        sizes = {key: value for key, value in options.items() if is_whole(value)}
        for key, value in sizes.items():
            limit = schema.LARGEST_SCALE if key == "upscaling_factor" else schema.LARGEST_SIZE
            if value > limit:
                self.add(f"{where}.{key}", f"got {value}, expected {limit:,} at most.")
                return None
        repeats = {"n_blocks": 5, "conv_blocks": 5} if is_ours else {}
        repeats |= {key: value for key, value in sizes.items() if "block" in key or "group" in key}
        blocks = math.prod(repeats.values())
        if blocks > schema.MOST_BLOCKS and is_ours:
            self.add(where, f"got {blocks} blocks in all, expected {schema.MOST_BLOCKS:,} at most.")
        # Neither files are read nor networks made that nobody could train.
        if blocks > schema.MOST_BLOCKS or any(key.endswith("path") for key in options):
            return None
        # There it takes no memory, and no random numbers from the run.
        with torch.device("meta"):
            made = self.attempt(where, cls, lambda: cls(**options))
        return made if is_ours else None

    def attempt(self, where: str, cls: type, make: Callable[[], Any]) -> Any:
        """Report what making an object raises."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return make()
        except Exception as error:  # whatever a class makes of values that do not fit
            reason, _, _ = str(error).partition("\n")
            if cls.__module__.startswith("esc_basicsr."):
                self.add(where, reason)
            elif "meta" not in reason and "device=" not in reason:  # some cannot be made there
                self.add(where, f"{cls.__name__} refuses these options ({type(error).__name__}: {reason}).")
            return None


def keys_read(*functions: Callable[..., Any]) -> set[str]:
    """Collect the keys that functions of BasicSR read of their options without asking whether they exist."""
    source = "".join(map(inspect.getsource, functions))
    asked = re.findall(r"'(\w+)' in (?:self\.)?opt\b", source) + re.findall(r"opt\.get\('(\w+)'", source)
    return {*re.findall(r"\bopt\['(\w+)'\]", source)} - {*asked, "scale", "phase"}


def has_ours(model: Any, method: str) -> bool:
    """Tell whether a model's method is, or calls, what `basicsr_host.patches` has put around BasicSR's."""
    for each in getattr(model, "__mro__", ()):
        if (function := vars(each).get(method)) is None:
            continue
        if hasattr(function, "__wrapped__"):
            return True
        if method not in getattr(getattr(function, "__code__", None), "co_names", ()):  # super's, it would be
            return False
    return False


def registered(registry: Any) -> dict[str, Any]:
    """Give the classes of a registry by their names, which BasicSR finds with and without its own suffix."""
    classes = dict(iter(registry))  # else dict() takes it for a mapping
    return {name.removesuffix("_basicsr"): cls for name, cls in classes.items()} | classes


def instead(name: Any, names: Iterable[str], remedy: str) -> str:
    """Say what may have been meant by a name that is not known."""
    return NOT_HERE.get(str(name)) or f"{hint(name, names)} {remedy}".strip()


def _kind_of(parameter: inspect.Parameter, function: Callable[..., Any]) -> Kind:
    """Tell what a parameter accepts, as far as its annotation or its default say for certain."""
    kind = _ANNOTATED.get(parameter.annotation) if isinstance(parameter.annotation, (type, str)) else None
    if kind is None and function.__module__.startswith("basicsr.") and isinstance(parameter.default, bool):
        return BOOL
    if kind is not None:
        return kind
    return _NO_NUMBER_AS_TEXT if is_number(parameter.default) else ANYTHING
