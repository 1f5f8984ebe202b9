"""The optimizer step on moments: reference, list functions and kernel against formulas in float64, and its edges."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from trgnet.kernels import BackendError, launch, moment_update, operator
from trgnet.kernels.loss_gate import AVERAGES, PHASE, new_control, observed
from trgnet.kernels.moment_update import (
    PER_THREAD,
    TILES,
    Draw,
    Hyper,
    Moments,
    MomentTable,
    is_dense,
    random_bits,
    step_scalars,
    update_all,
    update_one_by_one,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((3, 4), (), (0, 2), (1100,), (9256,))
needs_triton = pytest.mark.skipif(launch.triton is None, reason="Triton is not installed")


def random_tensors(seed: int, dtype: torch.dtype = torch.float64, shapes: tuple = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@dataclass
class Formula:
    """The step written down in float64, tensor by tensor, with Python numbers."""

    form: str
    hyper: Hyper
    second: bool
    products: float = 1.0
    steps: int = 0
    moments: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def step(self, params: list[Tensor], grads: list[Tensor], phase: int) -> None:
        h, self.steps = self.hyper, self.steps + 1
        beta1, alpha = h.beta1[phase], h.alpha[phase]
        self.products *= beta1
        for i, (p, g) in enumerate(zip(params, grads)):
            m, v = self.moments.get(i, (torch.zeros_like(p), torch.zeros_like(p)))
            g = h.sign * g + h.l2 * p
            gain = (1.0 if self.steps == 1 else 1 - h.dampening) if self.form == "sum" else 1 - beta1
            correction = {"sum": 1.0, "average": 1 - beta1**self.steps, "product": 1 - self.products}[
                self.form
            ]
            m = beta1 * m + gain * g
            v = h.beta2 * v + (1 - h.beta2) * g**2
            u = (g + beta1 * m if h.nesterov else m) / correction
            if self.second:
                u = u / ((v.clamp(min=1e-300) / (1 - h.beta2**self.steps)) ** alpha + h.eps)
            p.copy_((1 - h.lr * h.decay) * p - h.lr * u)
            self.moments[i] = m, v


HYPER = Hyper(lr=0.1, l2=0.01, beta1=(0.8, 0.95), beta2=0.98, alpha=(0.25, 0.5))
CASES = {
    "sgd": ("sum", False, Hyper(lr=0.1)),
    "dampened": ("sum", False, HYPER._replace(dampening=0.3, sign=-1.0)),
    "nesterov": ("sum", False, HYPER._replace(nesterov=1.0)),
    "adam": ("average", True, Hyper(lr=0.1)),
    "decoupled": ("average", True, HYPER._replace(l2=0.0, decay=0.2, sign=-1.0)),
    "exponents": ("product", True, HYPER._replace(alpha=(-0.5, 1.3))),
    "momentum": ("product", False, HYPER),
    "sum over root": ("sum", True, HYPER),
    "betas of zero": ("product", True, HYPER._replace(l2=0.0, beta1=(0.0, 0.9), beta2=0.0)),
}
PHASES = (1, 0, 0, 1)
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


@dataclass
class Run:
    """The same through :func:`moment_update`, in ``dtype``."""

    form: str
    hyper: Hyper
    second: bool
    dtype: torch.dtype = torch.float32
    backend: str = "reference"
    rounding: str = "nearest"
    state_dtype: torch.dtype = torch.float32
    shapes: tuple = SHAPES

    def __post_init__(self) -> None:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.params = [p.to(self.dtype).to(DEVICE) for p in random_tensors(0, shapes=self.shapes)]
        self.first = [
            torch.zeros_like(p, dtype=wide if wide == self.dtype else self.state_dtype) for p in self.params
        ]
        self.second_moments = [torch.zeros_like(m) for m in self.first] if self.second else []
        self.spare = [torch.zeros_like(p) for p in self.params] if self.rounding == "kahan" else []
        self.rows = torch.tensor([self.hyper.row], dtype=wide, device=DEVICE)
        self.counts = torch.zeros(len(self.params), 3, device=DEVICE)
        self.control = new_control(DEVICE)

    def step(self, grads: list[Tensor], phase: int | None = None, **options: object) -> None:
        if phase is not None:
            self.control[PHASE] = phase
        moment_update(
            self.params, [g.to(self.dtype).to(DEVICE) for g in grads], self.first, self.second_moments, self.spare,
            groups=[0] * len(self.params), places=range(len(self.params)), rows=self.rows, counts=self.counts,
            control=self.control, form=self.form, backend=self.backend, rounding=self.rounding, **options,
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.first, *self.second_moments, *self.spare, self.counts, self.control]


def errors(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The largest error of each tensor, relative to its largest element."""
    return [
        ((g.cpu().double() - t).abs().max() / t.abs().max()).item() for g, t in zip(got, truth) if t.numel()
    ]


