"""Checkpoints load unchanged, of another scale too, or say why they do not."""

import copy
import inspect
import json
import os
import random
import resource
import struct
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from esc_basicsr.archs import VARIANTS
from esc_basicsr.archs.variants import NETWORKS
from esc_basicsr.common.errors import UserError
from esc_basicsr.weights.fit import check_fit, load_weights
from esc_basicsr.weights.infer import infer_network_options
from esc_basicsr.weights.read import is_safetensors, read_safetensors_metadata, read_weights
from esc_basicsr.weights.shipped import load_network
from esc_basicsr.weights.write import write_safetensors

ABLATIONS = [
    {},
    {"use_ln": True},
    {"dynamic_kernel": False},
    {"share_large_kernel": False, "dynamic_kernel": False},
    {"share_large_kernel": False},
    {"token_mixer": "attention"},
    {"token_mixer": "conv_attention"},
    {"exp_ratio": 1.7},
]


@pytest.fixture
def saved(tmp_path, tiny_network, build_network):
    """A checkpoint as BasicSR saves it, and its network."""
    net = build_network(tiny_network)
    ema = build_network(tiny_network)
    path = tmp_path / "net_g_latest.pth"
    torch.save({"params": net.state_dict(), "params_ema": ema.state_dict()}, path)
    return path, net, ema


def test_params_and_params_ema_load_strictly_and_unchanged(saved, tiny_network, build_network):
    path, net, ema = saved
    for key, source in (("params", net), ("params_ema", ema)):
        fresh = build_network(tiny_network)
        load_weights(fresh, read_weights(path, key), path)
        assert all(
            torch.equal(value, source.state_dict()[name]) for name, value in fresh.state_dict().items()
        )


def test_bare_state_dict_and_module_prefix_are_read(tmp_path, saved):
    _, net, _ = saved
    torch.save({f"module.{key}": value for key, value in net.state_dict().items()}, tmp_path / "bare.pth")
    weights = read_weights(tmp_path / "bare.pth", None)
    assert list(weights) == list(net.state_dict())


FORMS = {
    "torch.compile": lambda w: {"params": {f"_orig_mod.{key}": value for key, value in w.items()}},
    "compiled, then DDP": lambda w: {f"module._orig_mod.{key}": value for key, value in w.items()},
    "averaged": lambda w: {"n_averaged": torch.tensor(5), **{f"module.{k}": v for k, v in w.items()}},
    "counted by thop": lambda w: {**w, "total_ops": torch.zeros(1), "last.total_params": torch.zeros(1)},
    "with a number beside": lambda w: {**w, "epoch": 3, "note": "sound"},
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model and optimizer": lambda w: {"model": w, "optimizer": {"state": {}, "param_groups": []}},
    "an unknown name alone": lambda w: {"weights": w, "step": 3},
    "Lightning": lambda w: {"state_dict": {f"net_g.{k}": v for k, v in w.items()}, "global_step": 7},
    "GAN in Lightning": lambda w: {
        "state_dict": {
            **{f"generator.{k}": v for k, v in w.items()},
            **{f"discriminator.{k}": v + 1 for k, v in w.items()},
        }
    },
    "a wrapped generator": lambda w: {"params": {f"model.net.{k}": v for k, v in w.items()}},
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_other_trainers_load(form, saved, tiny_network, build_network, tmp_path):
    _, net, _ = saved
    torch.save(FORMS[form](net.state_dict()), tmp_path / "theirs.pth")
    weights = read_weights(tmp_path / "theirs.pth", "params")
    fresh = build_network(tiny_network)
    load_weights(fresh, weights, "theirs.pth")
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in net.state_dict().items())
    trained = load_network(tmp_path / "theirs.pth")
    assert all(torch.equal(v, trained.network.state_dict()[key]) for key, v in net.state_dict().items())


def test_averaged_weights_of_other_trainers_are_preferred_and_the_log_says_so(saved, tmp_path, esc_log):
    _, net, ema = saved
    torch.save({"model": net.state_dict(), "ema": ema.state_dict(), "best": 31.2}, tmp_path / "two.pth")
    weights = read_weights(tmp_path / "two.pth", "params_ema")
    assert torch.equal(weights["proj.weight"], ema.proj.weight)
    assert "holds no params_ema; its ema is loaded" in "".join(esc_log)
    assert torch.equal(read_weights(tmp_path / "two.pth", "params")["proj.weight"], net.proj.weight)


