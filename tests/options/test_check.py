"""Every mistake in an option file is reported before anything is built, with its key and a remedy."""

import copy
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
import yaml
from basicsr.models import MODEL_REGISTRY
from basicsr.models.base_model import BaseModel
from basicsr.models.esrgan_model import ESRGANModel
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY
from PIL import Image

from esc_basicsr.common.errors import UserError
from esc_basicsr.options.check import check_options
from esc_basicsr.options.loader import load_options
from esc_basicsr.weights.read import read_weights
from esc_basicsr.weights.write import write_safetensors

MISSING = object()


def problems(opt: dict[str, Any], is_train: bool = True) -> list[str]:
    """List what is found wrong, a line each."""
    try:
        check_options(opt, "mine.yml", is_train)
    except UserError as error:
        head, *lines = str(error).splitlines()
        lines = [line for line in lines if line.startswith("  ") and not line.startswith("   ")]
        assert head == f"mine.yml: {len(lines)} problem" + "s" * (len(lines) > 1)
        return [line.strip() for line in lines]
    return []


def change(opt: dict[str, Any], key_path: str, value: object) -> dict[str, Any]:
    """Set or remove (MISSING) one value."""
    *parents, key = key_path.split(".")
    section = opt
    for parent in parents:
        section = section[parent]
    if value is MISSING:
        del section[key]
    else:
        section[key] = value
    return opt


def as_test(opt: dict[str, Any]) -> dict[str, Any]:
    """Make the same options to test with."""
    return {
        **{key: opt[key] for key in ("name", "model_type", "scale", "num_gpu", "network_g", "path")},
        "datasets": {"test_1": opt["datasets"]["val"]},
        "val": {"save_img": False, "metrics": opt["val"]["metrics"]},
    }


def esc_options(opt: dict[str, Any]) -> dict[str, Any]:
    """Make the same options for this package's network, model, loss and data set."""
    opt["model_type"] = "ESCModel"
    opt["network_g"] = {"type": "ESC", "upscaling_factor": 2, "dim": 16, "pdim": 4, "n_blocks": 1}
    opt["train"]["optim_g"]["type"] = "AdamW"
    opt["train"]["pixel_opt"] = {"type": "YChannelL1Loss", "loss_weight": 1.0, "reduction": "mean"}
    return opt


def dflip_options(opt: dict[str, Any], weights: Sequence[float] = (1.0,)) -> dict[str, Any]:
    """Make the same options with a DFLIPDataset, whose every source is the one LMDB of 8 images."""
    train = opt["datasets"]["train"]
    root = train.pop("dataroot_gt")
    del train["dataroot_lq"], train["io_backend"]
    train["type"] = "DFLIPDataset"
    train["sources"] = [{"dataroot_gt": root, "weight": weight} for weight in weights]
    return opt


def test_sound_options_pass(sound_options):
    assert problems(sound_options) == []
    assert problems(as_test(sound_options), is_train=False) == []


def test_sound_options_with_this_packages_classes_pass(sound_options):
    assert problems(dflip_options(esc_options(sound_options))) == []


def test_lr_made_on_the_device_needs_a_model_that_makes_it(sound_options):
    dflip_options(esc_options(sound_options))["datasets"]["train"]["lq_on_device"] = True
    assert problems(sound_options) == []
    assert problems(change(sound_options, "datasets.train.lq_on_device", "yes")) == [
        "datasets.train.lq_on_device: got 'yes', expected true or false."
    ]
    change(sound_options, "datasets.train.lq_on_device", True)
    sound_options["train"]["optim_g"]["type"] = "Adam"
    (line,) = problems(change(sound_options, "model_type", "SRModel"))
    assert line.startswith("datasets.train.lq_on_device: got true, but SRModel cannot make LR")


def test_options_pass_once_more_after_basicsr_has_filled_them_in(sound_options, monkeypatch):
    sound_options |= {"dist": False, "rank": 0, "world_size": 1, "auto_resume": False, "is_train": True}
    sound_options["root_path"] = "."
    for phase, dataset in sound_options["datasets"].items():
        dataset |= {"phase": phase, "scale": 2}
    keys = ("experiments_root", "models", "training_states", "log", "visualization")
    sound_options["path"] |= dict.fromkeys(keys, "experiments/Tiny_x2")
    assert problems(sound_options) == []


def test_checking_changes_neither_options_nor_random_numbers(sound_options):
    opt = esc_options(sound_options)
    before, state = repr(opt), torch.get_rng_state()
    check_options(opt, "mine.yml", True)
    assert repr(opt) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_all_problems_are_reported_at_once(sound_options):
    opt = change(change(sound_options, "scale", 0), "train.optim_g.lr", "5e-4")
    assert len(problems(opt)) == 3  # the network's scale does not match any more either


@pytest.mark.parametrize(
    ("key_path", "value", "message"),
    [
        ("mdoel_type", "SRModel", "mdoel_type: unknown key. Did you mean 'model_type'?"),
        ("train.ema_deccay", 0.9, "train.ema_deccay: unknown key. Did you mean 'ema_decay'?"),
        (
            "path.pretrained_network_g",
            "x.pth",
            "path.pretrained_network_g: unknown key. Did you mean 'pretrain_network_g'?",
        ),
        (
            "val.metrics.psnr.test_y_chanel",
            True,
            "val.metrics.psnr.test_y_chanel: unknown key. Did you mean 'test_y_channel'?",
        ),
        ("logger.wandb.projekt", "x", "logger.wandb.projekt: unknown key. Did you mean 'project'?"),
        ("dist_params.prot", 29500, "dist_params.prot: unknown key. Did you mean 'port'?"),
        ("train.optim_g.amsgard", True, "train.optim_g.amsgard: unknown key. Did you mean 'amsgrad'?"),
        ("train.scheduler.restart", [0], "train.scheduler.restart: unknown key. Did you mean 'restarts'?"),
        ("network_g.num_blocks", 2, "network_g.num_blocks: unknown key. Did you mean 'num_block'?"),
        ("network_g.num_inch", 3, "network_g.num_inch: unknown key. Did you mean 'num_in_ch'?"),
        ("train.pixel_opt.weight", 2.0, "train.pixel_opt.weight: unknown key. Did you mean 'loss_weight'?"),
        ("datasets.train.use_flip", True, "datasets.train.use_flip: unknown key. Did you mean 'use_hflip'?"),
        (
            "datasets.val.filename_templ",
            "{}",
            "datasets.val.filename_templ: unknown key. Did you mean 'filename_tmpl'?",
        ),
        (
            "val.zzz",
            1,
            "val.zzz: unknown key. Known here: batch_size, metrics, pbar, save_img, suffix, val_freq.",
        ),
    ],
)
def test_unknown_keys_are_reported(sound_options, key_path, value, message):
    assert problems(change(sound_options, key_path, value)) == [message]


@pytest.mark.parametrize(
    ("section", "key", "typo"),
    [
        ("", "model_type", "mdoel_type"),
        ("train", "total_iter", "total_iters"),
        ("datasets.train", "use_hflip", "use_flip"),
        ("val", "val_freq", "valfreq"),
        ("logger", "print_freq", "Print_Freq"),
    ],
)
def test_a_mistyped_required_key_is_reported_once_with_the_near_one(sound_options, section, key, typo):
    prefix = f"{section}." if section else ""
    parent = sound_options
    for part in section.split(".") if section else ():
        parent = parent[part]
    parent[typo] = parent.pop(key)
    assert problems(sound_options) == [f"{prefix}{typo}: unknown key. Did you mean '{key}'?"]


