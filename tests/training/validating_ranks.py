"""Run alone: validates with 1, 2 and 4 gloo processes, and leaves what each rank came to know as JSON.

The processes are forks of this one, which has imported everything and computed nothing.
"""

import copy
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import esc_basicsr  # noqa: F401 - first: it mends what stock BasicSR cannot import

# isort: split
import cv2
import numpy as np
import torch
import torch.distributed as dist
from basicsr.data import build_dataloader, build_dataset

from esc_basicsr.common import signals
from esc_basicsr.common.errors import UserError
from esc_basicsr.data.degradation import reduce_uint8
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.training.esc_model import ESCModel

SCALE = 2
WORLDS = (1, 2, 4)
MIXED = [(48, 40), (40, 64), (40, 64), (32, 32), (64, 48)]
SETS = {"mixed": MIXED, "single": [(36, 36)], "equal": [(32, 40)] * 7}
METRICS = {
    name: {"type": f"calculate_{name}", "crop_border": SCALE, "test_y_channel": True}
    for name in ("psnr", "ssim")
}
TINY = {
    **{"type": "ESC", "upscaling_factor": SCALE, "dim": 16, "pdim": 4, "kernel_size": 5, "n_blocks": 1},
    **{"conv_blocks": 1, "window_size": 4, "num_heads": 2},
}


def write_set(folder, sizes):
    """Write HR and LR PNGs: parts of a photograph, of these heights and widths."""
    photograph = load_sample_image("coffee")[:, :, ::-1]
    for kind in ("HR", "LR"):
        (folder / kind).mkdir(parents=True)
    for number, (height, width) in enumerate(sizes):
        top, left = 37 * number, 53 * number
        hr = np.ascontiguousarray(photograph[top : top + height, left : left + width])
        cv2.imwrite(str(folder / "HR" / f"{number:02}.png"), hr)
        cv2.imwrite(str(folder / "LR" / f"{number:02}.png"), reduce_uint8(hr, SCALE))
    return folder


def paired(name, folder, phase="val"):
    return {
        **{"name": name, "type": "PairedImageDataset", "phase": phase, "scale": SCALE},
        **{"dataroot_gt": f"{folder}/HR", "dataroot_lq": f"{folder}/LR", "io_backend": {"type": "disk"}},
    }


def lr_alone(name, folder):
    images = {"type": "SingleImageDataset", "dataroot_lq": f"{folder}/LR", "io_backend": {"type": "disk"}}
    return {"name": name, "phase": "val", "scale": SCALE, **images}


def options(root, datasets, is_train=True, **changes):
    """Give options as BasicSR's parse_options does; results go under ``root``."""
    kind = "experiments_root" if is_train else "results_root"
    opt = {
        **{"name": "run", "model_type": "ESCModel", "scale": SCALE, "num_gpu": 0, "is_train": is_train},
        **{"dist": False, "rank": 0, "world_size": 1, "auto_resume": False, "manual_seed": 0},
        "network_g": TINY,
        "datasets": datasets,
        "path": {kind: str(root), "log": str(root)},
        "val": {"save_img": True, "suffix": None, "metrics": METRICS},
    }
    opt["path"] |= {key: str(root / key) for key in ("visualization", "models", "training_states")}
    if is_train:
        opt["train"] = {
            "total_iter": 8,
            "optim_g": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "MultiStepLR", "milestones": [8], "gamma": 0.5},
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        }
        opt["logger"] = {"print_freq": 1, "save_checkpoint_freq": 8, "use_tb_logger": False}
    opt = copy.deepcopy(opt) | changes
    if is_train:
        opt["datasets"] = {**opt["datasets"], "train": {"name": "Train", "batch_size_per_gpu": 1}}
    return opt


def loader(dataset):
    return build_dataloader(build_dataset(dataset), dataset)


