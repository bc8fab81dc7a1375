"""The tensor table in pure Python, twin of csrc/host_table and of Table in csrc/python/watched_table.h.

It stands in where nothing was compiled, so that the Triton and reference backends run from a plain install.
The columns are the same bytes in the same order (csrc/table.h); only the host time of a step is longer.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rules import Rule
from .storages import CODE_STORAGES, FLOAT8_SQUARE, STORAGES

# csrc/types.h as typecodes of array: unsigned and signed integers of 32 and 64 bits.
U32, I32, U64, I64, F64 = "I", "i", "Q", "q", "d"

# csrc/rules/rule.h, csrc/table.h
HYPERS = 8  # hyperparameters a rule may name
SLOTS = 15  # columns of addresses: csrc/table.h
ELEMENT_SLOTS = 8  # the slots before the step
GRAD, STATE0, MASTER, COPY, RUN = 1, 2, 5, 7, 13
REPORTS = 128  # enum PhaseFlag in csrc/phase.h
LEAF = 2048  # elements; a chunk is a whole number of leaves
MOST_CHUNK = 32768  # elements
STORAGE_BITS = 4  # bits per slot in the storage column
STORAGE_MASK = (1 << STORAGE_BITS) - 1
MODE_SHIFT = 32  # where in the storage column the mode of a tensor stands
ROUNDS_AT_RANDOM = 1 << 4  # of a mode
DENSE_LAYOUT = -1
ASKED_AT_ONCE = 64  # rows whose states are asked where they lie at a step, or as small a share of all
_REVISIONS = count(1)  # unique in the process, so that copies of one table are never taken for another's
EMPTY_GRADIENT = 1  # stands for the address of a gradient of 0 elements, which has none

FLOAT32, BFLOAT16, FLOAT64 = STORAGES[torch.float32], STORAGES[torch.bfloat16], STORAGES[torch.float64]
SIGNED8, ROOT8 = CODE_STORAGES[torch.int8], CODE_STORAGES[torch.uint8]
CODES8 = 15  # a variant whose first state is SIGNED8 and whose others are ROOT8
ANY_STORAGE = -1  # what a variant that reads the storage of each slot at run time was compiled for

# enum Feature in csrc/variants.h
STRIDED_FEATURE, DOUBLE_FEATURE, SIDE_FEATURE, MASTER_FEATURE, BLOCK_FEATURE, REPORT_FEATURE = 1, 2, 4, 8, 16, 32
EVERY_FEATURE = STRIDED_FEATURE | DOUBLE_FEATURE | SIDE_FEATURE | MASTER_FEATURE | BLOCK_FEATURE | REPORT_FEATURE


class Variant(NamedTuple):
    """What a kernel is compiled for: csrc/variants.h."""

    name: str
    param: int
    state: int
    features: int

    def covers(self, param: int, state: int, features: int) -> bool:
        """Whether tensors of these storages and features may go through it."""
        fixed = self.param != ANY_STORAGE
        return not features & ~self.features and (not fixed or (param, state) == (self.param, self.state))


# Smallest first.
VARIANTS = (
    Variant("f32", FLOAT32, FLOAT32, 0),
    Variant("bf16", BFLOAT16, BFLOAT16, 0),
    Variant("bf16_f32", BFLOAT16, FLOAT32, 0),
    Variant("any", ANY_STORAGE, ANY_STORAGE, 0),
    Variant("strided", ANY_STORAGE, ANY_STORAGE, STRIDED_FEATURE),
    Variant("full", ANY_STORAGE, ANY_STORAGE, STRIDED_FEATURE | DOUBLE_FEATURE),
    Variant("bf16_f32_master", BFLOAT16, FLOAT32, MASTER_FEATURE),
    Variant("master", ANY_STORAGE, ANY_STORAGE, STRIDED_FEATURE | MASTER_FEATURE),
    Variant("bf16_8", BFLOAT16, CODES8, MASTER_FEATURE | BLOCK_FEATURE),
    Variant("blocks", ANY_STORAGE, ANY_STORAGE, STRIDED_FEATURE | MASTER_FEATURE | BLOCK_FEATURE),
    Variant("f32_side", FLOAT32, FLOAT32, SIDE_FEATURE),
    Variant("strided_side", ANY_STORAGE, ANY_STORAGE, STRIDED_FEATURE | SIDE_FEATURE),
    Variant("blocks_side", ANY_STORAGE, ANY_STORAGE, STRIDED_FEATURE | MASTER_FEATURE | BLOCK_FEATURE | SIDE_FEATURE),
    Variant("f32_report", FLOAT32, FLOAT32, SIDE_FEATURE | REPORT_FEATURE),
    Variant(
        "master_report", ANY_STORAGE, ANY_STORAGE, STRIDED_FEATURE | MASTER_FEATURE | SIDE_FEATURE | REPORT_FEATURE
    ),
    Variant("everything", ANY_STORAGE, ANY_STORAGE, EVERY_FEATURE),
)


class Facts(NamedTuple):
    """What must stay the same about a tensor for its row of the table to stay true."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Facts:
        """The facts of a tensor now."""
        return Facts(tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())


