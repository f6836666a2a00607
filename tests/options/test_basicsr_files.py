"""A minimal copy of each kind of BasicSR's own option files, and of the ESC release's, is sound."""

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.archs.vgg_arch import VGG_PRETRAIN_PATH
from basicsr.data import DATASET_REGISTRY
from basicsr.models import MODEL_REGISTRY

from esc_basicsr.common.errors import UserError
from esc_basicsr.options.check import check_options
from esc_basicsr.options.loader import load_options

LOADER = {"batch_size_per_gpu": 2, "num_worker_per_gpu": 1, "dataset_enlarge_ratio": 1, "use_shuffle": True}
DISK = {"dataroot_gt": "gt", "dataroot_lq": "lq", "io_backend": {"type": "disk"}}
CROPS = {"gt_size": 32, "use_hflip": True, "use_rot": False, **LOADER}
KERNELS = ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
BLUR = {
    **{"blur_kernel_size": 21, "kernel_list": KERNELS, "kernel_prob": [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]},
    **{"sinc_prob": 0.1, "blur_sigma": [0.2, 3], "betag_range": [0.5, 4], "betap_range": [1, 2]},
}
CLIP = {"num_frame": 5, "interval_list": [1], "random_reverse": False, "meta_info_file": "list.txt", **CROPS}
WATCHED = {"cache_data": False, "num_frame": 5, "padding": "reflection_circle"}