@pytest.mark.parametrize("backend, dtype, bound", [
    ("reference", torch.float64, 1e-14),
    ("reference", torch.float32, 3e-6),
    pytest.param("triton", torch.float32, 3e-6, marks=needs_triton),
])  # fmt: skip
@pytest.mark.parametrize("case", CASES)
def test_every_form_follows_its_formula(case: str, backend: str, dtype: torch.dtype, bound: float):
    form, second, hyper = CASES[case]
    truth, run = random_tensors(0), Run(form, hyper, second, dtype, backend)
    formula = Formula(form, hyper, second)
    for t, phase in enumerate(PHASES):
        grads = random_tensors(t + 1)
        formula.step(truth, grads, phase)
        run.step(grads, phase)
        assert max(errors(run.params, truth)) < bound
        assert max(errors(run.first, [formula.moments[i][0] for i in range(len(truth))])) < bound
        if second:
            # 1 - beta is as exact as float32 lets it be: what it rounds off beta is in the row.
            moments = [formula.moments[i][1] for i in range(len(truth))]
            assert max(errors(run.second_moments, moments)) < bound
        assert run.counts[:, 0].tolist() == [t + 1] * len(truth)


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype and torch.equal(g.cpu(), e.cpu())


MIXES = [  # dtype of the parameters, of the moments, rounding
    (torch.float64, torch.float64, "nearest"),
    (torch.float32, torch.float32, "nearest"),
    (torch.float32, torch.bfloat16, "stochastic"),
    (torch.float16, torch.float16, "kahan"),
    (torch.bfloat16, torch.float32, "nearest"),
    (torch.bfloat16, torch.float32, "kahan"),
    (torch.bfloat16, torch.bfloat16, "stochastic"),
]


@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "tensors"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_list_functions_equal_the_loop_bit_for_bit(mix: tuple, case: str, numbers: bool):
    dtype, state_dtype, rounding = mix
    form, second, hyper = CASES[case]
    if not numbers:

        def on_device(x: float | tuple) -> Tensor | tuple:
            if isinstance(x, tuple):
                return tuple(map(on_device, x))
            return torch.tensor(x, dtype=torch.float64, device=DEVICE)

        hyper = Hyper(*map(on_device, hyper[:-2]), *hyper[-2:])
    shapes, device = ((3, 4), (), (0, 2), (300,)), "cpu" if numbers else DEVICE
    params, first, squares, gradients = (
        [t.to(device) for t in random_tensors(i, d, shapes)]
        for i, d in enumerate((dtype, state_dtype, state_dtype, dtype))
    )
    moments = Moments(
        params, gradients, first, [v.abs() for v in squares] if second else [],
        [torch.zeros_like(p) for p in params] if rounding == "kahan" else [],
    )  # fmt: skip
    s = step_scalars(
        hyper, form, second, 0.0 if numbers else torch.tensor(0.0, device=DEVICE), (2.0, -0.3, 0.0)
    )
    draws = [Draw(5, 2.0, i) if rounding == "stochastic" else None for i in range(len(params))]
    grads = [g.clone() for g in moments.grads]
    expected = list(update_one_by_one(moments, s, draws))
    update_all(moments, s, draws)
    assert_same(moments.grads, grads)
    for name in ("params", "first", "second", "spare"):
        assert_same(list(getattr(moments, name)), [t for new in expected for t in getattr(new, name)])