def test_several_networks_none_of_which_is_named_are_listed(saved, tmp_path):
    _, net, ema = saved
    torch.save({"first": net.state_dict(), "second": ema.state_dict()}, tmp_path / "two.pth")
    with pytest.raises(UserError, match="several networks: 'first', 'second'"):
        read_weights(tmp_path / "two.pth")
    assert torch.equal(read_weights(tmp_path / "two.pth", "second")["proj.weight"], ema.proj.weight)


def test_a_prefix_that_the_network_has_itself_stays(tmp_path):
    net = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2), "net": torch.nn.Linear(2, 2)})
    torch.save(net.state_dict(), tmp_path / "net.pth")
    fresh = copy.deepcopy(net)
    torch.nn.init.zeros_(fresh["model"].weight)
    load_weights(fresh, read_weights(tmp_path / "net.pth", None), "net.pth")
    assert torch.equal(fresh["model"].weight, net["model"].weight)


def test_a_whole_module_is_refused_with_what_to_do(saved, tmp_path):
    _, net, _ = saved
    torch.save(net, tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"esc_arch\.ESC.*would run its code.*save the weights alone"):
        read_weights(tmp_path / "module.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_weights_that_are_not_finite_are_refused_by_name(value, kind, saved, tmp_path):
    _, net, _ = saved
    weights = net.state_dict()
    weights["last.weight"][0, 0, 0, 0] = value
    path = tmp_path / f"diverged.{kind}"
    write_safetensors(path, weights, {}) if kind == "safetensors" else torch.save(weights, path)
    with pytest.raises(UserError, match=r"last\.weight has values that are no finite numbers"):
        read_weights(path)


def test_missing_ema_falls_back_to_params_and_says_so(tmp_path, saved, esc_log):
    _, net, _ = saved
    torch.save({"params": net.state_dict()}, tmp_path / "no_ema.pth")
    weights = read_weights(tmp_path / "no_ema.pth", "params_ema")
    assert torch.equal(weights["proj.weight"], net.proj.weight)
    assert "holds no params_ema; its params is loaded" in "".join(esc_log)


def test_another_scale_changes_to_img_alone_and_says_so(saved, tiny_network, build_network, esc_log):
    path, net, _ = saved
    other = build_network(tiny_network, upscaling_factor=4)
    load_weights(other, read_weights(path), path)
    assert "is of scale ×2; to_img is converted to ×4" in "".join(esc_log)
    for name, value in other.state_dict().items():
        if not name.startswith("to_img"):
            assert torch.equal(value, net.state_dict()[name])
    # Bilinear resizing keeps the mean of each filter's image.
    old, new = (
        state.to_img.weight.view(3, -1, *state.to_img.weight.shape[1:]).mean(1) for state in (net, other)
    )
    assert torch.allclose(old, new, atol=1e-6)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"n_blocks": 2}, [r"missing from the file \(43\):", "blocks.1.", r"n_blocks: 1 \(here 2\)"]),
        (
            {"dim": 32},
            [
                "of another shape",
                r"proj.weight: \[16, 3, 3, 3\], expected \[32, 3, 3, 3\]",
                r"dim: 16 \(here 32\)",
            ],
        ),
        ({"conv_blocks": 1}, ["unknown to the network", "blocks.0.convffns.1.", "and 6 more"]),
    ],
)
def test_checkpoint_that_does_not_fit_says_keys_shapes_and_remedy(
    saved, tiny_network, build_network, options, expected
):
    path, _, _ = saved
    net = build_network(tiny_network, **options)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(net, read_weights(path), path)
    for pattern in expected:
        assert caught.match(pattern)
    assert caught.match("net_g_latest.pth does not fit ESC")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_fit_is_told_of_a_network_without_memory_as_of_one_that_loads(saved, tiny_network, build_network):
    path, _, _ = saved
    weights = read_weights(path)
    with torch.device("meta"):
        same, other_scale, deeper = (
            build_network(tiny_network, **options)
            for options in ({}, {"upscaling_factor": 4}, {"n_blocks": 2})
        )
    check_fit(same, weights, path)
    check_fit(other_scale, weights, path)
    with pytest.raises(UserError) as checked:
        check_fit(deeper, weights, path)
    with pytest.raises(UserError) as loaded:
        load_weights(build_network(tiny_network, n_blocks=2), weights, path)
    assert str(checked.value) == str(loaded.value)
    assert all(parameter.is_meta for parameter in same.parameters())


