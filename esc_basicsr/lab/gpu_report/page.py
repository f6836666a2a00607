"""The page of a report on a GPU: targets first, then every figure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from esc_basicsr.common.tables import markdown_table, milliseconds, scientific
from esc_basicsr.lab.gpu_report.cases import BASE, PARTS
from esc_basicsr.lab.measure import benchmark, training_step, window_attention
from esc_basicsr.lab.networks.by_name import implementation_of

# how many times as fast as the release's compiled Flex, at least: in float32, in half precision
_INFERENCE, _TRAINING = (3.0, 6.0), (2.0, 3.0)
_MEMORY = 0.6  # of the release's, at most
_RELEASES = (BASE, "release")

Report = Mapping[str, Any]


class Target(NamedTuple):
    """One thing that was aimed at, and what was found."""

    what: str
    wanted: str
    found: str
    by: str  # the implementation
    is_hit: bool


def write_page(report: Report, left: Sequence[str]) -> str:
    """Write the page, in Markdown.

    Args:
        report: Settings, results by key.
        left: Keys of what has not been measured.
    """
    machine = report["settings"]["machine"]
    lines = [f"# ESC on {machine['device']}"]
    if machine["device"] == "cpu":
        lines.append("**A rehearsal on a CPU: no figure here means anything.**")
    lines.append(", ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
    if left:
        lines.append(f"**{len(left)} cases are left**: the same command goes on. The next is {left[0]}.")
    lines += ["## Targets", *_targets_section(report["results"])]
    sections = {
        "card": _card,
        "correctness": _correctness,
        "inference": _networks,
        "training": _training,
        "window attention": _window_attention,
        "growth": _networks,
        "compiled": _compiled,
    }
    for part in PARTS:
        results = _of(report["results"], part)
        if results:
            lines += [f"## {part.capitalize()}", *sections[part](results)]
    lines += ["## Failures", *_failures(report["results"])]
    return "\n\n".join(lines) + "\n"


def _of(results: Report, part: str) -> dict[str, list[dict[str, Any]]]:
    """Give the rows that were measured of a part, by case."""
    named = {key: result for key, result in results.items() if key.startswith(f"{part}: ")}
    return {
        key.removeprefix(f"{part}: "): [row for row in result["rows"] if "failure" not in row]
        for key, result in named.items()
        if "rows" in result
    }


def _row(kind: type[Any], row: Mapping[str, Any]) -> Any:
    return kind(**{key: row[key] for key in kind._fields})


def targets(results: Report) -> Iterator[Target]:
    """Yield each target that can be judged: in each case our fastest, against the release's compiled Flex."""
    for part, row_type, factors in (
        ("inference", benchmark.Row, _INFERENCE),
        ("compiled", benchmark.Row, _INFERENCE),
        ("training", training_step.Row, _TRAINING),
        ("compiled", training_step.Row, _TRAINING),
    ):
        for name, rows in _of(results, part).items():
            measured = [_row(row_type, row) for row in rows if row.keys() >= {*row_type._fields}]
            base = next((row for row in measured if implementation_of(row.network) == BASE), None)
            ours = [row for row in measured if implementation_of(row.network) not in _RELEASES]
            if base is None or not ours:
                continue
            what = f"{part}, {name}"
            wanted = factors[not name.split(",")[0].endswith("fp32")]
            fastest = min(ours, key=lambda row: row.latency)
            ratio = base.latency / fastest.latency
            speed = (f"{wanted:g} times as fast", f"{ratio:.2f} times", fastest.network, ratio >= wanted)
            yield Target(what, *speed)
            with_memory = [row for row in ours if getattr(row, "memory", None) is not None]
            if with_memory and base.memory:
                fastest = min(with_memory, key=lambda row: row.latency)
                share = fastest.memory / base.memory
                memory = (f"{_MEMORY:g} of the memory", f"{share:.2f}", fastest.network, share <= _MEMORY)
                yield Target(what, *memory)


def _targets_section(results: Report) -> list[str]:
    judged = [*targets(results)]
    if not judged:
        return ["None can be judged yet."]
    hits = sum(target.is_hit for target in judged)
    head = ["", "target", "found", "by", ""]
    rows = [[t.what, t.wanted, t.found, t.by, "hit" if t.is_hit else "**missed**"] for t in judged]
    explained = (
        f"{hits} of {len(judged)} hit. Each is our fastest implementation against {BASE}, the release's "
        "compiled Flex, in the same precision, measured in turn; memory is that of the fastest that has a "
        "figure for it."
    )
    return [explained, markdown_table(head, rows)]


def _card(results: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    rows = []
    for found in results.get("ceilings", ()):
        rows += [
            [what, f"{rate / 1e9:,.0f} GB/s" if what == "copy" else f"{rate / 1e12:,.2f} TFLOP/s"]
            for what, rate in found.items()
        ]
    return [
        "A copy on the card, read and written; products of large matrices.",
        markdown_table(["", "rate"], rows),
    ]


def _correctness(results: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    rows = [row for found in results.values() for row in found]
    kinds = list(dict.fromkeys(row["precision"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        error = scientific(row["error"])
        line = cells.setdefault((row["variant"], row["implementation"] or "ours"), {})
        line[row["precision"]] = error if row["passed"] else f"**{error}, wrong**"
    lines = [[*names, *(line.get(kind, "") for kind in kinds)] for names, line in cells.items()]
    text = (
        "Errors against float64 on the CPU, norm against norm: of what a network adds to its upscaled input, "
        "and of gradients. What is wrong is not measured further."
    )
    return [text, markdown_table(["network", "implementation", *kinds], lines)]


def _networks(results: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    parts = []
    for name, rows in results.items():
        if not rows:
            continue
        measured = [_row(benchmark.Row, row) for row in rows]
        parts += [f"### {name}", benchmark.markdown(measured)]
        if "floor" in rows[0]:
            least, limit = rows[0]["floor"], rows[0]["limited by"]
            fastest = min(measured, key=lambda row: row.latency)
            parts.append(
                f"The card's floor is {milliseconds(least)}, set by {limit}; {fastest.network} takes "
                f"{fastest.latency / least:.1f} times as long."
            )
    return parts


def _training(results: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    parts = []
    for name, rows in results.items():
        if rows:
            parts += [f"### {name}", training_step.markdown([_row(training_step.Row, row) for row in rows])]
    return parts


def _compiled(results: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    trained = {name: rows for name, rows in results.items() if name.endswith("training")}
    rest = {name: rows for name, rows in results.items() if name not in trained}
    return [*_networks(rest), *_training(trained)]


def _window_attention(results: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    rows = [row for found in results.values() for row in found]
    parts = []
    for kind in dict.fromkeys(row["precision"] for row in rows):
        of_kind = [_row(window_attention.Row, row) for row in rows if row["precision"] == kind]
        of_kind.sort(key=lambda row: row.window)
        parts += [f"### {kind}", window_attention.markdown(of_kind)]
    return parts


def _failures(results: Report) -> list[str]:
    lines = []
    for key, result in results.items():
        if "failure" in result:
            lines.append(f"* {key}: {result['failure']}")
        lines += [
            f"* {key}, {row['network']}: {row['failure']}"
            for row in result.get("rows", ())
            if "failure" in row
        ]
    return ["\n".join(lines) if lines else "None."]