@pytest.mark.parametrize(
    ("key_path", "value", "message"),
    [
        ("model_type", "SRModle", "model_type: got 'SRModle', no known model. Did you mean 'SRModel'?"),
        (
            "network_g.type",
            "MSRResnet",
            "network_g.type: got 'MSRResnet', no known network. Did you mean 'MSRResNet'?",
        ),
        (
            "train.pixel_opt.type",
            "L1loss",
            "train.pixel_opt.type: got 'L1loss', no known loss. Did you mean 'L1Loss'?",
        ),
        ("val.metrics.psnr.type", "psnr", "val.metrics.psnr.type: got 'psnr', no known metric."),
        ("datasets.val.type", "PairImageDataset", "no known data set. Did you mean 'PairedImageDataset'?"),
        ("datasets.val.io_backend.type", "dsk", "got 'dsk', expected one of disk, lmdb, memcached."),
        ("train.scheduler.type", "MultistepLR", "no known scheduler of BasicSR. Did you mean 'MultiStepLR'?"),
        ("train.optim_g.type", "AdmaW", "no known optimizer of SRModel. Did you mean 'AdamW'?"),
        ("train.optim_g.type", "LBFGS", "got 'LBFGS', no known optimizer of SRModel. Known here: ASGD, "),
    ],
)
def test_unknown_types_are_reported_with_the_near_one(sound_options, key_path, value, message):
    (line,) = problems(change(sound_options, key_path, value))
    assert message in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ESC-light", "type: ESC, dim: 64, n_blocks: 3"),
        ("esc_light", "type: ESC, dim: 64, n_blocks: 3"),
        ("ESC-FP", "type: ESCFP, dim: 48, n_blocks: 5"),
    ],
)
def test_a_variants_name_as_type_is_reported_how_to_write(sound_options, name, message):
    opt = change(esc_options(sound_options), "network_g.type", name)
    (line,) = problems(opt)
    assert line.startswith(f"network_g.type: got '{name}', a variant: write {message}, ")


