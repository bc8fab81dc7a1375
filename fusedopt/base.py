"""FusedOptimizer: what all optimizers share - groups, lazy state, closure, AMP, checkpoints - around a launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from operator import is_
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import averages, checkpoint, hooks, norms, traced
from .apart import separate
from .backends import Backend, Waiting, choose_backend, cpu, find_backend
from .check import check_flags, check_groups, check_number
from .hidden_steps import HiddenSteps
from .lasting import Lasting, refuse_capture
from .phase import EMA, MEASURES, NOTHING, OPTIONS, UPDATES, WHOLE_STEP, Phase, check_copy, check_distinct
from .precision import check_modes, scale_key
from .report import Report, read_report
from .rows import name_of, part_of, rows_of
from .rules import MODE_KEYS, Rule
from .sharded import Spread, is_any_sharded, local, spread_of
from .table import Table

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_MODES = frozenset(MODE_KEYS)
SELDOM_KEYS = frozenset((*MODE_KEYS, *OPTIONS, "differentiable"))  # a group with none of them need not be looked at

_increment_version = torch.autograd.graph.increment_version


class FusedOptimizer(Optimizer):
    """The base of all optimizers here; not for use by itself."""

    _rule: ClassVar[Rule]
    _group_defaults: ClassVar[dict[str, Any]]  # options that groups saved by older versions may lack
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None
    _finds_inf = False  # within step_finding_inf
    _main = 0  # the table whose results are the optimizer's
    _spreads: tuple[Spread, ...] = (None,)  # how parameters lie over ranks
    _unreported = 0  # the place of the last step among those of which one is reported, from 1
    _swaps = 0  # how many swap_ema() are within: the averages are in the parameters' place
    _held: list[averages.Held]  # what the parameters were before the first of them
    profile_hook_step = staticmethod(hooks.profile_hook_step)  # type: ignore[assignment]

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], backend: str | None, phase: Phase | None = None
    ) -> None:
        """Takes parameters and defaults as ``torch.optim.Optimizer``, the name of a backend or None, and a phase."""
        if backend is not None:
            find_backend(backend)  # refuses a name that there is not
        self._requested_backend = backend
        phase = NOTHING if phase is None else phase
        self._phase = phase if phase.copy_to is None else replace(phase, copy_to=None)  # until all groups are there
        self._results: dict[int, Tensor] = {}  # of each table
        self._hidden_steps = HiddenSteps()
        self._main, self._spreads, self._unreported = 0, (None,), 0  # unfuse() takes off what is set here
        self._number = traced.register(self)
        self._traced_params: list[Tensor] = []
        self._is_sharded = False
        if not _MODES.isdisjoint(defaults):
            check_modes(self._rule, defaults)
        super().__init__(params, defaults)
        self._phase = phase
        if phase.copy_to is not None:
            self._copies()  # refuses those that do not fit

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, in one launch per device.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient or a state does not fit its parameter; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._launch()
        elif self._is_sharded or self._phase.writes_tensors_of_others or not traced.belongs_in_graph():
            self._launch_untraced()
        else:
            self._trace_launch()
        return loss

    @property
    def grad_norm(self) -> Tensor:
        """The norm of all gradients before they were clipped, at the last step: float64, on the device, 0-dim.

        With norm_by_group that of each group, in order: 1-dim. A step at which no parameter has a gradient does
        nothing: it stays that of the step before, NaN where there was none.

        To read its number waits for the device; to pass the tensor on does not. The next step overwrites it.

        Raises:
            RuntimeError: no step has been taken, or neither max_grad_norm nor skip_nonfinite was asked for.
        """
        norms = self._known_results()[1:]
        return norms if self._phase.norm_by_group else norms[0]

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps skip_nonfinite has skipped in this process: float64, on the device, 0-dim."""
        return self._known_results()[0]

    def _known_results(self) -> Tensor:
        if self._main not in self._results:
            raise RuntimeError("the norm is known after a step with max_grad_norm or skip_nonfinite")
        return self._results[self._main]

    @torch.no_grad()
    def report(self) -> Report:
        """What the last step that was taken did to each parameter: waits for the device, and joins what it kept.

        With ``report=100`` the last of those that are reported: the first, the 101st, the 201st.

        Returns:
            Norms and counts, for each parameter that had a gradient and for all of them.

        Raises:
            RuntimeError: no step has been taken, or report=True was not asked for.

        Example:
            >>> import torch, fusedopt
            >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> optimizer = fusedopt.SGD([weight], lr=0.5, report=True)
            >>> weight.grad = torch.tensor([6.0, 8.0])
            >>> optimizer.step()
            >>> optimizer.report().whole["update_norm"]
            5.0
        """
        if not self._phase.report:
            raise RuntimeError("nothing was kept to report: construct the optimizer with report=True")
        tables = [table for table, _ in self._tables or ()]
        if not any(table.reported for table in tables):
            raise RuntimeError(
                "a report tells of a step, and none that is reported has been taken since the optimizer was made or "
                "loaded, or since its parameters changed"
            )
        names: dict[Tensor, str] = {}
        for group in self.param_groups:
            for k, param in enumerate(group["params"]):
                names[param] = group["param_names"][k] if "param_names" in group else str(len(names))
        return read_report(tables, names)

    def finds_inf(self) -> bool:
        """Whether a launch sees all gradients as they are now, so that ``step_finding_inf`` can serve."""
        tables = self._current_tables() if self._tables is None else self._tables
        return (
            self._is_one_launch(tables)
            and not self._is_sharded
            and not hooks.are_around(self)
            and any(param.grad is not None for param in self._traced_params)
        )

    def step_finding_inf(self, grad_scale: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """A step by gradients divided by a scale, which changes nothing where one of them is infinite or NaN.

        Args:
            grad_scale: one element, on the device.
            args: for ``step``.
            kwargs: for ``step``.

        Returns:
            What ``step`` returned; and 1 where nothing was changed, else 0: float32, 0-dim, on the device.
        """
        own = getattr(self, "grad_scale", None)
        try:
            self.grad_scale = grad_scale if own is None else own * grad_scale
            self._finds_inf = True
            returned = self.step(*args, **kwargs)
        finally:
            for name in ("_finds_inf", "grad_scale"):
                self.__dict__.pop(name, None)
        norms = self._known_results()[1:]
        found = torch.ne(norms - norms, 0)  # of what is infinite or NaN, that is NaN
        return returned, found.any().to(torch.float32)

    def _is_one_launch(self, tables: list[tuple[Table, Backend]]) -> bool:
        return len(tables) <= 1 and self._spreads == (None,)

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Puts the averages in the place of the parameters, for an evaluation, and the parameters back at its end.

        A parameter that has no average yet keeps its value. Values change places, tensors do not: what a CUDA graph or
        a gradient bucket points to stays valid.

        Raises:
            RuntimeError: no average is kept; or a step is taken within, which would be lost; or a parameter has another
                shape than its average, or got another within, when it keeps what it has and all others get theirs back.

        Example:
            >>> import torch, fusedopt
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = fusedopt.SGD([weight], lr=0.5, ema_decay=0.5)
            >>> for _ in range(2):
            ...     weight.grad = torch.ones(2)
            ...     optimizer.step()
            >>> with optimizer.swap_ema():
            ...     weight.tolist()
            [0.25, 0.25]
            >>> weight.tolist()
            [0.0, 0.0]
        """
        if self._phase.ema_decay is None:
            raise RuntimeError("no average is kept: construct the optimizer with ema_decay")
        if not self._swaps:
            self._held = averages.held_values(self.param_groups, self.state)
        self._swaps += 1
        try:
            if self._swaps == 1:
                averages.swap_in(self._held)
            yield
        finally:
            self._end_swap()

    def _end_swap(self) -> None:
        """The last that ends, which need not be the first that began, gives the parameters their values."""
        try:
            if self._swaps == 1:
                averages.put_back(self._held)
        finally:
            if self._swaps == 1:
                averages.put_back(self._held)  # what an interrupt of that left
            self._swaps -= 1
            if not self._swaps:
                del self._swaps, self._held

    def refresh(self) -> None:
        """Looks at all tensors again.

        Needed only where a tensor stays where it is and something else about it changes. That a state, or a copy of
        ``copy_to``, lies elsewhere, after ``tensor.data = ...``, ``tensor.resize_`` or ``tensor.share_memory_``, the
        next step sees by itself; of states that are DTensors, of subclasses, and of all with torch before 2.10 some
        step of the next 64 does. A state that is transposed in place, or whose storage is shrunk without being moved,
        is not noticed, nor is such a storage of a gradient whose shape and strides stay: call this after it.
        A gradient that lies where a step writes, in another parameter or a state, is refused when a parameter has its
        first gradient or new states, and after this; one that comes to lie there later is not noticed.

        Between steps the optimizer holds the parameters and states of the last one. Call this to have it let go of
        them: of states that were moved to other memory by hand, before it is needed, and of parameters that
        ``torch.utils.swap_tensors`` is to exchange.
        """
        self._forget_tables()

    def sync_hyperparameters(self) -> None:
        """Gives the groups' hyperparameters of now to the steps that CUDA graphs have captured.

        A captured step reads hyperparameters that are tensors on its device at every replay; Python numbers keep
        the value of the capture until this is called, on the stream of the replays. No new capture is needed.

        Raises:
            RuntimeError: a parameter, gradient or state is no longer where the capture found it: capture again.
        """
        for table, backend in self._current_tables():
            if table.phase.flags:
                table.announce()
            moved = backend.moved_since_captures(table)
            if moved:
                names = ", ".join(table.rows[row].name for row in moved[:3])
                raise RuntimeError(
                    f"{names}: {len(moved)} of {len(table.rows)} parameters, with their gradients and states, are no "
                    "longer where the captured graph reads and writes them; capture again"
                )
            backend.update_captures(table)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: the group has an option that no step could use, or ``copy_to`` is a list, which has no copy for
                its parameters; it was not added.
        """
        if isinstance(param_group, dict) and not SELDOM_KEYS.isdisjoint(param_group):
            check_flags(foreach=False, fused=False, differentiable=param_group.get("differentiable", False))
            self._phase.check_group(len(self.param_groups), param_group)
            check_modes(self._rule, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self._phase.copy_to is not None:
            try:
                self._copies()
            except BaseException:
                self.param_groups.pop()
                raise
        self._see_params(self.param_groups[-1]["params"])
        self._forget_tables()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """The state as a dict, as ``torch.optim.Optimizer.state_dict``: its tensors are the optimizer's own.

        A state that no step has written yet, because the gradient scaler skipped the first, is left out: to
        torch, a momentum buffer that is there has been stepped.
        """
        self._settle()
        held = {param: self.state[param] for param in self._unstepped()}
        left_out = (*self._rule.states, *map(scale_key, self._rule.states), EMA)
        for param, state in held.items():
            self.state[param] = {key: value for key, value in state.items() if key not in left_out}
        try:
            return super().state_dict()
        finally:
            self.state.update(held)

    def state_dict_torch(self) -> dict[str, Any]:
        """The state as ``torch.optim`` keeps it, to leave a precision mode by: no state below float32, no mode.

        With ``rounding="stochastic"`` the ``rounding_key`` and, for SGD, the ``step`` stay in it, which torch carries
        along unread: an optimizer that rounds at random again goes on with the next random bits.

        Raises:
            ValueError: a group's ``state_block`` is no longer that of its states' codes.
        """
        return checkpoint.without_modes(self._rule, self.state_dict(), self._name_of)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` of this class or of torch's returned. State tensors keep their dtype.

        Raises:
            ValueError: it is that of another model or of another optimizer; nothing was changed.
        """
        checkpoint.expect("loaded state dict", state_dict, Mapping)
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        loaded = checkpoint.read(
            self._rule, self._phase, self.param_groups, state_dict, self._name_of, self._fill_groups
        )
        self.__setstate__(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: tables are rebuilt when next needed."""
        if self._swaps:
            raise RuntimeError("a copy made within swap_ema() would step from the averages, and never have its values")
        self._settle()
        state: dict[str, Any] = super().__getstate__()
        state["_requested_backend"] = self._requested_backend
        state["_phase"] = self._phase
        counts = self._hidden_steps.known
        state["_hidden_steps"] = {param: counts[param] for param in counts.keys() & self.state.keys()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what pickle, deepcopy and ``load_state_dict`` bring, and adds what older torch left out."""
        counts = state.get("_hidden_steps", {})
        self._number = traced.register(self, getattr(self, "_number", None))
        if not hasattr(self, "_requested_backend"):
            self._requested_backend = None
        if not hasattr(self, "_phase"):
            self._phase = NOTHING
        if not hasattr(self, "_results"):
            self._results = {}
        super().__setstate__(state)
        self._hidden_steps = HiddenSteps(counts)
        self._traced_params, self._is_sharded = [], False
        self._see_params(traced.params_of(self))
        self._forget_tables()
        self._fill_groups(self.param_groups)
        for param, values in self._own_states() if self._rule.keeps_step else ():
            if not isinstance(values.get("step", param), Tensor):
                values["step"] = checkpoint.as_step(values["step"], local(param).device)

    def _see_params(self, params: list[Tensor]) -> None:
        """Takes note of parameters that have come."""
        if self.defaults.get("fused") is False:
            # Some trainers clip scaled gradients only where the scaler has unscaled them before the step.
            self._step_supports_amp_scaling = False
        self._traced_params = [*self._traced_params, *params]
        # DTensor's dispatch does not know the operator of a traced step: such a step breaks the graph.
        self._is_sharded = self._is_sharded or is_any_sharded(params)

    def _forget_params(self, params: list[Tensor]) -> None:
        """Lets go of parameters that are in no group any more. A graph that knows them is traced anew."""
        before = self._traced_params
        if len(before) != len(params) or not all(map(is_, before, params)):
            self._traced_params, self._is_sharded = params, is_any_sharded(params)
            self._hidden_steps.keep_only(params)

    def _fill_groups(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            for key, value in self._group_defaults.items():
                group.setdefault(key, value)

    def _own_states(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The state of every parameter that has one. What else somebody keeps in ``state`` is not the optimizer's."""
        return (
            (param, state)
            for param, state in self.state.items()
            if isinstance(param, Tensor) and isinstance(state, dict)
        )

    def _unstepped(self) -> list[Tensor]:
        """Parameters that have a state which no step has written yet."""
        counts = {param: step for param, step in self._hidden_steps.known.items() if param in self.state}
        if not self._rule.keeps_step:
            counts |= {param: state["step"] for param, state in self._own_states() if "step" in state}
        return [param for param, step in counts.items() if float(step) == 0.0]

    def _name_of(self, group: int, place: int) -> str:
        return name_of(self.param_groups, group, place)

    def _forget_tables(self) -> None:
        if not hasattr(self, "_lasting"):
            self._lasting: dict[tuple[torch.device, int], Lasting] = {}
        else:
            self._settle()
        self._tables: list[tuple[Table, Backend]] | None = None
        self._built_from: tuple[Any, Any] = (None, None)

    def _launch(self) -> None:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(mode=False), torch.no_grad():
                self._launch()
            return
        if self._swaps:
            raise RuntimeError("a step within swap_ema() would be lost: the averages are in the parameters' place")
        try:
            self._launch_tables(self._current_tables(launches=True))
        except BaseException:
            self._settle()
            raise

    _launch_untraced = torch._disable_dynamo(_launch)  # type: ignore[attr-defined]

    def _launch_tables(self, tables: list[tuple[Table, Backend]]) -> None:
        if self._finds_inf and not self._is_one_launch(tables):
            raise RuntimeError("the parameters no longer are on one device, where one launch could find an infinity")
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        phase = self._phase_of_step()
        live = {number: params for number, (table, _) in enumerate(tables) if (params := table.live_params())}
        if phase.reads_twice:
            self._choose_main(list(live))
        for number, (table, _) in enumerate(tables if phase.report and live else ()):
            if number not in live:
                table.forget_report()  # it is of a step before this one
        is_one = not phase.reads_twice or self._is_one_launch(tables)
        for stage in (WHOLE_STEP,) if is_one else (MEASURES, UPDATES):
            for number, params in live.items():
                table, backend = tables[number]
                scale = None if grad_scale is None else _on(table.device, "grad_scale", grad_scale)
                found = None if found_inf is None else _on(table.device, "found_inf", found_inf)
                if stage != MEASURES and (untold := table.core.bump_versions(of_gradients=False)):
                    _increment_version(untold)
                if phase.flags or table.phase.flags:
                    self._announce(number, table, params, phase, stage)
                    table.finds_faults = phase.reads_twice and found is None
                backend.launch(table, scale, found)
            if stage == MEASURES and live:
                self._join_norms([tables[number][0] for number in live], phase)

    def _settle(self) -> None:
        """Clears the new states that a launch is to clear and has not, for whoever looks at them between the two.

        Who reads ``state`` itself there, from a signal's handler, sees what the memory held.
        """
        for table, _ in self._tables or ():
            table.core.settle()

    def _phase_of_step(self) -> Phase:
        """What the step being taken does beside the update."""
        phase = self._phase
        if phase.flags:
            phase.check_scalars()
        if self._finds_inf:
            phase = phase.finding_inf
        if phase.report > 1:
            self._unreported = (self._unreported + 1) % phase.report
            if self._unreported != 1:
                phase = phase.unreported
        return phase

    def _choose_main(self, live: list[int]) -> None:
        """The results are those of the first table that takes part; how many steps were skipped goes with them."""
        if live and live[0] != self._main and self._main in self._results:
            count = self._results[self._main][0]
            if live[0] in self._results:
                self._results[live[0]][0].copy_(count)
        self._main = live[0] if live else self._main

    def _join_norms(self, tables: list[Table], phase: Phase) -> None:
        """Gives every table the norms of all tables and ranks."""
        found = [table.lasting.joined for table in tables if table.lasting.joined is not None]
        joined = norms.join(found, self._spreads, largest=phase.is_largest)
        for one in found:
            one[: len(joined)].copy_(joined)

    def _announce(self, number: int, table: Table, params: list[Tensor], phase: Phase, stage: int) -> None:
        """Tells a table, and autograd, what else the launch does."""
        table.phase, table.results = phase, self._results_of(number, table.device, phase)
        decay = phase.ema_decay
        table.ema_decay = _on(table.device, "ema_decay", decay) if isinstance(decay, Tensor) else decay
        table.announce(stage)
        if stage == MEASURES:
            return
        if phase.report:
            table.note_reported(params)
        if phase.zero_grads:
            _clear_history(table.core.bump_versions(of_gradients=True))
        if phase.copy_to is not None:
            _increment_version([row.copy for row in table.live_rows() if row.copy is not None])

    def _results_of(self, number: int, device: torch.device, phase: Phase) -> Tensor | None:
        if not phase.reads_twice:
            return None
        size = 1 + (len(self.param_groups) if phase.norm_by_group else 1)
        before = self._results.get(number, self._results.get(self._main))
        if number not in self._results or before is None or before.device != device or before.numel() != size:
            refuse_capture(device)
            made = torch.full((size,), math.nan, dtype=torch.float64, device=device)
            made[0] = 0.0 if before is None else before[0].to(device)
            self._lasting[device, number].keep(self._results.get(number))
            self._results[number] = made
        return self._results[number]

    def _copies(self) -> dict[Tensor, Tensor]:
        """The checked copy of each parameter that has one."""
        if self._phase.copy_to is None:
            return {}
        copies = self._phase.copies([param for group in self.param_groups for param in group["params"]])
        for g, group in enumerate(self.param_groups) if copies else ():
            for k, param in enumerate(group["params"]):
                if param in copies:
                    check_copy(self._name_of(g, k), param, copies[param])
        params = [
            (self._name_of(g, k), p) for g, group in enumerate(self.param_groups) for k, p in enumerate(group["params"])
        ]
        if copies:
            named = [(f"copy_to of {name}", copies[param]) for name, param in params if param in copies]
            check_distinct([*named, *params], among=len(named))
        return copies

    @torch.no_grad()
    def _trace_launch(self) -> None:
        """What ``torch.compile`` sees of a step: one operator."""
        params = self._traced_params
        places = [place for place, param in enumerate(params) if param.grad is not None]
        live = [params[place] for place in places]
        if live:
            torch.ops.fusedopt.step(live, [param.grad for param in live], places, self._number)
        elif any(param.grad is not None for param in traced.params_of(self)):
            self._launch_untraced()  # all parameters were replaced in the groups by hand

    def _current_tables(self, *, launches: bool = False) -> list[tuple[Table, Backend]]:
        """The tables, true to what parameters, gradients, states and groups are now.

        Args:
            launches: whether their launch follows, to which new states may be left: then ``_settle`` where it fails.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(mode=False), torch.no_grad():  # states made there could not be stepped outside
                return self._current_tables(launches=launches)
        tables = self._tables
        try:
            if tables is not None:
                if self._are_true(tables):
                    return tables
                self._forget_tables()
            self._tables = self._begin_plainly(launches) or self._build_tables()
        except BaseException:
            self._forget_tables()  # what was read so far is not to be trusted
            raise
        self._built_from = (self.state, self.param_groups)
        return self._tables

    def _are_true(self, tables: list[tuple[Table, Backend]]) -> bool:
        """Refreshes the tables; False where they must be built anew."""
        state, groups = self._built_from
        if state is not self.state or groups is not self.param_groups:
            return False
        return all(table.is_current() and table.refresh() for table, _ in tables)

    def _begin_plainly(self, launches: bool) -> list[tuple[Table, Backend]]:
        """The one table of a first step of which nothing needs a closer look, as of almost all; else none."""
        table = Table.of_plain(self._rule, self.param_groups, self.state, self._hidden_steps, self._phase)
        if table is None:
            return []
        self._forget_params(table.core.params())
        self._spreads = (None,)
        table.lasting = self._lasting.setdefault((table.device, 0), table.lasting)
        if self._phase.reads_twice:
            table.results = self._results_of(0, table.device, self._phase)
        backend = choose_backend(self._requested_backend, table.device)  # refuses before a state is made
        self._tables = [(table, backend)]  # for _settle()
        # A launch that may do more than update settles first: nothing is left to it.
        updates_all = launches and not self._phase.flags and getattr(self, "found_inf", None) is None
        table.begin(leaves_fresh=updates_all and backend is cpu)
        return self._tables

    def _build_tables(self) -> list[tuple[Table, Backend]]:
        """Tables of all parameters, each looked at closely."""
        check_groups(self.param_groups)
        if not isinstance(self.state, dict):
            raise TypeError(f"the optimizer's state must be a dict, but it is {self.state!r}")
        for index, group in enumerate(self.param_groups):
            self._phase.check_group(index, group)
            check_modes(self._rule, group)
        copies = self._copies()
        if self._phase.ema_decay is not None:
            averages.check_not_replaced(self.param_groups, self._own_states(), self._traced_params)
        rows, are_apart = rows_of(self.param_groups, copies)
        tables: list[tuple[Table, Backend]] = []
        params = traced.params_of(self)
        self._forget_params(params)
        is_sharded = not are_apart and is_any_sharded(params)  # torch's own types do not lie over ranks
        self._spreads = tuple(dict.fromkeys(map(spread_of, params))) if is_sharded else (None,)
        for device, device_rows in rows.items():
            if len(self._spreads) > 1 or self._phase.norm_by_group:
                device_rows.sort(key=lambda row: part_of(row, self._phase, self._spreads))
                are_apart = False  # to be counted anew
            for part in [device_rows] if are_apart else separate(device_rows):
                lasting = self._lasting.setdefault((device, len(tables)), Lasting())
                table = Table(
                    self._rule,
                    device,
                    self.param_groups,
                    part,
                    device_rows,
                    self.state,
                    self._hidden_steps,
                    lasting,
                    self._phase,
                    self._results_of(len(tables), device, self._phase),
                    self._spreads,
                )
                choose = choose_backend if any(row.param.grad is not None for row in part) else Waiting
                backend = choose(self._requested_backend, device)  # refuses before a state is made
                table.begin()
                tables.append((table, backend))
        return tables


def _clear_history(params: Iterable[Tensor]) -> None:
    """Has autograd forget what the gradients came from, as ``zero_grad(set_to_none=False)``: they are to be cleared."""
    grads = [param.grad for param in params if param.grad is not None]
    for grad in grads:
        if grad.grad_fn is not None:
            grad.detach_()
        elif grad.requires_grad:
            grad.requires_grad_(False)
    _increment_version(grads)


def _on(device: torch.device, name: str, scalar: Tensor) -> Tensor:
    """A scalar that the launch reads, float32 on a table's device."""
    if not isinstance(scalar, Tensor):
        raise TypeError(f"{name} must be a tensor of 1 element, but it is {scalar!r}")
    check_number(name, scalar)
    # Of a GPU's scalar a table on the CPU reads the value at once: it must have come by then.
    return scalar.to(device=device, dtype=torch.float32, non_blocking=device.type != "cpu")
