"""States in 8 bits and parameters rounded at random: bits of every backend, codecs, checkpoints, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import blocks

from .running import INTERPRETED, ISAS, ONE_RUN_EACH, Run, as_params
from .test_precision import BF16, F16, F32, make_params, take_steps

I8, F8 = torch.int8, torch.float8_e4m3fn
needs_no_backend = pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")

MODES = [
    ("AdamW", F32, {"state_dtype": I8}),
    ("AdamW", BF16, {"state_dtype": I8, "weight_decay": 0.1}),
    ("AdamW", BF16, {"state_dtype": I8, "master": "split", "state_block": 32}),
    ("Adam", BF16, {"state_dtype": {"exp_avg": I8, "exp_avg_sq": F32}, "state_block": 256, "amsgrad": True}),
    ("Adam", F16, {"state_dtype": I8, "state_block": 64, "master": "kahan", "amsgrad": True}),
    ("SGD", BF16, {"state_dtype": I8, "momentum": 0.9}),
    ("AdamW", BF16, {"state_dtype": F8, "master": "split"}),
    ("Adam", F32, {"state_dtype": {"exp_avg": I8, "exp_avg_sq": F8}, "state_block": 32, "amsgrad": True}),
    ("AdamW", F32, {"state_dtype": F8, "weight_decay": 0.0}),
    ("Adam", BF16, {"state_dtype": F8, "weight_decay": 0.1, "state_block": 64}),
    ("SGD", F32, {"state_dtype": F8, "momentum": 0.9, "state_block": 256}),
    ("AdamW", BF16, {"rounding": "stochastic"}),
    ("AdamW", BF16, {"rounding": "stochastic", "state_dtype": F32}),
    ("AdamW", BF16, {"rounding": "stochastic", "state_dtype": I8}),
    ("AdamW", BF16, {"rounding": "stochastic", "state_dtype": F8}),
    ("Adam", F16, {"rounding": "stochastic", "amsgrad": True}),
    ("SGD", F16, {"rounding": "stochastic"}),
    ("SGD", BF16, {"rounding": "stochastic", "momentum": 0.9, "state_dtype": F8}),
]


def mixed_params(dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    """Vectors, a transposed matrix, and a float32 tensor beside the others."""
    params = make_params(dtype, device=device)
    params.append(torch.nn.Parameter(make_params(dtype, 5, device)[2].detach().view(8, 8).t()))
    params.append(torch.nn.Parameter(make_params(F32, 6, device)[3].detach()))
    return params


def uneven_steps(optimizer: Any, params: list[torch.nn.Parameter], steps: int) -> None:
    """Gradients of very different sizes within a block, zeros among them; at last one that is infinite."""
    generator = torch.Generator().manual_seed(4)
    for step in range(steps):
        for param in params:
            values = torch.randn(param.shape, generator=generator) * 10 ** (
                -6 * torch.rand(param.shape, generator=generator)
            )
            values[torch.rand(param.shape, generator=generator) < 0.1] = 0.0
            param.grad = values.to(param.device, param.dtype)
        if step == steps - 1:
            params[3].grad.view(-1)[-1] = torch.inf  # type: ignore[union-attr]
        optimizer.step()


def all_bits(optimizer: Any, params: list[torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Everything that a step writes, float8 as its bits, on the CPU."""
    found: dict[str, Any] = {}
    for k, param in enumerate(params):
        found |= {f"param {k}": param.detach(), f"grad {k}": param.grad}
        found |= {f"{key} {k}": torch.as_tensor(value) for key, value in optimizer.state[param].items()}
    found |= {f"copy {k}": tensor for k, tensor in enumerate(optimizer._phase.copy_to or ())}
    return {key: (x.view(torch.int8) if x.dtype == F8 else x).cpu() for key, x in found.items()}


def assert_all_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.allclose(ours[key], tensor, rtol=0, atol=0, equal_nan=True), key


@pytest.mark.parametrize(("name", "dtype", "options"), MODES, ids=str)
@pytest.mark.parametrize("run", as_params((*ONE_RUN_EACH, *(Run("cpu", isa=isa) for isa in ISAS[1:]))))
def test_codes_scales_and_parameters_have_the_bits_of_the_reference(
    name: str, dtype: torch.dtype, options: dict[str, Any], run: Run, settings: Run
) -> None:
    found = []
    for backend, device in ((run.backend, run.device), ("reference", "cpu")):
        params = mixed_params(dtype, device)
        optimizer = getattr(fusedopt, name)(params, lr=0.01, backend=backend, **options)
        before = fusedopt.launch_count()
        uneven_steps(optimizer, params, 3)
        assert fusedopt.launch_count() == before + 3
        found.append(all_bits(optimizer, params))
    assert_all_same(*found)


