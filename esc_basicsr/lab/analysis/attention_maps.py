"""Attention modules of networks of any origin: finding them, and seeing what they make of an image.

What is read off a module: its features are its output, or its projection's (``proj``, ``to_out``) where the
network does not call the module itself, as ESC does not; a window is its ``window_size``; a shift is its own
``shift`` or its block's ``shift_size``. Attention maps are taken from the softmax, or the fused kernel, that
runs within it.
"""

import enum
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from esc_basicsr.archs.attention import WindowAttention
from esc_basicsr.common.errors import UserError
from esc_basicsr.common.first_few import first_few
from esc_basicsr.lab.analysis.networks import Subject
from esc_basicsr.lab.analysis.similarity import WindowMaps

# SwinIR's, ESC's, HAT's, DRCT's, Swin2SR's and ATD's; MambaIRv2's; HiT-SRF's
_CLASSES = ("WindowAttention", "WindowMHSA", "Correlation")
_PROJECTIONS = ("proj", "to_out")
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_LISTED = 12
_PROBE = 32


class _Layout(enum.Enum):
    """The order of an output's axes."""

    CHANNELS_FIRST = "(1, C, H, W)"
    CHANNELS_LAST = "(1, H, W, C)"
    TOKENS = "(1, H·W, C)"
    WINDOWS = "(windows, w², C)"


class Layer(NamedTuple):
    """A module whose output can be laid over the image."""

    name: str
    source: str  # the module whose output is taken: itself, or its projection
    layout: _Layout  # of that output
    window: int | None  # side of its windows, in pixels of its input; None if it has none
    shift: int  # of its windows, in pixels


class Seen(NamedTuple):
    """A layer's features and attention on an image."""

    features: Tensor  # (H, W, C); windows are merged and their shift is undone
    maps: WindowMaps | None  # its attention; None if none was seen, or not by windows


def refuse_compiled(subject: Subject) -> None:
    """Refuse what has no layers that can be looked into.

    Raises:
        UserError: The network is TorchScript.
    """
    if isinstance(subject.net, torch.jit.ScriptModule):
        raise UserError(
            f"{subject.name} is compiled (TorchScript): its layers cannot be looked into. Give its weights."
        )


def attention_names(net: nn.Module, name: str, patterns: Sequence[str] | None) -> list[str]:
    """List the attention modules of a network: those that patterns name, or those of known classes.

    Raises:
        UserError: There are none.
    """
    if patterns is not None:
        return match_names(net, name, patterns, _candidates(net))
    found = known_attention(net)
    if not found:
        raise UserError(
            f"{name}: no attention modules of a known kind ({', '.join(_CLASSES)}) were found. Name them by "
            f"--modules PATTERN. {_listed(_candidates(net))}"
        )
    return found