@pytest.mark.parametrize(
    ("wanted", "here", "launched", "message"),
    [
        (3, 0, None, "0 GPUs"),
        (3, 1, None, "1 GPU"),
        (3, 2, None, "2 GPUs"),
        (3, 3, None, None),
        (0, 0, None, None),
        ("auto", 0, None, None),
        (3, 1, "WORLD_SIZE", None),
        (3, 1, "SLURM_PROCID", None),
        (3, 0, "WORLD_SIZE", "0 GPUs"),
    ],
)
def test_more_gpus_than_there_are_is_reported_unless_a_launcher_gives_each_process_one(
    sound_options, monkeypatch, wanted, here, launched, message
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    if launched:
        monkeypatch.setenv(launched, "1")
    change(sound_options, "datasets.train.batch_size_per_gpu", 1)
    found = problems(change(sound_options, "num_gpu", wanted))
    expected = f"num_gpu: got 3, but this machine has {message}. Write auto, or 0 for the CPU."
    assert found == ([expected] if message else [])


@pytest.mark.parametrize(
    ("key_path", "value"),
    [
        ("train.amp", "bf16"),
        ("train.amp", "fp16"),
        ("train.amp", False),
        ("train.amp", None),
        ("train.accumulate", 1),
        ("train.accumulate", 4),
        ("train.compile", True),
        ("train.clip_grad_norm", 1.0),
        ("datasets.train.global_batch_size", 8),
    ],
)
def test_options_of_a_step_are_every_models(sound_options, key_path, value):
    assert problems(change(copy.deepcopy(sound_options), key_path, value)) == []
    assert problems(change(esc_options(sound_options), key_path, value)) == []


@pytest.mark.parametrize(
    ("key_path", "value"),
    [
        ("train.amp", "bf16"),
        ("train.accumulate", 4),
        ("train.compile", True),
        ("train.max_skipped", 3),
        ("datasets.train.global_batch_size", 8),
    ],
)
def test_models_that_step_by_themselves_are_refused_what_they_cannot(
    sound_options, register, key_path, value
):
    class TheirModel(SRModel):
        def optimize_parameters(self, current_iter):
            self.optimizer_g.step()

    class TheirOtherModel(SRModel):
        def optimize_parameters(self, current_iter):
            super().optimize_parameters(current_iter)

    for cls in (TheirModel, TheirOtherModel):
        register(MODEL_REGISTRY, cls)
    opt = copy.deepcopy(sound_options) | {"model_type": "TheirOtherModel"}
    assert problems(change(opt, key_path, value)) == []
    for model in ("TheirModel", "HiFaceGANModel", "StyleGAN2Model", "VideoRecurrentGANModel"):
        opt = copy.deepcopy(sound_options) | {"model_type": model}
        plain = problems(opt)
        (line,) = {*problems(change(opt, key_path, value))} - {*plain}
        assert line.startswith(f"{key_path}: {model} takes its steps by itself, in float32 and one piece")


@pytest.mark.parametrize(
    ("model", "network_d", "message"),
    [
        ("ESRGANModel", "UNetDiscriminatorSN", "ESRGANModel compares with the mean of a whole batch"),
        ("TheirModel", "UNetDiscriminatorSN", "ESRGANModel compares with the mean of a whole batch"),
        ("SRGANModel", "VGGStyleDiscriminator", "network_d normalises over a whole batch"),
        ("SRGANModel", "UNetDiscriminatorSN", None),
    ],
)
def test_pieces_that_would_change_the_step_are_refused(sound_options, register, model, network_d, message):
    class TheirModel(ESRGANModel):
        pass

    register(MODEL_REGISTRY, TheirModel)
    discriminator = {"type": network_d, "num_in_ch": 3, "num_feat": 4}
    opt = sound_options | {"model_type": model, "network_d": discriminator}
    opt["train"] |= {
        "optim_d": {"type": "Adam", "lr": 1e-4},
        "gan_opt": {"type": "GANLoss", "gan_type": "vanilla"},
    }
    assert problems(opt) == []
    lines = problems(change(copy.deepcopy(opt), "train.accumulate", 2))
    assert [line.startswith(f"train.accumulate: {message}") for line in lines] == [True] * bool(message)
    opt["datasets"]["train"] |= {"global_batch_size": 4, "batch_size_per_gpu": 4}
    assert problems(opt) == []  # in one piece


@pytest.mark.parametrize(
    ("key_path", "value"), [("channels_last", True), ("cpu_kernels", True), ("val.amp", "bf16")]
)
def test_options_for_speed_are_escmodels(sound_options, key_path, value):
    (line,) = problems(change(copy.deepcopy(sound_options), key_path, value))
    assert line == f"{key_path}: unknown key. With model_type: ESCModel it is known."
    assert problems(change(esc_options(sound_options), key_path, value)) == []


@pytest.mark.parametrize(
    ("key_path", "value", "message"),
    [
        ("train.amp", True, "train.amp: got true, expected bf16 or fp16, or false."),
        ("train.amp", "float16", "train.amp: got 'float16', expected bf16 or fp16, or false."),
        ("val.amp", "int8", "val.amp: got 'int8', expected bf16 or fp16, or false."),
        ("train.compile", "yes", "train.compile: got 'yes', expected true or false."),
        ("channels_last", 1, "channels_last: got 1, expected true or false."),
        ("train.channels_last", True, "train.channels_last: unknown key."),
        ("train.acumulate", 2, "train.acumulate: unknown key. Did you mean 'accumulate'?"),
        ("train.accumulate", 0, "train.accumulate: got 0, expected a whole number of at least 1."),
        ("train.accumulate", "2", "In quotes it is text: write 2."),
        (
            "train.accumulate",
            3,
            "train.accumulate: got 3, expected a divisor of datasets.train.batch_size_per_gpu, 4",
        ),
    ],
)
def test_options_for_speed_that_do_not_fit_are_reported(sound_options, key_path, value, message):
    (line,) = problems(change(esc_options(sound_options), key_path, value))
    assert message in line


@pytest.mark.parametrize("loss", ["pixel_opt", "ldl_opt"])
def test_losses_that_are_no_means_are_not_accumulated(sound_options, loss):
    opt = sound_options | {"model_type": "SwinIRModel"}  # whose section train may hold either
    opt = change(opt, f"train.{loss}", {"type": "L1Loss", "reduction": "sum"})
    assert problems(opt) == []
    (line,) = problems(change(opt, "train.accumulate", 2))
    assert line.startswith(f"train.{loss}.reduction: got 'sum', which is no mean over images")


@pytest.mark.parametrize(("key", "value"), [("amp", "fp16"), ("compile", True)])
def test_kernels_go_with_neither_fp16_nor_compile(sound_options, key, value):
    opt = change(esc_options(sound_options), "cpu_kernels", True)
    assert problems(opt) == []
    assert problems(change(opt, "train.amp", "bf16")) == []
    (line,) = problems(change(opt, f"train.{key}", value))
    assert line.startswith(f"train.{key}: does not go with cpu_kernels")


@pytest.mark.parametrize("wanted", [2, "auto"])
@pytest.mark.parametrize(("key", "value"), [("amp", "bf16"), ("compile", True)])
def test_amp_and_compile_want_a_process_for_each_gpu(sound_options, monkeypatch, wanted, key, value):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    opt = change(esc_options(sound_options), "num_gpu", wanted)
    assert problems(opt) == []
    (line,) = problems(change(opt, f"train.{key}", value))
    assert line.startswith(f"train.{key}: needs a process for each GPU, and num_gpu is {wanted} (2 GPUs)")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert problems(opt) == []


def test_a_type_of_a_package_that_was_not_imported_is_reported_so(sound_options):
    (line,) = problems(change(sound_options, "network_g", {"type": "Zyx"}))
    assert line.endswith("If another package provides it, that package must be imported first.")


@pytest.mark.parametrize(
    ("key_path", "text", "number"),
    [
        ("train.optim_g.lr", "5e-4", "0.0005"),
        ("train.optim_g.lr", "1.5e2", "150"),
        ("train.optim_g.weight_decay", "1E-2", "0.01"),
        ("train.optim_g.eps", "1e-8", "1.0e-08"),
        ("train.total_iter", "5e5", "500000"),
        ("train.scheduler.gamma", "5e-1", "0.5"),
        ("train.pixel_opt.loss_weight", "1e-1", "0.1"),
        ("network_g.num_feat", "1e1", "10"),
        ("train.ema_decay", "999e-3", "0.999"),
        ("train.optim_g.lr", "50e-9", "5.0e-08"),
        ("train.pixel_opt.loss_weight", ".5e-1", "0.05"),
    ],
)
def test_numbers_that_yaml_reads_as_text_are_reported_how_to_write(sound_options, key_path, text, number):
    (line,) = problems(change(sound_options, key_path, text))
    assert line.startswith(f"{key_path}: got the text '{text}', expected ")
    assert line.endswith(f"YAML 1.1 reads that as text: write {number}.")


def test_a_number_in_quotes_is_reported_how_to_write(sound_options):
    (line,) = problems(change(sound_options, "datasets.train.batch_size_per_gpu", "4"))
    assert line.endswith("In quotes it is text: write 4.")


@pytest.mark.parametrize(
    ("key_path", "value", "message"),
    [
        ("name", 5, "got 5, expected a name fit for a folder, without slashes."),
        ("name", "../up", "got '../up', expected a name fit for a folder, without slashes."),
        ("num_gpu", -1, "got -1, expected auto, or a whole number of at least 0."),
        ("num_gpu", True, "got true, expected auto, or a whole number of at least 0."),
        (
            "manual_seed",
            0.5,
            "got 0.5, expected a whole number of at least 0, and at most 4,000,000,000 or ~.",
        ),
        ("path", None, "got nothing (~), expected a section of 'key: value' lines."),
        ("path.strict_load_g", "true", "got the text 'true', expected true or false."),
        ("train.total_iter", 0, "got 0, expected a whole number of at least 1."),
        ("train.warmup_iter", -5, "got -5, expected a whole number, -1 for no warm-up."),
        ("train.ema_decay", 1, "got 1, expected a number from 0 to below 1."),
        ("train.optim_g.lr", float("nan"), "got nan, expected a number above 0, and at most 1,000."),
        (
            "train.optim_g.betas",
            [0.9],
            "got [0.9], expected a list, 2 items, each a number from 0 to below 1.",
        ),
        ("train.optim_g.amsgrad", "no", "got 'no', expected true or false."),
        ("train.scheduler.milestones", 50, "got 50, expected a list, each a whole number of at least 1."),
        (
            "datasets.train.batch_size_per_gpu",
            -4,
            "got -4, expected a whole number of at least 1, and at most 1,000,000.",
        ),
        (
            "datasets.train.batch_size_per_gpu",
            True,
            "got true, expected a whole number of at least 1, and at most 1,000,000.",
        ),
        (
            "datasets.train.num_worker_per_gpu",
            1.5,
            "got 1.5, expected a whole number of at least 0, and at most 1,000.",
        ),
        ("datasets.train.prefetch_mode", "gpu", "got 'gpu', expected one of ~, cpu, cuda."),
        ("datasets.val.filename_tmpl", "x2", "got 'x2', expected text with one {} for the HR name."),
        ("datasets.val", "Set5", "got 'Set5', expected a section of 'key: value' lines."),
        ("val.metrics.psnr", 5, "got 5, expected a section of 'key: value' lines."),
        ("val.metrics.psnr.better", "more", "got 'more', expected one of higher, lower."),
        ("logger.print_freq", 0, "got 0, expected a whole number of at least 1."),
        ("dist_params.backend", "ncl", "got 'ncl', expected one of nccl, gloo, mpi."),
    ],
)
def test_values_that_do_not_fit_are_reported(sound_options, key_path, value, message):
    assert problems(change(sound_options, key_path, value)) == [f"{key_path}: {message}"]


def test_iterations_may_be_written_as_floats_as_in_basicsrs_own_files(sound_options):
    change(sound_options, "val.val_freq", 5e3)
    change(sound_options, "logger.save_checkpoint_freq", 5e3)
    assert problems(change(sound_options, "train.total_iter", 5e5)) == []


@pytest.mark.parametrize(
    "key_path",
    [
        *("name", "model_type", "scale", "num_gpu", "path", "network_g", "network_g.type", "train", "logger"),
        *("datasets", "datasets.train", "datasets.train.name", "datasets.train.type"),
        *("datasets.train.dataroot_gt", "datasets.train.io_backend", "datasets.train.io_backend.type"),
        *("datasets.train.batch_size_per_gpu", "datasets.train.num_worker_per_gpu", "datasets.train.gt_size"),
        *("train.total_iter", "train.optim_g", "train.optim_g.type", "train.optim_g.lr", "train.scheduler"),
        *(
            "train.scheduler.type",
            "train.scheduler.milestones",
            "train.pixel_opt",
            "val.val_freq",
            "val.save_img",
        ),
        *("val.metrics.psnr.type", "val.metrics.psnr.crop_border"),
        *("logger.print_freq", "logger.save_checkpoint_freq", "logger.use_tb_logger"),
    ],
)
def test_missing_keys_that_end_basicsr_are_reported(sound_options, key_path):
    lines = problems(change(sound_options, key_path, MISSING))
    assert f"{key_path}: missing; expected " in "\n".join(lines)


def test_missing_keys_of_a_test_file_are_reported(sound_options):
    opt = as_test(sound_options)
    assert problems({key: value for key, value in opt.items() if key != "val"}, is_train=False) == [
        "val: missing; expected a section of 'key: value' lines or ~."
    ]
    assert problems({**opt, "val": None}, is_train=False) == [
        "val: got nothing (~), expected a section of 'key: value' lines."
    ]
    assert problems({**opt, "datasets": {}}, is_train=False) == [
        "datasets: missing; expected at least one data set, such as test_1."
    ]
    assert problems({**opt, "val": {"save_img": True}}, is_train=False) == [
        "val.suffix: missing; expected text or ~."
    ]


def test_a_file_to_test_by_needs_no_training_sections(sound_options):
    sound_options["datasets"] = {"test_1": sound_options["datasets"]["val"]}
    for section in ("train", "logger", "dist_params"):
        del sound_options[section]
    del sound_options["val"]["val_freq"]
    assert problems(sound_options, is_train=False) == []


@pytest.mark.parametrize(
    ("is_train", "phase", "expected"),
    [
        (True, "test_1", "train, val or val_NAME"),
        (True, "train_2", "train, val or val_NAME"),
        (False, "train", "test_NAME or val_NAME"),
    ],
)
def test_phases_that_the_pipeline_does_not_know_are_reported(sound_options, is_train, phase, expected):
    opt = sound_options if is_train else as_test(sound_options)
    opt["datasets"][phase] = {**sound_options["datasets"]["val"], "name": "Other"}
    (line,) = problems(opt, is_train)
    assert line.startswith(f"datasets.{phase}: unknown phase; expected {expected}.")


def test_validation_is_optional_in_training(sound_options):
    del sound_options["val"], sound_options["datasets"]["val"]
    assert problems(sound_options) == []


def test_names_of_data_sets_and_metrics_may_have_dots(sound_options):
    sound_options["datasets"]["val_1.5"] = {**sound_options["datasets"]["val"], "name": "Other"}
    sound_options["val"]["metrics"]["psnr.y"] = sound_options["val"]["metrics"].pop("psnr")
    assert problems(sound_options) == []
    del sound_options["val"]["metrics"]["psnr.y"]["crop_border"]
    assert problems(sound_options) == [
        "val.metrics.psnr.y.crop_border: missing; expected a whole number of at least 0."
    ]


def test_metrics_are_optional(sound_options):
    assert problems(change(sound_options, "val.metrics", None)) == []


@pytest.mark.parametrize(
    ("key_path", "value", "message"),
    [
        ("network_g.upscale", 4, "network_g.upscale: got 4, but scale is 2. Make them equal."),
        ("datasets.train.gt_size", 15, "datasets.train.gt_size: got 15, expected a multiple of scale, 2."),
        (
            "train.scheduler.restarts",
            [0, 50],
            "train.scheduler: MultiStepRestartLR refuses these options (AssertionError: restarts and",
        ),
        (
            "train.scheduler",
            {"type": "CosineAnnealingRestartLR", "periods": [50, 30], "restart_weights": [1, 1]},
            "train.scheduler.periods: got [50, 30], 80 iterations in all, less than total_iter, 100.",
        ),
        (
            "datasets.train.prefetch_mode",
            "cuda",
            "datasets.train.pin_memory: expected true with prefetch_mode: cuda.",
        ),
        ("train.pixel_opt", None, "train.pixel_opt: missing; expected a section that names the loss"),
    ],
)
def test_values_that_contradict_one_another_are_reported(sound_options, key_path, value, message):
    (line,) = problems(change(sound_options, key_path, value))
    assert line.startswith(message)


def test_wandb_without_tensorboard_is_reported(sound_options):
    change(sound_options, "logger.wandb.project", "mine")
    (line,) = problems(change(sound_options, "logger.use_tb_logger", False))
    assert line.startswith("logger.use_tb_logger: expected true with wandb")


def test_another_crop_border_than_the_scale_is_a_warning_only(sound_options, caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("basicsr").propagate = True
    assert problems(change(sound_options, "val.metrics.psnr.crop_border", 0)) == []
    assert "val.metrics.psnr.crop_border is 0 and scale is 2" in caplog.text


@pytest.mark.parametrize(
    ("key_path", "value", "message"),
    [
        (
            "train.warmup_iter",
            101,
            "train.warmup_iter is 101 and total_iter is 100: the learning rate never gets as high as lr.",
        ),
        ("train.warmup_iter", 100, ""),
        (
            "train.scheduler.milestones",
            [101, 200],
            "train.scheduler.milestones start at 101 and total_iter is 100: "
            "the learning rate is never lowered.",
        ),
        ("train.scheduler.milestones", [100, 200], ""),
        ("train.scheduler.milestones", [], ""),
    ],
)
def test_a_schedule_beyond_the_training_is_a_warning_only(sound_options, caplog, key_path, value, message):
    caplog.set_level(logging.WARNING)
    logging.getLogger("basicsr").propagate = True
    assert problems(change(sound_options, key_path, value)) == []
    assert [record.getMessage() for record in caplog.records] == ([message] if message else [])


@pytest.mark.parametrize(
    ("key_path", "value", "message"),
    [
        (
            "network_g.num_heads",
            3,
            "network_g: dim must be a multiple of num_heads, got dim 16 and num_heads 3.",
        ),
        (
            "network_g.dim",
            "16",
            "network_g.dim: got the text '16', expected a whole number. In quotes it is text: write 16.",
        ),
        ("network_g.use_ln", 1, "network_g.use_ln: got 1, expected true or false."),
        (
            "network_g.upscaling_factor",
            3,
            "network_g.upscaling_factor: got 3, but scale is 2. Make them equal.",
        ),
        (
            "train.pixel_opt.reduction",
            "avg",
            "train.pixel_opt.reduction: got 'avg', expected one of mean, sum.",
        ),
        ("network_g.kernelsize", 13, "network_g.kernelsize: unknown key. Did you mean 'kernel_size'?"),
    ],
)
def test_what_this_packages_classes_refuse_is_reported(sound_options, key_path, value, message):
    assert problems(change(esc_options(sound_options), key_path, value)) == [message]


def test_a_checkpoint_that_is_not_there_is_reported(sound_options):
    (line,) = problems(change(sound_options, "path.pretrain_network_g", "experiments/x2/net_g_latest.pth"))
    assert line == (
        "path.pretrain_network_g: there is no checkpoint 'experiments/x2/net_g_latest.pth'. "
        "Train what it comes from first, or give another."
    )


def test_a_file_that_is_no_checkpoint_is_reported(sound_options):
    opt = change(esc_options(sound_options), "path.pretrain_network_g", "net.pth")
    Path("net.pth").write_text("not weights")
    (line,) = problems(opt)
    assert line.startswith("path.pretrain_network_g: net.pth: not a")


def test_weights_may_be_safetensors(sound_options, save_zeros):
    plain = change(sound_options, "path.pretrain_network_g", "net.safetensors")
    opt = esc_options(copy.deepcopy(plain))
    save_zeros(Path("net.pth"), opt["network_g"])
    weights = read_weights("net.pth")
    write_safetensors("net.safetensors", weights, {"param_key": "params"})
    assert problems(opt) == []
    assert problems(change(plain, "network_g", opt["network_g"])) == []
    del weights["last.bias"]
    write_safetensors("net.safetensors", weights, {})
    assert problems(opt) == ["path.pretrain_network_g: net.safetensors does not fit ESC:"]
    Path("net.safetensors").write_bytes(Path("net.safetensors").read_bytes()[:-1])
    (line,) = problems(opt)
    assert line.startswith("path.pretrain_network_g: net.safetensors: not a readable checkpoint")


def test_weights_of_another_network_are_reported_with_what_differs_before_training(sound_options, save_zeros):
    opt = change(esc_options(sound_options), "path.pretrain_network_g", "net.pth")
    save_zeros(Path("net.pth"), {**opt["network_g"], "n_blocks": 2})
    assert problems(opt) == ["path.pretrain_network_g: net.pth does not fit ESC:"]
    with pytest.raises(UserError) as caught:
        check_options(opt, "mine.yml", True)
    assert str(caught.value).splitlines()[-1] == (
        "    The file is of another network_g: n_blocks: 2 (here 1). Set these options, or load another "
        "checkpoint."
    )
    assert problems(change(opt, "path.strict_load_g", False)) == []


def test_weights_of_another_scale_are_converted_for_every_model(sound_options, save_zeros):
    opt = change(esc_options(sound_options), "path.pretrain_network_g", "net.pth")
    save_zeros(Path("net.pth"), {**opt["network_g"], "upscaling_factor": 4})
    for model in ("ESCModel", "SRModel"):
        assert problems(opt | {"model_type": model}) == []


@pytest.mark.parametrize(
    ("param_key", "ema_decay", "keys", "fits"),
    [
        ("params", 0.999, ("params", "params_ema"), True),
        ("params", 0.999, ("params",), True),
        ("params", 0.999, ("params_ema",), True),
        ("params", 0.999, ("mine", "yours"), False),
        ("params_ema", 0.999, ("params_ema",), True),
        (MISSING, 0, ("params",), True),
        (MISSING, 0, ("params_ema",), True),
        (MISSING, 0, ("mine", "yours"), False),
    ],
)
def test_both_networks_weights_are_looked_for_as_they_will_be_loaded(
    sound_options, save_zeros, param_key, ema_decay, keys, fits
):
    opt = change(esc_options(sound_options), "path.pretrain_network_g", "net.pth")
    save_zeros(Path("net.pth"), opt["network_g"], keys)
    change(opt, "train.ema_decay", ema_decay)
    if param_key is not MISSING:
        change(opt, "path.param_key_g", param_key)
    found = problems(opt)
    assert (found == []) == fits
    if not fits:
        assert "net.pth: " in found[0]
        assert "'mine', 'yours'" in found[0]


def test_the_averages_weights_must_fit_too(sound_options, save_zeros):
    opt = change(esc_options(sound_options), "path.pretrain_network_g", "net.pth")
    save_zeros(Path("net.pth"), opt["network_g"])
    content = torch.load("net.pth")
    del content["params_ema"]["last.bias"]
    torch.save({**content, "params": {**content["params"], "last.bias": torch.zeros(16)}}, "net.pth")
    assert problems(opt) == ["path.pretrain_network_g: net.pth does not fit ESC:"]
    assert problems(change(opt, "train.ema_decay", 0)) == []


def test_a_resumed_run_needs_its_state_and_not_what_it_started_from(sound_options):
    change(sound_options, "path.pretrain_network_g", "gone.pth")
    (line,) = problems(change(sound_options, "path.resume_state", "10.state"))
    assert line == "path.resume_state: there is no training state '10.state'. Give another, or ~."
    Path("10.state").touch()
    assert problems(sound_options) == []


def test_home_directories_are_expanded(sound_options, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    change(sound_options, "datasets.train.dataroot_gt", "~/datasets/Train/HR.lmdb")
    (tmp_path / "net.pth").touch()
    assert problems(change(sound_options, "path.pretrain_network_g", "~/net.pth")) == []


@pytest.mark.parametrize(
    ("key_path", "value", "expected"),
    [
        ("datasets.train.dataroot_gt", "datasets/DIV2K/HR.lmdb", "LMDB folder"),
        ("datasets.val.dataroot_gt", "datasets/Set5/HR", "folder of images"),
        ("datasets.val.dataroot_lq", "datasets/Set5/LR", "folder of images"),
        ("datasets.val.meta_info_file", "datasets/meta.txt", "list of images"),
    ],
)
def test_missing_data_is_reported_with_the_guide(sound_options, key_path, value, expected):
    (line,) = problems(change(sound_options, key_path, value))
    assert line == f"{key_path}: there is no {expected} '{value}'."


def test_a_list_that_an_lmdb_leaves_unread_is_reported(sound_options):
    Path("list.txt").write_text("0.png\n")
    (line,) = problems(change(sound_options, "datasets.train.meta_info_file", "list.txt"))
    assert line == (
        "datasets.train.meta_info_file: nothing reads it with io_backend lmdb: an LMDB's meta_info.txt says "
        "what is taken."
    )


def test_where_paths_start_and_the_guide_to_the_data_are_reported_once(sound_options):
    change(sound_options, "path.pretrain_network_g", "net.pth")
    with pytest.raises(UserError) as caught:
        check_options(sound_options, "mine.yml", True)
    start = f"Relative paths start at the working directory, {Path.cwd()}."
    assert str(caught.value).splitlines()[2:] == [start]
    shutil.rmtree("datasets")
    with pytest.raises(UserError) as caught:
        check_options(sound_options, "mine.yml", True)
    *_, last_but_one, last = str(caught.value).splitlines()
    assert last_but_one == start
    assert last.startswith("datasets/README.md says how to get and lay out data; ")
    assert str(caught.value).count(start) == 1


@pytest.mark.parametrize("names", [["data.mdb"], ["meta_info.txt"], ["data.mdb", "meta_info.txt"]])
def test_an_incomplete_lmdb_is_reported(sound_options, names):
    for name in names:
        Path("datasets/Train/HR.lmdb", name).unlink()
    (line,) = problems(sound_options)
    assert f"datasets/Train/HR.lmdb', which has no {' and no '.join(names)}: no complete LMDB" in line


def test_an_lmdb_that_lists_nothing_is_reported(sound_options):
    Path("datasets/Train/HR.lmdb/meta_info.txt").write_text("")
    (line,) = problems(sound_options)
    assert "datasets/Train/HR.lmdb/meta_info.txt lists no images: rebuild the LMDB." in line


def test_an_lmdb_not_named_so_is_reported(sound_options):
    (line,) = problems(change(sound_options, "datasets.train.dataroot_gt", "datasets/Val/HR"))
    assert line.startswith(
        "datasets.train.dataroot_gt: got 'datasets/Val/HR', expected a folder whose name ends in .lmdb"
    )


def test_an_empty_folder_is_reported(sound_options):
    for folder in (Path("datasets/Val/HR"), Path("datasets/Val/LR")):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / ".hidden").touch()
    lines = problems(sound_options)
    assert [line.split(": ")[0] for line in lines] == ["datasets.val.dataroot_gt", "datasets.val.dataroot_lq"]
    assert all("a folder without files; expected one of images." in line for line in lines)


def test_unequal_numbers_of_hr_and_lr_are_reported(sound_options):
    Path("datasets/Val/LR/0x2.png").unlink()
    lmdb_lists("datasets/Train/LR.lmdb", "0.png (8,8,3)")
    train, val = problems(sound_options)
    assert train.startswith("datasets.train.dataroot_lq: got 'datasets/Train/LR.lmdb', which has no '1'")
    assert val.startswith(
        "datasets.val.dataroot_lq: 1 of 8 images of 'datasets/Val/HR' have no LR image: 0.png (LR: 0x2.*)"
    )


def test_a_template_that_names_no_lr_file_is_reported(sound_options):
    (line,) = problems(change(sound_options, "datasets.val.filename_tmpl", "{}x4"))
    assert line.startswith(
        "datasets.val.dataroot_lq: 8 of 8 images of 'datasets/Val/HR' have no LR image: 0.png (LR: 0x4.*)"
    )


def lmdb_lists(root: str, *lines: str) -> None:
    Path(root, "meta_info.txt").write_text("".join(f"{line} 1\n" for line in lines))


def test_an_lmdb_without_the_lr_of_an_hr_image_is_reported(sound_options):
    lmdb_lists("datasets/Train/LR.lmdb", *(f"{i}x2.png (8,8,3)" for i in range(8)))
    assert problems(sound_options) == [
        "datasets.train.dataroot_lq: got 'datasets/Train/LR.lmdb', which has no '0' as dataroot_gt has "
        "(8 of 8 such in all); expected the LR images of these HR images."
    ]


def test_an_lmdb_whose_list_cannot_be_read_is_reported(sound_options):
    path = Path("datasets/Train/LR.lmdb/meta_info.txt")
    path.write_text("0.png 1\n")
    (line,) = problems(sound_options)
    assert line.startswith(f"datasets.train.dataroot_lq: {path}, line 1: expected 'name.png (height,width,")
    path.write_bytes(b"\xff.png (8,8,3) 1\n")
    (line,) = problems(sound_options)
    assert line.startswith(
        "datasets.train.dataroot_lq: datasets/Train/LR.lmdb/meta_info.txt, line 1: expected"
    )
    opt = change(dflip_options(sound_options), "datasets.train.sources", [{"dataroot_gt": str(path.parent)}])
    (line,) = problems(opt)
    assert line.startswith(
        "datasets.train.sources[0].dataroot_gt: datasets/Train/LR.lmdb/meta_info.txt, line 1"
    )


@pytest.mark.parametrize(("hr", "fits"), [("16,20", True), ("17,20", False), ("16,16", False)])
def test_an_lmdb_of_another_scale_is_reported_with_its_first_offender(sound_options, hr, fits):
    sizes = ["(16,16,3)"] * 8
    sizes[3] = f"({hr},3)"
    lmdb_lists("datasets/Train/HR.lmdb", *(f"{i}.png {size}" for i, size in enumerate(sizes)))
    sizes = ["(8,8,3)"] * 8
    sizes[3] = "(8,10,3)"
    lmdb_lists("datasets/Train/LR.lmdb", *(f"{i}.png {size}" for i, size in enumerate(sizes)))
    height, width = hr.split(",")
    message = (
        "datasets.train.dataroot_lq: at scale 2 the LR image of '3', 10×8, goes with an HR image of 20×16; "
        f"got {width}×{height} (1 of 8 pairs do not fit). Give HR and LR of this scale."
    )
    assert problems(sound_options) == ([] if fits else [message])


def test_images_smaller_than_a_crop_are_reported(sound_options):
    change(sound_options, "datasets.train.gt_size", 18)
    message = (
        "datasets.train.gt_size: got 18, but '0' of 'datasets/Train/HR.lmdb' is 16×16 (8 of 8 images are "
        "smaller than a crop). Lower gt_size, or take them out."
    )
    assert problems(sound_options) == [message]
    assert problems(dflip_options(sound_options)) == [message]


@pytest.mark.parametrize(
    ("size", "fits"),
    [((16, 16), True), ((17, 17), True), ((18, 16), False), ((16, 18), False), ((15, 16), False)],
)
def test_hr_images_that_go_with_another_scale_are_reported_where_basicsr_would_crop_them(
    sound_options, size, fits
):
    Image.new("RGB", size).save("datasets/Val/HR/5.png")
    message = (
        "datasets.val.dataroot_lq: at scale 2 the LR image of '5.png', 8×8, goes with an HR image of 16×16, "
        f"or up to 1 more on a side; got {size[0]}×{size[1]} (1 of 8 pairs do not fit). "
        "Give HR and LR of this scale."
    )
    assert problems(sound_options) == ([] if fits else [message])


def test_images_that_are_turned_on_reading_are_measured_turned(sound_options):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    for folder, name, size in (("HR", "5", (32, 16)), ("LR", "5x2", (8, 16))):
        Path(f"datasets/Val/{folder}/{name}.png").unlink()
        options = {"exif": exif} if folder == "HR" else {}
        Image.new("RGB", size).save(f"datasets/Val/{folder}/{name}.jpg", **options)
    assert cv2.imread("datasets/Val/HR/5.jpg").shape == (32, 16, 3)
    assert problems(sound_options) == []


def test_a_file_that_is_no_image_is_reported(sound_options):
    Path("datasets/Val/LR/5x2.png").write_text("no image")
    assert problems(sound_options) == [
        "datasets.val.dataroot_lq: 'datasets/Val/LR/5x2.png' cannot be read as an image. "
        "Replace or remove it."
    ]


def test_folders_to_train_by_are_measured_as_strictly_as_lmdbs(sound_options):
    train, val = (sound_options["datasets"][name] for name in ("train", "val"))
    train |= {key: val[key] for key in ("dataroot_gt", "dataroot_lq", "filename_tmpl", "io_backend")}
    assert problems(sound_options) == []
    Image.new("RGB", (17, 16)).save("datasets/Val/HR/5.png")
    (line,) = problems(sound_options)
    assert "at scale 2 the LR image of '5.png', 8×8, goes with an HR image of 16×16; got 17×16 (1 of" in line


@pytest.mark.parametrize(
    ("batch", "ratio", "gpus", "processes", "enough"),
    [
        (8, 1, 0, None, True),
        (9, 1, 0, None, False),
        (9, 2, 1, None, True),
        (4, 1, 2, None, True),
        (5, 1, 2, None, False),
        (4, 1, 2, 2, True),
        (5, 1, 2, 2, False),
    ],
)
def test_a_training_set_smaller_than_a_batch_is_reported(
    sound_options, monkeypatch, batch, ratio, gpus, processes, enough
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sound_options["num_gpu"] = gpus
    sound_options["datasets"]["train"] |= {"batch_size_per_gpu": batch, "dataset_enlarge_ratio": ratio}
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    lines = problems(sound_options)
    assert (lines == []) == enough
    if not enough:
        (line,) = lines
        assert line.startswith(f"datasets.train.batch_size_per_gpu: got {batch}")
        assert f"8 images × dataset_enlarge_ratio {ratio}" in line


@pytest.mark.parametrize(
    ("batch", "processes", "reported"),
    [
        (8, 1, None),
        (8, 4, None),
        (9, 1, "got 9, but 8 images × dataset_enlarge_ratio 1 make only 8 samples an epoch"),
        (8, 3, "got 8, expected a multiple of the number of processes, 3"),
    ],
)
def test_a_global_batch_is_checked_as_a_whole(sound_options, monkeypatch, batch, processes, reported):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    sound_options["model_type"] = "ESCModel"
    sound_options["datasets"]["train"] |= {"global_batch_size": batch, "batch_size_per_gpu": 99}
    lines = problems(sound_options)
    assert (lines == []) == (reported is None)
    assert all(line.startswith(f"datasets.train.global_batch_size: {reported}") for line in lines)


def test_a_global_batch_goes_with_no_accumulation_of_ones_own_and_with_means_alone(sound_options):
    sound_options["datasets"]["train"]["global_batch_size"] = 4
    assert problems(sound_options) == []
    (line,) = problems(change(sound_options, "train.accumulate", 2))
    assert line.startswith("train.accumulate: not with datasets.train.global_batch_size")
    del sound_options["train"]["accumulate"]
    (line,) = problems(change(sound_options, "train.pixel_opt.reduction", "sum"))
    assert "datasets.train.global_batch_size would change it" in line


def test_num_gpu_auto_counts_the_gpus(sound_options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    (line,) = problems(change(sound_options, "num_gpu", "auto"))
    assert "got 4 on each of 3 GPUs or processes, but 8 images" in line


def test_a_batch_is_checked_for_a_list_of_images_too(sound_options):
    Path("list.txt").write_text("0.png\n1.png\n")
    train = sound_options["datasets"]["train"]
    train |= {"io_backend": {"type": "disk"}, "meta_info_file": "list.txt"}
    train |= {key: sound_options["datasets"]["val"][key] for key in ("dataroot_gt", "dataroot_lq")}
    (line,) = problems(sound_options)
    assert "but 2 images" in line


@pytest.mark.parametrize(("weights", "batch", "enough"), [((0.5, 1.0), 12, True), ((0.5, 1.0), 13, False)])
def test_weights_of_sources_count_in_the_batch_check(sound_options, weights, batch, enough):
    opt = dflip_options(sound_options, weights)
    assert (problems(change(opt, "datasets.train.batch_size_per_gpu", batch)) == []) == enough


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "datasets.train.sources: got [], expected a list of sections."),
        (["x.lmdb"], "datasets.train.sources[0]: got 'x.lmdb', expected a section of 'key: value' lines."),
        ([{"weight": 1}], "datasets.train.sources[0].dataroot_gt: missing; expected text."),
        (
            [{"dataroot_gt": "x.lmdb"}],
            "datasets.train.sources[0].dataroot_gt: there is no LMDB folder 'x.lmdb'.",
        ),
        (
            [{"dataroot_gt": "datasets/Train/HR.lmdb", "wieght": 2}],
            "datasets.train.sources[0].wieght: unknown key. Did you mean 'weight'?",
        ),
        (
            [{"dataroot_gt": "datasets/Train/HR.lmdb", "weight": 0}],
            "datasets.train.sources[0].weight: got 0, expected a number above 0, and at most 1,000,000.",
        ),
    ],
)
def test_sources_that_do_not_fit_are_reported(sound_options, sources, message):
    opt = dflip_options(sound_options)
    (line,) = problems(change(opt, "datasets.train.sources", sources))
    assert line.startswith(message)


def test_a_memcached_data_set_is_not_looked_for_on_disk(sound_options):
    train = sound_options["datasets"]["train"]
    train |= {"io_backend": {"type": "memcached"}, "dataroot_gt": "far", "dataroot_lq": "away"}
    assert problems(sound_options) == []


@pytest.fixture
def register() -> Any:
    """Register a class with BasicSR for one test."""
    registered: list[tuple[Any, str]] = []

    def add(registry: Any, cls: Callable[..., Any]) -> None:
        registry.register(cls)
        registered.append((registry, cls.__name__))

    yield add
    for registry, name in registered:
        del registry._obj_map[name]


def test_what_other_packages_read_is_left_alone(sound_options, register):
    class TheirModel:
        pass

    class TheirDataset:
        pass

    class TheirNet:
        def __init__(self, **options: Any) -> None:
            pass

    for registry, cls in (
        (MODEL_REGISTRY, TheirModel),
        (DATASET_REGISTRY, TheirDataset),
        (ARCH_REGISTRY, TheirNet),
    ):
        register(registry, cls)
    sound_options |= {
        "model_type": "TheirModel",
        "their_section": {"x": 1},
        "network_g": {"type": "TheirNet", "any": 1},
    }
    sound_options["network_d"] = {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 64}
    sound_options["train"] |= {"gan_opt": {"type": "GANLoss"}, "optim_g": {"type": "Lion", "lr": 1.0}}
    sound_options["path"]["pretrain_network_d"] = None
    sound_options["val"]["tile"] = 64
    sound_options["logger"]["level"] = "debug"
    sound_options["datasets"]["train"] |= {"type": "TheirDataset", "dataroot_gt": "theirs", "their_key": 1}
    assert problems(sound_options) == []


def test_keys_of_other_packages_networks_are_checked_where_their_constructor_names_them(
    sound_options, register
):
    class TheirNet:
        def __init__(self, width: int, depth=4) -> None:
            pass

    register(ARCH_REGISTRY, TheirNet)
    assert problems(change(sound_options, "network_g", {"type": "TheirNet", "widht": 8, "depth": "1e1"})) == [
        "network_g.widht: unknown key. Did you mean 'width'?",
        "network_g.depth: got the text '1e1', expected a number. YAML 1.1 reads that as text: write 10.",
    ]
    assert problems(change(sound_options, "network_g", {"type": "TheirNet"})) == [
        "network_g.width: missing; expected a whole number."
    ]


@pytest.mark.parametrize("value", [None, 5, "text", [1], {}, {"type": None}, {"type": ["x"]}, True, -0.5])
def test_no_value_anywhere_ends_in_another_error(sound_options, value):
    def paths(section: dict[str, Any], prefix: str = "") -> list[str]:
        found = []
        for key, inner in section.items():
            found.append(f"{prefix}{key}")
            found += paths(inner, f"{prefix}{key}.") if isinstance(inner, dict) else []
        return found

    for key_path in paths(sound_options):
        opt = change(copy.deepcopy(sound_options), key_path, value)
        problems(opt)
        problems(opt, is_train=False)


def test_what_a_run_started_from_is_not_needed_to_resume_it(sound_options):
    sound_options["path"]["pretrain_network_g"] = "experiments/gone.pth"
    with pytest.raises(UserError, match=r"there is no checkpoint 'experiments/gone\.pth'"):
        check_options(sound_options, "tiny.yml", is_train=True)
    check_options(sound_options, "tiny.yml", is_train=True, resumes=True)


@pytest.mark.parametrize(
    ("key_path", "value", "message"),
    [
        ("datasets.train.dataset_enlarge_ratio", 1e308, "expected a number above 0, and at most 1,000,000."),
        (
            "datasets.train.num_worker_per_gpu",
            2**31,
            "expected a whole number of at least 0, and at most 1,000.",
        ),
        ("train.pixel_opt.reduction", "none", "got 'none', expected one of mean, sum."),
        ("train.total_iter", 10**300, "expected a whole number of at least 1."),
        ("name", "x" * 201, "expected a name fit for a folder, without slashes."),
        ("name", "a\nb", "expected a name fit for a folder, without slashes."),
        ("datasets.val.io_backend.lock", True, "unknown key."),
        ("datasets.val.dataroot_lq", "x" * 300, "there is no folder of images"),
        ("datasets.train.dataroot_gt", f"{'x' * 300}.lmdb", "there is no LMDB folder"),
        ("path.pretrain_network_g", "x" * 300, "there is no checkpoint"),
        ("path.pretrain_network_g", "~nobody/x", "there is no checkpoint"),
    ],
)
def test_what_would_end_in_a_traceback_or_never_is_reported(sound_options, key_path, value, message):
    reported = problems(change(sound_options, key_path, value))
    assert any(problem.startswith(f"{key_path}: ") and message in problem for problem in reported), reported


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("dim", "network_g.dim: got 4611686018427387904, expected 4,096 at most."),
        ("n_blocks", "network_g.n_blocks:"),
        ("upscaling_factor", "network_g.upscaling_factor: got 4611686018427387904, expected 64 at most."),
    ],
)
def test_networks_that_would_take_for_ever_to_build_are_reported(sound_options, key, message):
    reported = problems(change(esc_options(sound_options), f"network_g.{key}", 2**62))
    assert any(problem.startswith(message) for problem in reported), reported
    (reported,) = problems(change(esc_options(sound_options), "network_g.n_blocks", 4000))
    assert reported.startswith("network_g: got ") and "blocks in all, expected 500 at most" in reported


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("trian:lr=3", "trian: unknown key. Did you mean 'train'?"),
        ("train:ema_deccay=0", "train.ema_deccay: unknown key. Did you mean 'ema_decay'?"),
        ("val:metrics:ssim:crop_border=2", "val.metrics.ssim.type: missing; expected the name of metric."),
        ("datasets:test_1:name=Set5", "datasets.test_1: unknown phase; expected train, val or val_NAME."),
    ],
)
def test_what_force_yml_adds_is_checked_as_what_the_file_has(sound_options, entry, message):
    Path("mine.yml").write_text(yaml.safe_dump(sound_options))
    (line,) = problems(load_options("mine.yml", [entry]))
    assert line.startswith(message)


