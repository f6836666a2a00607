"""The package is clean by ruff and mypy, and names neither machine paths nor documents that it lacks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from slow import SLOW

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_tool_finds_nothing(command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_slow_tests_exist():
    assert all((ROOT / "tests" / name).exists() for name in SLOW)


def test_no_machine_path_is_written_down():
    sources = [
        path
        for folder in ("esc_basicsr", "options", "datasets", "tests", "docs", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".yml", ".md", ".json", ""}
        and path.is_file()
        and "lmdb" not in path.suffixes
    ]
    assert len(sources) > 50
    machine_path = re.compile(r"(?<![\w.])/(?:home|root|mnt|Users)/\w")
    found = [
        str(path) for path in [*sources, *ROOT.glob("*.md")] if machine_path.search(path.read_text("utf-8"))
    ]
    assert not found


def test_documents_that_the_code_names_exist():
    missing = {
        (str(path.relative_to(ROOT)), name)
        for folder in ("esc_basicsr", "tests", "docs/studies")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\bdocs/[\w/.-]+\.(?:md|csv|json)\b", path.read_text("utf-8"))
        if not (ROOT / name).exists()
    }
    assert not missing