@needs_triton
@pytest.mark.parametrize("mix", MIXES[1:], ids=str)
def test_kernel_rounds_like_the_reference(mix: tuple):
    """Each step from the same state. Both compute in float32, with other last bits, and round the result once more: so
    some results are on two sides of a boundary, one unit of their dtype apart, as many as those bits make likely."""
    dtype, state_dtype, rounding = mix
    reference, kernel = (
        Run("product", HYPER, True, dtype, backend, rounding, state_dtype)
        for backend in ("reference", "triton")
    )
    for t, phase in enumerate(PHASES):
        for old, new in zip(kernel.tensors(), reference.tensors()):
            old.copy_(new)
        for run in (reference, kernel):
            run.step(random_tensors(t + 1, dtype), phase, seed=7)
        for name in ("params", "first", "second_moments"):
            for a, b in zip(getattr(reference, name), getattr(kernel, name), strict=True):
                assert a.dtype == b.dtype
                assert_equal_but_for_boundaries(a.cpu().double(), b.cpu().double(), torch.finfo(a.dtype).eps)
        for *parameters, c, d in zip(reference.params, kernel.params, reference.spare, kernel.spare):
            p, q = (t.cpu().double() for t in parameters)
            # Half a unit of the rounding error, which is half a unit of the parameter, twice.
            last = torch.finfo(dtype).eps ** 2 / 2 * p.abs()
            assert ((p + c.cpu() - q - d.cpu()).abs() <= computed_apart(p) + last).all()


def computed_apart(x: Tensor) -> Tensor:
    """How far two results in float32 are from each other at most."""
    return 4e-6 * (1 + x.abs())


def assert_equal_but_for_boundaries(a: Tensor, b: Tensor, eps: float) -> None:
    """``a`` and ``b`` are rounded to multiples of eps times a power of 2 from values that are :func:`computed_apart`."""
    apart, unit = computed_apart(a), eps * torch.maximum(a.abs(), b.abs())
    assert ((a - b).abs() <= apart + unit).all()
    # A boundary lies between two values with this probability: the unit is at least eps / 2 of what is rounded.
    likely = (apart / (eps / 2 * a.abs() + 1e-30)).clamp(max=1).sum().item()
    assert ((a - b).abs() > apart).sum() <= likely + 4 * math.sqrt(likely)


LOSSES = (0.7, 0.5, 0.6, math.nan, 0.9, 0.55, math.inf, 0.2, 0.8, 0.61)


@pytest.mark.parametrize("average, same", [(a, s) for a in AVERAGES for s in (False, True)])
def test_gate_decides_alike_everywhere(average: str, same: bool):
    """Phase, average and counts of steps, after every loss, of the reference and of the kernel: bit for bit."""
    losses = [torch.tensor(x, device=DEVICE) for x in LOSSES]
    shapes = ((3, 4), (5,))
    runs = [Run("sum", HYPER, False, shapes=shapes)]
    if launch.triton is not None:
        runs.append(Run("sum", HYPER, False, backend="triton", shapes=shapes))
    histories = [torch.zeros(3, device=DEVICE) if average == "window" else None for _ in runs]
    seen: list[float] = []
    phase, steps = 1, [0, 0]
    for i, loss in enumerate(losses):
        for run, history in zip(runs, histories):
            run.step(
                random_tensors(1, shapes=shapes),
                loss=loss,
                average=average,
                share=0.25,
                same=same,
                history=history,
            )
        before = phase
        if math.isfinite(LOSSES[i]):
            seen.append(float(loss))
            mean = expected_average(seen, average)
            phase = 0 if seen[-1] < mean and len(seen) > 1 else 1
            assert runs[0].control[:2].double().sum().item() == pytest.approx(mean, rel=1e-7)
        steps[phase if same else before] += 1
        assert runs[0].control[3:6].tolist() == [phase, *steps]
        for run, history in zip(runs[1:], histories[1:]):
            assert torch.equal(run.control, runs[0].control)
            assert history is None or torch.equal(history, histories[0])
            assert max(errors(run.params, [p.cpu().double() for p in runs[0].params])) < 3e-6


