"""Feed hostile option files, checkpoints, training states, LMDBs and images to this package, and count.

Each try is some input, mutated or made up, in a folder of its own, that goes through a real entry of the
package, in a child process with a time limit and a memory limit. It ends in one of three ways:

* handled: it worked, or had worked until it was asked to stop;
* refused: UserError, or exit code 2 (3 of the LMDB builder, which lists what it left out), with a message
  that names the file or the key, is of some length, and holds nothing that steers a terminal;
* failed: a traceback, a crash, a hang, too much memory, code run, a file written anywhere but where the run's
  results go, or a message of no use.

  python tests/stress/fuzz.py --seconds 360 -o docs

writes docs/fuzz.json and prints it as a table; failing inputs are kept in docs/fuzz_failures/KIND-NUMBER.
``--only KIND:NUMBER --seed S`` repeats one try and shows what it says.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lmdb
import mmengine
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from stress.fuzz_kinds import KINDS, Kind, Place

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.tables import markdown_table
from esc_basicsr.common.version import __version__
from esc_basicsr.data import lmdb_walk

MEMORY = 3 * 2**30  # bytes of address space that a try may add
PATIENCE = 5.0  # seconds that a process which was asked to stop may take
LONGEST_MESSAGE = 20_000  # characters
OUTCOMES = ("handled", "refused", "failed")

_STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# but where a message says so, of a network that would take it, or of addresses that an LMDB's head asks for
_TOLD = re.compile(r"\.yml: out of memory|the LMDB \S+ cannot be opened")
_OUT_OF_MEMORY = re.compile(r"MemoryError|[Cc]an.?t allocate memory|Cannot allocate memory|bad_alloc")
_ADVICE = re.compile(r"weights_only=False|add_safe_globals")  # torch's, to run what is in a file
_WRITES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
}
_PROGRAMS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
_HARMLESS = ("/dev/null", "/dev/shm/", "/proc/self/")


class Result(NamedTuple):
    """How a try ended."""

    outcome: str
    why: str


def main() -> int:
    """Try until there is an end to it. 0 if nothing failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--seconds", type=float)
    end.add_argument("--tries", type=int)
    end.add_argument("--only", metavar="KIND:NUMBER")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for fuzz.json")
    args = parser.parse_args()
    failures = args.output / "fuzz_failures"
    if args.only:
        name, _, number = args.only.partition(":")
        with fuzzer(args.seed, failures) as fuzz:
            ((_, result),) = fuzz.tries(name, int(number), 1)
            print(fuzz.log.read_text(errors="replace"), result, sep="\n")
        return int(result.outcome == "failed")
    counts = run(args.kinds, args.seed, failures, args.seconds, args.tries)
    result = report(counts, args.seed)
    mmengine.dump(result, args.output / "fuzz.json", indent=1)
    print(table(result))
    return int(any(count["failed"] for count in counts.values()))