def test_two_sets_of_one_name_are_reported(sound_options):
    sound_options["datasets"]["val_2"] = dict(sound_options["datasets"]["val"])
    assert problems(sound_options) == [
        "datasets.val_2.name: got 'Val', as datasets.val has. Give each a name of its own."
    ]
    sound_options["datasets"]["val_2"]["name"] = "Train"  # a training set has no results
    assert problems(sound_options) == []


def test_images_whose_results_would_have_one_name_are_reported_where_they_are_saved(sound_options):
    val = sound_options["datasets"]["val"]
    val |= {"type": "SingleImageDataset"}
    del val["dataroot_gt"], val["filename_tmpl"]
    sound_options["val"]["metrics"] = None
    Image.new("RGB", (8, 8)).save("datasets/Val/LR/5x2.jpg")
    assert problems(sound_options) == []
    (line,) = problems(change(sound_options, "val.save_img", True))
    assert line.startswith("datasets.val.dataroot_lq: results of '5x2.jpg' and '5x2.png' of")


@pytest.mark.parametrize(("side", "border", "fits"), [(48, 0, True), (47, 0, False), (48, 1, False)])
def test_images_too_small_for_niqe_are_reported(sound_options, side, border, fits):
    for file in Path("datasets/Val/LR").iterdir():
        Image.new("RGB", (60, 60)).save(file)
    for file in Path("datasets/Val/HR").iterdir():
        Image.new("RGB", (120, 120)).save(file)
    sound_options["val"]["metrics"]["niqe"] = {"type": "calculate_niqe", "crop_border": border}
    assert problems(sound_options) == []
    Image.new("RGB", (60, side)).save("datasets/Val/LR/6x2.png")
    Image.new("RGB", (120, 2 * side)).save("datasets/Val/HR/6.png")
    message = (
        f"datasets.val.dataroot_lq: the result of '6x2.png' of 'datasets/Val/LR' is 120×{2 * side}, and "
        "calculate_niqe needs 96 pixels a side within crop_border. Leave out this metric or set."
    )
    assert problems(sound_options) == ([] if fits else [message])