def match_names(net: nn.Module, name: str, patterns: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """List the modules whose names a pattern matches.

    Raises:
        UserError: A pattern matches none.
    """
    names = [module for module, _ in net.named_modules() if module]
    for pattern in patterns:
        if not any(fnmatchcase(module, pattern) for module in names):
            raise UserError(f"{name}: no module is called {pattern!r}. {_listed(candidates)}")
    return [module for module in names if any(fnmatchcase(module, pattern) for pattern in patterns)]


def known_attention(net: nn.Module) -> list[str]:
    """List a network's attention modules of known classes."""
    modules = net.named_modules()
    return [name for name, module in modules if type(module).__name__ in _CLASSES and _projection(module)]


def _projection(module: nn.Module) -> str | None:
    children = dict(module.named_children())
    return next((name for name in _PROJECTIONS if name in children), None)


def _candidates(net: nn.Module) -> list[str]:
    """List modules that may be attention, by name or class."""
    return [
        name
        for name, module in net.named_modules()
        if name and re.search("att|msa", f"{name.rpartition('.')[2]} {type(module).__name__}", re.IGNORECASE)
    ]


def _listed(candidates: Sequence[str]) -> str:
    if not candidates:
        return "None of its modules is called like attention."
    return f"Candidates: {first_few(candidates, _LISTED)}."


def group_of(name: str) -> str:
    """Name the group of layers that a module belongs to: its name up to its number within the group.

    ``layers.0.residual_group.blocks.3.attn`` is one of ``layers.0.residual_group.blocks``, and
    ``layers.0.swin1.attn`` one of ``layers.0``.
    """
    *above, _ = name.split(".")
    last = max((i for i, part in enumerate(above) if part[-1:].isdigit()), default=len(above))
    return ".".join(above[:last])


def tile_of(net: nn.Module, names: Sequence[str]) -> int:
    """Return what sides of an image must be multiples of: windows of these modules and of known attention."""
    windows = (_window(net.get_submodule(name)) for name in (*names, *known_attention(net)))
    return math.lcm(*(window for window in windows if window is not None))


def _window(module: nn.Module) -> int | None:
    size = getattr(module, "window_size", None)
    sides = set(size) if isinstance(size, (tuple, list)) else {size}
    (side,) = sides if len(sides) == 1 else (None,)
    return side if isinstance(side, int) and not isinstance(side, bool) else None


def _shift(net: nn.Module, name: str, window: int | None) -> int:
    if window is None:
        return 0
    module, block = net.get_submodule(name), net.get_submodule(name.rpartition(".")[0])
    own = getattr(module, "shift", None)
    if isinstance(own, bool):
        return window // 2 if own else 0
    shift = getattr(module, "shift_size", getattr(block, "shift_size", 0))
    if isinstance(shift, (tuple, list)):
        if len(set(shift)) > 1:
            raise UserError(f"{name} shifts its windows by {shift}: only equal shifts are understood.")
        shift = shift[0]
    return shift % window if isinstance(shift, int) else 0


def locate(subject: Subject, names: Sequence[str]) -> list[Layer]:
    """Find out how modules' outputs lie over the image, in the order in which they run.

    The image that is given to the network is wider than high, but by no whole factor: neither side, nor a
    multiple of it, can be taken for the other.

    Raises:
        UserError: A module does not run, runs more than once, or its output cannot be laid over the image.
    """
    tile = tile_of(subject.net, names)
    height = max(-(-_PROBE // tile), 2) * tile
    width = height + tile
    device = next((parameter.device for parameter in subject.net.parameters()), torch.device("cpu"))
    lq = torch.rand((1, 3, height, width), device=device)
    sources = {name: name for name in names}
    for name in names:
        projection = _projection(subject.net.get_submodule(name))
        if projection is not None:
            sources[f"{name}.{projection}"] = name
    shapes: dict[str, list[tuple[int, ...]]] = {}  # in the order in which sources end
    _run(subject, lq, sources, lambda name, output: shapes.setdefault(name, []).append(tuple(output.shape)))
    ran = {sources[source]: source for source in shapes if source not in names}
    ran |= {name: name for name in shapes if name in names}  # rather the module itself
    for name in names:
        calls = len(shapes[ran[name]]) if name in ran else 0
        if calls != 1:
            many = "does not run" if not calls else f"runs {calls} times"
            raise UserError(
                f"{subject.name}: {name} {many} when an image is upscaled. Name modules that run once; in a "
                "pattern * stands for dots too, [0-9] for one digit."
            )
    return [
        _layer(subject, name, ran[name], shapes[ran[name]][0], (height, width))
        for name in dict.fromkeys(sources[source] for source in shapes)
    ]


def _layer(subject: Subject, name: str, source: str, shape: tuple[int, ...], size: tuple[int, int]) -> Layer:
    module = subject.net.get_submodule(name)
    window = _window(module)
    height, width = size
    sides = getattr(module, "window", None)  # HiT-SRF's, which pads to them
    sizes = [size]
    if isinstance(sides, (tuple, list)):
        sizes.append((-(-height // sides[0]) * sides[0], -(-width // sides[1]) * sides[1]))
    layout = None
    if len(shape) == 3:
        if shape[:2] == (1, height * width):
            layout = _Layout.TOKENS
        elif window is not None and shape[0] * shape[1] == height * width and shape[1] == window**2:
            layout = _Layout.WINDOWS
    elif len(shape) == 4 and shape[0] == 1:
        if shape[1:3] in sizes:
            layout = _Layout.CHANNELS_LAST
        elif shape[2:] in sizes or shape[3] * height == shape[2] * width:
            layout = _Layout.CHANNELS_FIRST
    if layout is None:
        known = ", ".join(member.value for member in _Layout)
        raise UserError(
            f"{subject.name}: {name} makes {shape} of an image of {height}×{width}, which cannot be laid "
            f"over it: expected one of {known}. Name another module."
        )
    return Layer(name, source, layout, window, _shift(subject.net, name, window))


def see(subject: Subject, layers: Sequence[Layer], lq: Tensor) -> dict[str, Seen]:
    """Upscale an image, (1, 3, H, W), and keep what layers make of it, by their names.

    Its sides are multiples of `tile_of`; the layers are as `locate` found them.
    """
    size = (int(lq.shape[-2]), int(lq.shape[-1]))
    by_source = {layer.source: layer for layer in layers}
    seen: dict[str, Seen] = {}
    with _Softmax() as softmax:

        def forget(name: str) -> None:
            if by_source[name].name == name:
                softmax.taken()

        def keep(source: str, output: Tensor) -> None:
            layer = by_source[source]
            features = _features(subject, layer, output.detach(), size)
            taken = softmax.taken()
            # A projection's own is the last: before it may have run layers that are not looked into.
            own = taken if source == layer.name else taken[-1:]
            seen[layer.name] = Seen(features, _maps(layer, own, size))

        _run(subject, lq, by_source, keep, forget)
    return seen


def _run(
    subject: Subject,
    lq: Tensor,
    sources: Iterable[str],
    keep: Callable[[str, Tensor], None],
    before: Callable[[str], None] = lambda name: None,
) -> None:
    """Upscale an image; call functions before each module runs, and afterwards, with its first output."""

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(first, Tensor):
            kind = type(first).__name__
            raise UserError(f"{subject.name}: {name} gives {kind}, not a tensor. Name another module.")
        keep(name, first)

    with ExitStack() as stack:
        for name in sources:
            module = subject.net.get_submodule(name)
            hooks = (
                module.register_forward_pre_hook(lambda module, args, name=name: before(name)),
                module.register_forward_hook(functools.partial(after, name)),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        for module in subject.net.modules():
            if isinstance(module, WindowAttention):  # whose scores are to be seen, whatever its backend
                stack.callback(setattr, module, "attn_type", module.attn_type)
                module.attn_type = "Naive"
        stack.enter_context(torch.no_grad())
        subject(lq)


class _Softmax(TorchFunctionMode):
    """Keeps the attention that softmax or a fused kernel makes of windows, averaged over heads."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _SOFTMAX:
            self._keep(out)
        elif func is F.scaled_dot_product_attention:
            self._keep(_weights(func, *args, **kwargs))
        return out

    def _keep(self, weights: Tensor) -> None:
        if weights.ndim == 4 and weights.shape[-1] == weights.shape[-2]:  # [windows, heads, queries, keys]
            self._kept.append(weights.detach().mean(1))

    def taken(self) -> list[Tensor]:
        """Take what was kept since this was last called."""
        kept, self._kept = self._kept, []
        return kept


def _weights(attend: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Have fused attention give the weights of values: of an identity in their place it gives just these."""
    identity = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device)
    return attend(query, key, identity.expand(*key.shape[:-2], -1, -1), *args, **kwargs)


def _features(subject: Subject, layer: Layer, output: Tensor, size: tuple[int, int]) -> Tensor:
    """Lay an output over the image, (H, W, C): a copy, as networks overwrite what they have."""
    height, width = size
    pixels = output.shape[0] * output.shape[1]
    if layer.layout in (_Layout.TOKENS, _Layout.WINDOWS) and pixels != height * width:
        raise UserError(
            f"{subject.name}: {layer.name} works on {pixels} pixels of an image of {width}×{height}: the "
            "network pads it. Give a larger image."
        )
    match layer.layout:
        case _Layout.TOKENS:
            return output[0].unflatten(0, size).clone()
        case _Layout.CHANNELS_FIRST:
            return output[0].permute(1, 2, 0).clone()
        case _Layout.CHANNELS_LAST:
            return output[0, :height, :width].clone()
    assert layer.window is not None
    w = layer.window
    # [(rows columns), (w w), C] -> [(rows w), (columns w), C]
    windows = output.view(height // w, width // w, w, w, -1).transpose(1, 2)
    return windows.reshape(height, width, -1).roll((layer.shift, layer.shift), (0, 1))


def _maps(layer: Layer, taken: Sequence[Tensor], size: tuple[int, int]) -> WindowMaps | None:
    """Give the attention of a layer's windows, if what was taken is that."""
    w = layer.window
    if w is None or any(side % w for side in size):
        return None
    rows, columns = (side // w for side in size)
    if any(weights.shape[-1] != w * w for weights in taken):
        return None
    if len(taken) == 1 and len(taken[0]) == rows * columns:
        grid = taken[0].unflatten(0, (rows, columns))
    elif [len(weights) for weights in taken] == [(rows - 1) * (columns - 1), rows - 1, columns - 1, 1]:
        # as MambaIRv2 does: the last column, the last row and the corner, whose masks differ, apart
        inner, last_column, last_row, corner = taken
        upper = torch.cat([inner.unflatten(0, (rows - 1, columns - 1)), last_column[:, None]], 1)
        grid = torch.cat([upper, torch.cat([last_row, corner])[None]])
    else:
        return None
    return WindowMaps(grid, w, layer.shift)


def attention_row(maps: WindowMaps, row: int, column: int) -> tuple[Tensor, tuple[int, int]]:
    """Give what one pixel attends to in a layer.

    Returns:
        The weights of its window, (w, w), and the window's first row and column; they are negative where a
        shifted window reaches round the image's edge, and what lies there is masked.
    """
    w, rows, columns = maps.window, *maps.weights.shape[:2]
    (window_row, y), (window_column, x) = (divmod(position - maps.shift, w) for position in (row, column))
    weights = maps.weights[window_row % rows, window_column % columns, y * w + x]
    return weights.view(w, w), (row - y, column - x)