def expected_average(seen: list[float], average: str) -> float:
    if average == "ema":
        value = seen[0]
        for x in seen[1:]:
            value += 0.25 * (x - value)
        return value
    chosen = seen[-3:] if average == "window" else seen
    return sum(chosen) / len(chosen)


def test_average_does_not_tire_of_many_losses():
    """A float32 sum of so many equal losses would have drifted; equal losses are never below their average."""
    control = new_control()
    loss = torch.tensor(0.1)
    for _ in range(3000):
        control, _ = observed(control, None, loss, "mean", 0.0)
        assert control[PHASE] == 1
    assert control[0] == loss and control[1] == 0
    control, _ = observed(control, None, torch.nextafter(loss, torch.tensor(0.0)), "mean", 0.0)
    assert control[PHASE] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaler_and_clipping(backend: str):
    """Gradients are divided by the scale and multiplied by the coefficient; found_inf changes nothing at all."""
    plain, scaled = Run("product", HYPER, True, backend=backend), Run("product", HYPER, True, backend=backend)
    scale, clip = torch.tensor(1024.0, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    loss, history = torch.tensor(0.3, device=DEVICE), torch.zeros(4, device=DEVICE)
    options = dict(loss=loss, average="window", history=history)
    for t in range(3):
        history.zero_()
        plain.step(random_tensors(t), **options)
        history.zero_()
        scaled.step(
            [2048 * g for g in random_tensors(t)], clip=clip, grad_scale=scale,
            found_inf=torch.zeros((), device=DEVICE), **options,
        )  # fmt: skip
        assert_same(scaled.tensors(), plain.tensors())
    before = [t.clone() for t in (*plain.tensors(), history)]
    bad = [torch.full_like(g, math.inf) for g in random_tensors(0)]
    plain.step(bad, grad_scale=scale, found_inf=torch.ones((), device=DEVICE), **options)
    assert_same([*plain.tensors(), history], before)


@needs_triton
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 1, 0, 2)], ids=str)
def test_one_launch_equals_one_per_tensor_in_any_order(order: tuple[int, ...]):
    together, apart = (
        Run("product", HYPER, True, backend="triton"),
        Run("product", HYPER, True, backend="triton"),
    )
    for t in range(3):
        grads = random_tensors(t)
        together.step(grads)
        control = apart.control.clone()
        for i in order:
            apart.control.copy_(control)
            moment_update(
                [apart.params[i]], [grads[i].float().to(DEVICE)], [apart.first[i]], [apart.second_moments[i]],
                groups=[0], places=[i], rows=apart.rows, counts=apart.counts, control=apart.control,
                form="product", backend="triton",
            )  # fmt: skip
        assert_same(apart.tensors(), together.tensors())


