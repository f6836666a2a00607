"""The shipped option files: in sync with their source, read alike by BasicSR, sound, as published."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.losses import build_loss
from basicsr.utils.options import ordered_yaml
from jsonschema import Draft7Validator

from esc_basicsr.archs.variants import RELEASED
from esc_basicsr.common.errors import UserError
from esc_basicsr.metrics.published import published_restoration
from esc_basicsr.options.baselines import BASELINES
from esc_basicsr.options.check import check_options
from esc_basicsr.options.loader import load_options
from esc_basicsr.options.recipes import option_files
from esc_basicsr.options.reference import json_schema, reference
from esc_basicsr.options.schema import CALLED
from esc_basicsr.weights.shipped import model_list

OPTIONS = Path(__file__).parents[2] / "options"
FILES = sorted(map(str, option_files()))
LARGE = (("ESC", "DFLIP"), ("ESC-XL", "DF2K"))  # trained on several sets
REAL = [file for file in FILES if file.endswith(("_MSE.yml", "_GAN.yml"))]
STAGES = [file for file in REAL if file.startswith("train")]
TRAINING = [file for file in FILES if file.startswith("train") and file not in REAL]
DEGRADED = [file for file in FILES if "_x1_" in file]
VALIDATOR = Draft7Validator(json.loads(json_schema()))


def read(file: str) -> dict[str, Any]:
    return load_options(OPTIONS / file)


def test_committed_files_are_the_generated_ones():
    committed = {str(path.relative_to(OPTIONS)): path.read_text() for path in OPTIONS.rglob("*.*")}
    assert committed.pop("schema.json") == json_schema()
    assert committed == {str(path): text for path, text in option_files().items()}


def test_the_committed_page_is_the_generated_one():
    assert (OPTIONS.parent / "docs/options.md").read_text() == reference()


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_valid_against_the_schema_that_its_first_line_names(file):
    first, _, _ = (OPTIONS / file).read_text().partition("\n")
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert ((OPTIONS / file).parent / named).resolve() == OPTIONS / "schema.json"
    assert [*VALIDATOR.iter_errors(read(file))] == []


@pytest.mark.parametrize("file", [FILES[0], "train/ESC/ESC_x2_DFLIP.yml", "train/ESC/ESC_x2_DIV2K.yml"])
def test_a_mistyped_key_or_value_is_invalid_by_the_schema_wherever_it_is(file):
    def broken(value: Any, where: str) -> Iterator[tuple[str, Any]]:
        """Give the options with one key more, in each section that has no keys but those known."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                for inner, changed in broken(item, f"{where}[]"):
                    yield inner, [*value[:index], changed, *value[index + 1 :]]
        if not isinstance(value, dict):
            return
        if where not in (*CALLED, "datasets", "val.metrics", "val.metrics.psnr", "val.metrics.ssim"):
            yield where, {**value, "mistyped": 1}
        for key, item in value.items():
            for inner, changed in broken(item, f"{where}.{key}".lstrip(".")):
                yield inner, {**value, key: changed}

    cases = [*broken(read(file), "")]
    assert len(cases) >= 8
    assert [
        where for where, options in cases if VALIDATOR.is_valid(options) and "io_backend" not in where
    ] == []


def test_every_variant_scale_and_training_set_has_a_file_to_train_and_one_to_test_by():
    networks = [
        f"{variant}_x{scale}_DIV2K" for variant in ("ESC", "ESC-light", "ESC-FP") for scale in (2, 3, 4)
    ]
    networks += [f"{name}_x{scale}_{data}" for scale in (2, 3, 4) for name, data in LARGE]
    stems = {kind: {Path(file).stem for file in FILES if file.startswith(kind)} for kind in ("train", "test")}
    ablation = {stem for stem in stems["train"] if stem.startswith("ESC_x2_DIV2K_")}
    ships = {f"ESC-light_x{scale}_photographs" for scale in (2, 4)}
    real = {f"{name}_DIV2K_{stage}" for name in ("ESC-Real_x4", "ESC-RealM_x2") for stage in ("MSE", "GAN")}
    tasks = ("noise15", "noise25", "noise50", "jpeg", "jpeg_gray")
    degraded = {f"{variant}_x1_DIV2K_{task}" for variant in ("ESC", "ESC-RealM") for task in tasks}
    assert stems["train"] == {*networks, *ablation, *ships, *real, *degraded}
    baselines = {f"{baseline}_x{scale}_DIV2K" for baseline in BASELINES for scale in (2, 3, 4)}
    assert stems["test"] == {
        *networks,
        *ablation,
        *baselines,
        *ships,
        *real,
        *degraded,
        "Bicubic_x2",
        "Bicubic_x3",
        "Bicubic_x4",
    }
    assert len(ablation) == 7


