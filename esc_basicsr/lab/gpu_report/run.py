"""Going through the cases of a report in the time there is, and again where it was left."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from esc_basicsr.common.errors import UserError
from esc_basicsr.fast.gpu import take_failures
from esc_basicsr.lab.gpu_report.cases import CardLostError, Case, Plan, check_card, free_memory, list_cases
from esc_basicsr.lab.gpu_report.page import write_page
from esc_basicsr.lab.measure.results import describe_machine
from esc_basicsr.lab.networks.by_name import described
from esc_basicsr.metrics.result_files import write_text

FILE, PAGE = "gpu-report.json", "gpu-report.md"
_MOST_ATTEMPTS = 2  # at a case during which the process ended


def run_report(folder: Path, plan: Plan, minutes: float) -> tuple[int, int]:
    """Measure what a folder's report lacks; write it, and the page, after each case.

    Args:
        folder: Exists already.
        plan: What is measured.
        minutes: No case begins later.

    Returns:
        How many cases are left, and how many failed, in part too, or found something wrong.

    Raises:
        UserError: The folder has the report of another machine or plan; or the GPU does not answer any more.
    """
    deadline = time.monotonic() + 60 * minutes
    cases = list(list_cases(plan))
    report = _read(folder / FILE, plan)
    results, attempts = report["results"], report["attempts"]
    # what failed is tried again, last: it may have been mended
    left = [case for case in cases if not _is_whole(results.get(case.key))]
    left.sort(key=lambda case: case.key in results)
    _write(folder, report, plan)
    for case in tqdm(left, unit="case"):
        if time.monotonic() >= deadline:
            break
        if attempts.get(case.key, 0) >= _MOST_ATTEMPTS:
            results[case.key] = {"failure": "the process ended during it"}
            attempts.pop(case.key)
        else:
            attempts[case.key] = attempts.get(case.key, 0) + 1
            _write(folder, report, plan)
            try:
                results[case.key] = _run(case, results)
            except KeyboardInterrupt:  # the case has no part in it
                attempts[case.key] -= 1
                _write(folder, report, plan)
                raise
            attempts.pop(case.key)
        _write(folder, report, plan)
    failed = sum(not _is_whole(result) or _is_wrong(result) for result in results.values())
    return sum(case.key not in results for case in cases), failed


def _run(case: Case, results: dict[str, Any]) -> dict[str, Any]:
    torch._dynamo.reset()  # so that no limit of recompilations turns a compiled baseline into an eager one
    take_failures()  # of an earlier case
    begin = time.monotonic()
    found: dict[str, Any]
    try:
        found = {"rows": case.run(results)}
        check_card()
    except CardLostError as error:
        raise UserError(
            f"{case.key}: the GPU does not answer any more ({error}). The same command goes on from here."
        ) from error
    except Exception as error:  # one of many cases
        check_card()
        found = {"failure": described(error)}
    free_memory()
    return {**found, "seconds": time.monotonic() - begin}


def _is_whole(result: dict[str, Any] | None) -> bool:
    return result is not None and not any("failure" in part for part in (result, *result.get("rows", ())))


def _is_wrong(result: dict[str, Any]) -> bool:
    return not all(row.get("passed", True) for row in result.get("rows", ()))


def _read(path: Path, plan: Plan) -> dict[str, Any]:
    """Read a report that was begun, or begin one."""
    machine = describe_machine(torch.device(plan.device))
    # as JSON has it
    settings = json.loads(json.dumps({"machine": machine, "plan": plan._asdict()}))
    if not path.is_file():
        return {"settings": settings, "results": {}, "attempts": {}}
    try:
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
        known = report["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no report that could be gone on with ({described(error)}).") from error
    if known != settings:
        raise UserError(f"{path} is of another machine, version or plan: name another folder.")
    return report


def _write(folder: Path, report: dict[str, Any], plan: Plan) -> None:
    write_text(folder / FILE, json.dumps(report, indent=1))
    left = [case.key for case in list_cases(plan) if case.key not in report["results"]]
    write_text(folder / PAGE, write_page(report, left))
