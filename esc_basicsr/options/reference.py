"""Descriptions of the options, for people and for editors: docs/options.md and options/schema.json."""

import json
from collections.abc import Mapping
from typing import Any

from esc_basicsr.common.tables import markdown_table
from esc_basicsr.options.kinds import Kind
from esc_basicsr.options.schema import ALWAYS, CALLED, DATASETS, KNOWN_MODELS, LOADER, SECTIONS, UNSET, Option

_DATASET = "datasets.NAME"

_TITLES = {
    "": "The file",
    "train.optim_g": "`train.optim_g`, beside the arguments of PyTorch's class",
    "train.scheduler": "`train.scheduler`, beside the arguments of BasicSR's class",
    "val.metrics.NAME": "`val.metrics.NAME`, beside the arguments of the metric",
    _DATASET: "`datasets.NAME`, of whatever type",
}

_HEAD = """\
# Options

Every key of an option file for `SRModel`, `ESCModel`, `RealESRNetModel` and `RealESRGANModel`. Each is
declared once, in `esc_basicsr/options/schema.py`, from which
`python -m esc_basicsr options --docs docs/options.md` writes this page.

* `python -m esc_basicsr options --check FILE` says what is wrong in a file, before anything is built.
* `--force_yml train:clip_grad_norm=1` sets any of these keys for one run, whether the file has it or not.
* The first line of a shipped file names `options/schema.json`, by which editors complete and check what you
  write (VS Code: the extension YAML). In a file elsewhere, let it name the path of the schema from there.

Files of BasicSR are read as they are, and those of the authors' release: `ESRModel` is `ESCModel` here, and
`DownsampleImageDataset` of an LMDB is `DFLIPDataset`.

A network, an optimizer, a loss or a metric takes the arguments of its class or function; these sections list
only what is known better than from its signature. "required" keys have no default. Keys that BasicSR sets
itself are left out.
"""


def reference() -> str:
    """Write docs/options.md."""
    parts = [_HEAD, *(_table(_title(where), table) for where, table in SECTIONS.items())]
    parts += [_table(f"`{_DATASET}` of type `{kind}`", table) for kind, table in DATASETS.items()]
    return "\n".join(parts)


def _title(where: str) -> str:
    return _TITLES.get(where, f"`{where}`")


def _table(title: str, table: Mapping[str, Option]) -> str:
    rows = [
        [f"`{key}`", option.kind.expected, _default(option), option.unit, _meaning(option)]
        for key, option in table.items()
        if not option.doc.startswith("Set by BasicSR")
    ]
    return f"## {title}\n\n{markdown_table(['key', 'value', 'default', 'unit', 'meaning'], rows)}\n"


def _default(option: Option) -> str:
    if option.required:
        return "required" if option.required == ALWAYS else f"required {option.required}"
    if option.default is UNSET or option.default == {}:
        return ""
    return "~" if option.default is None else f"`{json.dumps(option.default)}`"


def _meaning(option: Option) -> str:
    return f"{option.doc} {' and '.join(option.models)} alone." if option.models else option.doc


def json_schema() -> str:
    """Write options/schema.json."""
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"Option files for {', '.join(KNOWN_MODELS)}, as esc_basicsr checks them",
        **_section(""),
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _section(where: str) -> dict[str, Any]:
    """Describe the section at ``where``, and those within."""
    if where == "datasets":
        return {"type": "object", "additionalProperties": _dataset()}
    if where == "val.metrics":
        return {"type": "object", "additionalProperties": _section("val.metrics.NAME")}
    if where in CALLED or where == "val.metrics.NAME":
        kind = {"type": {"type": "string", "description": "Its class or function."}}
        properties = {**kind, **_properties(where, SECTIONS.get(where, {}))}
        return {"type": "object", "required": ["type"], "properties": properties}
    return _closed(where, SECTIONS[where])


def _closed(where: str, table: Mapping[str, Option]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": [key for key, option in table.items() if option.required == ALWAYS],
        "properties": _properties(where, table),
        "additionalProperties": False,
    }


def _dataset() -> dict[str, Any]:
    """Describe a data set by its type; others than those known may have any keys."""
    return {
        "type": "object",
        "required": ["name", "type"],
        "properties": {"type": {"type": "string", "examples": [*DATASETS]}},
        "allOf": [
            {
                "if": {"properties": {"type": {"const": kind}}},
                "then": _closed(_DATASET, {**LOADER, **table}),
            }
            for kind, table in DATASETS.items()
        ],
    }


def _properties(where: str, table: Mapping[str, Option]) -> dict[str, Any]:
    properties = {}
    for key, option in table.items():
        unit = f" Unit: {option.unit}." if option.unit else ""
        described: dict[str, Any] = {"description": f"{_meaning(option)}{unit}"}
        if option.default is not UNSET:
            described["default"] = option.default
        properties[key] = {**described, **_value(f"{where}.{key}".lstrip("."), option.kind)}
    return properties


def _value(where: str, kind: Kind) -> Mapping[str, Any]:
    if where == f"{_DATASET}.sources":
        return {**kind.json, "items": _section(f"{where}[]")}
    if where not in (*SECTIONS, *CALLED, "datasets", "val.metrics"):
        return kind.json
    section = _section(where)
    return {"anyOf": [section, {"type": "null"}]} if kind.accepts(None) else section