def test_incomplete_checkpoint_of_the_same_network_is_told(saved, tiny_network, build_network):
    path, _, _ = saved
    weights = read_weights(path)
    del weights["last.bias"]
    with pytest.raises(UserError, match=r"missing from the file \(1\):\n    last.bias\n.*incomplete"):
        load_weights(build_network(tiny_network), weights, path)


def test_weights_of_something_else_are_told(tiny_network, build_network):
    with pytest.raises(UserError, match="not weights of an ESC network"):
        load_weights(build_network(tiny_network), {"conv_first.weight": torch.zeros(1)}, "edsr.pth")


def test_without_strict_the_rest_is_loaded_and_listed(saved, tiny_network, build_network, esc_log):
    path, net, _ = saved
    wider = build_network(tiny_network, kernel_size=7)
    load_weights(wider, read_weights(path), path, strict=False)
    assert torch.equal(wider.proj.weight, net.proj.weight)
    assert "plk_filter" in "".join(esc_log) and "strict loading is off" in "".join(esc_log)


def test_unreadable_files_are_told(tmp_path, saved):
    path, _, _ = saved
    with pytest.raises(UserError, match="there is no such checkpoint"):
        read_weights(tmp_path / "absent.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"cut\.pth: not a readable checkpoint: it is cut short"):
        read_weights(cut)
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match=r"text\.pth: not a PyTorch checkpoint"):
        read_weights(tmp_path / "text.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.pth: not a readable checkpoint"):
        read_weights(tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="expected a dict of weights, got list"):
        read_weights(tmp_path / "list.pth")
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="found none; it holds 'state_dict', 'epoch'"):
        read_weights(tmp_path / "other.pth")