@pytest.mark.parametrize(("color", "channels", "fits"), [("y", 1, True), ("y", 3, False), (None, 1, False)])
def test_channels_of_images_and_network_must_agree(sound_options, color, channels, fits):
    sound_options["network_g"] |= {"num_in_ch": channels, "num_out_ch": channels}
    for dataset in sound_options["datasets"].values():
        dataset["color"] = color
    found = problems(sound_options)
    assert [line.partition(":")[0] for line in found] == (
        [] if fits else ["datasets.train.color", "datasets.val.color"]
    )
    assert all(f"and network_g takes {channels}." in line for line in found)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"type": "MSRResNet", "upscale": 7}, "MSRResNet refuses these options (AttributeError: "),
        ({"type": "RCAN", "num_in_ch": 3, "num_out_ch": 3, "squeeze_factor": 0}, "ZeroDivisionError: "),
        ({"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "rgb_mean": [1]}, "RuntimeError: shape"),
        ({"type": "SwinIR", "upscale": 2}, ""),  # cannot be made on the meta device
    ],
)
def test_networks_of_basicsr_that_cannot_be_made_are_reported(sound_options, network, message):
    sound_options["scale"] = network.get("upscale", 2)
    sound_options["datasets"]["train"]["gt_size"] = 14
    del sound_options["datasets"]["val"]
    found = [line for line in problems(change(sound_options, "network_g", network)) if "network_g" in line]
    assert len(found) == bool(message)
    assert all(line.startswith("network_g: ") and message in line for line in found)


