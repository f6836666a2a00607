"""A report goes through its cases in the time there is, keeps what it knows, goes on where it was left."""

import json
import subprocess
import sys

import pytest
import torch

from esc_basicsr.__main__ import main
from esc_basicsr.common.errors import UserError
from esc_basicsr.fast import gpu
from esc_basicsr.lab.gpu_report import cases, run
from esc_basicsr.lab.gpu_report.cases import ON_GPU, PARTS, REHEARSAL, CardLostError, Case, list_cases
from esc_basicsr.lab.measure import benchmark, window_attention


def read(folder):
    return json.loads((folder / run.FILE).read_text())


@pytest.fixture
def calls(monkeypatch):
    """Three cases in place of the real ones, and what was called of them; ``act`` says what each does."""

    class Calls(list):
        def act(self, name):
            return [{"network": name, "value": len(self)}]

    made = Calls()

    def call(name, results):
        made.append(name)
        return made.act(name)

    listed = [Case("growth", name, lambda results, name=name: call(name, results)) for name in "abc"]
    monkeypatch.setattr(run, "list_cases", lambda plan: iter(listed))
    monkeypatch.setattr(run, "write_page", lambda report, left: f"{len(left)} left")
    return made


@pytest.mark.slow
def test_a_rehearsal_covers_every_part_and_goes_on_where_it_was_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "peak_memory_growth", lambda build, lq: 1000)
    monkeypatch.setattr(window_attention, "peak_memory_growth", lambda build, lq: 1000)
    monkeypatch.setattr(benchmark, "count_multiply_adds", lambda network, scale, lq: 10**9)
    call = ["gpu-report", "-o", str(tmp_path), "--rehearse"]
    listed = [case.key for case in list_cases(REHEARSAL)]
    assert main([*call, "--minutes", "1e-9"]) == 0
    assert f"{len(listed)} cases are left" in capsys.readouterr().out
    assert f"**{len(listed)} cases are left**" in (tmp_path / run.PAGE).read_text()
    assert main(call) == 0
    assert "left" not in capsys.readouterr().out
    report = read(tmp_path)
    assert [*report["results"]] == listed and not report["attempts"]
    assert {key.partition(": ")[0] for key in listed} == set(PARTS)
    rows = [row for result in report["results"].values() for row in result["rows"]]
    assert all(row.get("passed", True) for row in rows) and not any("failure" in row for row in rows)
    (ceilings,) = report["results"]["card: ceilings"]["rows"]
    assert ceilings.keys() == {"copy", "fp32", "bf16"} and min(ceilings.values()) > 0
    measured = report["results"]["inference: ESC-FP ×2 fp32"]["rows"]
    assert [row["network"] for row in measured] == [
        *("ESC-FP:release", "ESC-FP", "ESC-FP:kernels", "ESC-FP:graphs")
    ]
    assert all(min(row["seconds"]) > 0 and row["floor"] > 0 for row in measured)
    page = (tmp_path / run.PAGE).read_text()
    assert "A rehearsal on a CPU" in page
    for part in PARTS:
        assert f"## {part.capitalize()}\n" in page
    assert page.endswith("## Failures\n\nNone.\n")


def test_each_result_is_written_before_the_next_case_begins(tmp_path, calls):
    seen = []

    def act(name):
        report = read(tmp_path)
        seen.append((name, [*report["results"]], report["attempts"], (tmp_path / run.PAGE).read_text()))
        return []

    calls.act = act
    assert run.run_report(tmp_path, REHEARSAL, 1)[0] == 0
    assert seen == [
        ("a", [], {"growth: a": 1}, "3 left"),
        ("b", ["growth: a"], {"growth: b": 1}, "2 left"),
        ("c", ["growth: a", "growth: b"], {"growth: c": 1}, "1 left"),
    ]


def test_no_case_begins_after_the_time(tmp_path, calls, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])

    def act(name):
        clock[0] += 40
        return []

    calls.act = act
    assert run.run_report(tmp_path, REHEARSAL, 1)[0] == 1
    assert calls == ["a", "b"]
    assert run.run_report(tmp_path, REHEARSAL, 1)[0] == 0
    assert calls == ["a", "b", "c"]


def test_a_failure_is_kept_and_tried_again_last(tmp_path, calls):
    def fail(name):
        if name == "a":
            raise RuntimeError("no such instruction")
        return [{"network": "b", "failure": "not enough memory"}] if name == "b" else []

    calls.act = fail
    assert run.run_report(tmp_path, REHEARSAL, 1) == (0, 2)
    assert read(tmp_path)["results"]["growth: a"]["failure"] == "RuntimeError: no such instruction"
    calls.clear()
    calls.act = lambda name: []
    run.run_report(tmp_path, REHEARSAL, 1)
    assert calls == ["a", "b"]
    assert all(result["rows"] == [] for result in read(tmp_path)["results"].values())