SIDES: dict[str, Any] = {"ema_decay": 0.9, "ema_warmup": True, "copies": True, "zero_grads": True}
PHASES = [
    ("AdamW", BF16, {"state_dtype": I8, "master": "split"}, SIDES),
    ("AdamW", BF16, {"state_dtype": I8}, {"ema_decay": 0.25, "max_grad_norm": 0.5}),
    ("Adam", F32, {"state_dtype": {"exp_avg": I8, "exp_avg_sq": F8}, "amsgrad": True, "state_block": 32}, SIDES),
    ("AdamW", BF16, {"rounding": "stochastic", "state_dtype": F8}, {**SIDES, "max_grad_norm": 2.0}),
    ("AdamW", BF16, {"rounding": "stochastic"}, {"copies": True, "max_grad_norm": 0.1, "skip_nonfinite": True}),
    ("SGD", F16, {"state_dtype": I8, "momentum": 0.9}, {**SIDES, "skip_nonfinite": True}),
]


@pytest.mark.parametrize(("name", "dtype", "options", "phase"), PHASES, ids=str)
@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_codes_beside_a_phase_have_the_bits_of_the_reference(
    name: str, dtype: torch.dtype, options: dict[str, Any], phase: dict[str, Any], run: Run, settings: Run
) -> None:
    found = []
    for backend, device in ((run.backend, run.device), ("reference", "cpu")):
        params = mixed_params(dtype, device)
        asked = {key: value for key, value in phase.items() if key != "copies"}
        if phase.get("copies"):
            asked["copy_to"] = [
                torch.empty_like(param, dtype=(BF16, F16, F32)[k % 3]).detach() for k, param in enumerate(params)
            ]
        optimizer = getattr(fusedopt, name)(params, lr=0.01, backend=backend, **options, **asked)
        uneven_steps(optimizer, params, 3)
        found.append(all_bits(optimizer, params))
        if "max_grad_norm" in phase:
            found[-1]["norm"] = optimizer.grad_norm.cpu()
        if "skip_nonfinite" in phase:
            assert int(optimizer.skipped_steps) == 1
    assert_all_same(*found)


@needs_no_backend
def test_a_phase_changes_no_bit_of_a_mode() -> None:
    found = []
    for phase in ({}, {"ema_decay": 0.5, "zero_grads": True}):
        params = mixed_params(BF16, "cpu")
        optimizer = fusedopt.AdamW(params, lr=0.01, rounding="stochastic", state_dtype=I8, **phase)
        uneven_steps(optimizer, params, 3)
        found.append(all_bits(optimizer, params))
    plain, beside = found
    assert_all_same({key: tensor for key, tensor in beside.items() if not key.startswith(("ema", "grad"))},
                    {key: tensor for key, tensor in plain.items() if not key.startswith("grad")})  # fmt: skip


@needs_no_backend
@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_a_code_is_at_most_half_a_step_off_for_means_and_a_step_for_roots(block: int) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-20, 10, 5000)
    codes, scales = blocks.coded(values, torch.int8, block=block)
    step = scales.repeat_interleave(block)[: values.numel()]
    # Half a step, and what the product with the inverse and the sum that rounds may be off by: 2^-16 of a step.
    assert ((blocks.decoded(codes, scales, block=block) - values).abs() <= step * (0.5 + 2**-16)).all()
    squares = values * values
    codes, scales = blocks.coded(squares, torch.uint8, block=block, step=7)
    step = scales.repeat_interleave(block)[: values.numel()]
    off = (blocks.decoded(codes, scales, block=block).sqrt() - squares.sqrt()).abs()
    assert (off <= step * (1 + 2**-15)).all()


@needs_no_backend
def test_a_second_moment_that_is_not_0_never_becomes_0_nor_an_update_twice_as_large() -> None:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) ** 30
    values[::100] = 1.0
    codes, scales = blocks.coded(values, torch.uint8, block=128, step=3)
    assert (codes[values > 0] > 0).all()
    kept = blocks.decoded(codes, scales, block=128)
    assert (kept.sqrt() * 2 * (1 + 2**-14) >= values.sqrt()).all()
    assert blocks.decoded(*blocks.coded(torch.zeros(5), torch.uint8, block=32), block=32).count_nonzero() == 0