@dataclass
class Watch:
    """One parameter as the table last saw it.

    Attributes:
        param: owned, as the table points into it.
        stand_in: whether the row's gradient was made from the parameter's and must be made again each step.
        unwrap: whether it is a DTensor, whose local tensor is what the row holds.
        address: of the parameter.
        param_facts: of the parameter.
        grad_facts: of its gradient; None: it had none.
        copy: what a launch copies it to, if it does.
        keep: what else the row points into.
        layout: of a tensor that is not dense; empty: it is.
    """

    param: Tensor
    stand_in: bool = False
    unwrap: bool = False
    address: int = 0
    param_facts: Facts | None = None
    grad_facts: Facts | None = None
    copy: Tensor | None = None
    keep: list[Tensor] = field(default_factory=list)
    layout: list[int] = field(default_factory=list)
    grad_spec: Any = None  # of a DTensor's gradient: how it lies over the devices


@dataclass
class GroupRow:
    """One group's hyperparameters, as the kernels see them.

    Attributes:
        values: the numbers; 1 where a tensor on the table's device holds it.
        tensors: addresses of those tensors, else 0.
        storages: of those tensors.
        flags: one bit each.
        max_norm: what its gradients are clipped to; below 0: they are not.
        watched: what the watched keys held when last read; None: never.
        shape: flags and which values are 0, when last read; None: never.
    """

    values: array[float] = field(default_factory=lambda: array(F64, [0.0] * HYPERS))
    tensors: list[int] = field(default_factory=lambda: [0] * HYPERS)
    storages: list[int] = field(default_factory=lambda: [0] * HYPERS)
    flags: int = 0
    shape: tuple[int, tuple[bool, ...]] | None = None
    max_norm: float = -1.0
    watched: list[Any] | None = None