def test_a_case_in_which_the_process_ended_twice_is_given_up(tmp_path, calls):
    class EndedError(BaseException):
        pass

    def end(name):
        if name == "b":
            raise EndedError
        return []

    calls.act = end
    for _ in range(2):
        with pytest.raises(EndedError):
            run.run_report(tmp_path, REHEARSAL, 1)
    assert run.run_report(tmp_path, REHEARSAL, 1)[0] == 0
    assert calls == ["a", "b", "b", "c"]
    assert read(tmp_path)["results"]["growth: b"] == {"failure": "the process ended during it"}


def test_an_interrupted_case_is_no_failure_however_often(tmp_path, calls):
    def interrupt(name):
        raise KeyboardInterrupt

    calls.act = interrupt
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run.run_report(tmp_path, REHEARSAL, 1)
    assert calls == ["a", "a", "a"]
    assert read(tmp_path)["results"] == {} and read(tmp_path)["attempts"] == {"growth: a": 0}


def test_a_card_that_answers_no_more_ends_the_run_and_the_case_is_tried_again(tmp_path, calls):
    def lose(name):
        raise CardLostError("an illegal memory access")

    calls.act = lose
    with pytest.raises(UserError, match=r"growth: a: the GPU does not answer any more .an illegal memory"):
        run.run_report(tmp_path, REHEARSAL, 1)
    assert read(tmp_path)["results"] == {} and read(tmp_path)["attempts"] == {"growth: a": 1}


def test_a_report_of_another_plan_or_of_other_text_is_refused(tmp_path, calls):
    run.run_report(tmp_path, REHEARSAL, 1)
    with pytest.raises(UserError, match="is of another machine, version or plan: name another folder"):
        run.run_report(tmp_path, REHEARSAL._replace(batch=2), 1)
    (tmp_path / run.FILE).write_text("{")
    with pytest.raises(UserError, match="is no report that could be gone on with"):
        run.run_report(tmp_path, REHEARSAL, 1)


def test_what_is_wrong_is_not_measured_further():
    wrong = {"rows": [{"passed": False}]}
    results = {
        "correctness: ESC:kernels fp16": wrong,
        "correctness: ESC:graphs fp16": {"failure": "no compiler"},
        "correctness: ESC fp16": {"rows": [{"passed": True}]},
    }
    names = ("", "kernels", "graphs", "release")
    assert cases._sound(names, "ESC", "fp16", results) == ["ESC", "ESC:release"]
    assert cases._sound(names, "ESC", "fp32", results) == ["ESC", "ESC:kernels", "ESC:graphs", "ESC:release"]
    gradients = {"correctness: ESC:gradients by kernels fp32": wrong}
    assert cases._sound(("", "kernels"), "ESC", "fp32", gradients, trains=True) == ["ESC"]


def test_kernels_that_fail_are_not_taken_for_what_took_over(monkeypatch):
    def fall_back():
        gpu._failures.append(RuntimeError("no Triton"))

    def run_out():
        raise torch.OutOfMemoryError

    working, failed = cases._working({"a": fall_back, "b": lambda: None, "c": run_out})
    assert working == ["b"]
    assert failed == {"a": "RuntimeError: no Triton", "c": "not enough memory"}
    assert not gpu._failures


def test_the_plan_for_a_gpu_has_every_network_and_precision():
    names = [case.key for case in list_cases(ON_GPU)]
    assert len(names) == len({*names})
    of_parts = {part: [name for name in names if name.startswith(f"{part}: ")] for part in PARTS}
    assert len(of_parts["inference"]) == 27 and of_parts["inference"][0] == "inference: ESC ×4 fp32"
    assert len(of_parts["correctness"]) == 9 * 7 and len(of_parts["window attention"]) == 12
    check = names.index("correctness: ESC:compiled fp16")
    assert names.index("growth: ESC 7680×4320 fp32") < check < names.index("compiled: ESC ×4 fp16")
    assert "growth: ESC 7680×4320 fp32" in names and "training: ESC-FP bf16" in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "this machine has no GPU that PyTorch can use. --rehearse"),
        (("--minutes", "0"), "above 0, got 0"),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-report", "-o", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_machine_without_basicsr_suffices(tmp_path):
    code = (
        "import sys\n"
        "absent = 'basicsr mmengine addict lmdb imagecodecs spandrel matplotlib PIL cv2 safetensors'\n"
        "for name in absent.split():\n"
        "    sys.modules[name] = None\n"
        "from esc_basicsr.__main__ import main\n"
        f"sys.exit(main(['gpu-report', '-o', {str(tmp_path)!r}, '--rehearse', '--minutes', '1e-9']))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / run.PAGE).is_file()