@pytest.mark.parametrize(("code", "least"), [(I8, 254), (F8, 416)], ids=str)
@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_no_random_bits_carry_the_largest_of_a_block_beyond_the_largest_code(
    code: torch.dtype, least: int, run: Run, settings: Run
) -> None:
    """All of a block are its largest: of 2^17, some eight meet the highest two of 2^15 random words."""
    sizes = torch.rand(2**12, generator=torch.Generator().manual_seed(0)).repeat_interleave(32)
    param = torch.nn.Parameter(torch.zeros(2**17, device=run.device))
    optimizer = fusedopt.AdamW([param], backend=run.backend, state_dtype=code, state_block=32)
    param.grad = sizes.to(run.device)
    optimizer.step()
    codes = optimizer.state[param]["exp_avg_sq"].float()
    assert float(codes.min()) >= least


@needs_no_backend
def test_a_decay_of_one_in_a_thousand_is_not_lost() -> None:
    """The root of a mean of squares loses 1/2000 a step, 1/20 of a code of 100: to nearest it would stay for ever."""
    value = torch.full((20_000,), 0.16)
    value[::128] = 1.0  # the largest of each block; code 102 for the others
    for step in range(200):
        codes, scales = blocks.coded(value, torch.uint8, block=128, step=step)
        value = blocks.decoded(codes, scales, block=128)
        value[value < 0.5] *= 0.999
        value[::128] = 1.0
    rest = value[value < 0.5]
    # Each step is off by at most a code, independently: the mean of 19,843 after 200 steps has a deviation below
    # sqrt(200)/2 of a code of 1/255 at a root of 0.4, divided by the root of their number; five of those are allowed.
    bound = 5 * (200**0.5 / 2) / 255 / rest.numel() ** 0.5
    variance = 200 / 4 / 255**2  # that the mean of the squares is larger by, at most
    expected = (0.16 * 0.999**200) ** 0.5
    assert abs(float(rest.mean().sqrt()) - expected) <= bound + variance / (2 * expected)


@needs_no_backend
@pytest.mark.parametrize("place", [0.3, 30.2, 3e-3, 1e-2], ids=str)
def test_float8_of_a_mean_of_squares_is_unbiased(place: float) -> None:
    count = 1 << 16
    values = torch.full((count,), place)
    values[::32] = 448.0
    codes, scales = blocks.coded(values, F8, block=32, step=3, is_square=True)
    assert (scales == 1.0).all()
    found = blocks.decoded(codes, scales, block=32)[values < 448].double()
    # Draws from two values a gap apart: the mean's deviation is at most half a gap by the root of their number; and
    # 16 random bits are 2^-17 of a gap off.
    gap = float(found.max() - found.min())
    assert len(found.unique()) == 2
    assert abs(float(found.mean()) - float(values[1])) <= gap * (5 / 2 / found.numel() ** 0.5 + 2**-17)


@needs_no_backend
def test_random_rounding_is_unbiased_and_stays_between_neighbours() -> None:
    value, count = 1.0 + 0.3 * 2**-7, 1 << 16
    found = blocks.at_random(torch.full((count,), value), key=5, step=9)
    low, high = 1.0, 1.0 + 2**-7
    assert set(found.tolist()) == {low, high}
    # A mean of `count` draws of probability 0.3: five standard deviations are 5·sqrt(0.21/count) of the gap.
    share = float((found == high).double().mean())
    assert abs(share - 0.3) <= 5 * (0.21 / count) ** 0.5
    again = blocks.at_random(torch.full((count,), value), key=5, step=10)
    both = float(((found == high) & (again == high)).double().mean())
    assert abs(both - 0.09) <= 5 * (0.09 * 0.91 / count) ** 0.5, "steps are independent"


