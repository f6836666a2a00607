"""The command that writes, lists and checks option files."""

from pathlib import Path

import yaml

from esc_basicsr.__main__ import main
from esc_basicsr.options.recipes import option_files
from esc_basicsr.options.reference import json_schema, reference


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


OPTION_FILES = {str(path): text for path, text in option_files().items()}
SHIPPED = {**OPTION_FILES, "schema.json": json_schema()}


def test_list_names_every_shipped_file(capsys):
    assert main(["options", "--list"]) == 0
    assert capsys.readouterr().out.split() == list(OPTION_FILES)


def test_write_writes_every_file_and_a_second_time_none(tmp_path, capsys):
    assert main(["options", "--write", str(tmp_path / "options")]) == 0
    assert tree(tmp_path / "options") == SHIPPED
    assert main(["options", "--write", str(tmp_path / "options")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{len(SHIPPED)} files written to {tmp_path / 'options'}, 0 up to date"
    assert second == f"0 files written to {tmp_path / 'options'}, {len(SHIPPED)} up to date"


def test_write_keeps_a_changed_file_and_then_writes_nothing(tmp_path, capsys):
    mine = tmp_path / "train/ESC/ESC_x2_DIV2K.yml"
    mine.parent.mkdir(parents=True)
    mine.write_text("name: mine\n")
    assert main(["options", "--write", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[1:] == [f"  {mine}"]
    assert "these files differ from the shipped ones; rename yours or add --overwrite" in error
    assert tree(tmp_path) == {"train/ESC/ESC_x2_DIV2K.yml": "name: mine\n"}
    assert main(["options", "--write", str(tmp_path), "--overwrite"]) == 0
    assert tree(tmp_path) == SHIPPED


def test_write_leaves_no_half_written_file_when_it_fails(tmp_path, monkeypatch, capsys):
    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    assert main(["options", "--write", str(tmp_path)]) == 2
    assert "cannot be written: disk full" in capsys.readouterr().err
    assert tree(tmp_path) == {}


def test_write_below_a_file_is_reported(tmp_path, capsys):
    (tmp_path / "options").touch()
    assert main(["options", "--write", str(tmp_path / "options")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_docs_writes_the_page_once_and_keeps_another_file(tmp_path, capsys):
    page = tmp_path / "docs/options.md"
    assert main(["options", "--docs", str(page)]) == 0
    assert page.read_text() == reference()
    assert main(["options", "--docs", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}: written\n{page}: up to date\n"
    page.write_text("mine")
    assert main(["options", "--docs", str(page)]) == 2
    assert page.read_text() == "mine"
    assert main(["options", "--docs", str(page), "--overwrite"]) == 0
    assert page.read_text() == reference()


def test_overwrite_without_write_is_reported(capsys):
    assert main(["options", "--list", "--overwrite"]) == 2
    assert "--overwrite goes with --write DIR or --docs FILE" in capsys.readouterr().err


def test_check_passes_sound_files(sound_options, capsys):
    Path("mine.yml").write_text(yaml.safe_dump(sound_options))
    assert main(["options", "--check", "mine.yml"]) == 0
    assert capsys.readouterr().out == "mine.yml: sound, to train by\n"


def test_check_reports_what_is_wrong_in_each_file(sound_options, capsys):
    sound_options["scael"] = 2
    Path("mine.yml").write_text(yaml.safe_dump(sound_options))
    del sound_options["train"], sound_options["logger"], sound_options["scael"]
    sound_options["datasets"] = {"test_1": sound_options["datasets"]["val"]}
    Path("sound.yml").write_text(yaml.safe_dump(sound_options))
    assert main(["options", "--check", "mine.yml", "none.yml", "sound.yml"]) == 2
    out, err = capsys.readouterr()
    assert out == "sound.yml: sound, to test by\n"
    assert (
        "mine.yml: 1 problem\n  scael: unknown key. Did you mean 'scale'?\nnone.yml: no such option file"
        in err
    )