# data sets to train on, and to test on; what PairedImageDataset needs is in the fixture
TRAINED_ON: dict[str, dict[str, Any]] = {
    "RealESRGANDataset": {
        **{"dataroot_gt": "datasets/Val/HR", "meta_info": "list.txt", "io_backend": {"type": "disk"}},
        **BLUR,
        **{f"{key}2": value for key, value in BLUR.items()},
        **{"final_sinc_prob": 0.8},
        **CROPS,
    },
    "RealESRGANPairedDataset": {**DISK, "meta_info": "list.txt", "filename_tmpl": "{:s}", **CROPS},
    "REDSDataset": {**DISK, "dataroot_flow": None, "val_partition": "REDS4", **CLIP},
    "REDSRecurrentDataset": {**DISK, "val_partition": "REDS4", "test_mode": False, **CLIP},
    "Vimeo90KDataset": {**DISK, **CLIP},
    "Vimeo90KRecurrentDataset": {**DISK, "flip_sequence": True, **CLIP},
    "FFHQDataset": {
        **{"dataroot_gt": "ffhq.lmdb", "io_backend": {"type": "lmdb"}, "use_hflip": True},
        **{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        **LOADER,
    },
}
TESTED_ON: dict[str, dict[str, Any]] = {
    "VideoTestDataset": {**DISK, **WATCHED},
    "VideoTestVimeo90KDataset": {**DISK, **WATCHED, "meta_info_file": "list.txt"},
    "VideoTestDUFDataset": {**DISK, **WATCHED, "use_duf_downsampling": True},
    "VideoRecurrentTestDataset": {**DISK, "cache_data": True, "num_frame": -1},
}
NOISE = {
    **{"resize_prob": [0.2, 0.7, 0.1], "resize_range": [0.15, 1.5], "gaussian_noise_prob": 0.5},
    **{"noise_range": [1, 30], "poisson_scale_range": [0.05, 3], "gray_noise_prob": 0.4},
    "jpeg_range": [30, 95],
}
DEGRADED = {
    **NOISE,
    **{f"{key}2": value for key, value in NOISE.items()},
    **{"second_blur_prob": 0.8, "gt_size": 32, "queue_size": 180, "high_order_degradation": True},
}
SHARPENED = {"l1_gt_usm": True, "percep_gt_usm": True, "gan_gt_usm": False}
VGG = {
    **{"type": "PerceptualLoss", "layer_weights": {"conv5_4": 1}, "vgg_type": "vgg19", "range_norm": False},
    **{"use_input_norm": True, "perceptual_weight": 1.0, "style_weight": 0, "criterion": "l1"},
}
GAN = {
    "gan_opt": {"type": "GANLoss", "gan_type": "vanilla", "real_label_val": 1.0, "loss_weight": 0.1},
    **{"optim_d": {"type": "Adam", "lr": 1e-4}, "net_d_iters": 1, "net_d_init_iters": 0},
    "perceptual_opt": VGG,
}
EDVR = {"type": "EDVR", "num_feat": 8, "num_frame": 5, "deformable_groups": 8, "center_frame_idx": None}
UNET = {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 8, "skip_connection": True}
VGG_D = {"type": "VGGStyleDiscriminator", "num_in_ch": 3, "num_feat": 8}
BASIC_VSR = {"type": "BasicVSR", "num_feat": 8, "num_block": 1, "spynet_path": None}
RRDB = {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "num_grow_ch": 4}
HIFACE = {
    "type": "HiFaceGAN",
    "num_in_ch": 3,
    "num_feat": 8,
    "use_vae": False,
    "z_dim": 256,
    "crop_size": 512,
}
COSINE = {"type": "CosineAnnealingRestartLR", "periods": [60, 40], "restart_weights": [1, 0.5], "eta_min": 0}

# model -> what its files have beside SRModel's
KINDS: dict[str, dict[str, Any]] = {
    "SRModel": {"network_g": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "upscale": 2}},
    "SwinIRModel": {"network_g": {"type": "SwinIR", "upscale": 2, "in_chans": 3, "window_size": 8}},
    "SRGANModel": {"network_d": VGG_D, "train": GAN},
    "ESRGANModel": {"network_g": RRDB, "network_d": UNET, "train": GAN},
    "RealESRNetModel": {"network_g": RRDB, "data": "RealESRGANDataset", **DEGRADED, "gt_usm": True},
    "RealESRGANModel": {
        **{"network_g": {**RRDB, "scale": 2}, "network_d": UNET, "train": GAN, "data": "RealESRGANDataset"},
        **DEGRADED,
        **SHARPENED,
        "path": {"pretrain_network_d": None, "param_key_d": "params", "strict_load_d": True},
    },
    "HiFaceGANModel": {"network_g": HIFACE, "network_d": {"type": "HiFaceGANDiscriminator"}, "train": GAN},
    "StyleGAN2Model": {
        "network_g": {"type": "StyleGAN2Generator", "out_size": 32, "resample_kernel": [1, 3, 3, 1]},
        "network_d": {"type": "StyleGAN2Discriminator", "out_size": 32, "channel_multiplier": 2},
        "data": "FFHQDataset",
        "train": {
            **GAN,
            **{"r1_reg_weight": 10, "path_batch_shrink": 2, "path_reg_weight": 2, "mixing_prob": 0.9},
            **{"net_g_reg_every": 4, "net_d_reg_every": 16, "pixel_opt": None},
        },
    },
    "VideoBaseModel": {"network_g": {"type": "TOFlow"}, "data": "Vimeo90KDataset", "save_img": True},
    "EDVRModel": {
        **{"network_g": EDVR, "data": "REDSDataset", "find_unused_parameters": True},
        "train": {"tsa_iter": 50, "dcn_lr_mul": 1, "scheduler": COSINE},
    },
    "VideoRecurrentModel": {
        **{"network_g": BASIC_VSR, "data": "REDSRecurrentDataset"},
        "train": {"fix_flow": 5000, "flow_lr_mul": 0.125, "scheduler": COSINE},
    },
    "VideoRecurrentGANModel": {
        **{"network_g": BASIC_VSR, "network_d": VGG_D, "data": "Vimeo90KRecurrentDataset"},
        "train": {**GAN, "fix_flow": None, "lr_flow": 0.0},
    },
    "VideoGANModel": {"network_g": EDVR, "network_d": VGG_D, "data": "REDSDataset", "train": GAN},
}


@pytest.fixture
def sound_options(sound_options: dict[str, Any]) -> dict[str, Any]:
    """Have the list of images that some data sets want beside them."""
    Path("list.txt").write_text("".join(f"{number}.png\n" for number in range(8)))
    return sound_options


def copied(sound: dict[str, Any], model: str) -> dict[str, Any]:
    """Make a file of a kind from SRModel's."""
    kind = copy.deepcopy(KINDS[model])
    data = kind.pop("data", None)
    opt = {**sound, **kind, "model_type": model}
    for section in ("train", "path"):
        opt[section] = {**sound[section], **kind.get(section, {})}
    if data is not None:
        opt["datasets"]["train"] = {"name": "Train", "type": data, **TRAINED_ON[data]}
    if data is not None and data != "RealESRGANDataset":
        del opt["datasets"]["val"], opt["val"]
    return opt


