"""What doctor finds, and what it makes of it."""

import importlib.machinery
import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esc_basicsr.__main__ import main
from esc_basicsr.basicsr_host import functional_tensor, patches
from esc_basicsr.basicsr_host.copies import warn_of_shadowing
from esc_basicsr.commands import doctor
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.version import __version__
from esc_basicsr.fast import kernels


def test_sound_installation_is_found_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"esc_basicsr      {__version__}" in said
    for backend in ("Naive", "SDPA", "Flex"):
        assert f"  {backend:<16} works" in said
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    _, _, after = project.partition("\ndependencies = [\n")
    names = re.findall(r'^    "([\w-]+)', after.partition("\n]\n")[0], re.MULTILINE)
    assert len(names) > 10
    for name in names:
        assert f"\n  {name} " in said
    assert said.count("  patched") == len(patches.active())
    is_provided = functional_tensor.is_provided()
    assert (
        f"patched          functional_tensor: BasicSR imports {functional_tensor.NAME}" in said
    ) == is_provided
    assert said.endswith("All is well.\n")


def test_it_enters_basicsr_from_a_fresh_process() -> None:
    """Here BasicSR is imported already, which once hid a circle of imports."""
    code = "from esc_basicsr.commands import doctor; print(*doctor._basicsr(), sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(f"{patch.name}: " in result.stdout for patch in patches.active())


def test_shadowed_basicsr_is_found(tmp_path: Path) -> None:
    """A vendored BasicSR in the working directory, which 'python -m' puts first: BasicSR #506, #683, #723."""
    (tmp_path / "basicsr").mkdir()
    (tmp_path / "basicsr" / "__init__.py").write_text("raise ImportError('an old copy')\n")
    ended = subprocess.run(
        [sys.executable, "-m", "esc_basicsr", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert f"imported from    {tmp_path / 'basicsr'}" in ended.stdout
    assert "it is shadowed by the first" in ended.stdout
    assert "Wrong:" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_training_beside_a_clone_of_basicsr_says_so(tmp_path: Path) -> None:
    (tmp_path / "basicsr").mkdir()
    (tmp_path / "basicsr" / "__init__.py").write_text("from .version import __version__\n")
    ended = subprocess.run(
        [sys.executable, "-m", "esc_basicsr", "train", "-opt", "mine.yml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    message = f"finds basicsr at {tmp_path / 'basicsr'}, which lacks basicsr.version"
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_clone_that_is_whole_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("basicsr").propagate = True
    monkeypatch.syspath_prepend("")
    monkeypatch.chdir(tmp_path)
    warn_of_shadowing()
    assert caplog.text == ""
    (tmp_path / "basicsr").mkdir()
    (tmp_path / "basicsr" / "__init__.py").touch()
    warn_of_shadowing()
    assert f"imported from the working directory, {tmp_path / 'basicsr'}, and not from" in caplog.text


def test_editable_copy_that_is_found_by_no_path_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "clone" / "basicsr"
    own.mkdir(parents=True)
    (own / "__init__.py").touch()

    class Finder:
        def find_spec(
            self, name: str, path: object, target: object = None
        ) -> importlib.machinery.ModuleSpec | None:
            found = name == "basicsr"
            return importlib.util.spec_from_file_location(name, own / "__init__.py") if found else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    assert main(["doctor"]) == 1
    assert f"another one      {own}: it is shadowed by the first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("has_bf16", "has_amx", "named"),
    [
        (True, True, "bfloat16 by AMX"),
        (True, False, "bfloat16 by AVX-512 BF16"),
        (False, False, "no instructions"),
    ],
)
def test_what_multiplies_bfloat16_is_named(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, has_amx: bool, named: str
) -> None:
    library = kernels.load()._replace(has_bf16=has_bf16, has_amx=has_amx)
    monkeypatch.setattr(kernels, "load", lambda: library)
    findings = {name: message for name, message, _ in doctor._devices()}
    assert findings["C++ kernels"].startswith(f"work, {named}")


def test_what_can_be_done_without_is_not_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise UserError("no C++ compiler")

    monkeypatch.setattr(kernels, "load", fail)
    monkeypatch.setattr(doctor, "_EXTRAS", {"none_such": "nothing"})
    monkeypatch.setattr(doctor, "copies", list)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "do not work, networks run without: no C++ compiler" in said
    assert "is not installed: nothing needs it" in said
    assert "pip install basicsr" in said