@pytest.mark.parametrize("file", FILES)
def test_stock_basicsr_reads_the_same_values(file):
    with (OPTIONS / file).open() as stream:
        stock = yaml.load(stream, Loader=ordered_yaml()[0])
    ours = read(file)
    assert ours == stock
    assert repr(ours) == repr(stock)  # types and order, too


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_sound_where_its_data_is(file, tmp_path, monkeypatch, make_data, caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("basicsr").propagate = True
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # as published: a batch of 64
    options = read(file)
    make_data(options, images=64)
    check_options(options, file, is_train=file.startswith("train"))
    assert caplog.text == ""


@pytest.mark.parametrize("file", FILES)
def test_name_is_the_files_and_no_path_is_absolute(file):
    options = read(file)
    assert options["name"] == Path(file).stem
    text = (OPTIONS / file).read_text()
    assert text.splitlines()[1].startswith("# Generated by: python -m esc_basicsr options --write options.")
    assert f"-opt options/{file}\n" in text

    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for inner in value.values() for text in texts(inner)]
        if isinstance(value, list):
            return [text for inner in value for text in texts(inner)]
        return [value] if isinstance(value, str) else []

    for value in texts(options):
        assert not Path(value).is_absolute() and not value.startswith("~")
        if "/" in value:
            assert value.split("/")[0] in ("datasets", "experiments")


@pytest.mark.parametrize(
    "file",
    [file for file in TRAINING if "photographs" not in file and file not in DEGRADED],
)
def test_training_follows_the_published_recipe(file):
    options = read(file)
    train, scale = options["train"], options["scale"]
    assert train["optim_g"] == {"type": "AdamW", "lr": 5e-4, "weight_decay": 0, "betas": [0.9, 0.9]}
    assert train["scheduler"] == {
        "type": "MultiStepLR",
        "milestones": [250000, 400000, 450000, 475000, 490000],
        "gamma": 0.5,
    }
    assert (train["total_iter"], train["warmup_iter"], train["ema_decay"]) == (500000, 20000, 0.999)
    data = options["datasets"]["train"]
    assert (data["gt_size"], data["global_batch_size"]) == (64 * scale, 64)  # published: 16 on each of 4 GPUs
    if "DFLIP" in file:
        roots = [source["dataroot_gt"].split("/")[1] for source in data["sources"]]
        assert roots == ["DIV2K", "Flickr2K", "LSDIR", "DiverSeg-IP"]
    elif "DF2K" in file:
        roots = [source["dataroot_gt"].split("/")[1] for source in data["sources"]]
        assert roots == ["DIV2K", "Flickr2K"]
    else:
        assert data["dataroot_lq"].endswith(f"_X{scale}_sub.lmdb")
    start = None if scale == 2 else options["name"].replace(f"_x{scale}_", "_x2_")
    assert options["path"]["pretrain_network_g"] == (start and f"experiments/{start}/models/net_g_latest.pth")
    assert options["path"]["param_key_g"] == "params_ema"


