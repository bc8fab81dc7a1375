"""Makes the tensors of a case: values of every kind, in every layout, between guard bytes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cases import DTYPES, Case

GUARD = 64  # bytes on each side, a multiple of every vector's size
PATTERN = 0xA5


def shape_of(size: int) -> tuple[int, int, int, int]:
    """A shape of four dimensions, as many of them above 1 as the size allows, the second the largest."""
    dims = [1, 1, 1, 1]
    if size == 0:
        return 2, 3, 0, 5
    for factor in sorted(_prime_factors(size), reverse=True):
        dims[dims.index(min(dims))] *= factor
    small, *middle, large = sorted(dims)
    return middle[0], large, middle[1], small


def _prime_factors(n: int) -> list[int]:
    for factor in range(2, math.isqrt(n) + 1):
        if n % factor == 0:
            return [factor, *_prime_factors(n // factor)]
    return [n] if n > 1 else []


def _empty(*shape: int, **options: torch.memory_format) -> Tensor:
    return torch.empty(shape, device="meta", **options)


# A placement takes a shape and returns a view, on the meta device, with the strides and the offset wanted.
PLACEMENTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "contiguous": lambda shape: _empty(*shape),
    "scalar": lambda shape: _empty(),
    "channels_last": lambda shape: _empty(*shape, memory_format=torch.channels_last),
    "transposed": lambda shape: _empty(*reversed(shape)).permute(*reversed(range(len(shape)))),
    "strided": lambda shape: _empty(*shape[:-1], 2 * shape[-1])[..., ::2],
    "sliced": lambda shape: _empty(shape[0], shape[1], shape[2] + 3, shape[3])[:, :, 1 : shape[2] + 1],
    "expanded": lambda shape: _empty(shape[0], 1, *shape[2:]).expand(shape),
    "misaligned": lambda shape: _empty(math.prod(shape) + 1)[1:].view(shape),
}


@dataclass
class Placed:
    """A tensor in a buffer of its own, guard bytes around it."""

    buffer: Tensor
    like: Tensor  # on the meta device
    dtype: torch.dtype

    @property
    def view(self) -> Tensor:
        """The tensor."""
        return self._view_of(self.buffer)

    def guards_are_whole(self) -> bool:
        """Whether no byte but those of the elements has changed."""
        expected = torch.full_like(self.buffer, PATTERN)
        mine = self._view_of(expected)
        if 0 not in self.like.stride():
            mine.copy_(self.view)
        else:  # every element stands for several
            self._once(mine).copy_(self._once(self.view))
        return torch.equal(expected, self.buffer)

    @staticmethod
    def _once(view: Tensor) -> Tensor:
        """An expanded view with each element but once."""
        return view.as_strided(
            tuple(1 if stride == 0 else size for size, stride in zip(view.shape, view.stride(), strict=True)),
            view.stride(),
        )

    def _view_of(self, buffer: Tensor) -> Tensor:
        elements = buffer[GUARD : buffer.numel() - GUARD].view(self.dtype)
        offset = elements.storage_offset() + self.like.storage_offset()
        return elements.as_strided(self.like.shape, self.like.stride(), offset)


def place(values: Tensor, placement: str, dtype: torch.dtype, device: str = "cpu") -> Placed:
    """Lays values out in memory, cast to a dtype.

    Args:
        values: of the tensor; where it is expanded, those of the first index count.
        placement: a key of PLACEMENTS.
        dtype: of the elements.
        device: of the buffer.
    """
    like = PLACEMENTS[placement](tuple(values.shape))
    elements = 0
    if like.numel():
        elements = 1 + like.storage_offset()
        elements += sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    buffer = torch.full((2 * GUARD + elements * dtype.itemsize,), PATTERN, dtype=torch.uint8, device=device)
    placed = Placed(buffer, like, dtype)
    target = placed.view
    if 0 in like.stride():
        once = Placed._once(target)
        once.copy_(values[tuple(slice(0, size) for size in once.shape)])
    else:
        target.copy_(values)
    return placed


def values_of(kind: str, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random values, the same for the same seed.

    ``ordinary`` are normal, at one scale per tensor. ``extreme`` mixes in arbitrary finite bit patterns, denormals,
    and zeros of both signs. ``special`` adds infinities and NaN.

    Args:
        kind: one of tests.cases.VALUES.
        size: number of elements.
        dtype: that the values must be exact in.
        seed: of the generator.

    Returns:
        Values of the dtype, shape (size,).
    """
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** int(torch.randint(-3, 2, (), generator=generator))
    normal = (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)
    if kind == "ordinary":
        return normal
    finfo = torch.finfo(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits = torch.iinfo(integers)
    patterns = torch.randint(limits.min, limits.max, (size,), generator=generator, dtype=integers).view(dtype)
    patterns = torch.where(patterns.isfinite(), patterns, normal)
    mantissa = torch.randint(1, 1 << 9, (size,), generator=generator, dtype=integers)
    sign = torch.randint(0, 2, (size,), generator=generator, dtype=integers) * limits.min
    denormal = (mantissa % (1 << _mantissa_bits(dtype)) | sign).view(dtype)
    edges = torch.tensor(
        [0.0, -0.0, finfo.max, finfo.min, finfo.tiny, -finfo.tiny, finfo.smallest_normal / 2, 1.0, -1.0],
        dtype=torch.float64,
    ).to(dtype)
    kinds = [normal, patterns, denormal, edges[torch.randint(0, len(edges), (size,), generator=generator)]]
    if kind == "special":
        special = torch.tensor([math.inf, -math.inf, math.nan, 0.0], dtype=dtype)
        kinds.append(special[torch.randint(0, 4, (size,), generator=generator)])
    choice = torch.randint(0, len(kinds), (size,), generator=generator)
    return torch.stack(kinds).gather(0, choice[None])[0]


def _mantissa_bits(dtype: torch.dtype) -> int:
    return -int(math.log2(torch.finfo(dtype).eps))


@dataclass
class CaseTensors:
    """All tensors of one case, and the step count that its state starts from."""

    case: Case
    param: Placed
    grads: list[Placed]
    states: dict[str, Placed] = field(default_factory=dict)
    step: int = 0
    parameter: torch.nn.Parameter = field(init=False)  # made by the test

    def placed(self) -> list[Placed]:
        """Every tensor."""
        return [self.param, *self.grads, *self.states.values()]


LOADED_STEPS = (1, 9, 1000, 16_777_210)  # the last: where float32 begins to run out of integers


def make(case: Case, steps: int, device: str = "cpu") -> CaseTensors:
    """The tensors of a case, and gradients for some steps."""
    shape = () if case.layout.name == "scalar" else shape_of(case.size)

    def slot(name: str, placement: str, dtype: torch.dtype) -> Placed:
        seed = zlib.crc32(f"{case.id} {name}".encode())
        values = values_of(case.values, case.size, dtype, seed)
        if name.endswith("_sq"):
            values = values.abs()
        return place(values.reshape(shape), placement, dtype, device)

    param = slot("param", case.layout.param, DTYPES[case.dtypes[0]])
    grads = [slot(f"grad {k}", case.layout.grad, DTYPES[case.dtypes[1]]) for k in range(steps)]
    if case.start == "fresh":
        return CaseTensors(case, param, grads)
    states = {name: slot(name, case.layout.state, dtype) for name, dtype in case.state_dtypes().items()}
    step = LOADED_STEPS[zlib.crc32(case.id.encode()) % len(LOADED_STEPS)] if case.rule.rule.keeps_step else 1
    return CaseTensors(case, param, grads, states, step)


def same_bits(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors of the same dtype and shape have the same bits; NaN is NaN, zeros have signs."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    equal = one.contiguous().view(integers) == other.contiguous().view(integers)
    return equal | (one.isnan() & other.isnan())