@pytest.mark.parametrize(("key", "value"), [("input_order", "CHW"), ("convert_to", "rgb")])
def test_metrics_of_what_images_are_not_are_reported(sound_options, key, value):
    sound_options["val"]["metrics"]["niqe"] = {"type": "calculate_niqe", "crop_border": 0, key: value}
    assert any(line.startswith(f"val.metrics.niqe.{key}: got '{value}'") for line in problems(sound_options))


def test_losses_of_rgb_images_do_not_go_with_other_networks(sound_options):
    opt = esc_options(sound_options)
    opt["network_g"] |= {"in_channels": 1, "out_channels": 1}
    for dataset in opt["datasets"].values():
        dataset["color"] = "y"
    opt["train"]["perceptual_opt"] = {"type": "PerceptualLoss", "layer_weights": {"conv5_4": 1}}
    found = problems(opt)
    assert [line.partition(": ")[0] for line in found] == [
        "train.pixel_opt.type",
        "train.perceptual_opt.type",
    ]
    opt["train"] |= {"perceptual_opt": None, "pixel_opt": {"type": "L1Loss"}}
    assert problems(opt) == []
    del opt["datasets"]["val"], opt["datasets"]["train"]["color"]
    (line,) = problems(dflip_options(opt))
    assert line.startswith("datasets.train.type: gives colours, 3 channels, and network_g takes 1.")