def validate(model, data, iteration=8):
    """Validate on a set; gives the error's text if there is one."""
    try:
        model.validation(data, iteration, None, model.opt["val"]["save_img"])
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def count_images(model):
    """Record the batches that the network is given from here on, as numbers of images."""
    batches, stock = [], model.test

    def test():
        batches.append(len(model.lq))
        stock()

    model.test = test
    return batches


def run_rank(work, rank, world):
    torch.set_num_threads(1)
    root = work / f"{world}"
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{work}/store{world}",
            **{"rank": rank, "world_size": world, "timeout": timedelta(seconds=60)},
        )
        # It may wait for the other ranks, which have images of their own.
        torch.nn.parallel.DistributedDataParallel.forward = None
    place = {"dist": world > 1, "rank": rank, "world_size": world}
    sets = {f"val_{name}": paired(name, work / "data" / name) for name in SETS}
    sets["val_lr"] = lr_alone("lr", work / "data" / "mixed")
    torch.manual_seed(rank)  # as BasicSR's seeds, which differ
    model = ESCModel(options(root, sets, **place))
    if world == 1:
        torch.save(model.net_g.state_dict(), work / "weights.pth")
    else:  # 1 has come and gone
        model.get_bare_model(model.net_g).load_state_dict(torch.load(work / "weights.pth", weights_only=True))
    known = {}

    batches = count_images(model)
    problems = [validate(model, loader(dataset)) for dataset in sets.values()]
    known |= {
        "problems": problems,
        "batches": batches[:],
        "history": model.shared_validation.records.history[:],
    }
    known["best"] = copy.deepcopy(model.shared_validation.records.best)

    model.opt["val"]["batch_size"] = 2
    batches.clear()
    known["problems"] += [validate(model, loader(sets[f"val_{name}"]), 4) for name in ("equal", "mixed")]
    known |= {"batches of 2": batches[:], "history of 2": model.shared_validation.records.history[-2:]}
    model.opt["val"]["batch_size"] = 1
    before = model.shared_validation.records.state()

    calls = []
    if rank == min(1, world - 1):
        signals.requested = lambda: calls.append(1) or (signal.SIGTERM if len(calls) > 1 else None)
    known["stopped"] = not model.shared_validation.run(
        model.upscale_batch, loader(sets["val_equal"]), 5, None, True
    )
    signals.requested = lambda: None

    known["unreadable"] = validate(model, loader(paired("broken", work / "data" / "broken")), 5)
    if world > 1:
        others = loader(sets["val_mixed"])
        if rank == 1:
            others.dataset.paths.pop()
        known["other files"] = validate(model, others, 5)
        stock = model.test
        if rank == world - 1:
            model.test = lambda: (_ for _ in ()).throw(RuntimeError("no memory"))
        known["failing"] = validate(model, loader(sets["val_mixed"]), 5)
        model.test = stock
    known["nothing recorded"] = model.shared_validation.records.state() == before
    # The ranks are still in step.
    data = loader(sets["val_mixed"])
    data.dataset.paths.sort(key=lambda paths: hash((rank, paths["lq_path"])))  # each has its own order
    known["problems"].append(validate(model, data, 6))
    known["last"] = model.shared_validation.records.history[-1]

    tests = {f"test_{name}": paired(name, work / "data" / name, "test") for name in ("mixed", "single")}
    network = {"type": "Bicubic", "upscaling_factor": SCALE}
    tester = ESCModel(options(root / "test", tests, is_train=False, network_g=network, **place))
    known["problems"] += [validate(tester, loader(dataset), "run") for dataset in tests.values()]
    (work / f"{world}_{rank}.json").write_text(json.dumps(known))


def main():
    work = Path(sys.argv[1])
    for name, sizes in SETS.items():
        write_set(work / "data" / name, sizes)
    broken = write_set(work / "data" / "broken", MIXED) / "LR" / "03.png"
    broken.write_bytes(broken.read_bytes()[:20])
    for world in WORLDS:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run_rank(work, rank, world)
                    code = 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"{world} processes: one failed")


if __name__ == "__main__":
    main()
