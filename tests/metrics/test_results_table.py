"""The table of a test run: what was measured beside what is published, and only where that compares."""

import csv
from pathlib import Path
from typing import Any

import pytest

from esc_basicsr.archs.variants import VARIANTS, build_variant
from esc_basicsr.common.errors import UserError
from esc_basicsr.metrics.published import published_figures
from esc_basicsr.metrics.result_files import file_name, write_csv
from esc_basicsr.metrics.results_table import ResultsTable, SetResult
from esc_basicsr.options.recipes import BENCHMARKS


def table(**changes: Any) -> ResultsTable:
    metrics = {
        name: {"type": f"calculate_{name}", "crop_border": 4, "test_y_channel": True}
        for name in ("psnr", "ssim")
    }
    keys: dict[str, Any] = {
        "name": "ESC-light_x4_DIV2K",
        "scale": 4,
        "checkpoint": "experiments/ESC-light_x4_DIV2K/models/net_g_latest.pth",
        "variant": "ESC-light",
        "metrics": metrics,
        "results": {"Set5": SetResult(5, {"psnr": 32.51849, "ssim": 0.89942})},
    }
    return ResultsTable(**keys | changes)


def rows(text: str) -> dict[str, list[str]]:
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_network_stands_beside_what_is_published_of_its_scale_and_training_set() -> None:
    text = table().markdown()
    found = rows(text)
    assert list(found)[:2] == ["method", "**ESC-light_x4_DIV2K, measured**"]
    assert found["**ESC-light_x4_DIV2K, measured**"] == ["DIV2K", "32.52 / 0.8994"]
    assert found["**ESC-light, published**"] == ["DIV2K", "32.52 / 0.8995"]
    assert found["SwinIR-light"] == ["DIV2K", "32.44 / 0.8976"]
    assert {"ESC", "ESC-FP", "RCAN", "ATD-light"} <= set(found) and len(found) == 12
    assert "DFLIP" not in text
    assert "arXiv:2503.06671, networks trained on DIV2K" in text
    assert "(Set5 5)" in text


def test_only_tested_sets_have_columns_and_what_is_not_published_a_dash() -> None:
    result = SetResult(109, {"psnr": 34.5, "ssim": 0.95})
    metrics = {name: {**keys, "crop_border": 3} for name, keys in table().metrics.items()}
    results = {"mine": result, "Manga109": result, "BSD100": result}
    found = rows(table(name="x3", checkpoint=None, scale=3, metrics=metrics, results=results).markdown())
    assert found["method"] == ["trained on", "mine", "Manga109", "BSD100"]
    assert found["ESC-FP"] == ["DIV2K", "—", "34.56 / —", "29.30 / 0.8107"]
    assert found["**x3, measured**"][0] == "—"


@pytest.mark.parametrize(
    ("name", "checkpoint", "trained_on"),
    [
        ("ESC_x4_DFLIP", "experiments/ESC_x4_DIV2K/net_g.pth", ["DFLIP"]),
        ("mine", "experiments/ESC_x4_DFLIP/models/net_g_latest.pth", ["DFLIP"]),
        ("mine", "net_g.pth", ["DIV2K", "DFLIP"]),
        ("Bicubic_x4", None, ["DIV2K", "DFLIP"]),
    ],
)
def test_training_set_is_told_by_the_run_or_its_checkpoint_else_all_are_shown(
    name: str, checkpoint: str | None, trained_on: list[str]
) -> None:
    text = table(name=name, checkpoint=checkpoint, variant="ESC").markdown()
    assert f"networks trained on {' or '.join(trained_on)};" in text
    assert text.count("**ESC, published**") == len(trained_on)


@pytest.mark.parametrize("change", [{"test_y_channel": False}, {"crop_border": 0}])
def test_figures_measured_otherwise_do_not_stand_beside_published_ones(change: dict[str, Any]) -> None:
    metrics = {name: {**keys, **change} for name, keys in table().metrics.items()}
    text = table(metrics=metrics).markdown()
    assert len(rows(text)) == 2
    assert "Published figures are skipped" in text


def restored(is_luma: bool, **results: dict[str, float]) -> dict[str, list[str]]:
    """Give the rows of a network that keeps the size."""
    metrics = {
        name: {**keys, "crop_border": 0, "test_y_channel": is_luma} for name, keys in table().metrics.items()
    }
    sets = {name: SetResult(5, values) for name, values in results.items()}
    return rows(table(name="restored", scale=1, metrics=metrics, results=sets).markdown())


