"""Run alone: shows each thing that stock BasicSR breaks, before and after the patches, as JSON.

Every symptom is a function that raises on an unpatched BasicSR. It runs in a process of its own because
importing esc_basicsr patches BasicSR for good.
"""

import contextlib
import importlib
import json
import logging
import os
import pickle
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

PACKAGE = Path(__file__).parents[2] / "esc_basicsr"


def functional_tensor_issue_533():
    importlib.import_module("basicsr")


def _join(launcher, **environ):
    os.environ.update(environ)
    try:
        importlib.import_module("basicsr.utils.dist_util").init_dist(launcher)
        assert (dist.get_backend(), dist.get_world_size()) == ("gloo", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.multiprocessing.set_start_method(None, force=True)
        for name in (*environ, "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


def launcher_pytorch_without_a_gpu():
    _join("pytorch", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["FREE_PORT"])


def launcher_slurm_without_a_gpu():
    _join(
        "slurm",
        SLURM_PROCID="0",
        SLURM_NTASKS="1",
        SLURM_NODELIST="localhost",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=os.environ["FREE_PORT"],
    )


def ddp_on_a_cpu():
    from basicsr.models.base_model import BaseModel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = BaseModel({"num_gpu": 0, "dist": True, "is_train": True})
        wrapped = model.model_to_device(torch.nn.Linear(2, 2))
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    finally:
        dist.destroy_process_group()


def _parse(text, *flags):
    file = Path("options.yml")
    file.write_text(text)
    # What is checked in an option file is another matter, and has its own tests.
    importlib.import_module("esc_basicsr.basicsr_host.parse").check_options = lambda *args: None
    sys.argv = ["train.py", "-opt", str(file), *flags]
    return importlib.import_module("basicsr.utils.options").parse_options(str(Path.cwd()), is_train=False)[0]


PLAIN = "name: plain\nnum_gpu: 0\nmanual_seed: 0\ndatasets: {}\npath: {}\nnote: ~\n"


def local_rank_issue_626():
    _parse(PLAIN, "--local-rank=0")


def option_file_runs_code():
    marker = Path("option_file_ran")
    with contextlib.suppress(SystemExit):
        _parse(f"{PLAIN}x: !!python/object/apply:os.mkdir [{marker}]\n")
    assert not marker.exists()


def force_yml_runs_code():
    marker = Path("force_yml_ran")
    with contextlib.suppress(SystemExit):
        _parse(PLAIN, "--force_yml", f"note=[__import__('os').mkdir('{marker}')]")
    assert not marker.exists()


def _state(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {"epoch": 0, "iter": 8, "optimizers": [], "schedulers": [{"milestones": Counter([1])}]}
    torch.save(state, folder / "8.state")
    path = {"models": "models", "training_states": str(folder), "resume_state": None}
    return {"name": "run", "root_path": "root", "auto_resume": False, "path": path}


def resume_on_a_cpu():
    opt = _state("root/experiments/run/training_states")
    opt["path"]["resume_state"] = "root/experiments/run/training_states/8.state"
    assert importlib.import_module("basicsr.train").load_resume_state(opt)["iter"] == 8


def auto_resume_under_the_root_path():
    opt = _state("root/experiments/run/training_states")
    opt["auto_resume"] = True
    assert importlib.import_module("basicsr.train").load_resume_state(opt)["iter"] == 8


def option_file_that_lies_in_its_experiment():
    Path("train.yml").write_text(PLAIN)
    importlib.import_module("basicsr.train").copy_opt_file("train.yml", ".")


def resumed_run_has_its_place_in_the_data():
    from basicsr.utils.registry import DATASET_REGISTRY

    class Numbers:
        def __init__(self, opt):
            self.opt = opt

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"number": index}

    if "Numbers" not in DATASET_REGISTRY:
        DATASET_REGISTRY.register(Numbers)
    section = {"phase": "train", "name": "numbers", "type": "Numbers", "max_unreadable": 10}
    opt = {
        "datasets": {"train": {**section, "batch_size_per_gpu": 1, "num_worker_per_gpu": 0}},
        **{"num_gpu": 0, "dist": False, "rank": 0, "world_size": 1, "manual_seed": 0},
        "train": {"total_iter": 6},
    }

    def epoch(**resumed):
        logger = logging.getLogger("basicsr")
        create = importlib.import_module("basicsr.train").create_train_val_dataloader
        loader, sampler, *_ = create({**opt, **resumed}, logger)
        sampler.set_epoch(3)
        return list(loader)

    batches = epoch()
    rest = epoch(resume={**batches[1].get("position", {}), "epoch": 3, "iter": 20})
    assert [batch["number"] for batch in rest] == [batch["number"] for batch in batches[2:]]


class _Killed:
    """Ends the process that pickles it, as SIGKILL does."""

    def __reduce__(self):
        os._exit(9)


def checkpoint_of_a_process_killed_while_saving():
    from basicsr.models.base_model import BaseModel

    opt = {
        "num_gpu": 0,
        "is_train": True,
        "dist": False,
        "train": {},
        "datasets": {"train": {}},
        "logger": {},
    }
    model = BaseModel({**opt, "path": {"models": ".", "training_states": "."}})
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    model.optimizers = [optimizer]
    save_all = lambda: model.save_training_state(0, 8), lambda: model.save_network(net, "net_g", 8)
    for save in save_all:
        save()
    optimizer.param_groups[0]["betas"] = _Killed()
    net.state_dict = lambda: {"weight": net.weight, "killed": types.SimpleNamespace(cpu=_Killed)}
    for save in save_all:
        child = os.fork()
        if child == 0:
            save()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert torch.load("8.state", weights_only=True)["iter"] == 8
    assert list(torch.load("net_g_8.pth", weights_only=True)["params"]) == ["weight", "bias"]


def tensorboard_of_a_resumed_run():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    init_tb_logger = importlib.import_module("basicsr.train").init_tb_logger
    for values in ({1: 1.0, 2: 2.0, 3: 3.0}, {2: 20.0, 4: float("nan")}):
        writer = init_tb_logger("tb_logger")
        for step, value in values.items():
            writer.add_scalar("losses/l_pix", value, step)
        writer.close()
        events = next(path for path in Path("tb_logger").iterdir() if not path.name[0].isdigit())
        events.rename(events.with_name(f"{min(values)}.{events.name}"))  # both were made in one second
    shown = EventAccumulator("tb_logger").Reload().Scalars("losses/l_pix")
    assert [(event.step, event.value) for event in shown] == [(1, 1.0), (2, 20.0)]


def persistent_workers_of_a_validation_set():
    from basicsr.data import build_dataloader

    build_dataloader([0], {"phase": "val", "persistent_workers": True})


def cuda_prefetcher_without_a_gpu():
    from basicsr.data.prefetch_dataloader import CUDAPrefetcher

    prefetcher = CUDAPrefetcher([1, 2], {"num_gpu": 0})
    prefetcher.reset()
    assert [prefetcher.next() for _ in range(3)] == [1, 2, None]


def cuda_prefetcher_derived_from():
    from basicsr.data.prefetch_dataloader import CUDAPrefetcher

    class Doubling(CUDAPrefetcher):
        def __init__(self, factor, loader, opt):
            super().__init__(loader, opt)
            self.factor = factor

        def next(self):
            item = super().next()
            return None if item is None else self.factor * item

    prefetcher = Doubling(2, [1, 2], opt={"num_gpu": 0})
    assert [prefetcher.next() for _ in range(3)] == [2, 4, None]
    prefetcher.reset()
    assert prefetcher.next() == 2


def _sr_model(**opt):
    from basicsr.models.sr_model import SRModel

    options = {"num_gpu": 0, "is_train": False, "dist": False, "path": {}, "name": "run", **opt}
    network = {"type": "SRVGGNetCompact", "num_feat": 4, "num_conv": 1, "upscale": 2}
    return SRModel({"network_g": network, "rank": 0, "world_size": 1, "scale": 2, **options})


def safetensors_in_a_model_of_basicsr():
    import safetensors.torch

    net = _sr_model().net_g
    weights = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    safetensors.torch.save_file(weights, "zeros.safetensors")
    loaded = _sr_model(path={"pretrain_network_g": "zeros.safetensors"}).net_g
    assert not any(value.any() for value in loaded.state_dict().values())


def adamw_in_a_model_of_basicsr():
    model = _sr_model()
    for name in ("Adam", "AdamW", "SGD"):
        optimizer = model.get_optimizer(name, [torch.zeros(1, requires_grad=True)], 0.5)
        assert (type(optimizer).__name__, optimizer.defaults["lr"]) == (name, 0.5)


def _training_model():
    scheduler = {"type": "MultiStepLR", "milestones": [9]}
    train = {"optim_g": {"type": "Adam", "lr": 0.1}, "scheduler": scheduler, "pixel_opt": {"type": "L1Loss"}}
    data = {"train": {"batch_size_per_gpu": 1}}
    more = {"path": {"training_states": "."}, "logger": {}, "val": None, "datasets": data}
    return _sr_model(is_train=True, train=train, **more)


def step_of_a_loss_that_is_no_number():
    model = _training_model()
    model.feed_data({"lq": torch.full((1, 3, 4, 4), torch.nan), "gt": torch.zeros(1, 3, 8, 8)})
    model.optimize_parameters(1)
    assert all(bool(parameter.isfinite().all()) for parameter in model.net_g.parameters())


def state_of_a_model_of_basicsr():
    model = _training_model()
    position = {"seed": 0, "samples": 4, "batch": 2, "epoch": 0, "done": 1}
    model.feed_data({"lq": torch.zeros(1, 3, 4, 4), "position": position})
    torch.manual_seed(5)
    model.save_training_state(0, 8)
    expected = torch.rand(3)
    state = torch.load("8.state", weights_only=True)
    model.resume_training(state)
    assert torch.equal(torch.rand(3), expected)
    assert state["data"] == position


def validation_without_hr_images():
    from basicsr.data import build_dataloader, build_dataset

    Path("lq").mkdir()
    importlib.import_module("cv2").imwrite("lq/0.png", torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())
    section = {"name": "set", "type": "SingleImageDataset", "dataroot_lq": "lq", "phase": "val"}
    dataset = build_dataset({**section, "io_backend": {"type": "disk"}})
    metrics = {"psnr": {"type": "calculate_psnr", "crop_border": 0}}
    model = _sr_model(
        val={"metrics": metrics, "save_img": True, "suffix": None},
        datasets={"test_1": section},
        path={"results_root": ".", "visualization": "images"},
    )
    model.validation(build_dataloader(dataset, section), "run", None, True)
    assert [file.name for file in Path("images/set").iterdir()] == ["0_run.png"]


def real_world_model_on_a_cpu():
    from basicsr.models.realesrnet_model import RealESRNetModel

    opt = {"num_gpu": 0, "is_train": False, "dist": False, "path": {}, "queue_size": 2}
    network = {"type": "SRVGGNetCompact", "num_feat": 4, "num_conv": 1, "upscale": 2}
    model = RealESRNetModel({"network_g": network, **opt})
    for _ in range(3):
        model.lq, model.gt = torch.ones(1, 3, 4, 4), torch.ones(1, 3, 8, 8)
        model._dequeue_and_enqueue()
    assert (model.lq.device.type, float(model.lq.mean())) == ("cpu", 1)


def blur_of_channels_last_images():
    from basicsr.models.realesrgan_model import filter2D

    image = torch.rand(2, 3, 8, 8)
    kernel = torch.rand(2, 5, 5)
    strided = filter2D(image.to(memory_format=torch.channels_last), kernel)
    assert torch.equal(strided, filter2D(image, kernel))


def _lmdb(name):
    import lmdb

    with lmdb.open(name, map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    return importlib.import_module("basicsr.utils").FileClient("lmdb", db_paths=[name], client_keys=["lq"])


def lmdb_pickles_after_reading():
    client = _lmdb("pickled.lmdb")
    assert client.get("key", "lq") == b"value"
    assert pickle.loads(pickle.dumps(client)).get("key", "lq") == b"value"


def two_clients_of_one_lmdb():
    clients = [
        _lmdb("twice.lmdb"),
        importlib.import_module("basicsr.utils").FileClient("lmdb", db_paths="twice.lmdb"),
    ]
    assert [clients[0].get("key", "lq"), clients[1].get("key")] == [b"value"] * 2


def _paired(*names):
    for folder in ("gt", "lq"):
        Path(folder).mkdir()
    for name in names:
        Path(name).touch()
    pair = importlib.import_module("basicsr.data.data_util").paired_paths_from_folder
    return [(Path(p["lq_path"]), Path(p["gt_path"])) for p in pair(["lq", "gt"], ["lq", "gt"], "{}")]


def pairs_of_other_suffixes():
    pairs = _paired("gt/b.png", "gt/a.png", "lq/a.jpg", "lq/b.png")
    assert pairs == [(Path("lq/a.jpg"), Path("gt/a.png")), (Path("lq/b.png"), Path("gt/b.png"))]


def stray_file_beside_images():
    assert len(_paired("gt/a.png", "lq/a.png", "gt/Thumbs.db")) == 1


SYMPTOMS = {
    launcher_pytorch_without_a_gpu: "distributed set-up on a CPU",
    launcher_slurm_without_a_gpu: "distributed set-up on a CPU",
    ddp_on_a_cpu: "DDP on a CPU",
    local_rank_issue_626: "options",
    option_file_runs_code: "options",
    force_yml_runs_code: "options",
    resume_on_a_cpu: "resume",
    auto_resume_under_the_root_path: "resume",
    option_file_that_lies_in_its_experiment: "option file's copy",
    resumed_run_has_its_place_in_the_data: "data order",
    checkpoint_of_a_process_killed_while_saving: "checkpoints and optimizers of every model",
    tensorboard_of_a_resumed_run: "TensorBoard",
    persistent_workers_of_a_validation_set: "persistent_workers",
    cuda_prefetcher_without_a_gpu: "CUDAPrefetcher",
    cuda_prefetcher_derived_from: "CUDAPrefetcher",
    safetensors_in_a_model_of_basicsr: "checkpoints and optimizers of every model",
    adamw_in_a_model_of_basicsr: "checkpoints and optimizers of every model",
    state_of_a_model_of_basicsr: "states of every model",
    step_of_a_loss_that_is_no_number: "steps of every model",
    validation_without_hr_images: "validation of every model",
    real_world_model_on_a_cpu: "degradations",
    blur_of_channels_last_images: "degradations",
    lmdb_pickles_after_reading: "LMDB clients",
    two_clients_of_one_lmdb: "LMDB clients",
    pairs_of_other_suffixes: "pairs of folders",
    stray_file_beside_images: "pairs of folders",
}


def outcome(symptom):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            symptom()
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            os.chdir(PACKAGE)
    return None


def main():
    # The package without its __init__, which would have BasicSR patched at once.
    package = types.ModuleType("esc_basicsr")
    package.__path__ = [str(PACKAGE)]
    sys.modules["esc_basicsr"] = package
    unimportable = outcome(functional_tensor_issue_533)
    importlib.import_module("esc_basicsr.basicsr_host.functional_tensor").provide_functional_tensor()
    assert outcome(functional_tensor_issue_533) is None
    patches = importlib.import_module("esc_basicsr.basicsr_host.patches")
    before = {symptom: outcome(symptom) for symptom in SYMPTOMS}
    needed = [patch.name for patch in patches.PATCHES if patch.is_needed()]
    patches.apply()
    active = [patch.name for patch in patches.active()]
    after = {symptom: outcome(symptom) for symptom in SYMPTOMS}
    still_needed = [patch.name for patch in patches.PATCHES if patch.is_needed()]
    patches.apply()
    result = {
        "unimportable": unimportable,
        "symptoms": {s.__name__: [patch, before[s], after[s]] for s, patch in SYMPTOMS.items()},
        "needed": needed,
        "active": active,
        "still_needed": still_needed,
        "applied_again": len(patches.active()) - len(active),
    }
    Path(os.environ["RESULT"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