@pytest.mark.parametrize("file", STAGES)
def test_stages_for_photographs_follow_the_releases_recipe(file):
    options = read(file)
    train, is_first = options["train"], file.endswith("_MSE.yml")
    data = options["datasets"]["train"]
    assert (options["gt_size"], options["queue_size"], data["batch_size_per_gpu"]) == (256, 180, 12)
    assert options["network_g"]["upscaling_factor"] == options["scale"]
    assert train["pixel_opt"] == {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
    optimizer = {"type": "Adam", "lr": 1e-4, "weight_decay": 0, "betas": [0.9, 0.99]}
    if is_first:
        assert (options["model_type"], train["total_iter"]) == ("RealESRNetModel", 1_000_000)
        optimizer |= {"type": "AdamW", "lr": 5e-4, "betas": [0.9, 0.9]}
        assert train["scheduler"] == {"type": "MultiStepLR", "milestones": [100_000], "gamma": 0.4}
        assert options["gt_usm"] is True and options["path"]["pretrain_network_g"] is None
        assert not {"network_d", "l1_gt_usm"} & options.keys() and "gan_opt" not in train
    else:
        assert (options["model_type"], train["total_iter"]) == ("RealESRGANModel", 400_000)
        assert [options[f"{loss}_gt_usm"] for loss in ("l1", "percep", "gan")] == [True, True, False]
        assert train["optim_d"] == optimizer and train["gan_opt"]["loss_weight"] == 0.1
        weights = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1, "conv4_4": 1, "conv5_4": 1}
        assert train["perceptual_opt"]["layer_weights"] == weights
        assert options["path"]["param_key_g"] == "params_ema"
        first = read(file.replace("_GAN", "_MSE"))
        assert options["path"]["pretrain_network_g"] == f"experiments/{first['name']}/models/net_g_latest.pth"
        assert options["network_g"] == first["network_g"] and data == first["datasets"]["train"]
    assert train["optim_g"] == optimizer and train["ema_decay"] == 0.999


@pytest.mark.parametrize("file", STAGES)
def test_photographs_are_tested_without_hr_and_with(file):
    options, trained = read(file.replace("train", "test", 1)), read(file)
    for key in ("name", "scale", "network_g"):
        assert options[key] == trained[key]
    own, scale = f"experiments/{trained['name']}/models/net_g_latest.pth", trained["scale"]
    assert (options["path"]["pretrain_network_g"], options["val"]["save_img"]) == (own, True)
    photographs, pairs = options["datasets"].values()
    assert (photographs["type"], pairs["type"]) == ("SingleImageDataset", "PairedImageDataset")
    assert pairs["dataroot_lq"].endswith(f"/X{scale}") and pairs["filename_tmpl"] == f"{{}}x{scale}"
    metrics = {metric["type"]: metric for metric in options["val"]["metrics"].values()}
    assert metrics.pop("calculate_niqe") == {"type": "calculate_niqe", "crop_border": 0, "better": "lower"}
    assert metrics.keys() == {"calculate_psnr", "calculate_ssim"}
    assert all(one["crop_border"] == scale and one["test_y_channel"] for one in metrics.values())