class PyTable:
    """The table of one rule on one device.

    Args:
        rule: names the hyperparameters and flags that a group's row holds.
        device: where the table's tensors are; a hyperparameter that is a tensor there is read by the launch.
        places: group, position in that group's list, and parameter of each row, which is blank until ``set_row``.
        group_sizes: parameters of each group, over all devices.
        states: the optimizer's ``state``: ``refresh`` reports the rows to which it gives another dict.
        first_rows: the first row of each part of the table whose leaves are joined to one number.
        watched: keys of groups that ``read_groups`` reports with -1 where one holds another object than before.
    """

    def __init__(
        self,
        rule: Rule,
        device: torch.device,
        places: list[tuple[int, int, Tensor]],
        group_sizes: list[int],
        states: dict[Tensor, dict[str, Any]],
        first_rows: Sequence[int],
        watched: Sequence[str],
    ) -> None:
        """See the class."""
        rows = len(places)
        self._rule = rule
        self._device = device
        self._phase = 0
        self._rows = rows
        self._sizes = list(group_sizes)
        self._groups = [GroupRow() for _ in group_sizes]
        self._address = array(U64, [0]) * (SLOTS * rows)
        self._numel = array(I64, [0]) * rows
        self._group = array(U32, [0]) * rows
        self._storage = array(U64, [0]) * rows
        self._watches: list[Watch | None] = [Watch(param) for *_, param in places]
        self._places = [(group, place) for group, place, _ in places]
        self._states = states
        self._state: list[tuple[dict[str, Any], dict[str, Any]] | None] = [None] * rows
        self._state_addresses: list[list[int]] = [[] for _ in range(rows)]
        self._next_asked = 0
        self._live = [False] * rows
        self._live_params: list[Tensor] | None = None
        self._gradients_moved = False
        self._chunks = array(U32)
        self._chunk_elements = 0
        self._planned_workers = 0
        self._parts = list(first_rows)
        self._watched_keys = tuple(watched)
        self._revision = next(_REVISIONS)

    @property
    def revision(self) -> int:
        """Changes with anything but gradients and groups."""
        return self._revision

    @property
    def rows(self) -> int:
        """How many tensors there are."""
        return self._rows

    @property
    def variant(self) -> str:
        """Name of the smallest variant that covers all rows."""
        param, state, features = ANY_STORAGE, ANY_STORAGE, SIDE_FEATURE if self._phase else 0
        if self._phase & REPORTS:
            features |= REPORT_FEATURE
        params, states = self._storages_in_use()
        self._refuse_double_modes()
        has_runs = any(self._address[RUN * self._rows : (RUN + 1) * self._rows])
        if has_runs or any(watch is not None and watch.layout for watch in self._watches):
            features |= STRIDED_FEATURE
        if FLOAT64 in params | states:
            features |= DOUBLE_FEATURE
        rounds_at_random = any(packed >> MODE_SHIFT & ROUNDS_AT_RANDOM for packed in self._storage)
        if rounds_at_random or {CODES8, FLOAT8_SQUARE, *CODE_STORAGES.values()} & states:
            features |= BLOCK_FEATURE
        if any(self._address[MASTER * self._rows : (MASTER + 1) * self._rows]):
            features |= MASTER_FEATURE
        if len(params or {FLOAT32}) == 1 and not rounds_at_random:
            param = min(params, default=FLOAT32)
        if len(states or {param}) == 1:
            state = min(states, default=param)
        return next(variant.name for variant in VARIANTS if variant.covers(param, state, features))

    @property
    def leaves(self) -> int:
        """How many leaves all rows have."""
        return sum(-(-numel // LEAF) for numel in self._numel)

    @property
    def chunk_count(self) -> int:
        """How many chunks the plan has."""
        return len(self._chunks) // 2

    def watch_state(self, row: int, state: dict[str, Any], entries: dict[str, Any]) -> None:
        """From now on ``refresh`` reports the row when ``state`` no longer holds these very objects.

        Args:
            row: its index.
            state: what the optimizer's state has for the row's parameter.
            entries: what that must hold, by key; None: nothing.
        """
        self._state[row] = (state, dict(entries))
        self._state_addresses[row] = self._addresses_of(row)

    def set_phase(
        self,
        flags: int,
        stage: int,
        ema_decay: float,
        ema_decay_tensor: int,
        norms: int,
        max_norms: list[float],
        leaf_sums: int,
        joined: int,
        results: int,
        report: int,
    ) -> None:
        """What else a launch does.

        Args:
            flags: bits of ``enum PhaseFlag``.
            stage: of ``enum Stage``.
            ema_decay: the decay of the average.
            ema_decay_tensor: where to read it instead; 0: nowhere.
            norms: how many norms there are.
            max_norms: what the gradients of each group are clipped to; below 0: they are not.
            leaf_sums: where one number for each leaf goes.
            joined: where what these come to goes, for each norm.
            results: where the norm and the count of skipped steps go.
            report: where five numbers for each leaf go, and whether the launch was skipped.
        """
        for group, max_norm in zip(self._groups, max_norms, strict=True):
            group.max_norm = max_norm
        if flags != self._phase:
            self._phase = flags
            self._revision = next(_REVISIONS)

    def hold_nothing(self) -> None:
        """Has no effect here: there is no C++ side to hold anything."""

    def states_in_place(self) -> bool:
        """Whether the watched states, and copies, lie where they lay when their watch began: some rows at a time."""
        count = min(self._rows, max(ASKED_AT_ONCE, self._rows // ASKED_AT_ONCE))
        first, self._next_asked = self._next_asked, self._next_asked + count
        return all(self.state_in_place(row % self._rows) for row in range(first, first + count))

    def state_in_place(self, row: int) -> bool:
        """The same of one row.

        Args:
            row: its index.
        """
        return self._addresses_of(row) == self._state_addresses[row]

    def _addresses_of(self, row: int) -> list[int]:
        watched, watch = self._state[row], self._watches[row]
        copy = None if watch is None else watch.copy
        return _addresses([*(watched[1].values() if watched else ()), copy])

    def set_row(
        self,
        row: int,
        addresses: list[int],
        storages: list[int],
        mode: int,
        numel: int,
        group: int,
        layout: list[int],
        param: Tensor,
        grad: Tensor | None,
        unwrap: bool,
        copy: Tensor | None,
        keep: list[Tensor],
    ) -> None:
        """Describes one tensor and starts watching its parameter, gradient and copy.

        Args:
            row: its index.
            addresses: of every slot; 0: absent.
            storages: codes of the slots before the step.
            mode: of blocks and rounding: csrc/table.h.
            numel: its elements.
            group: index of its group.
            layout: empty where every slot is dense; else as csrc/table.h says of ``layouts``.
            param: the parameter.
            grad: its gradient, or None.
            unwrap: whether both are DTensors.
            copy: what a launch copies the parameter to, if it does.
            keep: what else the row points into and must therefore outlive it.
        """
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        for slot, address in enumerate(addresses):
            self._address[slot * self._rows + row] = address
        if self._numel[row] != numel:
            self._planned_workers = 0
        self._numel[row] = numel
        self._group[row] = group
        packed = sum(storage << (STORAGE_BITS * slot) for slot, storage in enumerate(storages))
        self._storage[row] = packed | mode << MODE_SHIFT
        local = _local(param, unwrap)
        self._watches[row] = Watch(
            param=param,
            stand_in=grad is not None and grad is not param.grad,
            unwrap=unwrap,
            address=0 if grad is None else local.data_ptr(),
            param_facts=None if grad is None else Facts.of(local),
            grad_facts=None if grad is None else Facts.of(_local(grad, unwrap)),
            copy=copy,
            keep=keep,
            layout=list(layout),
            grad_spec=grad._spec if unwrap and grad is not None else None,  # type: ignore[attr-defined]
        )
        self._state_addresses[row] = self._addresses_of(row)
        self._live[row] = grad is not None
        self._live_params = None
        self._revision = next(_REVISIONS)

    def plain_rows(self, rows: list[int]) -> tuple[list[int], bool]:
        """None: every row is looked at closely; only the compiled table has a shorter way.

        Args:
            rows: which to look at.
        """
        return [], False

    def counted_rows(self, rows: Sequence[int]) -> list[int]:
        """Never called, as no row is plain.

        Args:
            rows: which to look at.
        """
        raise NotImplementedError

    def begin_rows(self, *arguments: Any) -> None:
        """Never called, as no row is plain.

        Args:
            arguments: those of the compiled table.
        """
        raise NotImplementedError

    def settle(self) -> None:
        """Has nothing to clear."""

    def described(self, row: int) -> tuple[int, int, Tensor, int, int, dict[str, Any]]:
        """Never called, as no row is plain.

        Args:
            row: the row.
        """
        raise NotImplementedError

    def refresh(self) -> list[int] | None:
        """Reads gradients again: rows that are no longer what the table says, or None."""
        changed = [row for row, watch in enumerate(self._watches) if watch is not None and not self._look(row, watch)]
        return changed or None

    def read_groups(self, groups: list[dict[str, Any]]) -> list[int] | int | None:
        """Reads hyperparameters again.

        Returns:
            The groups of which a flag, or whether a value is 0, has changed since the last call: what a
            tensor needs for its step may have changed with it. None where there is none; -1 where parameters
            came, went or were replaced by others, or where a watched key changed.
        """
        if len(groups) != len(self._groups):
            return -1
        changed = []
        for index, group in enumerate(groups):
            if len(group["params"]) != self._sizes[index]:
                return -1
            row = self._groups[index]
            watched = [group.get(key) for key in self._watched_keys]
            if row.watched is not None and any(map(operator.is_not, row.watched, watched)):
                return -1
            row.watched = watched
            self._read_group(row, group)
            shape = (row.flags, tuple(value != 0.0 for value in row.values))
            if shape != row.shape:
                changed.append(index)
            row.shape = shape
        for watch, (group_index, place) in zip(self._watches, self._places, strict=True):
            if watch is not None and groups[group_index]["params"][place] is not watch.param:
                return -1
        return changed or None

    def gradients_moved(self) -> bool:
        """Whether a refresh has found a gradient elsewhere since the last call."""
        moved, self._gradients_moved = self._gradients_moved, False
        return moved

    def gradients_apart(self) -> bool:
        """Whether the gradients, as of the last refresh, are known to share no memory."""
        spans = []
        for row, watch in enumerate(self._watches):
            if watch is None or watch.grad_facts is None or not (self._live[row] and self._numel[row]):
                continue
            facts, first = watch.grad_facts, self._address[GRAD * self._rows + row]
            last = sum((size - 1) * stride for size, stride in zip(facts.shape, facts.strides, strict=True))
            spans.append((first, first + (last + 1) * facts.dtype.itemsize))
        spans.sort()
        return all(one[1] <= other[0] for one, other in pairwise(spans))

    def params(self) -> list[Tensor]:
        """The parameters of all rows."""
        return [watch.param for watch in self._watches if watch is not None]

    def live_params(self) -> list[Tensor]:
        """The parameters that have a gradient, as of the last refresh."""
        if self._live_params is None:
            pairs = zip(self._watches, self._live, strict=True)
            self._live_params = [watch.param for watch, live in pairs if live and watch is not None]
        return self._live_params

    def bump_versions(self, of_gradients: bool) -> list[Tensor]:
        """Leaves it to the caller to tell autograd that live parameters, or their gradients, are written."""
        return self.live_params()

    def columns(self, workers: int, only_step: bool) -> dict[str, Any]:
        """The columns as bytes, and the elements of a chunk.

        Args:
            workers: how many programs or threads the chunk plan is made for.
            only_step: leave out what changes only with ``revision``.

        Returns:
            ``grads`` u64[rows], ``group_values`` f64[groups, 8], ``group_flags`` u32[groups],
            ``group_max_norms`` f64[groups], ``group_tensors`` u64[groups, 8], ``group_storages`` u32[groups, 8].
            Unless only_step also ``address`` u64[15, rows], ``numel`` i64[rows], ``group`` u32[rows], ``storage``
            u64[rows], ``first_leaf`` u64[rows + 1], ``part_leaf`` u64[parts + 1], ``layout`` i32[rows],
            ``layouts`` i64[], ``chunks`` u32[chunks, 2] and ``chunk_elements``, an int.
        """
        self._plan(workers)
        columns: dict[str, Any] = {
            "grads": self._address[GRAD * self._rows : (GRAD + 1) * self._rows].tobytes(),
            "group_values": b"".join(group.values.tobytes() for group in self._groups),
            "group_flags": array(U32, [group.flags for group in self._groups]).tobytes(),
            "group_max_norms": array(F64, [group.max_norm for group in self._groups]).tobytes(),
            "group_tensors": b"".join(array(U64, group.tensors).tobytes() for group in self._groups),
            "group_storages": b"".join(array(U32, group.storages).tobytes() for group in self._groups),
        }
        if only_step:
            return columns
        layout, layouts = self._pack_layouts()
        first_leaf = array(U64, accumulate((-(-numel // LEAF) for numel in self._numel), initial=0))
        return columns | {
            "first_leaf": first_leaf.tobytes(),
            "part_leaf": array(U64, [*(first_leaf[row] for row in self._parts), first_leaf[-1]]).tobytes(),
            "address": self._address.tobytes(),
            "numel": self._numel.tobytes(),
            "group": self._group.tobytes(),
            "storage": self._storage.tobytes(),
            "layouts": layouts.tobytes(),
            "layout": layout.tobytes(),
            "chunks": self._chunks.tobytes(),
            "chunk_elements": self._chunk_elements,
        }

    def _look(self, row: int, watch: Watch) -> bool:
        """Reads one gradient's address; False where parameter or gradient is no longer what the row says."""
        grad = watch.param.grad
        if grad is None:  # the launch passes the row over, whatever else it says
            self._set_grad(row, 0, False)
            return True
        if watch.grad_facts is None or watch.stand_in or not self._holds_state(row, watch):
            return False
        if watch.unwrap and getattr(grad, "_spec", None) != watch.grad_spec:
            return False
        param, grad = _local(watch.param, watch.unwrap), _local(grad, watch.unwrap)
        if grad.layout != torch.strided or param.layout != torch.strided or grad.is_conj() or grad.is_neg():
            return False
        if (watch.address, watch.param_facts) != (param.data_ptr(), Facts.of(param)):
            return False
        if watch.grad_facts != Facts.of(grad):
            return False
        address = grad.data_ptr() if self._numel[row] else EMPTY_GRADIENT
        if address == 0:  # it keeps its values elsewhere, as a collective's pending result does
            return False
        self._set_grad(row, address, True)
        return True

    def _holds_state(self, row: int, watch: Watch) -> bool:
        found, watched = self._states.get(watch.param), self._state[row]
        if watched is None or found is not watched[0]:
            return found is None and watched is None
        return all(found.get(name) is tensor for name, tensor in watched[1].items())

    def _set_grad(self, row: int, address: int, live: bool) -> None:
        self._gradients_moved = self._gradients_moved or (live and self._address[GRAD * self._rows + row] != address)
        self._address[GRAD * self._rows + row] = address
        if self._live[row] != live:
            self._live[row] = live
            self._live_params = None

    def _read_group(self, row: GroupRow, group: dict[str, Any]) -> None:
        for index, (key, item) in enumerate(self._rule.hypers):
            if item >= 0 and len(group[key]) != self._rule.items_of(key):
                raise ValueError(f"{key} has {len(group[key])} items")
            value = group[key] if item < 0 else group[key][item]
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"a tensor of 1 element is wanted, not one of {value.numel()}")
            here = isinstance(value, Tensor) and self._reads_at_launch(value)
            # Only whether this is 0 matters before the launch; a GPU's value is not known by then.
            unknown = here and self._device.type != "cpu"
            row.values[index] = 1.0 if unknown else value.item() if isinstance(value, Tensor) else value
            row.tensors[index] = value.data_ptr() if here else 0
            row.storages[index] = STORAGES[value.dtype] if here else 0
        row.flags = sum(bit for key, bit in self._rule.flags if group[key])

    def _reads_at_launch(self, tensor: Tensor) -> bool:
        same_index = (tensor.device.index or 0) == (self._device.index or 0)
        return tensor.device.type == self._device.type and same_index and tensor.dtype in STORAGES

    def _storages_in_use(self) -> tuple[set[int], set[int]]:
        """Those of parameters and gradients, and those of states; a gradient counts even while it is None."""
        params: set[int] = set()
        states: set[int] = set()
        for slot in range(ELEMENT_SLOTS):
            if slot in (MASTER, COPY):
                continue  # read at run time by every variant
            found = params if slot < STATE0 else states
            for row in range(self._rows):
                if not self._address[row]:
                    continue  # it never had a gradient
                if slot == GRAD or self._address[slot * self._rows + row]:
                    storage = self._storage[row] >> (STORAGE_BITS * slot) & STORAGE_MASK
                    usual = SIGNED8 if slot == STATE0 else ROOT8
                    found.add(CODES8 if slot >= STATE0 and storage == usual else storage)
        return params, states

    def _refuse_double_modes(self) -> None:
        """What computes in float64 knows of no mode: whoever describes rows has seen to it by name."""
        for row in range(self._rows):
            present = [s for s in range(ELEMENT_SLOTS) if self._address[s * self._rows + row]]
            storages = {self._storage[row] >> (STORAGE_BITS * s) & STORAGE_MASK for s in present}
            is_coded = bool(storages & {FLOAT8_SQUARE, *CODE_STORAGES.values()})
            has_mode = is_coded or MASTER in present or bool(self._storage[row] >> MODE_SHIFT & ROUNDS_AT_RANDOM)
            if FLOAT64 in storages and has_mode:
                raise ValueError(f"row {row} has float64 and a mode")

    def _plan(self, workers: int) -> None:
        """Chunks of a whole number of leaves, as large as keeps so many workers busy."""
        if self._planned_workers == workers:
            return
        share = sum(self._numel) // max(workers, 1)
        size = min(max(share, LEAF), MOST_CHUNK) // LEAF * LEAF
        self._chunks = array(U32)
        for row, numel in enumerate(self._numel):
            self._chunks.extend(number for index in range(-(-numel // size)) for number in (row, index))
        self._chunk_elements = size
        self._planned_workers = workers
        self._revision = next(_REVISIONS)

    def _pack_layouts(self) -> tuple[array[int], array[int]]:
        """Where each row's layout starts, and all layouts one after the other."""
        layout, layouts = array(I32), array(I64)
        for watch in self._watches:
            own = watch.layout if watch is not None else []
            layout.append(len(layouts) if own else DENSE_LAYOUT)
            layouts.extend(own)
        return layout, layouts


def _addresses(values: Sequence[Any]) -> list[int]:
    tensors = (value for value in values if isinstance(value, Tensor))
    return [_local(tensor, hasattr(tensor, "_local_tensor")).data_ptr() for tensor in tensors]


def _local(tensor: Tensor, unwrap: bool) -> Tensor:
    """The tensor whose memory is on this device."""
    if not unwrap:
        return tensor
    local: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return local