def of_basicsr(registry: Any) -> dict[str, Any]:
    return {
        name.removesuffix("_basicsr"): cls
        for name, cls in iter(registry)
        if cls.__module__.startswith("basicsr.")
    }


def test_there_is_a_copy_of_each_kind() -> None:
    assert KINDS.keys() == of_basicsr(MODEL_REGISTRY).keys()
    data_sets = {**TRAINED_ON, **TESTED_ON}
    assert {"PairedImageDataset", "SingleImageDataset", *data_sets} == of_basicsr(DATASET_REGISTRY).keys()


@pytest.mark.parametrize("name", [*TRAINED_ON, *TESTED_ON])
def test_a_copy_has_every_key_that_its_data_set_reads(name: str) -> None:
    cls = of_basicsr(DATASET_REGISTRY)[name]
    of_its_own = {"scale", "phase", "name", "db_paths", "client_keys", "type"}  # set by BasicSR, or in all
    read = {*re.findall(r"opt\['(\w+)'\]", inspect.getsource(cls))} - of_its_own
    optional = {*re.findall(r"'(\w+)' in (?:self\.)?opt", inspect.getsource(cls)), "meta_info_file"}
    assert read - optional <= {**TRAINED_ON, **TESTED_ON}[name].keys()


@pytest.mark.parametrize("model", KINDS)
def test_a_file_to_train_with_is_sound(sound_options: dict[str, Any], model: str) -> None:
    check_options(copied(sound_options, model), "mine.yml", is_train=True)


@pytest.mark.parametrize("name", TRAINED_ON)
def test_a_training_set_of_each_kind_is_sound(sound_options: dict[str, Any], name: str) -> None:
    sound_options["datasets"]["train"] = {"name": "Train", "type": name, **TRAINED_ON[name]}
    check_options(sound_options, "mine.yml", is_train=True)


@pytest.mark.parametrize("name", TESTED_ON)
def test_a_file_to_test_videos_with_is_sound(sound_options: dict[str, Any], name: str) -> None:
    opt = copied(sound_options, "VideoBaseModel")
    opt["datasets"] = {"test": {"name": "Vid4", "type": name, **TESTED_ON[name]}}
    opt["val"] = {"save_img": True, "suffix": None}
    check_options(opt, "mine.yml", is_train=False)


def test_gray_files_are_sound(sound_options: dict[str, Any]) -> None:
    network = {"type": "ECBSR", "num_in_ch": 1, "num_out_ch": 1, "num_block": 1, "num_channel": 8}
    sound_options["network_g"] = {**network, "with_idt": False, "act_type": "prelu", "scale": 2}
    for dataset in sound_options["datasets"].values():
        dataset["color"] = "y"
    check_options(sound_options, "mine.yml", is_train=True)


def test_a_mistyped_key_of_a_class_that_is_found_by_its_short_name_is_reported(
    sound_options: dict[str, Any],
) -> None:
    sound_options["network_d"] = {**UNET, "skip_conection": True}
    with pytest.raises(UserError, match=r"network_d.skip_conection: unknown key. Did you mean 'skip_conn"):
        check_options(sound_options, "mine.yml", is_train=True)


def released(sound: dict[str, Any]) -> dict[str, Any]:
    """Make options as the ESC release writes them."""
    network = {"type": "ESC", "upscaling_factor": 2, "dim": 16, "pdim": 4, "n_blocks": 1, "conv_blocks": 1}
    sound["network_g"] = {**network, "exp_ratio": 1.25, "deployment": True, "attn_type": "Flex"}
    sound["train"]["optim_g"]["type"] = "AdamW"
    return {**sound, "model_type": "ESRModel"}


def loaded(opt: dict[str, Any]) -> dict[str, Any]:
    Path("mine.yml").write_text(yaml.safe_dump(opt))
    return load_options("mine.yml")


def test_the_releases_files_are_read_by_the_names_here(sound_options: dict[str, Any]) -> None:
    opt = released(sound_options)
    train = opt["datasets"]["train"]
    root = train["dataroot_gt"]
    train["type"] = "DownsampleImageDataset"
    del train["dataroot_lq"]
    train["filename_tmpl"] = "{}"
    read = loaded(opt)
    check_options(read, "mine.yml", is_train=True)
    assert read["model_type"] == "ESCModel"
    assert read["val"]["pad_to_window"] is True
    assert read["datasets"]["train"]["type"] == "DFLIPDataset"
    assert read["datasets"]["train"]["sources"] == [{"dataroot_gt": root}]


