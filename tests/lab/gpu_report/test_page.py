"""The page states targets hit and missed as such; floors follow from what is to be moved and computed."""

import pytest

from esc_basicsr.archs.variants import build_variant
from esc_basicsr.lab.gpu_report.floor import count_numbers, floor
from esc_basicsr.lab.gpu_report.page import targets, write_page


def network(name, seconds, memory, precision, **more):
    figures = {
        "scale": 4,
        "input": [2, 2],
        "multiply_adds": 10**9,
        "params": 1000,
        "difference": None,
        "psnr": None,
    }
    named = {"network": name, "seconds": [seconds], "memory": memory, "precision": precision}
    return {**figures, **named, **more}


def step(name, seconds, precision):
    return {
        **{"network": name, "seconds": [seconds], "difference": None, "bias_difference": None},
        "precision": precision,
    }


RESULTS = {
    "card: ceilings": {"rows": [{"copy": 3e12, "fp32": 5e13}]},
    "correctness: ESC fp32": {
        "rows": [
            {"variant": "ESC", "implementation": "", "precision": "fp32", "error": 2e-6, "passed": True},
            {"variant": "ESC", "implementation": "", "precision": "fp16", "error": 0.5, "passed": False},
        ]
    },
    "inference: ESC ×4 fp32": {
        "rows": [
            network("ESC:release-flex", 0.9, 1000, "fp32", floor=0.1, **{"limited by": "bytes"}),
            network("ESC:release", 0.1, 100, "fp32"),
            network("ESC:kernels", 0.3, 700, "fp32"),
            network("ESC:graphs", 0.25, None, "fp32"),
            {"network": "ESC", "precision": "fp32", "failure": "not enough memory"},
        ]
    },
    "inference: ESC ×4 fp16": {
        "rows": [network("ESC:release-flex", 0.9, 1000, "fp16"), network("ESC", 0.3, 600, "fp16")]
    },
    "training: ESC bf16": {"rows": [step("ESC:release-flex", 3.0, "bf16"), step("ESC:kernels", 1.0, "bf16")]},
    "compiled: ESC fp32, training": {
        "rows": [step("ESC:release-flex", 3.0, "fp32"), step("ESC:compiled", 2.0, "fp32")]
    },
    "growth: ESC 8×8 fp32": {"failure": "RuntimeError: no"},
}
REPORT = {"settings": {"machine": {"device": "Some Card", "torch": "2.11"}}, "results": RESULTS}


def test_targets_are_judged_by_our_fastest_against_flex_in_the_same_precision():
    judged = {(t.what, t.wanted): (t.found, t.by, t.is_hit) for t in targets(RESULTS)}
    assert judged == {
        ("inference, ESC ×4 fp32", "3 times as fast"): ("3.60 times", "ESC:graphs", True),
        ("inference, ESC ×4 fp32", "0.6 of the memory"): ("0.70", "ESC:kernels", False),
        ("inference, ESC ×4 fp16", "6 times as fast"): ("3.00 times", "ESC", False),
        ("inference, ESC ×4 fp16", "0.6 of the memory"): ("0.60", "ESC", True),
        ("training, ESC bf16", "3 times as fast"): ("3.00 times", "ESC:kernels", True),
        ("compiled, ESC fp32, training", "2 times as fast"): ("1.50 times", "ESC:compiled", False),
    }


def test_the_page_states_misses_failures_and_what_is_left():
    page = write_page(REPORT, ["growth: ESC 16×16 fp32"])
    assert page.startswith("# ESC on Some Card\n") and "rehearsal" not in page
    assert "3 of 6 hit." in page
    assert "| inference, ESC ×4 fp16 | 6 times as fast | 3.00 times | ESC | **missed** |" in page
    assert "| ESC | ours | 2.0e-06 | **5.0e-01, wrong** |" in page
    assert "The card's floor is 100.0 ms, set by bytes; ESC:release takes 1.0 times as long." in page
    assert "* inference: ESC ×4 fp32, ESC: not enough memory" in page
    assert "* growth: ESC 8×8 fp32: RuntimeError: no" in page
    assert "**1 cases are left**: the same command goes on. The next is growth: ESC 16×16 fp32." in page


def test_a_report_that_has_nothing_yet_has_a_page():
    page = write_page({**REPORT, "results": {}}, [])
    assert "None can be judged yet." in page and page.endswith("## Failures\n\nNone.\n")


@pytest.mark.parametrize(("variant", "dim", "blocks"), [("ESC-light", 64, 3), ("ESC-FP", 48, 5)])
def test_work_is_what_layers_read_and_write_once(variant, dim, blocks):
    scale, height, width = 3, 32, 64  # whole windows
    pixel = 3 + dim  # the first convolution
    # a block: a ConvFFN, attention, five ConvFFNs and ConvAttns, a convolution; each reads and writes a map
    pixel += blocks * (1 + 1 + 5 * 2 + 1) * 2 * dim
    pixel += 2 * dim + dim + 3 * scale**2  # the last two
    weights = sum(parameter.numel() for parameter in build_variant(variant, scale).parameters())
    assert count_numbers(variant, scale, height, width) == pixel * height * width + weights


def test_floor_is_set_by_what_takes_longer():
    ceilings = {"copy": 100.0, "fp32": 10.0, "fp16": 1000.0}
    assert floor(25, 80, ceilings, "fp32") == (5.0, "operations")
    assert floor(25, 40, ceilings, "fp16") == (0.4, "bytes")