@pytest.mark.parametrize("file", DEGRADED)
def test_what_keeps_the_size_is_trained_and_measured_as_its_field_does(file):
    options = read(file)
    sets = {each["name"]: each for each in options["datasets"].values()}
    training = sets.pop("DIV2K", None)
    is_gray, is_jpeg = file.endswith("_jpeg_gray.yml"), "_jpeg" in file
    task = Path(file).stem.rpartition("_")[2]
    sigma = None if is_jpeg else int(task.removeprefix("noise"))
    assert {each["type"] for each in options["datasets"].values()} == {"DegradedDataset"}
    assert {each.get("color") for each in options["datasets"].values()} == {"y" if is_gray else None}
    assert options["network_g"].get("in_channels", 3) == (1 if is_gray else 3)
    assert (options["scale"], options["network_g"]["upscaling_factor"]) == (1, 1)
    metrics = options["val"]["metrics"].values()
    is_luma = is_jpeg and not is_gray
    assert all((one["crop_border"], one["test_y_channel"]) == (0, is_luma) for one in metrics)
    if training is not None:
        assert options["train"]["pixel_opt"]["type"] == "L1Loss"
        assert training.get("jpeg_quality") == ([10, 90] if is_jpeg else None)
        assert training.get("noise_sigma") == sigma
        assert len(sets) == 1
        return
    if is_jpeg:
        kinds = [f"{'gray_' * is_gray}quality{quality}" for quality in (10, 20, 30, 40)]
        assert [*sets] == [f"{name}_{kind}" for name in ("Classic5", "LIVE1") for kind in kinds]
        assert all(name.endswith(f"quality{each['jpeg_quality']}") for name, each in sets.items())
    else:
        assert sets.keys() == {f"{name}_noise{sigma}" for name in ("CBSD68", "Kodak24", "McMaster")}
        assert {each["noise_sigma"] for each in sets.values()} == {sigma}
    published = published_restoration()["SwinIR"]
    assert (sets.keys() <= published.keys()) != is_luma
    for name, each in sets.items():
        assert each["sources"] == [{"dataroot_gt": f"datasets/{name.partition('_')[0]}"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["datasets:train:noise_sigma=~"],
            "datasets.train.noise_sigma: expected either this or jpeg_quality",
        ),
        (
            ["datasets:train:jpeg_quality=10"],
            "datasets.train.noise_sigma: expected either this or jpeg_quality",
        ),
        (
            ["datasets:train:jpeg_quality=101"],
            "datasets.train.jpeg_quality: got 101, expected a whole number",
        ),
        (
            ["datasets:train:jpeg_quality=[90,10]", "datasets:train:noise_sigma=~"],
            "datasets.train.jpeg_quality: got [90, 10], expected the least first",
        ),
        (
            ["datasets:val:jpeg_quality=[10,90]", "datasets:val:noise_sigma=~"],
            "datasets.val.jpeg_quality: got [10, 90], expected one quality: it is drawn for training alone",
        ),
        (["datasets:train:color=y"], "datasets.train.color: is for jpeg_quality alone. Leave it out"),
        (["scale=2"], "datasets.train.type: got 'DegradedDataset', which is for scale 1, and scale is 2"),
        (
            ["datasets:val:sources=[{dataroot_gt: nowhere}]"],
            "datasets.val.sources[0].dataroot_gt: there is no folder",
        ),
    ],
)
def test_degradation_that_cannot_be_done_is_refused(tmp_path, monkeypatch, make_data, changes, message):
    monkeypatch.chdir(tmp_path)
    file = OPTIONS / "train/ESC/ESC_x1_DIV2K_noise25.yml"
    make_data(load_options(file), images=64)
    with pytest.raises(UserError) as caught:
        check_options(load_options(file, ["num_gpu=0", *changes]), file, is_train=True)
    assert f"\n  {message}" in str(caught.value)


@pytest.mark.parametrize(("scale", "iterations"), [(2, 25_000), (4, 6_000)])
def test_what_ships_was_trained_on_photographs_and_chosen_by_others(scale, iterations):
    name = f"ESC-light_x{scale}_photographs"
    options = read(f"train/ESC-light/{name}.yml")
    train, data = options["train"], options["datasets"]["train"]
    assert train["scheduler"]["periods"] == [train["total_iter"]] == [iterations]
    assert (data["gt_size"], data["global_batch_size"]) == (32 * scale, 4)
    assert options["datasets"]["val"]["name"] == "heldout"
    assert data["dataroot_lq"] == f"datasets/photographs/photographs_LR_bicubic_X{scale}_sub.lmdb"
    tested = read(f"test/ESC-light/{name}.yml")
    assert tested["path"]["pretrain_network_g"] in model_list()
    assert [dataset["name"] for dataset in tested["datasets"].values()] == ["Set5", "Set14"]