@pytest.mark.parametrize(
    ("section", "name", "message"),
    [
        ("", "RealHATMSEModel", "model_type: got 'RealHATMSEModel', no known model. It is the release's"),
        ("", "RealHATGANModel", "RealESRGANModel has the same keys"),
        ("datasets", "DownsampleImageDataset", "Here it is DFLIPDataset, which reads an LMDB"),
    ],
)
def test_what_the_release_has_and_we_do_not_is_said(
    sound_options: dict[str, Any], section: str, name: str, message: str
) -> None:
    opt = released(sound_options)
    if section:
        opt["datasets"]["train"] |= {"type": name, "io_backend": {"type": "disk"}}
    else:
        opt["model_type"] = name
    with pytest.raises(UserError) as caught:
        check_options(loaded(opt), "mine.yml", is_train=True)
    assert message in str(caught.value)


@pytest.mark.parametrize("section", ["network_d", "optim_d", "gan_opt"])
@pytest.mark.parametrize(
    "model", ["ESRGANModel", "HiFaceGANModel", "VideoRecurrentGANModel", "StyleGAN2Model"]
)
def test_what_a_model_needs_to_train_is_reported_where_it_is_missing(
    sound_options: dict[str, Any], model: str, section: str
) -> None:
    opt = copied(sound_options, model)
    where = section if section == "network_d" else f"train.{section}"
    del (opt if section == "network_d" else opt["train"])[section]
    with pytest.raises(UserError) as caught:
        check_options(opt, "mine.yml", is_train=True)
    _, line = str(caught.value).splitlines()
    assert line == f"  {where}: missing; expected a section of 'key: value' lines."


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            "gan_opt",
            {"type": "GanLoss"},
            "train.gan_opt.type: got 'GanLoss', no known loss. Did you mean 'GANLoss'",
        ),
        (
            "gan_opt",
            {"gan_type": "wgann"},
            "train.gan_opt: GANLoss refuses these options (NotImplementedError: ",
        ),
        ("gan_opt", {"loss_weigth": 1}, "train.gan_opt.loss_weigth: unknown key. Did you mean 'loss_weight'"),
        ("optim_d", {"lr": "1e-4"}, "train.optim_d.lr: got the text '1e-4', expected a number above 0"),
        ("optim_d", {"type": "Adamm"}, "train.optim_d.type: got 'Adamm', no known optimizer of ESRGANModel"),
    ],
)
def test_sections_of_adversarial_training_are_checked(
    sound_options: dict[str, Any], section: str, changes: dict[str, Any], message: str
) -> None:
    opt = copied(sound_options, "ESRGANModel")
    opt["train"][section] = {**opt["train"][section], **changes}
    with pytest.raises(UserError) as caught:
        check_options(opt, "mine.yml", is_train=True)
    _, line = str(caught.value).splitlines()
    assert line.strip().startswith(message)


@pytest.mark.parametrize("name", TRAINED_ON)
def test_every_key_that_a_data_set_reads_is_missed(sound_options: dict[str, Any], name: str) -> None:
    keys = TRAINED_ON[name].keys() - LOADER.keys() - {"meta_info_file", "filename_tmpl", "interval_list"}
    keys -= {"random_reverse"} if "Recurrent" in name else set()
    keys -= {"gt_size"} if name == "RealESRGANDataset" else set()
    keys -= {"meta_info"}  # of folders alone
    sound_options["datasets"]["train"] = {"name": "Train", "type": name, **LOADER}
    if "meta_info_file" in TRAINED_ON[name]:
        sound_options["datasets"]["train"]["meta_info_file"] = "list.txt"
    with pytest.raises(UserError) as caught:
        check_options(sound_options, "mine.yml", is_train=True)
    missed = {line.partition(": missing; ")[0].strip() for line in str(caught.value).splitlines()[1:]}
    assert {f"datasets.train.{key}" for key in keys} <= missed