# The floats of 16 bits from 0 up, and what the next one is larger by. Their neighbours above are the next bits.
F16_VALUES = torch.arange(0x7C00, dtype=torch.int16).view(F16)
F16_GAPS = 2.0 ** (torch.arange(0x7C00) // 1024 - 1).clamp(min=0) * 2.0**-24
STEPS_UP = (1, 3, 4095, 4096, 8191)  # of 8192 between two neighbours


@needs_no_backend
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("steps", [0, *STEPS_UP])
def test_as_many_random_words_round_a_float16_up_as_make_the_mean_exact(steps: int, sign: int) -> None:
    """Of 2^13 words the last `steps` go up, between any two neighbours, subnormal ones too: so its mean is exact."""
    low, gaps = F16_VALUES.double()[:-1], F16_GAPS.double()[:-1]
    exact = (sign * (low + gaps * steps / 8192)).float()
    assert torch.equal(exact.double(), sign * (low + gaps * steps / 8192)), "float32 has them all"
    for word, goes_up in ((0, False), (8191 - steps, False), (8192 - steps, True), (8191, steps > 0)):
        if word > 8191:
            continue
        found = blocks._f16_at_random(exact, torch.tensor(0xABCD0000 & ~0x1FFF | word))
        expected = sign * (F16_VALUES[1:] if goes_up else F16_VALUES[:-1]).float()
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@needs_no_backend
def test_random_rounding_to_float16_makes_no_infinity_that_nearest_would_not() -> None:
    edge = torch.tensor([65504.0, 65505.0, 65519.9, 65520.0, 1e9, torch.inf, -65519.0, -65520.0, -0.0])
    for word in (0, 1, 8191):
        found = blocks._f16_at_random(edge, torch.tensor(word)).to(F16)
        assert torch.equal(found, edge.to(F16))
        assert found[-1].signbit()
        assert blocks._f16_at_random(torch.tensor(torch.nan), torch.tensor(word)).isnan()


@needs_no_backend
def test_what_lies_below_the_places_of_a_subnormal_biases_it_by_a_2_14th_of_the_gap_at_most() -> None:
    shares = torch.tensor([0.0, 2**-15, 3**-9, 0.1, 1 / 3, 0.7, 1 - 2**-20], dtype=torch.float64)
    values = (shares * 2.0**-24).float()[:, None].expand(-1, 8192)
    found = blocks._f16_at_random(values, torch.arange(8192)[None, :])
    assert ((found == 0) | (found == 2.0**-24)).all()
    # The sum with 2^-14 is rounded to 2^-37: by half of that, a 2^14th of the gap of 2^-24.
    assert ((found.double().mean(dim=1) * 2**24 - shares).abs() <= 2**-14 + 2**-24).all()


@pytest.mark.parametrize("steps", STEPS_UP)
@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_every_gap_of_float16_is_rounded_as_the_reference_does(steps: int, run: Run, settings: Run) -> None:
    """From every float16 a step of SGD goes to `steps` of 8192 of the way to the next: exactly, in float32."""
    found = []
    for backend, device in ((run.backend, run.device), ("reference", "cpu")):
        params = [torch.nn.Parameter((sign * F16_VALUES).to(device)) for sign in (1, -1)]
        optimizer = fusedopt.SGD(params, lr=steps / 8192, backend=backend, rounding="stochastic")
        for param, sign in zip(params, (-1, 1), strict=True):
            param.grad = (sign * F16_GAPS).to(device, F16)
        optimizer.step()
        found.append(all_bits(optimizer, params))
    assert_all_same(*found)
    exact = (F16_VALUES.double() + F16_GAPS.double() * steps / 8192).float()
    key = optimizer.state[params[0]]["rounding_key"]
    assert torch.equal(found[0]["param 0"], blocks.at_random(exact, key, 1, F16).to(F16))


SMALL_UPDATES = [
    # AdamW moves 1e-4 a step, a 39th of the gap of 2^-8 below 1 in bfloat16; SGD as much, a fifth of 2^-11 in float16.
    ("AdamW", BF16, 2**-8, {"weight_decay": 0.0}),
    ("SGD", BF16, 2**-8, {}),
    ("SGD", F16, 2**-11, {}),
]


@needs_no_backend
@pytest.mark.parametrize(("name", "dtype", "gap", "options"), SMALL_UPDATES, ids=str)
def test_small_updates_are_kept_on_average_by_random_rounding(
    name: str, dtype: torch.dtype, gap: float, options: dict[str, Any]
) -> None:
    param = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
    optimizer = getattr(fusedopt, name)([param], lr=1e-4, rounding="stochastic", **options)
    for _ in range(100):
        param.grad = torch.ones_like(param)
        optimizer.step()
    # To nearest nothing would move. The deviation of 100 steps is at most sqrt(100)/2 gaps for an element, a 64th of
    # that for the mean.
    assert abs(float(param.detach().double().mean()) - 0.99) <= 5 * 5 * gap / 64


@needs_no_backend
@pytest.mark.parametrize(("name", "dtype", "options"), MODES, ids=str)
def test_a_checkpoint_of_each_mode_goes_on_bit_for_bit(
    name: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Any
) -> None:
    params = make_params(dtype)
    optimizer = getattr(fusedopt, name)(params, lr=0.01, **options)
    take_steps(optimizer, params, 3)
    torch.save([optimizer.state_dict(), [param.detach() for param in params]], tmp_path / "saved")
    state, values = torch.load(tmp_path / "saved", weights_only=True)
    copies = [torch.nn.Parameter(value) for value in values]
    resumed = getattr(fusedopt, name)(copies, lr=0.01, **options)
    resumed.load_state_dict(state)
    for one, some in ((optimizer, params), (resumed, copies)):
        take_steps(one, some, 2, seed=9)
    assert_all_same(all_bits(resumed, copies), all_bits(optimizer, params))
    if options.get("rounding"):
        assert all(int(resumed.state[param]["step"]) == 5 for param in copies)


@needs_no_backend
@pytest.mark.parametrize(
    ("name", "options"), [("SGD", {}), ("SGD", {"momentum": 0.9, "dampening": 0.5}), ("AdamW", {})]
)
@pytest.mark.parametrize("way", ["fused", "for-loop", "none"])
def test_random_bits_go_on_by_way_of_torch(name: str, options: dict[str, Any], way: str) -> None:
    """What torch does not know is carried along by it, and what it has not stepped goes on bit for bit."""
    params = make_params(BF16)
    optimizer = getattr(fusedopt, name)(params, lr=0.01, rounding="stochastic", state_dtype=F32, **options)
    for place, param in enumerate(params):
        optimizer.state[param]["rounding_key"] = 7000 + place  # not what their places would give them
    take_steps(optimizer, params, 3)
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    form = copy.deepcopy(optimizer.state_dict_torch())
    if way != "none":
        wide = [torch.nn.Parameter(param.detach().to(F32)) for param in params]
        stepped, carrier = (getattr(torch.optim, name)(wide, lr=0.01, fused=way == "fused", **options) for _ in "12")
        stepped.load_state_dict(copy.deepcopy(form))
        take_steps(stepped, wide, 1)
        for place, state in stepped.state_dict()["state"].items():
            assert state["rounding_key"] == 7000 + place
            assert int(state["step"]) == (4 if name == "AdamW" else 3)
        carrier.load_state_dict(form)
        form = copy.deepcopy(carrier.state_dict())
    resumed = getattr(fusedopt, name)(copies, lr=0.01, rounding="stochastic", state_dtype=F32, **options)
    resumed.load_state_dict(form)
    for one, some in ((optimizer, params), (resumed, copies)):
        take_steps(one, some, 2, seed=9)
    assert_all_same(all_bits(resumed, copies), all_bits(optimizer, params))


@pytest.mark.parametrize("leave", [fusedopt.AdamW.state_dict_torch, fusedopt.unfuse], ids=["state_dict", "unfuse"])
@pytest.mark.parametrize(
    ("block", "message"),
    [
        (32, r"exp_avg_scale of parameter 1 of group 1 has shape \(5,\) .* have \(10,\) .* where state_block is 32"),
        (128, r"exp_avg_scale of parameter 1 of group 1 has shape \(5,\) .* have \(3,\) .* where state_block is 128"),
        (96, "state_block is 96; it must be 32, 64"),
    ],
    ids=str,
)
def test_a_mode_is_not_left_by_blocks_that_are_not_those_of_the_codes(block: int, message: str, leave: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(size)) for size in (300, 1, 300)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = fusedopt.AdamW(groups, state_dtype=I8, state_block=64)
    take_steps(optimizer, params, 1)
    before = copy.deepcopy(all_bits(optimizer, params))
    optimizer.param_groups[1]["state_block"] = block
    with pytest.raises(ValueError, match=message):
        leave(optimizer)
    assert type(optimizer) is fusedopt.AdamW
    assert_all_same(all_bits(optimizer, params), before)
    optimizer.param_groups[1]["state_block"] = 64
    leave(optimizer)


@needs_no_backend
def test_a_velocity_that_torch_began_is_no_first_one_when_it_comes_back() -> None:
    params = [torch.nn.Parameter(torch.ones(4, dtype=BF16))]
    options: dict[str, Any] = {"lr": 0.25, "momentum": 0.5, "dampening": 0.5}
    optimizer = fusedopt.SGD(params, **options, rounding="stochastic", state_dtype=F32, skip_nonfinite=True)
    params[0].grad = torch.full((4,), torch.nan, dtype=BF16)
    optimizer.step()
    theirs = torch.optim.SGD([torch.nn.Parameter(params[0].detach().to(F32))], **options)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict_torch()))
    take_steps(theirs, theirs.param_groups[0]["params"], 1)
    began = theirs.state_dict()["state"][0]["momentum_buffer"].clone()
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    params[0].grad = torch.ones(4, dtype=BF16)
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], 0.5 * began + 0.5)