@needs_triton
def test_dtypes_have_a_launch_each_and_count_one_step():
    """Also: misaligned tensors have one of their own, and a step is bitwise the same whenever it is done."""
    mixes = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
    base = torch.randn(101)

    def tensors() -> Moments:
        params = [torch.arange(100.0).to(p).to(DEVICE) for p, _ in mixes] + [base.clone().to(DEVICE)[1:]]
        first = [torch.zeros(100, dtype=s, device=DEVICE) for _, s in mixes] + [
            torch.zeros(100, device=DEVICE)
        ]
        return Moments(
            params, [torch.ones_like(p) for p in params], first, [torch.zeros_like(m) for m in first]
        )

    rows = torch.tensor([HYPER.row], device=DEVICE)
    results = []
    for _ in range(2):
        moments = tensors()
        table = MomentTable(moments, [0] * 4, range(4))
        assert [part.types["ALIGNED"] for part in table.parts] == [True, True, True, False]
        counts, control = torch.zeros(4, 3, device=DEVICE), new_control(DEVICE)
        for _ in range(2):
            table.launch(moments, rows, counts, control, loss=torch.ones((), device=DEVICE), form="product")
        assert counts[:, 0].tolist() == [2.0] * 4 and control[5] == 2 and table.done.item() == 0
        results.append([*moments.params, *moments.first, *moments.second, counts, control])
    assert_same(*results)


@needs_triton
def test_other_layouts_are_updated_like_their_copies():
    """Parameters with gaps, transposed parameters, gradients and moments of other strides than their parameter."""
    values, gradient = torch.randn(6, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    gaps = torch.zeros(6, 16, device=DEVICE)
    gaps[:, ::2] = values
    expanded = torch.randn(6, 1, device=DEVICE).expand(6, 8)
    cases = [
        (values.clone(), gradient.T.contiguous().T, torch.zeros(6, 8, device=DEVICE)),
        (values.T.contiguous().T, gradient, torch.zeros(6, 8, device=DEVICE)),
        (gaps[:, ::2], gradient, torch.zeros(6, 8, device=DEVICE)),
        (values.clone(), expanded, torch.zeros(8, 6, device=DEVICE).T),
    ]
    rows = torch.tensor([HYPER.row], device=DEVICE)

    def step(p: Tensor, g: Tensor, m: Tensor) -> list[Tensor]:
        moments = Moments([p], [g], [m])
        table = MomentTable(moments, [0], [0])
        for _ in range(2):  # the table stays valid
            table.launch(moments, rows, torch.zeros(1, 3, device=DEVICE), form="sum")
        return [p, m]

    for p, g, m in cases:
        expected = step(
            p.clone(memory_format=torch.contiguous_format), g.contiguous(), torch.zeros(6, 8, device=DEVICE)
        )
        assert_same([t.contiguous() for t in step(p, g, m)], expected)
    assert (gaps[:, 1::2] == 0).all()


@needs_triton
def test_offsets_have_64_bits():
    """A tensor of 2^33 elements, of which only the last chunk is there: addresses and sizes are moved by the rest."""
    rows, results = torch.tensor([HYPER.row], device=DEVICE), []
    for moved in (False, True):
        moments = Moments(*([random_tensors(i, torch.float32, ((1500,),))[0].to(DEVICE)] for i in range(3)),
                          [torch.ones(1500, device=DEVICE)])  # fmt: skip
        table = MomentTable(moments, [0], [0])
        if moved:
            chunks, elements = 1 << 20, 1 << 33
            assert elements == chunks * table.width * PER_THREAD * TILES
            places = table.parts[0].table
            places[:4] -= 4 * elements
            places[5] += elements
            places[8] += chunks
        table.launch(moments, rows, torch.zeros(1, 3, device=DEVICE), form="product")
        results.append([*moments.params, *moments.first, *moments.second])
    assert_same(*results)
    assert not torch.equal(results[0][0].cpu(), random_tensors(0, torch.float32, ((1500,),))[0])


def test_dense_layouts():
    t = torch.zeros(4, 6)
    assert all(map(is_dense, (t, t.T, t[0], t[:2], t[:1, :1], torch.zeros(3, 0), torch.zeros(2, 1, 3).mT)))
    assert not any(map(is_dense, (t[:, ::2], t[:, :3], torch.zeros(2, 1).expand(2, 4))))


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.25, 0.5, 1.0])
def test_scaling_the_loss_scales_the_step(alpha: float):
    """By c^(1 - 2 alpha), where eps does not matter."""
    start = [t.to(DEVICE) for t in random_tensors(0)]
    hyper = Hyper(lr=0.01, alpha=(alpha, alpha), eps=0.0)
    plain, scaled = (Run("average", hyper, True, torch.float64) for _ in range(2))
    for t in range(4):
        plain.step(random_tensors(t + 1))
        scaled.step([3.0 * g for g in random_tensors(t + 1)])
    for p0, p1, p3 in zip(start, plain.params, scaled.params, strict=True):
        torch.testing.assert_close(p3 - p0, (p1 - p0) * 3.0 ** (1 - 2 * alpha), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend, dtype", [
    ("reference", torch.float64),
    ("reference", torch.float32),
    pytest.param("triton", torch.float32, marks=needs_triton),
])  # fmt: skip
@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_zero_second_moment_gives_a_finite_step(alpha: float, backend: str, dtype: torch.dtype):
    for eps in (1e-8, 0.0):
        run = Run("average", Hyper(lr=0.1, alpha=(alpha, alpha), eps=eps), True, dtype, backend)
        before = [p.clone() for p in run.params]
        run.step([torch.zeros_like(g) for g in random_tensors(0)])
        assert_same(run.params, before)