def test_what_is_no_regular_file_is_told_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.pth")
    for path in (tmp_path, tmp_path / "fifo.pth", "/dev/zero"):
        with pytest.raises(UserError, match="it is no regular file"):
            read_weights(path)
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        read_weights("x" * 5000)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_checkpoint_that_would_execute_code_is_refused(tmp_path, capsys, is_zip):
    torch.save({"params": Evil()}, tmp_path / "evil.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match="holds more than weights"):
        read_weights(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("is_zip", [True, False])
def test_checkpoint_that_would_fill_the_memory_is_refused(tmp_path, is_zip):
    class Huge:
        def __reduce__(self):
            return (bytearray, (1 << 40,))  # PyTorch's safe loading calls it

    torch.save({"params": Huge()}, tmp_path / "huge.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match=r"huge\.pth: not a checkpoint to read safely: .* \(\w+\.bytearray\)"):
        read_weights(tmp_path / "huge.pth")


def test_archives_that_are_no_checkpoints_are_told(tmp_path, saved):
    path, _, _ = saved
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        archive.add(path, "net_g_latest.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "nothing of a checkpoint")
    for name in ("tar.pth", "other.pth"):
        with pytest.raises(UserError, match=rf"{name}: not a"):
            read_weights(tmp_path / name)


def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    """Copy a .pth file, with its records changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record.filename)))
    return target


def test_checkpoint_that_unpacks_to_more_than_it_holds_is_refused(tmp_path):
    torch.save({"params": {"w": torch.zeros(1 << 20)}}, tmp_path / "zeros.pth")
    bomb = rewritten(
        tmp_path / "zeros.pth", tmp_path / "bomb.pth", lambda name, data: data, zipfile.ZIP_DEFLATED
    )
    assert bomb.stat().st_size < 10_000
    with pytest.raises(UserError, match="it unpacks to more than the file holds"):
        read_weights(bomb)


def test_pickle_that_pytorch_would_read_is_checked_wherever_it_lies(tmp_path, saved):
    """A zip file behind a pickle, and a record named in capitals, hid it."""

    class Huge:
        def __reduce__(self):
            return (bytearray, (1 << 40,))

    torch.save({"params": Huge()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    glued = tmp_path / "glued.pth"
    glued.write_bytes((tmp_path / "old.pth").read_bytes() + saved[0].read_bytes())
    torch.save({"params": Huge()}, tmp_path / "new.pth")
    capitals = tmp_path / "capitals.pth"
    with zipfile.ZipFile(tmp_path / "new.pth") as old, zipfile.ZipFile(capitals, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename.replace("data.pkl", "DATA.PKL"), old.read(record.filename))
    for path in (glued, capitals):
        with pytest.raises(UserError, match=r"not a checkpoint to read safely: .* \(\w+\.bytearray\)"):
            read_weights(path)


def test_checkpoint_that_claims_more_numbers_than_it_holds_is_refused(tmp_path):
    weights = {"params": {"w": torch.zeros(300)}}
    claim = (b"M" + struct.pack("<H", 300), b"J" + struct.pack("<i", 2_000_000_000))  # as pickle has ints
    torch.save(weights, tmp_path / "zip.pth")
    rewritten(tmp_path / "zip.pth", tmp_path / "zip_more.pth", lambda name, data: data.replace(*claim))
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "old_more.pth").write_bytes((tmp_path / "old.pth").read_bytes().replace(*claim))
    for name in ("zip_more.pth", "old_more.pth"):
        with pytest.raises(UserError, match="not a readable checkpoint"):
            read_weights(tmp_path / name)
    torch.save({"params": {"w": torch.zeros(1).expand(1 << 40)}}, tmp_path / "repeated.pth")
    with pytest.raises(UserError, match="w would be larger than the whole file"):
        read_weights(tmp_path / "repeated.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.complex64),
    ],
    ids=["sparse", "meta", "complex"],
)
def test_tensors_that_no_network_takes_are_refused_by_name(tmp_path, value):
    torch.save({"params": {"conv.weight": value}}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"conv\.weight is no parameter of a network to load"):
        read_weights(tmp_path / "odd.pth")


def test_kinds_of_numbers_that_no_network_has_are_refused(tmp_path):
    torch.save({"params": {"conv.weight": torch.zeros(2, dtype=torch.float8_e4m3fn)}}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="it holds more than weights"):
        read_weights(tmp_path / "odd.pth")


def test_names_in_a_file_do_not_reach_the_terminal_as_they_are(tmp_path, tiny_network, build_network):
    names = ["\x1b[2J", "two\nlines", "x" * 100_000, *map(str, range(10_000))]
    torch.save(dict.fromkeys(names, 0), tmp_path / "names.pth")
    with pytest.raises(UserError, match=r"it holds '\\x1b\[2J', 'two\\nlines', .* and 9997 more") as several:
        read_weights(tmp_path / "names.pth")
    with pytest.raises(UserError) as unknown:
        load_weights(build_network(tiny_network), dict.fromkeys(names, torch.zeros(1)), "names.pth")
    for caught in (several, unknown):
        assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 2000


def test_weights_that_only_seem_of_another_scale_do_not_fit(tiny_network, build_network):
    net = build_network(tiny_network)
    for rows, biases in ((7, 27), (27, 28), (27, 3 * 10**6)):
        weights = net.state_dict() | {"to_img.weight": torch.zeros(rows, *net.to_img.weight.shape[1:])}
        with pytest.raises(UserError, match="of another shape"):
            load_weights(net, weights | {"to_img.bias": torch.zeros(biases)}, "odd.pth")


def test_damaged_checkpoints_are_refused_or_read_whatever_is_damaged(tmp_path, saved):
    """Bytes changed, cut off and doubled at random: weights or a UserError, nothing else."""
    path, net, _ = saved
    rng = random.Random(0)
    write_safetensors(tmp_path / "net.safetensors", net.state_dict(), {})
    torch.save({"params": net.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused = 0
    for source in (path, tmp_path / "old.pth", tmp_path / "net.safetensors"):
        whole = source.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(rng.choice([1, 3, 30])):
                # where it says what it holds more often than in the numbers
                end = rng.choice([200, 4000, len(whole)])
                damaged[rng.randrange(end) if rng.random() < 0.5 else -1 - rng.randrange(end)] = (
                    rng.randrange(256)
                )
            cut = rng.randrange(len(whole)) if rng.random() < 0.2 else len(whole)
            target = tmp_path / f"damaged{source.suffix}"
            target.write_bytes(damaged[:cut])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    weights = read_weights(target)
                    load_weights(net, weights, target, strict=False)
                except UserError as error:
                    refused += 1
                    assert str(target) in str(error)
    assert 60 < refused < 180


def test_safetensors_give_back_what_was_written(tmp_path, saved, tiny_network, build_network, esc_log):
    path, net, _ = saved
    about = {"param_key": "params_ema", "network_g": json.dumps(tiny_network), "iter": "500000"}
    state = net.state_dict()
    state["proj.weight"] = state["proj.weight"].to(memory_format=torch.channels_last)
    state["shared"] = state["last.weight"][1:]
    target = tmp_path / "net_g.safetensors"
    write_safetensors(target, state, about)
    assert read_safetensors_metadata(target) == about
    assert is_safetensors(target) and not is_safetensors(path)
    for key in ("params", "params_ema", None):
        weights = read_weights(target, key)
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[name], value) for name, value in state.items())
    assert len(esc_log) == 1 and "holds params_ema alone; it is loaded for params" in esc_log[0]
    # by content, whatever its name; and it may be replaced while its weights are in use
    renamed = target.rename(tmp_path / "net_g.pth")
    weights = read_weights(renamed)
    renamed.write_bytes(b"")
    del weights["shared"]
    load_weights(build_network(tiny_network), weights, renamed)


def test_safetensors_are_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "net.safetensors"
    write_safetensors(target, {"w": torch.ones(2)}, {})
    with pytest.raises(Exception, match="'int'"):
        write_safetensors(target, {"w": torch.zeros(2)}, {"iter": 5})
    assert torch.equal(read_weights(target)["w"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    with pytest.raises(UserError, match="cannot be written"):
        write_safetensors(tmp_path / "absent" / "net.safetensors", {"w": torch.ones(2)}, {})


def safetensors_of(header, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(*shape, dtype="F32", place=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


ENTRY = json.dumps(entry(2)).encode()


@pytest.mark.parametrize(
    "content",
    {
        "header larger than can be": safetensors_of({"w": entry(2)}, length=2**60),
        "header beyond the file": safetensors_of({"w": entry(2)}, length=10_000),
        "numbers beyond the file": safetensors_of({"w": entry(2**40, place=(0, 2**42))}),
        "overlapping": safetensors_of({"w": entry(2), "v": entry(2, place=(4, 12))}, bytes(12)),
        "same place": safetensors_of({"w": entry(2), "v": entry(2)}),
        "rest": safetensors_of({"w": entry(2)}, bytes(9)),
        "unknown dtype": safetensors_of({"w": entry(2, dtype="F99")}),
        "wrong dtype": safetensors_of({"w": entry(2, dtype="F64")}),
        "dtype that no network takes": safetensors_of({"w": entry(8, dtype="F8_E4M3")}),
        "same name": safetensors_of(b'{"w": ' + ENTRY + b', "w": ' + ENTRY + b"}"),
        "same metadata": safetensors_of(b'{"__metadata__": {"a": "1", "a": "2"}, "w": ' + ENTRY + b"}"),
        "shape of NaN": safetensors_of({"w": entry(float("nan"))}),
        "negative shape": safetensors_of({"w": entry(-2)}),
        "shape of a float": safetensors_of({"w": entry(2.0)}),
        "shape that overflows": safetensors_of({"w": entry(2**62, 2**62)}),
        "empty shape that overflows": safetensors_of({"w": entry(0, 2**63, place=(0, 0))}, b""),
        "a list": safetensors_of([1]),
        "deep": safetensors_of(b'{"w":' + b"[" * 100_000),
        "metadata that is no text": safetensors_of({"__metadata__": {"iter": 5}, "w": entry(2)}),
        "no UTF-8": safetensors_of(b'{"\xff": ' + ENTRY + b"}"),
        "nothing in it": safetensors_of({}, b""),
        "text": b"not weights",
        "short": b"abc",
        "empty": b"",
    }.items(),
    ids=lambda item: item[0],
)
def test_hostile_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content[1])
    with pytest.raises(UserError, match=r"hostile\.safetensors: "):
        read_weights(path)


def test_safetensors_of_very_many_tensors_are_read_and_do_not_fit(tmp_path, tiny_network, build_network):
    header = {f"w{number}": entry(1, place=(4 * number, 4 * number + 4)) for number in range(20_000)}
    path = tmp_path / "many.safetensors"
    path.write_bytes(safetensors_of(header, bytes(80_000)))
    with pytest.raises(UserError, match=r"unknown to the network \(20000\)"):
        load_weights(build_network(tiny_network), read_weights(path), path)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_published_network_is_recognised_from_its_weights(build_network, variant, scale):
    network_g = {**VARIANTS[variant], "upscaling_factor": scale}
    assert infer_network_options(build_network(network_g).state_dict()) == network_g


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_network_built_from_recognised_options_takes_the_weights(tiny_network, build_network, ablation):
    state = build_network(tiny_network, **ablation).state_dict()
    build_network(infer_network_options(state) | {"pdim": 4, "num_heads": 2}).load_state_dict(
        state, strict=True
    )


def test_weights_of_another_network_are_not_recognised():
    assert infer_network_options({"conv.weight": torch.zeros(3, 3)}) is None
    assert infer_network_options({"proj.weight": torch.zeros(3, 3)}) is None
    assert infer_network_options({}) is None


GOLDEN = Path(__file__).parents[1] / "golden"
REAL = sorted(file.stem for file in (GOLDEN / "esc_real").glob("*.npz"))


@pytest.mark.parametrize("file", REAL)
def test_real_networks_are_recognised_with_scale_and_upsampler(file, golden, tmp_path):
    arrays = golden(f"esc_real/{file}")
    torch.save({"params_ema": arrays["weights"]}, tmp_path / "real.pth")
    trained = load_network(tmp_path / "real.pth")
    # what the weights of this upsampler, or of this scale, do not depend on
    unseen = {"type", "mid_dim", *(["unshuffle_mod"] if trained.scale > 2 else [])}
    default = inspect.signature(type(trained.network)).parameters
    for key in arrays["config"].keys() - unseen:
        assert trained.options.get(key, default[key].default) == arrays["config"][key], key
    assert trained.options["type"] == arrays["config"]["type"]
    lq = torch.from_numpy(arrays["eval0/lq"])
    assert (trained.network(lq) - torch.from_numpy(arrays["eval0/sr"])).abs().max() < 2e-5


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_channels_are_recognised(name, channels, tiny_network, build_network, tmp_path):
    scale = 4 if name == "ESCReal" else 2
    both = {"in_channels": channels, "out_channels": channels}
    net = build_network(tiny_network, type=name, upscaling_factor=scale, **both)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    trained = load_network(tmp_path / "net.pth")
    assert {key: trained.options[key] for key in both} == both
    assert trained.network(torch.rand(1, channels, 5, 6)).shape == (1, channels, 5 * scale, 6 * scale)


def hostile(name):
    """Give weights whose keys and shapes ask for far more than they hold."""
    if name == "many blocks":
        return {"blocks.20000.ln_proj.weight": torch.zeros(1)}
    if name == "blocks without a gap, ConvAttn layers too":
        return {
            **{f"blocks.{i}.x": torch.zeros(1) for i in range(3000)},
            **{f"blocks.0.pconvs.{i}.x": torch.zeros(1) for i in range(3000)},
        }
    if name == "no channels":
        return {"proj.weight": torch.zeros(1_000_000, 0, 3, 3)}
    if name == "no window":
        return {"blocks.0.attn.relative_position_bias": torch.zeros(0, 10**12)}
    return {"proj.weight": torch.zeros(60_000, 3, 3, 3)}  # a feature map that the rest has no weights for


@pytest.mark.parametrize(
    "name",
    ["many blocks", "blocks without a gap, ConvAttn layers too", "no channels", "no window", "wide features"],
)
def test_sizes_that_a_file_claims_ask_for_no_time_and_memory(name, saved, tmp_path):
    _, net, _ = saved
    torch.save({**net.state_dict(), **hostile(name)}, tmp_path / "hostile.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(UserError, match=r"hostile\.pth"):
        load_network(tmp_path / "hostile.pth")
    assert time.process_time() - start < 60  # a day, if it were built
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB


def test_variants_of_other_trainers_are_reported_as_such(saved, tmp_path):
    _, net, _ = saved
    weights = {key: value for key, value in net.state_dict().items() if not key.startswith("to_img")}
    torch.save({**weights, "upsampler.offset.weight": torch.zeros(2)}, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match=r"another trainer's variant of ESC.*upsampler"):
        load_network(tmp_path / "theirs.pth")