@pytest.mark.parametrize(
    "file",
    [f for f in FILES if f.startswith("test") and "photographs" not in f and f not in (*DEGRADED, *REAL)],
)
def test_testing_covers_the_five_benchmarks_on_luma_with_the_scale_as_border(file):
    options = read(file)
    scale = options["scale"]
    # BasicSR tests in the order of the sections' names.
    sets = [dataset for _, dataset in sorted(options["datasets"].items())]
    assert [dataset["name"] for dataset in sets] == ["Set5", "Set14", "B100", "Urban100", "Manga109"]
    for dataset in sets:
        assert dataset["dataroot_gt"] == f"datasets/{dataset['name']}/HR/X{scale}"
        assert dataset["dataroot_lq"] == f"datasets/{dataset['name']}/LR_bicubic/X{scale}"
        assert dataset["filename_tmpl"] == f"{{}}x{scale}"
    metrics = options["val"]["metrics"]
    assert [metric["type"] for metric in metrics.values()] == ["calculate_psnr", "calculate_ssim"]
    assert all(metric["crop_border"] == scale and metric["test_y_channel"] for metric in metrics.values())
    folder = Path(file).parent.name
    own = f"experiments/{options['name']}/models/net_g_latest.pth"
    expected = {
        "Bicubic": None,
        **dict.fromkeys(BASELINES, f"experiments/pretrained_models/{options['name']}.pth"),
    }
    assert options["path"]["pretrain_network_g"] == expected.get(folder, own)


@pytest.mark.parametrize("file", TRAINING)
def test_a_network_is_tested_as_it_was_trained(file):
    assert read(file)["network_g"] == read(file.replace("train", "test", 1))["network_g"]


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.startswith("train") and "ablation" not in file]
)
def test_networks_are_the_published_variants(file):
    options = read(file)
    network = dict(options["network_g"])
    assert (network.pop("upscaling_factor"), network.pop("attn_type")) == (options["scale"], "auto")
    own = {"upsampler": "conv", "unshuffle_mod": False} if file in DEGRADED and "RealM" in file else {}
    own |= {"in_channels": 1, "out_channels": 1} if "_gray" in file else {}
    assert network == RELEASED[options["name"].split("_")[0]] | own


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ("attention_only", {"token_mixer": "attention", "conv_blocks": 2}),
        ("conv_attention_only", {"token_mixer": "conv_attention", "conv_blocks": 7}),
        ("kernel9", {"kernel_size": 9}),
        ("kernel17", {"kernel_size": 17}),
        ("no_dynamic_kernel", {"dynamic_kernel": False}),
        ("unshared_no_dynamic_kernel", {"share_large_kernel": False, "dynamic_kernel": False}),
        ("window16", {"window_size": 16, "conv_blocks": 6}),
    ],
)
def test_ablation_rows_differ_from_esc_in_what_they_ablate_alone(row, changes):
    whole = read("train/ESC/ESC_x2_DIV2K.yml")
    ablated = read(f"train/ablation/ESC_x2_DIV2K_{row}.yml")
    assert ablated["network_g"] == {**whole["network_g"], **changes}
    assert {**ablated, "name": "", "network_g": {}} == {**whole, "name": "", "network_g": {}}


LOSSES = {
    "shipped": {"type": "YChannelL1Loss", "chroma_weight": 0.2, "loss_weight": 1.0, "reduction": "mean"},
    "paper": {"type": "YChannelL1Loss", "loss_weight": 1.0, "reduction": "mean"},
    "release": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
}


@pytest.mark.parametrize("file", [file for file in TRAINING if file not in DEGRADED])
def test_the_losses_of_paper_and_release_are_one_line_each(file, tmp_path, monkeypatch, make_data):
    lines = (OPTIONS / file).read_text().splitlines()
    shipped, paper, release = (index for index, line in enumerate(lines) if "pixel_opt:" in line)
    monkeypatch.chdir(tmp_path)
    for name, index in {"shipped": shipped, "paper": paper, "release": release}.items():
        mine = [*lines]
        mine[shipped] = mine[index].replace("# pixel_opt", "pixel_opt")
        Path(f"{name}.yml").write_text("\n".join(mine))
        options = load_options(f"{name}.yml", ["num_gpu=0"])
        assert options["train"]["pixel_opt"] == LOSSES[name]
        if name == "shipped":
            make_data(options, images=64)
        check_options(options, f"{name}.yml", is_train=True)
        loss = build_loss(options["train"]["pixel_opt"])
        assert getattr(loss, "chroma_weight", None) == {"shipped": 0.2, "paper": 0, "release": None}[name]