CODED: list[dict[str, Any]] = [{"state_dtype": I8}, {"state_dtype": F8}, {"state_dtype": {"exp_avg": F8}}]
NOT_CODED: list[dict[str, Any]] = [{}, {"state_dtype": F32}, {"state_dtype": {"exp_avg_sq": BF16}}]


@needs_no_backend
@pytest.mark.parametrize("saved", CODED, ids=str)
@pytest.mark.parametrize("asked", [*CODED, *NOT_CODED, {"state_dtype": I8, "state_block": 32}], ids=str)
def test_a_checkpoint_of_another_mode_is_refused_or_converted(saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Codes go into the mode that made them; float32 of ``state_dict_torch`` and plain states into any."""
    params = make_params(BF16)
    optimizer = fusedopt.AdamW(params, **saved)
    take_steps(optimizer, params, 2)
    other = fusedopt.AdamW(make_params(BF16), **asked)
    if saved == asked or (saved, asked) == (CODED[2], CODED[1]):  # of which no code is another's
        other.load_state_dict(optimizer.state_dict())
    else:
        with pytest.raises(ValueError, match=r"is codes of torch.\w+, but state_dtype|where state_block is 32"):
            other.load_state_dict(optimizer.state_dict())
        assert not other.state
    other.load_state_dict(copy.deepcopy(optimizer.state_dict_torch()))
    theirs = other.param_groups[0]["params"]
    take_steps(other, theirs, 1)
    kept = other.state[theirs[0]]["exp_avg"].dtype
    wanted = asked.get("state_dtype", F32)  # None: what was loaded stays
    assert kept == (wanted.get("exp_avg", F32) if isinstance(wanted, dict) else wanted)


@needs_no_backend
@pytest.mark.parametrize("asked", [*CODED, {"rounding": "stochastic"}, {"master": "split"}], ids=str)
def test_a_plain_checkpoint_goes_into_every_mode(asked: dict[str, Any]) -> None:
    params = make_params(BF16)
    plain = fusedopt.AdamW(params)
    take_steps(plain, params, 2)
    other = fusedopt.AdamW(make_params(BF16), **asked)
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    take_steps(other, other.param_groups[0]["params"], 1)
    assert int(other.state[other.param_groups[0]["params"][0]]["step"]) == 3


@needs_no_backend
@pytest.mark.parametrize(("name", "dtype", "options"), MODES, ids=str)
def test_unfuse_leaves_the_mode(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = make_params(dtype)
    optimizer = getattr(fusedopt, name)(params, lr=0.01, **options)
    take_steps(optimizer, params, 2)
    wide = copy.deepcopy(optimizer.state_dict_torch())["state"]
    plain = fusedopt.unfuse(optimizer)
    for k, param in enumerate(params):
        known = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} if name != "SGD" else {"momentum_buffer"}
        assert plain.state[param].keys() <= known
        for key, tensor in plain.state[param].items():
            assert torch.equal(tensor, wide[k][key].to(tensor.dtype)), key
            assert tensor.dtype == (F32 if key == "step" else dtype), key
    assert not {"state_dtype", "state_block", "master", "rounding"} & plain.param_groups[0].keys()
    take_steps(plain, params, 1)


@needs_no_backend
def test_sgd_rounded_at_random_counts_on_from_a_velocity_without_a_count_and_refuses_a_false_one() -> None:
    params = make_params(BF16)
    plain = fusedopt.SGD(params, lr=0.1, momentum=0.9)
    take_steps(plain, params, 2)
    other = fusedopt.SGD(make_params(BF16), lr=0.1, momentum=0.9, rounding="stochastic")
    state = copy.deepcopy(plain.state_dict())
    other.load_state_dict(state)
    theirs = other.param_groups[0]["params"]
    take_steps(other, theirs, 1)
    assert [int(other.state[param]["step"]) for param in theirs] == [2] * len(theirs)  # some were taken: 1 at least
    state["state"][0]["step"] = -1.0
    with pytest.raises(ValueError, match=r"step of parameter 0 of group 0 must be a count, but it is -1"):
        other.load_state_dict(state)


@needs_no_backend
def test_a_first_step_that_was_skipped_leaves_no_velocity_to_torch() -> None:
    params = make_params(BF16)
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, rounding="stochastic", skip_nonfinite=True)
    for param in params:
        param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    assert not any("momentum_buffer" in state for state in optimizer.state_dict_torch()["state"].values())


@needs_no_backend
def test_states_of_torch_go_into_8_bits_and_back() -> None:
    params = make_params(F32)
    theirs = torch.optim.AdamW(params)
    take_steps(theirs, params, 2)
    before = theirs.state[params[4]]["exp_avg"].clone()
    optimizer = fusedopt.AdamW(params, state_dtype=I8)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for param in params:
        param.grad = None
    optimizer.step()
    state = optimizer.state_dict_torch()["state"][4]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert (state["exp_avg"] - before).abs().max() <= before.abs().max() / 254 * (1 + 2**-10)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict_torch()))
    take_steps(theirs, params, 1)


REFUSED = [
    ({"state_dtype": I8, "state_block": 100}, "state_block is 100; it must be 32, 64, 128, 256"),
    ({"rounding": "up"}, "rounding is 'up'"),
    ({"rounding": "stochastic", "master": "split"}, "rounding='stochastic' and master='split'"),
]


@needs_no_backend
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_a_mode_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusedopt.AdamW(make_params(BF16), **options)


@needs_no_backend
@pytest.mark.parametrize("options", [{"state_dtype": I8}, {"rounding": "stochastic"}], ids=str)
def test_float64_beside_a_mode_is_refused_before_anything_is_written(options: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(8, dtype=BF16))
    optimizer = fusedopt.AdamW([param], copy_to=[torch.zeros(8, dtype=torch.float64)], **options)
    param.grad = torch.ones_like(param)
    with pytest.raises(
        TypeError, match=r"copy_to of .* has dtype torch.float64, which (state_dtype=torch.int8|rounding='stochastic')"
    ):
        optimizer.step()
    assert not optimizer.state


@needs_no_backend
@pytest.mark.parametrize("options", [{"state_dtype": I8}, {"rounding": "stochastic"}, {"master": "split"}], ids=str)
@pytest.mark.parametrize("loads", [False, True])
def test_an_average_in_float64_beside_a_mode_is_refused(loads: bool, options: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(300, dtype=BF16))
    optimizer = fusedopt.AdamW([param], ema_decay=0.5, **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    if loads:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["ema"] = saved["state"][0]["ema"].double()
        optimizer.load_state_dict(saved)
    else:
        optimizer.state[param]["ema"] = optimizer.state[param]["ema"].double()
    before = param.detach().clone()
    with pytest.raises(TypeError, match=r"ema of parameter 0 of group 0 has dtype torch\.float64, which"):
        optimizer.step()
    assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize("run", as_params((*ONE_RUN_EACH, *(Run("cpu", isa=isa) for isa in ISAS[1:]))))
def test_float64_parameters_and_modes_share_a_launch(report: bool, run: Run, settings: Run) -> None:
    found = []
    for backend, device in ((run.backend, run.device), ("reference", "cpu")):
        exact, coded = make_params(torch.float64, device=device), make_params(BF16, device=device)
        groups = [{"params": exact}, {"params": coded, "state_dtype": I8}]
        optimizer = fusedopt.AdamW(groups, lr=0.01, rounding="stochastic", report=report, backend=backend)
        before = fusedopt.launch_count()
        uneven_steps(optimizer, [*exact, *coded], 2)
        assert fusedopt.launch_count() == before + 2
        found.append(all_bits(optimizer, [*exact, *coded]))
    assert_all_same(*found)


# Where the elements of local tensors are in a whole: (place of the first, elements of a run, from run to run).
PLACES = {
    "columns": (3, 7, 21),
    "long runs": (1000, 500, 4000),
    "beyond 2^32": (2**32 + 5, 48, 2**31 + 7),
    "passing 2^32 within a vector": (2**32 - 37, 70_000, 70_000),
    "runs of one": (0, 1, 2**32 + 1),
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("run", as_params((*ONE_RUN_EACH, *(Run("cpu", isa=isa) for isa in ISAS[1:]))))
def test_random_bits_are_those_of_places_in_the_whole(
    places: str, run: Run, settings: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sharded", "table"):
        monkeypatch.setattr(f"fusedopt.{name}.places_of", lambda param: PLACES[places])
    found = []
    for backend, device in ((run.backend, run.device), ("reference", "cpu")):
        params = mixed_params(BF16, device)
        optimizer = fusedopt.AdamW(params, lr=0.01, rounding="stochastic", state_dtype=I8, backend=backend)
        uneven_steps(optimizer, params, 2)
        found.append(all_bits(optimizer, params))
    assert_all_same(*found)


PLANNED = [
    (fusedopt.AdamW, {}, BF16),
    (fusedopt.AdamW, {"amsgrad": True}, F32),
    (fusedopt.SGD, {"momentum": 0.9}, BF16),
    (fusedopt.SGD, {}, BF16),
]


@needs_no_backend
@pytest.mark.parametrize(("optimizer", "options", "dtype"), PLANNED, ids=str)
def test_a_plan_is_what_the_states_take(optimizer: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(30, 50, dtype=dtype), torch.nn.Linear(50, 7, dtype=F32))
    for plan in fusedopt.plan_memory(model, budget=0, optimizer=optimizer, verbose=False, **options):
        params = [torch.nn.Parameter(torch.zeros_like(param, device="cpu")) for param in model.parameters()]
        made = optimizer(params, **options, **plan.options)
        take_steps(made, params, 1)
        found = [value for param in params for value in made.state[param].values() if isinstance(value, torch.Tensor)]
        kept = 0 if made._rule.keeps_step else 4 * len(made._hidden_steps.known)
        assert plan.state_bytes == sum(tensor.numel() * tensor.element_size() for tensor in found) + kept, plan.name
        assert plan.param_bytes == plan.grad_bytes == sum(param.nbytes for param in params)
        assert not plan.fits


@needs_no_backend
def test_a_plan_is_printed_and_a_negative_budget_refused(capsys: Any) -> None:
    params = [torch.empty(10**6, dtype=BF16, device="meta", requires_grad=True)]
    fusedopt.plan_memory(params, budget=10**7 + 100)
    lines = capsys.readouterr().out.splitlines()
    beyond = {line.split("  ")[0] for line in lines[1:] if line.endswith("too much")}
    float32 = {f"float32 states{beside}" for beside in ("", ", fp32", ", split", ", kahan", ", stochastic")}
    assert beyond == {*float32, "int8 states, fp32"}
    with pytest.raises(ValueError, match="budget is -1"):
        fusedopt.plan_memory(params, budget=-1)


# A NaN with all bits set: to add to its bits, as rounding at random does, would make it -0.
FULL_NAN = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
@pytest.mark.parametrize("options", [{"rounding": "stochastic"}, {"master": "split"}], ids=str)
def test_a_nan_of_any_bits_stays_one_and_leaves_no_low_bits(options: dict[str, Any], run: Run, settings: Run) -> None:
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype (Tensor.grad_dtype)")
    param = torch.nn.Parameter(torch.zeros(300, dtype=BF16, device=run.device))
    param.grad_dtype = F32
    optimizer = fusedopt.SGD([param], lr=1.0, backend=run.backend, **options)
    param.grad = FULL_NAN.to(run.device).expand(300).clone()
    optimizer.step()
    assert bool(param.isnan().all())
    assert not bool(optimizer.state[param].get("low_bits", torch.zeros(1)).any())


@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
@pytest.mark.parametrize("dtype", [I8, F8], ids=str)
def test_a_block_whose_scale_has_no_finite_inverse_is_zero(dtype: torch.dtype, run: Run, settings: Run) -> None:
    param = torch.nn.Parameter(torch.ones(300, device=run.device))
    optimizer = fusedopt.SGD([param], lr=1.0, momentum=0.9, state_dtype=dtype, backend=run.backend)
    param.grad = torch.full_like(param, 1e-38)
    optimizer.step()
    state = optimizer.state[param]
    assert not bool(state["momentum_buffer_scale"].any())
    assert not bool(state["momentum_buffer"].float().any())