@pytest.mark.parametrize("model", ["RealESRNetModel", "RealESRGANModel"])
def test_a_degradation_that_is_missing_is_reported(sound_options: dict[str, Any], model: str) -> None:
    opt = copied(sound_options, model)
    jpeg = opt.pop("jpeg_range2")
    with pytest.raises(UserError, match=f"jpeg_range2: missing; {model} reads it to degrade images"):
        check_options(opt, "mine.yml", is_train=True)
    check_options(opt | {"high_order_degradation": False}, "mine.yml", is_train=True)
    with pytest.raises(UserError, match=r"jpeg_rnage2: unknown key\. Did you mean 'jpeg_range2'"):
        check_options(opt | {"jpeg_rnage2": jpeg}, "mine.yml", is_train=True)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (
            "queue_size",
            181,
            "queue_size: got 181, expected a multiple of the 2 samples of a step",
        ),
        ("gt_size", 31, "gt_size: got 31, expected a multiple of scale, 2"),
        ("gt_size", 402, "gt_size: got 402, expected a whole number of at least 1, and at most 400"),
        ("second_blur_prob", 1.5, "second_blur_prob: got 1.5, expected a number from 0 to 1"),
        ("resize_prob", [0.3, 0.7], "resize_prob: got [0.3, 0.7], expected a list, 3 items"),
        ("channels_last", True, "channels_last: unknown key. With model_type: ESCModel it is known"),
        ("datasets.train.global_batch_size", 7, "queue_size: got 180, expected a multiple of the 7 samples"),
        ("datasets.train.meta_info", None, "datasets.train.meta_info: missing; expected a file that lists"),
        (
            "datasets.train.meta_info",
            "no.txt",
            "datasets.train.meta_info: there is no list of images",
        ),
        ("datasets.train.dataroot_gt", "no", "datasets.train.dataroot_gt: there is no folder of images 'no'"),
        ("datasets.train.sinc_prbo", 0.1, "datasets.train.sinc_prbo: unknown key. Did you mean 'sinc_prob'"),
        ("path.pretrain_network_d", "no.pth", "path.pretrain_network_d: there is no checkpoint 'no.pth'"),
    ],
)
def test_what_does_not_go_with_degradations_is_reported(
    sound_options: dict[str, Any], where: str, value: Any, message: str
) -> None:
    opt = copied(sound_options, "RealESRGANModel")
    section: Any = opt
    *sections, key = where.split(".")
    for name in sections:
        section = section[name]
    section[key] = value
    with pytest.raises(UserError) as caught:
        check_options(opt, "mine.yml", is_train=True)
    assert f"\n  {message}" in str(caught.value)


def test_images_that_degrading_models_cannot_use_are_refused(sound_options: dict[str, Any]) -> None:
    opt = copied(sound_options, "RealESRNetModel")
    opt["datasets"]["train"] = {**opt["datasets"]["val"], **LOADER, **CROPS}
    with pytest.raises(UserError, match=r"train.type: got 'PairedImageDataset', expected RealESRGANDataset"):
        check_options(opt, "mine.yml", is_train=True)


@pytest.mark.parametrize(
    ("vgg_type", "file"), [("vgg19", "vgg19-dcbb9e9d.pth"), ("vgg16", "vgg16-397923af.pth")]
)
def test_missing_weights_of_vgg_are_reported_and_not_downloaded(
    sound_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vgg_type: str, file: str
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    Path(VGG_PRETRAIN_PATH).unlink()
    opt = copied(sound_options, "RealESRGANModel")
    opt["train"]["perceptual_opt"]["vgg_type"] = vgg_type
    with pytest.raises(UserError) as caught:
        check_options(opt, "mine.yml", is_train=True)
    (line, _) = str(caught.value).splitlines()[1:]
    assert line.startswith("  train.perceptual_opt: there are no weights ")
    assert f"{file}', which PerceptualLoss needs. Download them from https://" in line
    (tmp_path / "cache" / "checkpoints").mkdir(parents=True)
    (tmp_path / "cache" / "checkpoints" / file).touch()  # where torchvision keeps what it has downloaded
    check_options(opt, "mine.yml", is_train=True)
    opt["train"]["perceptual_opt"]["vgg_type"] = "vgg91"
    with pytest.raises(UserError, match=r"vgg_type: got 'vgg91'\. Did you mean 'vgg19'"):
        check_options(opt, "mine.yml", is_train=True)