def run(
    kinds: Sequence[str], seed: int, failures: Path, seconds: float | None = None, tries: int | None = None
) -> dict[str, Counter[str]]:
    """Try all kinds in turn, for so many seconds or tries in all; count each kind's outcomes."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    shares = {kind: KINDS[kind].share for kind in kinds}
    if tries is not None:
        parts = tries / sum(shares.values())
        shares = {kind: min(share, math.ceil(share * parts)) for kind, share in shares.items()}
    start = time.monotonic()
    done = 0
    with fuzzer(seed, failures) as fuzz, tqdm(total=tries, unit="try", disable=None) as bar:
        for kind in itertools.cycle(kinds):
            wanted = shares[kind] if tries is None else min(shares[kind], tries - done)
            if wanted == 0 or (seconds is not None and time.monotonic() - start >= seconds):
                return counts
            for number, result in fuzz.tries(kind, counts[kind].total(), wanted):
                counts[kind][result.outcome] += 1
                done += 1
                bar.update()
                if result.outcome == "failed":
                    tqdm.write(f"{kind}:{number}: {result.why}")
    raise AssertionError("kinds are tried again and again")


def report(counts: dict[str, Counter[str]], seed: int) -> dict[str, Any]:
    """What is committed."""
    return {
        "esc_basicsr": __version__,
        "python": platform.python_version(),
        "pytorch": torch.__version__,
        "lmdb": lmdb.__version__,
        "seed": seed,
        "kinds": {
            kind: {
                "what": KINDS[kind].what,
                "tried": count.total(),
                **{outcome: count[outcome] for outcome in OUTCOMES},
            }
            for kind, count in counts.items()
        },
        "total": {
            "tried": sum(count.total() for count in counts.values()),
            **{outcome: sum(count[outcome] for count in counts.values()) for outcome in OUTCOMES},
        },
    }


def table(result: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    columns = ("tried", *OUTCOMES)
    rows = [[kind["what"], *(f"{kind[column]:,}" for column in columns)] for kind in result["kinds"].values()]
    rows.append(["**all**", *(f"{result['total'][column]:,}" for column in columns)])
    return markdown_table(["input", *columns], rows)


@contextlib.contextmanager
def fuzzer(seed: int, failures: Path) -> Iterator["Fuzzer"]:
    """A fuzzer, in a temporary folder."""
    with tempfile.TemporaryDirectory() as root:
        yield Fuzzer(Path(root), seed, failures)


class Fuzzer:
    """Runs tries within ``root``, as deep there as paths that lead upwards may go."""

    def __init__(self, root: Path, seed: int, failures: Path) -> None:
        self._root = root
        self._work = root / "a" / "b" / "c" / "work"
        self._temporary = root / "tmp"
        self.log = root / "log"
        self._seed = seed
        self._failures = failures
        self._samples: dict[str, Any] = {}
        self.place = Place(self._work, root / "data", root / "outside")
        for folder in (self._work, self._temporary, self.place.data, self.place.outside, root / "home"):
            folder.mkdir(parents=True)
        (self.place.outside / "canary").write_text("sings")
        os.environ |= {"HOME": str(root / "home"), "TMPDIR": str(self._temporary), "CUDA_VISIBLE_DEVICES": ""}
        tempfile.tempdir = None

    def tries(self, name: str, first: int, count: int) -> Iterator[tuple[int, Result]]:
        """Tries of one kind, in children; each of them does the kind's ``group``, if nothing fails."""
        kind = KINDS[name]
        if name not in self._samples:
            os.chdir(self.place.data)
            with contextlib.redirect_stdout(io.StringIO()):
                self._samples[name] = kind.prepare(self.place)
            gc.collect()
            gc.freeze()
        number, end = first, first + count
        while number < end:
            before = self._snapshot(self._root, self._work)
            for result in self._child(name, kind, number, min(kind.group, end - number)):
                if result.outcome == "failed":
                    self._keep(f"{name}-{number}", result.why)
                yield number, result
                number += 1
            stray = self._snapshot(self._root, self._work) ^ before
            if stray:
                why = f"among the tries before: written outside: {sorted(path for path, *_ in stray)[:4]}"
                self._keep(f"{name}-{number - 1}", why)
                yield number, Result("failed", why)
                self._clear(self._temporary)

    def _child(self, name: str, kind: Kind, first: int, count: int) -> Iterator[Result]:
        """Results of a process; the last one failed if there are fewer than ``count``."""
        self._clear(self._work)
        self.log.write_bytes(b"")
        incoming, outgoing = os.pipe()
        process = os.fork()
        if not process:
            os.close(incoming)
            self._live(name, kind, range(first, first + count), outgoing)
        os.close(outgoing)
        descriptor = os.pidfd_open(process)
        lines = _Lines(incoming)
        try:
            for _ in range(count):
                line = lines.read(kind.seconds)
                if line is None and "Start training" in self.log.read_text(errors="replace"):
                    os.kill(process, signal.SIGTERM)
                    line = lines.read(PATIENCE)
                if line is None:
                    ended, _, _ = select.select([descriptor], [], [], 0)
                    if not ended and not lines.at_end:
                        yield Result("failed", f"hung for more than {kind.seconds:g} s")
                        return
                    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                    process = 0
                    how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
                    yield Result("failed", f"crashed: {how}")
                    return
                result = Result(*json.loads(line))
                yield result
                if result.outcome == "failed":
                    return
        finally:
            os.close(incoming)
            os.close(descriptor)
            if process:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)

    def _live(self, name: str, kind: Kind, numbers: Sequence[int], outgoing: int) -> NoReturn:
        """Be the child: do tries, say how each ended."""
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDONLY)
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        os.dup2(quiet, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY,) * 2)
        witness = Witness((self._work, self._temporary))
        sys.addaudithook(witness)
        for number in numbers:
            self._clear(self._work)
            witness.seen.clear()
            os.chdir(self._work)
            os.ftruncate(log, 0)
            result = self._try(
                kind, random.Random(f"{self._seed}/{name}/{number}"), self._samples[name], witness
            )
            os.write(outgoing, json.dumps(result).encode() + b"\n")
            if result.outcome == "failed":
                break
        os._exit(0)

    def _try(self, kind: Kind, chance: random.Random, samples: Any, witness: "Witness") -> Result:
        attempt, names = kind.make(samples, chance)
        before = self._snapshot(self._work)
        peak = _status("VmPeak")
        code: Any = 0
        said = because = ""
        witness.is_watching = True
        try:
            code = attempt()
        except UserError as error:
            code, said = 2, str(error)
            because = "".join(traceback.format_exception(error))
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
            witness.is_watching = False
            sys.stderr.flush()
            return Result("failed", "traceback: " + traceback.format_exc().strip().splitlines()[-1][:300])
        witness.is_watching = False
        sys.stdout.flush()
        sys.stderr.flush()
        log = self.log.read_text(errors="replace")
        stray = [
            path for path, *_ in self._snapshot(self._work) ^ before if not _is_expected(path, self._work)
        ]
        if witness.seen or stray:
            return Result("failed", f"written or run outside: {[*witness.seen, *stray][:4]}")
        is_told = _TOLD.search(log + said)
        if not is_told and (_OUT_OF_MEMORY.search(log + because) or _status("VmPeak") - peak > MEMORY):
            return Result("failed", f"took too much memory: {(because or log)[-300:]}")
        if code == 128 + signal.SIGTERM:
            return Result("handled", "stopped")
        if code not in (0, None, 2, 3):
            return Result("failed", f"exit code {code}: {log[-300:]}")
        if code in (2, 3):
            said = said or re.split("^error: ", log, flags=re.MULTILINE)[-1]
            fault = complaint(said, names) if code == 2 else None
            return Result("failed", f"{fault}: {said[:300]!r}") if fault else Result("refused", said)
        return Result("handled", "")

    def _snapshot(self, folder: Path, but: Path | None = None) -> set[tuple[str, int, int, int]]:
        """All there is below a folder, with what would tell that it was changed."""
        found = set()
        folders = [str(folder)]
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.path in (str(but), str(self.log)):
                        continue
                    status = entry.stat(follow_symlinks=False)
                    is_folder = entry.is_dir(follow_symlinks=False)
                    time_changed = 0 if is_folder else status.st_mtime_ns
                    found.add((entry.path, status.st_mode, 0 if is_folder else status.st_size, time_changed))
                    if is_folder:
                        folders.append(entry.path)
        return found

    def _clear(self, folder: Path) -> None:
        for entry in [*os.scandir(folder)]:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                Path(entry.path).unlink()

    def _keep(self, name: str, why: str) -> None:
        """Keep what failed: the input, and what was said."""
        target = self._failures / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for entry in os.scandir(self._work):
            if entry.is_file(follow_symlinks=False):
                shutil.copy(entry.path, target)
            elif entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(shutil.Error, OSError):  # fifos, loops
                    shutil.copytree(entry.path, target / entry.name, symlinks=True)
        shutil.copy(self.log, target / "said.txt")
        (target / "why.txt").write_text(why + "\n", errors="backslashreplace")


