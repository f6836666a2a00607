"""Reading option files: safely, and saying where a mistake is.

The values are those of BasicSR's own loader (YAML 1.1, mappings as OrderedDict, in the file's order), but
nothing in a file can run code, a key given twice is refused, merge keys (``<<: *anchor``) work.
"""

import re
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.suggestion import hint
from esc_basicsr.options.release import translate

MAX_BYTES = 100_000
_SHOWN = 200  # characters of an override that a message repeats
MAX_VALUES = 20_000  # after aliases are written out: nested ones can grow a small file without bound

# What PyYAML's constructors raise for a value that does not fit its explicit tag, such as `!!bool perhaps`.
_MISFITS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


# A key and a value that YAML takes for one text.
_NO_SPACE = re.compile(r"\w+:[^\s/]")
_SYNTAX_ERRORS = (yaml.scanner.ScannerError, yaml.parser.ParserError)


class _OptionLoader(yaml.SafeLoader):
    """PyYAML's safe loader that keeps the order of keys and refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked on the text as written: construction puts merged keys beside a mapping's own.
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal("expected a plain name as key, got a list or a mapping", key)
            first = seen.setdefault((key.tag, key.value), key.start_mark)
            if first is not key.start_mark:
                raise _refusal(
                    f"the key '{key.value}' is given twice, first on line {first.line + 1}. Keep one", key
                )
        return node

    def construct_ordered(self, node: yaml.Node) -> "OrderedDict[Hashable, Any]":
        if not isinstance(node, yaml.MappingNode):
            raise _refusal("expected 'key: value' lines after the tag !!map", node)
        self.flatten_mapping(node)
        return OrderedDict(
            (self.construct_object(key, deep=True), self.construct_object(value, deep=True))
            for key, value in node.value
        )

    def construct_int64(self, node: Any) -> int:
        value = int(self.construct_yaml_int(node))
        if abs(value) >= 2**63:
            raise _refusal("a number of more than 64 bits", node)
        return value

    def refuse_tag(self, node: yaml.Node) -> None:
        raise _refusal(
            f"the tag '{node.tag}' is not allowed, option files hold plain values only, nothing that runs "
            "code or makes Python objects. Remove the tag",
            node,
        )


class _OverrideLoader(_OptionLoader):
    """As the above; numbers like 5e-4 and 1e5 are numbers, as in Python."""


_OptionLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _OptionLoader.construct_ordered)
_OptionLoader.add_constructor("tag:yaml.org,2002:int", _OptionLoader.construct_int64)
_OptionLoader.add_constructor(None, _OptionLoader.refuse_tag)
_OverrideLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _refusal(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def load_options(path: str | Path, overrides: Sequence[str] = ()) -> "OrderedDict[str, Any]":
    """Read an option file, then set what ``overrides`` say.

    Args:
        path: A YAML file.
        overrides: Entries of BasicSR's ``--force_yml``: keys separated by ':', '=', a value, such as
            ``train:ema_decay=0.999``. The value is read as YAML (a number, text, true, none, a list);
            nothing is evaluated. Keys and sections that the file lacks are added.

    Raises:
        UserError: The file cannot be read, or an override does not fit; with file and line or key.
    """
    options = _parse(_read(Path(path)), _OptionLoader, str(path))
    if not isinstance(options, OrderedDict):
        found = "nothing" if options is None else f"a {type(options).__name__}"
        raise UserError(f"{path}: expected 'key: value' lines, got {found}. Is this an option file?")
    for entry in overrides:
        _override(options, entry)
    translate(options)
    return options


def _read(path: Path) -> str:
    try:
        status = path.stat()
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected an option file, such as {path / 'NAME.yml'}")
        if not path.is_file():
            raise UserError(f"{path} is a device or a pipe; expected an option file")
        if status.st_size > MAX_BYTES:
            raise UserError(f"{path} has {status.st_size:,} bytes; expected an option file, a short text")
        content = path.read_bytes()
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.yml")] if path.parent.is_dir() else []
        message = (
            f"{path}: no such option file (working directory: {Path.cwd()}). {hint(path.name, siblings)}"
        )
        raise UserError(message.rstrip()) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the option file: {error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text. Is this an option file?") from None


def _parse(text: str, loader_class: type[_OptionLoader], where: str) -> Any:
    """Read the value that ``text`` holds. Raises UserError naming ``where``, and the line if it is known."""
    try:
        loader = loader_class(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _count_values(node, {}) > MAX_VALUES:
                raise _refusal(f"more than {MAX_VALUES:,} values, aliases written out", node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        if spaceless := _spaceless_line(text, error):
            number, line_text = spaceless
            message = f"got '{line_text}'. Is a space missing after the colon?"
            raise UserError(f"{where}, line {number}: {message}") from None
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{where}{line}: {problem[:300]}.") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply.") from None
    except (yaml.YAMLError, *_MISFITS) as error:
        raise UserError(f"{where}: not readable as YAML: {' '.join(str(error).split())}.") from None


def _spaceless_line(text: str, error: yaml.MarkedYAMLError) -> tuple[int, str] | None:
    """Find number and text of the line ``key:value`` over which YAML stumbled on the next."""
    if error.problem_mark is None or not isinstance(error, _SYNTAX_ERRORS):
        return None
    lines = [*enumerate(text.splitlines()[: error.problem_mark.line], start=1)]
    for number, line in reversed(lines):
        # No regular expression: on a long line of spaces it tries every one as a beginning.
        content = f" {line}".partition(" #")[0].strip().removeprefix("- ").strip()
        if content:
            return (number, content) if _NO_SPACE.match(content) else None
    return None


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values that ``node`` stands for once its aliases are written out."""
    number = counts.get(id(node))
    if number == 0:
        raise _refusal("an alias that contains itself", node)
    if number is None:
        counts[id(node)] = 0
        number = 1
        if isinstance(node, yaml.MappingNode):
            number += sum(1 + _count_values(value, counts) for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            number += sum(_count_values(item, counts) for item in node.value)
        counts[id(node)] = number
    return number


def _override(options: "OrderedDict[str, Any]", entry: str) -> None:
    """Set one value, as ``section:key=value`` says; `check_options` tells whether there are such keys."""
    where = f"--force_yml {entry if len(entry) <= _SHOWN else f'{entry[:_SHOWN]}...'}"
    names, equals, text = entry.partition("=")
    *parents, key = (name.strip() for name in names.split(":"))
    if not equals or not all([*parents, key]):
        raise UserError(f"{where}: expected keys and a value, such as train:ema_decay=0.999")
    value = None if text.strip().lower() == "none" else _parse(text.strip(), _OverrideLoader, where)
    if isinstance(value, Mapping):
        raise UserError(f"{where}: expected one value or a list, got 'key: value'. Set one key at a time.")
    section: Any = options
    for name in parents:
        if section.get(name) is None:
            section[name] = OrderedDict()
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"{where}: '{name}' is not a section, so it has no other keys.")
    section[key] = value
