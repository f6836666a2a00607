"""Measurements on a GPU, case by case, those of most worth first."""

import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esc_basicsr import fast
from esc_basicsr.archs.variants import VARIANTS
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.fast.gpu import take_failures
from esc_basicsr.fast.precision import PRECISIONS
from esc_basicsr.lab.gpu_report.floor import count_numbers, floor, measure_ceilings
from esc_basicsr.lab.measure import benchmark, training_step, window_attention
from esc_basicsr.lab.measure.benchmark import random_image
from esc_basicsr.lab.networks.by_name import build_network, described

PARTS = ("card", "correctness", "inference", "training", "window attention", "growth", "compiled")
BASE = "release-flex"  # what targets are relative to

# largest error against float64, norm against norm: of what a network adds to its input, of gradients
ERRORS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}
_GRADIENTS = "gradients by kernels"
_CHECK_SCALE = 2

Result = list[dict[str, Any]]
# by the case's key: its results so far
Results = Mapping[str, Mapping[str, Any]]


class Plan(NamedTuple):
    """Networks, precisions and sizes of a report."""

    device: str
    implementations: tuple[str, ...]  # keys of `IMPLEMENTATIONS`; figures are compared with the first
    trained: tuple[str, ...]  # those whose training steps are timed
    methods: tuple[str, ...]  # of window attention
    compiled: tuple[str, ...]  # first a base, then those that take minutes to compile
    variants: tuple[str, ...] = tuple(VARIANTS)
    scales: tuple[int, ...] = (4, 2, 3)
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    output: tuple[int, int] = (720, 1280)  # height, width
    checked: tuple[int, int] = (45, 37)  # input that correctness is checked on, twice a batch
    batch: int = 64
    patch: int = 64
    windows: tuple[int, ...] = (32, 8, 16, 64)
    growth: tuple[tuple[int, int], ...] = ((512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (4320, 7680))
    grown: tuple[str, ...] = (BASE, "", "kernels")
    repeats: int = 20
    warmup: int = 3
    copied: int = 2**31  # bytes
    multiplied: int = 8192  # side of a matrix


ON_GPU = Plan(
    device="cuda",
    implementations=(BASE, "release", "", "kernels", "graphs"),
    trained=(BASE, "release", "", "kernels"),
    methods=("naive", "flex", "fused", "by row chunks", "kernels"),
    compiled=(BASE, "compiled"),
)
REHEARSAL = Plan(
    device="cpu",
    implementations=("release", "", "kernels", "graphs"),
    trained=("", "kernels"),
    methods=("naive", "fused", "kernels"),
    compiled=("",),
    variants=("ESC-FP",),
    scales=(2,),
    precisions=("fp32", "bf16"),
    output=(16, 20),
    checked=(9, 14),
    batch=1,
    patch=16,
    windows=(4,),
    growth=((16, 16),),
    grown=("",),
    repeats=1,
    warmup=0,
    copied=2**16,
    multiplied=32,
)


class Case(NamedTuple):
    """One measurement: seconds, but for those that compile."""

    part: str  # one of `PARTS`
    name: str
    run: Callable[[Results], Result]

    @property
    def key(self) -> str:
        """Name its results."""
        return f"{self.part}: {self.name}"


def list_cases(plan: Plan) -> Iterator[Case]:
    """Yield all cases of a plan, those of most worth first."""
    each = [*itertools.product(plan.scales, plan.variants, plan.precisions)]
    yield Case("card", "ceilings", lambda _: _ceilings(plan))
    for variant in plan.variants:
        for kind in plan.precisions:
            for implementation in plan.implementations:
                yield _correctness(plan, variant, kind, implementation)
            check = functools.partial(_check_gradients, plan, variant, kind)
            yield Case("correctness", _check_name(variant, kind, _GRADIENTS), check)
    for scale, variant, kind in each:
        run = functools.partial(_inference, plan, variant, scale, kind, plan.implementations, plan.output)
        yield Case("inference", f"{variant} ×{scale} {kind}", run)
    for variant in plan.variants:
        for kind in plan.precisions:
            run = functools.partial(_training, plan, variant, kind, plan.trained)
            yield Case("training", f"{variant} {kind}", run)
    for window, kind in itertools.product(plan.windows, plan.precisions):
        run = functools.partial(_window_attention, plan, window, kind)
        yield Case("window attention", f"{window} {kind}", run)
    variant = plan.variants[0]
    for height, width in plan.growth:
        for kind in plan.precisions[:2]:
            run = functools.partial(
                _inference, plan, variant, plan.scales[0], kind, plan.grown, (height, width)
            )
            yield Case("growth", f"{variant} {width}×{height} {kind}", run)
    for scale, variant, kind in each:
        if scale == plan.scales[0]:  # here, so that compiling delays nothing else
            for implementation in plan.compiled:
                if implementation not in plan.implementations:
                    yield _correctness(plan, variant, kind, implementation)
        run = functools.partial(_inference, plan, variant, scale, kind, plan.compiled, plan.output)
        yield Case("compiled", f"{variant} ×{scale} {kind}", run)
        if scale == plan.scales[0]:
            run = functools.partial(_training, plan, variant, kind, plan.compiled)
            yield Case("compiled", f"{variant} {kind}, training", run)


def _correctness(plan: Plan, variant: str, kind: str, implementation: str) -> Case:
    check = functools.partial(_check, plan, variant, kind, implementation)
    return Case("correctness", _check_name(variant, kind, implementation), check)


def _check_name(variant: str, kind: str, implementation: str) -> str:
    return f"{_full_name(variant, implementation)} {kind}"


def _full_name(variant: str, implementation: str) -> str:
    return f"{variant}:{implementation}" if implementation else variant


def _ceilings(plan: Plan) -> Result:
    dtypes = {kind: PRECISIONS[kind] for kind in plan.precisions}
    device = torch.device(plan.device)
    return [measure_ceilings(device, dtypes, plan.copied, plan.multiplied, plan.repeats)]


@functools.cache
def _expected(variant: str, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Compute in float64 on the CPU: input, output, what the network adds to its input, gradients."""
    net: Any = build_network(f"{variant}:plain", _CHECK_SCALE).double()
    for layer in net.modules():
        if hasattr(layer, "attn_type"):
            layer.attn_type = "Naive"
    image = random_image(*size, torch.device("cpu"))
    lq = torch.cat([image, image.flip(-1)])
    sr = net(lq.double())
    added = sr - net.upscale_input(lq.double())
    (sr * _upstream(sr)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return lq, sr.detach(), added.detach(), gradients


def _upstream(sr: Tensor) -> Tensor:
    """Give the gradient of the output that gradients are checked with, ±1."""
    signs = torch.randn(sr.shape, generator=torch.Generator().manual_seed(1)).sign()
    return signs.to(sr.device, sr.dtype)


def _check(plan: Plan, variant: str, kind: str, implementation: str, _: Results) -> Result:
    lq, expected, added, _gradients = _expected(variant, plan.checked)
    name, dtype = _full_name(variant, implementation), PRECISIONS[kind]
    net = build_network(name, _CHECK_SCALE, plan.device).to(dtype).eval()
    with torch.inference_mode():
        sr = net(lq.to(plan.device, dtype)).double().cpu()
    _raise_failures()
    error = float((sr - expected).norm() / added.norm())
    names = {"variant": variant, "implementation": implementation, "precision": kind}
    return [{**names, "error": error, "passed": error <= ERRORS[kind]}]


def _check_gradients(plan: Plan, variant: str, kind: str, _: Results) -> Result:
    lq, _sr, _added, expected = _expected(variant, plan.checked)
    net: Any = build_network(f"{variant}:plain", _CHECK_SCALE, plan.device)
    fast.attend_by_kernels(net)
    with torch.autocast(plan.device, PRECISIONS[kind], enabled=kind != "fp32"):
        sr = net(lq.to(plan.device))
    (sr.float() * _upstream(sr.float())).sum().backward()
    _raise_failures()
    error = 0.0
    for part in ("", "relative_position_bias"):  # all, and those that the attention kernel alone sums up
        named = {name: parameter for name, parameter in net.named_parameters() if part in name}
        made = torch.cat([parameter.grad.flatten().double().cpu() for parameter in named.values()])
        right = torch.cat([expected[name].flatten() for name in named])
        error = max(error, float((made - right).norm() / right.norm()))
    names = {"variant": variant, "implementation": _GRADIENTS, "precision": kind}
    return [{**names, "error": error, "passed": error <= ERRORS[kind]}]


def _raise_failures() -> None:
    """Raise what kept the Triton kernels from serving, for which PyTorch's operations have taken over."""
    for failure in take_failures():
        raise failure


def _sound(
    names: Sequence[str], variant: str, kind: str, results: Results, trains: bool = False
) -> list[str]:
    """Leave out implementations that were found wrong: what they take means nothing."""

    def is_right(implementation: str) -> bool:
        known = results.get(f"correctness: {_check_name(variant, kind, implementation)}", {})
        return "failure" not in known and all(row["passed"] for row in known.get("rows", ()))

    sound = [name for name in names if is_right(name)]
    if trains and not is_right(_GRADIENTS):
        sound = [name for name in sound if name != "kernels"]
    return [_full_name(variant, name) for name in sound]


def _working(calls: Mapping[str, Callable[[], object]]) -> tuple[list[str], dict[str, str]]:
    """Call each once, and give the names of those that work, and of the others why they do not."""
    working, failed = [], {}
    take_failures()
    for name, call in calls.items():
        try:
            call()
            _raise_failures()
            working.append(name)
        except Exception as error:
            check_card()
            failed[name] = "not enough memory" if is_out_of_memory(error) else described(error)
        free_memory()
    return working, failed


class CardLostError(Exception):
    """The GPU answers nothing any more in this process."""


def check_card() -> None:
    """See that the GPU answers.

    Raises:
        CardLostError: It does not, as after an access beyond its memory.
    """
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise CardLostError(described(error)) from error


def free_memory() -> None:
    """Give back what earlier networks have left on the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _inference(
    plan: Plan,
    variant: str,
    scale: int,
    kind: str,
    implementations: Sequence[str],
    output: tuple[int, int],
    results: Results,
) -> Result:
    dtype, device = PRECISIONS[kind], torch.device(plan.device)
    height, width = (side // scale for side in output)
    lq = random_image(height, width, device).to(dtype)

    def call(name: str) -> None:
        net = build_network(name, scale, device).to(dtype).eval()
        with torch.inference_mode():  # not around the weights: Flex would be compiled again for others
            net(lq)

    names = _sound(implementations, variant, kind, results)
    working, failed = _working({name: functools.partial(call, name) for name in names})
    rows = benchmark.measure(working, scale, lq, plan.repeats, plan.warmup) if working else []
    least: dict[str, Any] = {}
    multiply_adds = next((row.multiply_adds for row in rows), None)
    for ceilings in results.get("card: ceilings", {}).get("rows", ()):
        if multiply_adds is not None:
            size = lq.element_size() * count_numbers(variant, scale, height, width)
            seconds, limit = floor(multiply_adds, size, ceilings, kind)
            least = {"floor": seconds, "limited by": limit}
    measured = [{**row._asdict(), **least, "precision": kind} for row in rows]
    return [*measured, *_failures(failed, kind)]


def _failures(failed: Mapping[str, str], kind: str) -> Result:
    return [{"network": name, "precision": kind, "failure": reason} for name, reason in failed.items()]


def _training(
    plan: Plan, variant: str, kind: str, implementations: Sequence[str], results: Results
) -> Result:
    dtype = None if kind == "fp32" else PRECISIONS[kind]
    side, device = plan.patch, plan.device
    lq, gt = (torch.rand(plan.batch, 3, s, s, device=device) for s in (side, side * _CHECK_SCALE))

    def call(name: str) -> None:
        training_step.Step(build_network(name, _CHECK_SCALE, device), lq, gt, dtype)()

    names = _sound(implementations, variant, kind, results, trains=True)
    working, failed = _working({name: functools.partial(call, name) for name in names})
    rows = training_step.measure(working, _CHECK_SCALE, lq, gt, dtype, plan.repeats, plan.warmup)
    return [*({**row._asdict(), "precision": kind} for row in rows), *_failures(failed, kind)]


def _window_attention(plan: Plan, window: int, kind: str, _: Results) -> Result:
    size = [side // plan.scales[0] for side in plan.output]
    x = torch.randn(1, window_attention.DIM, *size, generator=torch.Generator().manual_seed(0))
    x = x.to(plan.device, PRECISIONS[kind])

    def call(method: str) -> None:
        layer = window_attention.Layer(method, window).to(x.device, x.dtype)
        with torch.inference_mode():
            layer(x)

    working, failed = _working({method: functools.partial(call, method) for method in plan.methods})
    rows = window_attention.measure(working, window, x, plan.repeats, plan.warmup)
    return [*({**row._asdict(), "precision": kind} for row in rows), *_failures(failed, kind)]