class Witness:
    """An audit hook that notes programs that are run, and writing by Python outside some folders."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(f"{folder}/" for folder in folders)
        self.is_watching = False
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Hear of an event."""
        if not self.is_watching:
            return
        if event in _PROGRAMS and not self._is_our_own(arguments):
            self.seen.append(f"{event} {arguments}"[:200])
        elif event in _WRITES or (event == "open" and self._is_to_write(arguments)):
            for path in arguments[:2] if event == "os.rename" else arguments[:1]:
                if isinstance(path, str | bytes | os.PathLike):
                    full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - realpath, below, of its folder
                    full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))  # noqa: PTH118, PTH119, PTH120
                    if not full.startswith((*self._folders, *_HARMLESS)):
                        self.seen.append(f"{event} {full}"[:200])

    @staticmethod
    def _is_our_own(arguments: tuple[Any, ...]) -> bool:
        """Tell whether it is the program that reads an LMDB before this process does."""
        return [*map(str, arguments[1][:2])] == [sys.executable, lmdb_walk.__file__]

    @staticmethod
    def _is_to_write(arguments: tuple[Any, ...]) -> bool:
        flags = arguments[2] if len(arguments) > 2 else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))


class _Lines:
    """Lines from a pipe, each waited for so long."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        self.at_end = False

    def read(self, seconds: float) -> bytes | None:
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._descriptor], [], [], max(0, end - time.monotonic()))
            if not ready:
                return None
            said = os.read(self._descriptor, 1 << 16)
            if not said:
                self.at_end = True
                return None
            self._rest += said
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def complaint(said: str, names: Sequence[str]) -> str | None:
    """What is wrong with a refusal; None if a person can use it."""
    if not any(name in said for name in names):
        return f"the message names none of {', '.join(names)}"
    if len(said) > LONGEST_MESSAGE:
        return f"the message has {len(said)} characters"
    if _STEERING.search(said):
        return "the message steers a terminal"
    if _ADVICE.search(said):
        return "the message advises to run what the file holds"
    return None


def _is_expected(path: str, work: Path) -> bool:
    """Whether a run may write it: into one folder each, of one name, for experiments, logs and results."""
    parts = Path(path).relative_to(work).parts
    if parts[0] == "out":
        return True
    if parts[0] not in ("experiments", "tb_logger", "results"):
        return False
    names = {
        name.partition("_archived_")[0]
        for top in ("experiments", "tb_logger", "results")
        if (work / top).is_dir()
        for name in [entry.name for entry in os.scandir(work / top)]
    }
    return len(names) <= 1


def _status(key: str) -> int:
    """A figure of this process, in bytes."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