def test_networks_that_take_color_images_alone_are_not_given_gray_ones(sound_options):
    (line,) = problems(change(esc_options(sound_options), "datasets.val.color", "y"))
    assert line.startswith("datasets.val.color: gives luma alone, 1 channel, and network_g takes 3.")


@pytest.mark.parametrize(
    ("key_path", "value", "fits"),
    [
        ("path.ignore_resume_networks", 5, False),
        ("path.ignore_resume_networks", ["network_d"], True),
        ("path.ignore_resume_networks", "network_d", True),
        ("path.ignore_resume_networks", [1], False),
        ("train.perceptual_opt.range_norm", "no", False),
        ("train.perceptual_opt.range_norm", True, True),
    ],
)
def test_values_of_another_type_than_basicsr_can_use_are_reported(sound_options, key_path, value, fits):
    sound_options["train"]["perceptual_opt"] = {"type": "PerceptualLoss", "layer_weights": {"conv5_4": 1}}
    found = problems(change(sound_options, key_path, value))
    assert [line.partition(":")[0] for line in found] == ([] if fits else [key_path])


@pytest.mark.parametrize("milestones", [[80, 50], [50, 50, 80]])
def test_milestones_may_come_in_any_order_and_more_than_once(sound_options, milestones):
    assert problems(change(sound_options, "train.scheduler.milestones", milestones)) == []


