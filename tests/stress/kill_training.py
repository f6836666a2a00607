"""Kill a small real training at random instants, resume it, and compare its end with one left in peace.

The training is the demonstration's, on real photographs, made shorter. It is started with --auto_resume again
and again, in processes that are killed (most by SIGKILL, some by SIGTERM) at a random instant after their
start; now and then the newest state is damaged, too. With --ranks 2 torchrun starts two ranks, and any of its
processes is killed: the agent, a rank, a data worker. After each kill all processes of the training must end
within 15 seconds; those that do not are counted, and ended. Once the training has ended, everything it left
is compared bit for bit: weights, EMA, optimizer, schedule, random numbers, metrics, best records.

  python tests/stress/kill_training.py --kills 100 -o docs
"""

import argparse
import contextlib
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mmengine
import psutil
import torch
import yaml
from tqdm import tqdm

from esc_basicsr.commands.demo import NAME, prepare_data, write_option_files

DAMAGED = 0.1  # share of kills after which the newest state is damaged
TERMINATED = 0.2  # share of kills by SIGTERM
EARLY = 0.15  # share of kills within the first seconds of a process
STARTING = 8.0  # such seconds: importing, resuming, catching up on a validation
GONE = 15.0  # seconds after a kill in which all processes must end


def prepare(folder: Path, iterations: int) -> None:
    """Write data and options: the demonstration's, smaller, with checkpoints and validations often."""
    (folder / "datasets").mkdir()
    prepare_data(folder / "datasets")
    file, _ = write_option_files(folder, iterations)
    options = mmengine.Config(yaml.safe_load(file.read_text()))
    options.merge_from_dict(
        {
            "num_gpu": 0,
            "network_g": {"dim": 16, "pdim": 4, "n_blocks": 1, "conv_blocks": 1, "kernel_size": 5},
            "datasets.train.gt_size": 32,
            "datasets.train.global_batch_size": 4,
            "datasets.train.batch_size_per_gpu": 2,
            "datasets.train.num_worker_per_gpu": 2,
            "datasets.train.dataset_enlarge_ratio": 1,
            "logger.save_checkpoint_freq": 4,
            "logger.keep_checkpoints": 5,
            "logger.print_freq": 1,
            "val.val_freq": 100,
        }
    )
    file.write_text(yaml.safe_dump(options.to_dict(), sort_keys=False))