@needs_triton
@pytest.mark.parametrize("alpha", [-2.0, -0.7, 0.1, 1 / 3, 0.5, 0.9, 1.0, 1.7])
def test_power_has_the_accuracy_of_float32(alpha: float):
    """Over all magnitudes of v. A first moment of 1 and beta2 = 1 leave 1 / v^alpha in the parameter."""
    v = torch.logspace(-37, 37, 3001, base=10.0, dtype=torch.float64).float()
    alpha = torch.tensor(alpha).item()  # as float32 has it
    expected = v.double() ** -alpha
    v, expected = v[(expected < 1e37) & (expected > 1e-37)], expected[(expected < 1e37) & (expected > 1e-37)]
    p, m = torch.zeros_like(v), torch.ones_like(v)
    row = Hyper(lr=-1.0, beta1=(1.0, 1.0), beta2=1.0, alpha=(alpha, alpha), eps=0.0, dampening=1.0).row
    row[5], row[14] = 0.0, 0.0  # beta2 = 0 has no correction,
    table = Moments([p.to(DEVICE)], [v.sqrt().to(DEVICE)], [m.to(DEVICE)], [torch.zeros_like(v).to(DEVICE)])
    counts = torch.tensor([[1.0, 0.0, 0.0]], device=DEVICE)
    MomentTable(table, [0], [0]).launch(table, torch.tensor([row], device=DEVICE), counts, form="sum")
    kept = table.second[0].cpu().double()  # and v is the square as it was rounded
    torch.testing.assert_close(table.params[0].cpu().double(), kept**-alpha, rtol=6e-7, atol=0)
    assert (kept / v.double() - 1).abs().max() < 1e-6


def test_reference_is_differentiable():
    """Also with respect to hyper-parameters."""
    p, g, m = (random_tensors(i, shapes=((4,),))[0].requires_grad_() for i in range(3))
    v = random_tensors(3, shapes=((4,),))[0].square().requires_grad_()
    lr, beta, alpha, l2 = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.9, 0.3, 0.2)
    )

    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Tensor, beta: Tensor, alpha: Tensor, l2: Tensor):
        hyper = Hyper(lr, l2, 0.0, (beta, beta), beta, 1e-8, (alpha, alpha))
        s = step_scalars(
            hyper, "product", True, torch.tensor(1.0), [torch.tensor(x) for x in (1.0, -0.1, 0.0)]
        )
        (new,) = update_one_by_one(Moments([p], [g], [m], [v]), s, [None])
        return new.params[0], new.first[0], new.second[0]

    assert torch.autograd.gradcheck(step, (p, g, m, v, lr, beta, alpha, l2))