@pytest.mark.parametrize(
    ("template", "fits"),
    [
        ("{:s}x2", True),
        ("{0}x2", True),
        ("{0:s}x2", True),
        ("{}{}", False),
        ("{:9999s}", False),
        ("{x}", False),
    ],
)
def test_templates_are_those_that_basicsr_can_fill(sound_options, template, fits):
    assert (problems(change(sound_options, "datasets.val.filename_tmpl", template)) == []) == fits


def test_a_model_with_schedules_and_optimizers_of_its_own_knows_them_itself(sound_options, register):
    class TheirModel(SRModel):
        def setup_schedulers(self):
            pass

        def get_optimizer(self, optim_type, params, lr, **kwargs):
            return torch.optim.SGD(params, lr, **kwargs)

    register(MODEL_REGISTRY, TheirModel)
    sound_options["model_type"] = "TheirModel"
    sound_options["train"]["scheduler"] = {"type": "OneCycle", "max_lr": 1}
    sound_options["train"]["optim_g"] = {"type": "Prodigy", "d0": 1}
    assert problems(sound_options) == []


def test_a_basicsr_that_knows_more_optimizers_may_use_them(sound_options, monkeypatch):
    def get_optimizer(self, optim_type, params, lr, **kwargs):
        return (torch.optim.SGD if optim_type == "SGD" else torch.optim.Adam)(params, lr, **kwargs)

    sound_options["train"]["optim_g"] = {"type": "SGD", "lr": 0.1, "momentum": 0.9}
    assert problems(sound_options) == []
    get_optimizer.__module__ = BaseModel.__module__
    monkeypatch.setattr(BaseModel, "get_optimizer", get_optimizer)
    assert problems(sound_options) == []
    assert problems(change(sound_options, "train.optim_g.momentun", 0.9)) == [
        "train.optim_g.momentun: unknown key. Did you mean 'momentum'?"
    ]


def test_metrics_of_tensors_are_reported(sound_options):
    assert problems(change(sound_options, "val.metrics.psnr.type", "calculate_psnr_pt")) == [
        "val.metrics.psnr.type: is for tensors, and results are arrays. Write calculate_psnr."
    ]


@pytest.mark.parametrize(
    ("mean", "std", "key"),
    [
        ([0.5], [0.5], None),
        ([0.5, 0.4, 0.3], [1, 1, 1], None),
        ([0.5], None, "std"),
        (None, [0.5], "mean"),
        ([0.5, 0.5], [1, 1], "mean"),
        ([0.5], [0], "mean"),
    ],
)
def test_mean_and_deviation_go_together(sound_options, mean, std, key):
    sound_options["datasets"]["val"] |= {"mean": mean, "std": std}
    found = [line.partition(": ")[0] for line in problems(sound_options)]
    assert found == ([] if key is None else [f"datasets.val.{key}"])


def test_optimizers_and_schedules_that_cannot_be_made_are_reported(sound_options):
    sound_options["train"]["optim_g"] |= {"foreach": True, "fused": True}
    sound_options["train"]["scheduler"]["last_epoch"] = 5
    optimizer, scheduler = sorted(problems(sound_options))
    assert optimizer.startswith("train.optim_g: Adam refuses these options (RuntimeError: ")
    assert scheduler.startswith("train.scheduler: MultiStepRestartLR refuses these options (KeyError: ")


@pytest.mark.parametrize(
    ("key_path", "value"),
    [
        ("train.optim_g.lr", 1e308),
        ("train.optim_g.eps", 1e308),
        ("train.scheduler.gamma", 1e200),
        ("datasets.val.name", "x" * 201),
    ],
)
def test_values_beyond_what_can_be_computed_or_stored_are_reported(sound_options, key_path, value):
    (line,) = problems(change(sound_options, key_path, value))
    assert line.startswith(f"{key_path}: got ")


def test_weights_are_checked_for_every_model_of_basicsr(sound_options, save_zeros):
    opt = change(esc_options(sound_options), "path.pretrain_network_g", "net.pth")
    save_zeros(Path("net.pth"), {**opt["network_g"], "n_blocks": 2})
    opt["model_type"] = "SwinIRModel"
    opt["train"]["optim_g"]["type"] = "Adam"
    (line,) = problems(opt)
    assert line == "path.pretrain_network_g: net.pth does not fit ESC:"