def test_what_keeps_the_size_stands_beside_swinir() -> None:
    noise = restored(False, CBSD68_noise25={"psnr": 31.0, "ssim": 0.9}, mine={"psnr": 30.0, "ssim": 0.9})
    assert noise["SwinIR"] == ["DIV2K, Flickr2K, BSD500 and WED", "31.78 / —", "—"]
    gray = restored(False, LIVE1_gray_quality10={"psnr": 29.0, "ssim": 0.8})
    assert gray["SwinIR"][1:] == ["29.86 / 0.8287"]


def test_luma_of_colour_images_has_nothing_published_beside_it() -> None:
    for name in ("LIVE1_quality10", "LIVE1_gray_quality10"):
        assert "SwinIR" not in restored(True, **{name: {"psnr": 29.0, "ssim": 0.8}})


def test_other_scales_and_sets_have_nothing_beside_them() -> None:
    for changes in ({"scale": 8}, {"scale": None}, {"results": {"mine": SetResult(1, {"psnr": 30.0})}}):
        metrics = {
            name: {**keys, "crop_border": changes.get("scale", 4)} for name, keys in table().metrics.items()
        }
        text = table(metrics=metrics, **changes).markdown()
        assert len(rows(text)) == 2
        assert "ublished" not in text


def test_names_cannot_break_the_table() -> None:
    result = SetResult(1, {"psnr": 30.0, "ssim": 0.9})
    text = table(name="a|b", checkpoint=None, results={"x|y\nz": result}).markdown()
    assert "| **a\\|b, measured** | — | 30.00 / 0.9000 |" in text
    assert "| method | trained on | x\\|y z |" in text


def test_csv_has_every_figure_in_full(tmp_path: Path) -> None:
    table().write(tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        found = {row["method"]: row for row in csv.DictReader(file)}
    own, published = found["ESC-light_x4_DIV2K"], found["ESC-light"]
    assert (own["Set5 psnr"], own["Set5 ssim"], own["figures_from"]) == ("32.51849", "0.89942", "measured")
    assert (published["Set5 psnr"], published["same_network"]) == ("32.52", "yes")
    assert (found["ESC"]["figures_from"], found["ESC"]["same_network"]) == ("arXiv:2503.06671", "no")
    assert (tmp_path / "results.md").read_text().startswith("# ESC-light_x4_DIV2K\n\n| method |")


def test_published_figures_are_complete_and_plausible() -> None:
    for training_set, methods in (("DIV2K", {"ESC", "ESC-light", "ESC-FP"}), ("DFLIP", {"ESC"})):
        for scale in (2, 3, 4):
            figures = published_figures(training_set, scale)
            assert methods <= set(figures)
            for method, sets in figures.items():
                assert tuple(sets) == BENCHMARKS
                for values in sets.values():
                    assert 26 < values["psnr"] < 40 and 0.74 < values.get("ssim", 0.9) < 0.98, method
    assert published_figures("DIV2K", 4)["ESC"]["Urban100"] == {"psnr": 27.07, "ssim": 0.8144}
    assert published_figures("DFLIP", 2)["ESC"]["Set14"] == {"psnr": 34.42, "ssim": 0.9235}
    assert published_figures("DIV2K", 8) == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_variants_are_recognized_by_their_weights(variant: str) -> None:
    from esc_basicsr.training.shared_validation import published_variant

    net = build_variant(variant, 3)
    assert published_variant(net) == variant
    assert published_variant(net.proj) is None


def test_file_names_are_themselves_unless_they_lead_elsewhere() -> None:
    for name in ("Set5", "B100 ×4 (HR), [a]&b.c", "データ"):
        assert file_name(name) == name
    assert [file_name(name) for name in ("a/b", "..", "a\\b", "%", "\0")] == [
        *("a%2Fb", "%2E.", "a%5Cb", "%25", "%00"),
    ]


def test_table_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").touch()
    with pytest.raises(UserError, match="folder cannot be made"):
        write_csv(tmp_path / "folder" / "a.csv", ["a"], [])


@pytest.mark.parametrize("is_padded", [True, False])
def test_table_says_how_images_went_through_the_network(is_padded: bool) -> None:
    text = table(is_padded=is_padded).markdown()
    assert f"val.pad_to_window: {str(is_padded).lower()}" in text
    assert ("mirrored" in text) is is_padded