def test_random_bits_round_without_a_bias():
    """A bfloat16 second moment decays, although every single decay is less than half a unit of its last place."""
    bits = torch.stack(random_bits(Draw(3, 1.0, 2), torch.empty(20000)))
    assert bits.min() >= 0 and bits.max() < 65536
    assert torch.allclose(bits.float().mean(1), torch.tensor(32767.5), atol=4 * 65536 / math.sqrt(12 * 20000))
    assert torch.corrcoef(bits.float()).fill_diagonal_(0).abs().max() < 4 / math.sqrt(20000)
    other = [
        random_bits(Draw(*key), torch.empty(20000))[0] for key in ((4, 1.0, 2), (3, 2.0, 2), (3, 1.0, 3))
    ]
    assert all((bits[0] == o).sum() < 10 for o in other)

    p = [torch.zeros(2000, dtype=torch.bfloat16)]
    moments = Moments(p, [torch.zeros_like(p[0])], [torch.zeros_like(p[0])], [torch.ones_like(p[0])])
    for step in range(100):
        s = step_scalars(Hyper(lr=0.0), "average", True, 1.0, (float(step), 0.0, 0.0))
        update_all(moments, s, [Draw(1, float(step), 0)])
    assert moments.second[0].float().mean().item() == pytest.approx(0.999**100, abs=2e-3)


def test_gradients_stay_and_bad_arguments_are_refused():
    run = Run("sum", Hyper(lr=0.5, l2=1.0), False)
    grads = [g.float() for g in random_tensors(1)]
    kept = [g.clone() for g in grads]
    run.step(grads)
    assert_same(grads, kept)
    options = dict(groups=[0], places=[0], rows=run.rows, counts=run.counts)
    p = torch.ones(3)
    with pytest.raises(
        ValueError, match=r"first has the shapes \[\(2,\)\], expected those of params, \[\(3,\)\]"
    ):
        moment_update([p], [p], [torch.zeros(2)], form="sum", **options)
    for name, value in (("form", "som"), ("average", "median"), ("rounding", "up")):
        with pytest.raises(ValueError, match=f"{name} is '{value}', expected one of"):
            moment_update([p], [p], [p], **{"form": "sum", **options, name: value})


def test_cost_counts_every_tensor_once():
    """Gradients are read; parameters and moments are read and written."""

    def bytes_of(second: bool) -> int:
        p, g, m, v = ([torch.empty(36_500_000, device="meta")] for _ in range(4))
        empty, number = torch.empty(0, device="meta"), torch.empty(0, device="meta")
        rest = (None, None, None, None, None, None, "sum", "mean", 0.0, False, "nearest", 0)
        return (
            operator("moment_update")
            .cost(p, g, m, v if second else [], [], [0], [0], empty, number, *rest)
            .bytes
        )

    assert (bytes_of(True), bytes_of(False)) == (7 * 4 * 36_500_000, 5 * 4 * 36_500_000)


def test_backends():
    one, two = Run("product", HYPER, True), Run("product", HYPER, True, backend="recompute")
    for run in (one, two):
        run.step(random_tensors(1))
    assert_same(one.tensors(), two.tensors())
    double = Run("product", HYPER, True, torch.float64, "triton")
    with pytest.raises(BackendError, match="moment_update: backend 'triton' is forced"):
        double.step(random_tensors(1))


@pytest.mark.parametrize("op", ["moment_update", pytest.param("moment_update_triton", marks=needs_triton)])
def test_opcheck(op: str):
    shapes = ((3, 4), (5,))
    lists = [[t.to(DEVICE) for t in random_tensors(i, torch.float32, shapes)] for i in range(4)]
    rows, counts = torch.tensor([HYPER.row], device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    loss = torch.tensor(0.5, device=DEVICE)
    args = (*lists[:3], [s.abs() for s in lists[3]], [], [0, 0], [0, 1], rows, counts, new_control(DEVICE), None, loss,
            None, None, None, "product", "mean", 0.0, False, "nearest", 0)  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.trgnet, op).default, args)