def start(folder: Path, log: Path, ranks: int) -> "subprocess.Popen[bytes]":
    """Start training, or go on."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    launcher = ["--launcher", "pytorch"] if ranks > 1 else []
    module = [*(torchrun if ranks > 1 else []), "esc_basicsr.train"]
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *module, "-opt", "train.yml", "--auto_resume", *launcher],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "KILL_TEST": str(folder)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def processes(folder: Path) -> dict[int, str]:
    """Give the kinds of `start` and its descendants; told by the environment that they inherit."""
    found = {
        process.pid: (process.info["ppid"], " ".join(process.info["cmdline"] or ()))
        for process in psutil.process_iter(["ppid", "cmdline", "environ"])
        if (process.info["environ"] or {}).get("KILL_TEST") == str(folder)
    }
    kinds = {}
    for pid, (parent, command) in found.items():
        if "torch.distributed.run" in command:
            kinds[pid] = "agent"
        elif "forkserver" in command:
            kinds[pid] = "worker"  # or the server that forks them
        elif "esc_basicsr.train" in command:
            is_forked = "esc_basicsr.train" in found.get(parent, (0, ""))[1]
            kinds[pid] = "worker" if is_forked and kinds.get(parent) != "agent" else "rank"
        elif command:
            kinds[pid] = "helper"
    return kinds


def wait_until_gone(folder: Path) -> dict[int, str]:
    """Wait for all processes to end; give those that have not."""
    deadline = time.monotonic() + GONE
    while (left := processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def what_is_left(folder: Path, iterations: int) -> dict[str, Any]:
    """All that a training leaves to go on from, and to be used."""
    experiment = folder / "experiments" / NAME
    state = torch.load(experiment / "training_states" / f"{iterations}.state", weights_only=True)
    assert state.pop("sha256").keys() == {f"net_g_{iterations}.pth"}  # the digests may differ
    return {
        **state,
        "weights": torch.load(experiment / "models" / "net_g_latest.pth", weights_only=True),
        "history": (experiment / "metrics" / "history.csv").read_text(),
    }


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two such things differ in any bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict | list | tuple) and len(one) == len(other):
        keys = one if isinstance(one, dict) else range(len(one))
        return [found for key in keys for found in differing(one[key], other[key], f"{path}/{key}")]
    return [] if one == other else [path]


def damage_newest(folder: Path, chance: random.Random) -> str | None:
    """Truncate the newest state or its weights, or change a bit; not the last ones that are sound."""
    states = sorted(
        (folder / "experiments" / NAME / "training_states").glob("*.state"), key=lambda file: int(file.stem)
    )
    if len(states) < 3:
        return None
    newest = states[-1]
    file = chance.choice([newest, newest.parents[1] / "models" / f"net_g_{newest.stem}.pth"])
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    if chance.random() < 0.5:
        file.write_bytes(content[:place])
        return "truncated"
    # within a record: a bit of the archive's padding changes nothing
    start = content.find(b"PK\x01\x02")
    content[place % start] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return "a bit changed"


def torment(
    folder: Path, ranks: int, kills: int, longest: float, chance: random.Random, bar: "tqdm[Any]"
) -> Counter[str]:
    """Start and kill until training has ended or was killed ``kills`` times, then let it end."""
    counts: Counter[str] = Counter()
    log = folder / "log.txt"
    while counts["killed"] < kills:
        started = time.time()
        process = start(folder, log, ranks)
        size = log.stat().st_size
        if is_early := chance.random() < EARLY:
            time.sleep(chance.uniform(0, STARTING))
        else:
            # from when it goes on with training, after seconds of importing
            while process.poll() is None and b"Start training" not in log.read_bytes()[size:]:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, longest))
        number = signal.SIGTERM if chance.random() < TERMINATED else signal.SIGKILL
        victim, name = process.pid, "agent" if ranks > 1 else "rank"
        if number == signal.SIGKILL:  # SIGTERM comes from whoever started it, to that process
            running = processes(folder) or {victim: name}
            name = chance.choice(sorted({*running.values()}))  # there are more workers than agents
            victim = chance.choice([pid for pid, kind in running.items() if kind == name])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, number)
        code = process.wait()
        left = wait_until_gone(folder)
        for pid, kind in left.items():
            counts[f"left behind: {kind}"] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if code == 0:
            return counts
        if ranks == 1 and name == "rank":
            # SIGTERM before training has begun ends a process as it does any other
            ends = (-signal.SIGKILL, 128 + signal.SIGTERM, *([-signal.SIGTERM] if is_early else []))
            assert code in ends, log.read_text()[-5000:]
        counts[f"{number.name} of {name}"] += 1
        counts["before it went on"] += is_early
        counts["killed"] += 1
        counts[number.name] += 1
        experiment = folder / "experiments" / NAME
        partial = [file for file in experiment.glob("*/*.partial") if file.stat().st_mtime > started]
        counts["while saving"] += number == signal.SIGKILL and bool(partial)
        if chance.random() < DAMAGED and (damage := damage_newest(folder, chance)):
            counts[damage] += 1
        bar.update()
    code = start(folder, log, ranks).wait()
    assert code == 0, log.read_text()[-5000:]
    return counts


def main() -> int:
    """Run rounds until there were enough kills; 0 if all ended as the one in peace, leaving nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=400, help="of the training; by default %(default)s")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for kill_training.json")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    rounds = []
    with tempfile.TemporaryDirectory() as work:
        peaceful = Path(work, "peaceful")
        peaceful.mkdir()
        prepare(peaceful, args.iterations)
        print("The run that is left in peace ...", flush=True)
        assert start(peaceful, peaceful / "log.txt", args.ranks).wait() == 0, (
            peaceful / "log.txt"
        ).read_text()
        expected = what_is_left(peaceful, args.iterations)
        log = (peaceful / "log.txt").read_text()
        taken = [float(text) for text in re.findall(r"time \(data\): (\S+)", log)]
        # half of it is the mean life: enough kills fall into a round
        longest = max(0.3, 2 * args.iterations * sum(taken) / len(taken) / args.kills)
        bar = tqdm(total=args.kills, desc="kills")
        while (done := sum(counts["killed"] for counts, _ in rounds)) < args.kills:
            folder = Path(work, f"round{len(rounds)}")
            folder.mkdir()
            prepare(folder, args.iterations)
            counts = torment(folder, args.ranks, args.kills - done, longest, chance, bar)
            rounds.append((counts, differing(expected, what_is_left(folder, args.iterations))))
        bar.close()
    total = sum((counts for counts, _ in rounds), Counter())
    differences = [path for _, paths in rounds for path in paths]
    left_behind = sum(count for name, count in total.items() if name.startswith("left behind"))
    result = {
        "pytorch": torch.__version__,
        "python": platform.python_version(),
        "iterations": args.iterations,
        "ranks": args.ranks,
        "seed": args.seed,
        "rounds": len(rounds),
        "counts": dict(sorted(total.items())),
        "left_behind": left_behind,
        "differences": differences,
    }
    mmengine.dump(result, args.output / "kill_training.json", indent=1)
    print(mmengine.dump(result, file_format="json", indent=1))
    return 1 if differences or left_behind else 0


if __name__ == "__main__":
    sys.exit(main())
