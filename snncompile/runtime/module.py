"""The optimised network: an `nn.Module` that shares everything with the network it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..capture import adapter_of, classify, has_hooks, start_from, tensors_of
from ..explicit_states import ExplicitStates
from ..functional import reset_net
from ..ir import OpKind, TensorType
from ..options import Options
from ..torch_private import is_traced, is_traced_by_jit, no_modes, not_compiled
from .fingerprint import Visited, fingerprint
from .given_outputs import given_outputs
from .locks import CallLock, call_lock, planning, running
from .program import Program
from .stream import stream

MAX_PLANS = 32
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_PLANS = ("_plans", "_fingerprints", "_latest")


@dataclass(frozen=True)
class Request:
    """What a plan is for.

    Attributes:
        inputs: Types of `[T, N, *]` (or `[N, *]` if static).
        needs_grad: Values are recorded for backward.
        input_gradients: Gradients of the inputs are wanted.
        autocast: The dtype that autocast computes in, where it is on.
        whole_batch: The batch may not run in parts.
    """

    inputs: tuple[TensorType, ...]
    needs_grad: bool
    input_gradients: bool
    autocast: torch.dtype | None = None
    whole_batch: bool = False


@dataclass(frozen=True)
class Plan:
    """A compiled request.

    Attributes:
        program: Runs it.
        report: Says what was decided.
        visited: The modules that tracing went through, and the leaves it met.
    """

    program: Program
    report: Any
    visited: tuple[Visited, ...]


class Compiler(Protocol):
    """The stages before and after the runtime, handed in by the layer above; must be picklable."""

    def compile(self, net: nn.Module, options: Options, request: Request) -> Plan:
        """Capture, run the passes, emit."""

    def input_names(self, net: nn.Module) -> list[str]:
        """Names of the inputs that the network takes."""

    def unplanned_report(self, net: nn.Module, options: Options) -> Any:
        """A report before any input is known."""

    def profile(self, module: OptimizedModule, inputs: tuple[Tensor, ...]) -> Any:
        """A report with measured figures."""


class OptimizedModule(nn.Module):
    """Runs T time steps of a network in an order of the compiler's choice, with the step loop's results.

    Parameters, buffers and submodules are the very objects of `net`, under the same names, so checkpoints interchange
    and changes to either are changes to both. States stay where the network keeps them.

    Args:
        net: Network of single-step modules.
        options: Parsed options.
        compiler: Makes plans.
    """

    def __init__(self, net: nn.Module, options: Options, compiler: Compiler) -> None:
        super().__init__()
        self.__dict__.update(_net=net, _options=options, _compiler=compiler)
        self._share()
        self._forget_plans()

    def _share(self) -> None:
        for name in _SHARED:
            self.__dict__[name] = self._net.__dict__[name]

    def _forget_plans(self) -> None:
        self.__dict__.update(_plans={}, _fingerprints={}, _latest=None)

    @property
    def lock(self) -> CallLock:
        """Held while the network is called or planned for."""
        return call_lock(self._net)

    @not_compiled
    def forward(self, *inputs: Tensor, out: Any = None) -> Any:
        """Run T steps. Calls from several threads take turns.

        Args:
            inputs: `[T, N, *]` for each input of the network; `[N, *]` if `static_input`.
            out: Memory for what is returned, such as an earlier call's result: a contiguous tensor, or several in the
                network's own structure. Large results are computed faster so: their pages are there. The budget counts
                their bytes all the same. Without gradients only; explicit states are returned anew.

        Returns:
            What stacking T calls of the network returns, `[T, N, *]`, or its readout `[N, *]`; `out` if it was given.

        Raises:
            TypeError: Something that is no tensor, the wrong number of inputs, or an `out` that is built otherwise.
            ValueError: The first dimension is not T, a carried state does not fit, or `out` does not fit or lies where
                the call reads. Nothing was run.
            CaptureError: The network does not take inputs of this shape.
            InfeasibleBudgetError: No schedule for this shape fits into the budget.
            RuntimeError: Called from within a call of the same network; with `out` while gradients are recorded; or
                by `torch.export` before an ordinary call on such inputs (see README).
        """
        if is_traced():
            return self._written_down(inputs, out)
        with self.lock.held():
            inputs = self.start(*inputs)
            needs_grad = self._records_gradients(inputs)
            if needs_grad and out is not None:
                raise RuntimeError("gradients are not recorded through out: call under torch.no_grad(), or without out")
            plan = self.plan_for(self.request(inputs, needs_grad=needs_grad), self._options)
            into = () if out is None else self._given(out, plan, inputs)
            with running(), torch.set_grad_enabled(plan.program.needs_grad):
                return self._with_final_states(plan.program(*inputs, into=into))

    def _written_down(self, given: tuple[Any, ...], out: Any) -> Any:
        """What a call does from reset states on, as operations of torch's; kernels are calls of `snncompile::scan`.

        Parameters and states have no values here, so nothing can be planned: it has to have been.
        """
        if is_traced_by_jit():
            raise RuntimeError("torch.jit.trace cannot write a compiled network down; torch.export can")
        if out is not None or torch.is_grad_enabled():
            raise RuntimeError("a compiled network is exported for inference: call under torch.no_grad(), without out")
        with self.lock.held():
            count = len(self.network_inputs)
            self._check(given[:count])
            request = self.request(given[:count], needs_grad=False)
            plans = [plan for (known, _), plan in self._plans.items() if known == request]
            if not plans:
                raise RuntimeError(
                    "call a compiled network once on inputs like these, under torch.no_grad(), before it is exported: "
                    "its kernels are found by the values of its parameters"
                )
            program = plans[-1].program
            if obstacle := program.obstacle_to_export:
                raise RuntimeError(f"this plan of the network cannot be exported: {obstacle}")
            with program.reset():
                return self._with_final_states(program(*self.start(*given)))

    def _given(self, out: Any, plan: Plan, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The memory that the outputs are written to, checked; nothing that the call reads may lie there."""
        if isinstance(self._net, ExplicitStates) and isinstance(out, Tensor):
            out = (out,)  # the only output, which the states follow
        return given_outputs(out, plan.program.output_types, [*inputs, *tensors_of(self._net)])

    def stream(self, chunks: Iterable[Tensor | tuple[Tensor, ...]]) -> Iterator[Any]:
        """Run as many steps as come, chunk by chunk, without end if need be; states carry over, memory does not grow.

        A chunk is run when it is taken from `chunks`, before the next one is. Nothing is recorded for backward. The
        memory budget holds for each chunk; a chunk length is planned for when it first comes.

        Args:
            chunks: Each `[C, N, *]`, with a C of its own that need not be T; a tuple of such for a network of several
                inputs. With `static_input`, each is what a call takes, `[N, *]`, and is shown for T steps.

        Returns:
            With `readout="sequence"` the outputs `[C, N, *]` of each chunk in turn. With "sum", "mean" or "last" one
            readout of all steps, `[N, *]`, when the chunks have come to an end: `(y,) = opt.stream(chunks)`.

        Raises:
            TypeError: `chunks` is a tensor or nothing to iterate over; while iterating: a chunk is no tensor, or no
                tuple of one for each input.
            ValueError: The network takes its states as arguments, or takes whole sequences; while iterating: a chunk is
                not like those before it but for its length, or has no steps; or a readout of no chunks at all. A chunk
                is checked before any state changes.
            ScheduleError: A chunk is not as long as the `Schedule` that was asked for.
            CaptureError, InfeasibleBudgetError, RuntimeError: As for a call.
        """
        return stream(self, chunks)

    def plan(self, *inputs: Tensor) -> None:
        """Plan for inputs like these without running; in eval mode for inference, in train mode for training."""
        with self.lock.held():
            inputs = self.start(*inputs)
            needs_grad = self.training and self._records_gradients(inputs)
            self.plan_for(self.request(inputs, needs_grad=needs_grad), self._options)

    def start(self, *given: Any) -> tuple[Tensor, ...]:
        """Check what a call was given, put explicit states into their places, and return the inputs."""
        if not isinstance(self._net, ExplicitStates):
            self._check(given)
            return given
        count = len(self._net.input_names)
        inputs, states = given[:count], given[count:]
        self._check(inputs)
        start_from(self._net, states, tuple(x if self._options.static_input else x[0] for x in inputs))
        return inputs

    def _with_final_states(self, outputs: Any) -> Any:
        """What a network with explicit states returns: its outputs, then the states after the last step."""
        return (*outputs, *self._net.take_states()) if isinstance(self._net, ExplicitStates) else outputs

    def reset(self) -> None:
        """Put every state back to its reset value, between two calls."""
        if self.lock.is_mine():
            reset_net(self._net)
            return
        with self.lock.held():
            reset_net(self._net)

    @property
    def code(self) -> str:
        """The emitted loop nest of the latest plan as Python source."""
        if self._latest is None:
            return "# not planned yet: call the module, or pass example_input to optimize()\n"
        source: str = self._latest.program.source
        return source

    @property
    def report(self) -> Any:
        """What the latest plan decided, and why."""
        if self._latest is None:
            with planning():
                return self._compiler.unplanned_report(self._net, self._options)
        return self._latest.report

    def profile(self, *inputs: Tensor) -> Any:
        """Run on a copy and return the report with measured time, bytes and firing rates beside the predicted ones.

        Args:
            inputs: As for a call. States, statistics and parameters stay untouched.
        """
        with self.lock.held():
            return self._compiler.profile(self, inputs)

    @property
    def options(self) -> Options:
        options: Options = self._options
        return options

    @property
    def latest_program(self) -> Program | None:
        """The program of the latest plan."""
        return None if self._latest is None else self._latest.program

    # Plans

    @property
    def network(self) -> nn.Module:
        """The network that this runs."""
        net: nn.Module = self._net
        return net

    @property
    def network_inputs(self) -> list[str]:
        """Names of the inputs that the network takes."""
        names: list[str] = self._compiler.input_names(self._net)
        return names

    def plan_for(self, request: Request, options: Options) -> Plan:
        """The plan for a request, made if there is none or if the network's structure has changed since.

        Args:
            request: The inputs' types say how many steps there are, unless they are static.
            options: Those of this module; in a stream, for a chunk's number of steps.
        """
        key = (request, self._structure())
        plan: Plan | None = self._plans.get(key)
        if plan is None or self._fingerprints[key] != fingerprint(plan.visited):
            # Planning is no part of the call: whoever watches the call's operations does not see it.
            with planning(), no_modes():
                plan = self._compiler.compile(self._net, options, request)
            while len(self._plans) >= MAX_PLANS:
                oldest = next(iter(self._plans))
                del self._plans[oldest], self._fingerprints[oldest]
            self._plans[key] = plan
            self._fingerprints[key] = fingerprint(plan.visited)
        self.__dict__["_latest"] = plan
        return plan

    def _structure(self) -> tuple[tuple[int, bool, bool, object], ...]:
        """Which modules there are, in which modes, with hooks or without.

        A plan holds its modules, so an id is not taken twice.
        """
        return tuple(
            (id(module), module.training, has_hooks(module), getattr(module, "step_mode", None))
            for module in self._net.modules()
        )

    def request(self, inputs: tuple[Tensor, ...], *, needs_grad: bool) -> Request:
        """What a plan for such inputs is for."""
        wants = needs_grad and any(value.requires_grad for value in inputs)
        device = inputs[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return Request(tuple(TensorType.of(value) for value in inputs), needs_grad, wants, autocast)

    def _records_gradients(self, inputs: tuple[Tensor, ...]) -> bool:
        if not torch.is_grad_enabled():
            return False
        if any(value.requires_grad for value in inputs) or any(p.requires_grad for p in self._net.parameters()):
            return True
        return any(_may_carry_gradients(module) for module in self._net.modules())

    def _check(self, inputs: tuple[Any, ...]) -> None:
        expected = self.network_inputs
        if len(inputs) != len(expected):
            raise TypeError(f"the network takes {len(expected)} inputs ({', '.join(expected)}), got {len(inputs)}")
        for name, value in zip(expected, inputs, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(f"input {name} must be a tensor, got {type(value).__name__}")
            if self._options.static_input:
                continue
            if value.dim() == 0 or value.shape[0] != self._options.steps:
                raise ValueError(
                    f"input {name} must be [T, N, *] with T = {self._options.steps}, got shape {tuple(value.shape)}; "
                    "compile for another T with optimize(), or pass static_input=True for one [N, *] at every step"
                )

    # What nn.Module does with its own parts is done by the network, which may have its own idea of it.

    @property
    def training(self) -> bool:
        return bool(self._net.training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "_net" in self.__dict__:
            self._net.training = mode

    def train(self, mode: bool = True) -> OptimizedModule:
        self._net.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModule:
        self._net._apply(fn, recurse)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._net.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._net.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._net._load_from_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        net = self.__dict__.get("_net")
        # A special method of the network's, such as GraphModule's __deepcopy__, would make copies of it, not of this.
        if net is None or name == "_net" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(net, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes that are read from the network are written to it."""
        net = self.__dict__.get("_net")
        if net is None or name in self.__dict__ or hasattr(type(self), name) or not hasattr(net, name):
            super().__setattr__(name, value)
        else:
            setattr(net, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Plans are made anew where they are needed; functions that were emitted do not travel."""
        return {name: value for name, value in self.__dict__.items() if name not in (*_SHARED, *_PLANS)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(state)
        self._share()
        self._forget_plans()

    def extra_repr(self) -> str:
        return f"T={self._options.steps}, schedule={self._options.schedule!r}, readout={self._options.readout!r}"


def _may_carry_gradients(module: nn.Module) -> bool:
    if any(isinstance(value, Tensor) and value.requires_grad for value in vars(module).values()):
        return True  # carried in an attribute
    leaf = None if isinstance(module, (nn.Sequential, nn.ModuleList)) else classify(module)
    if leaf is None or leaf.kind is OpKind.MODULE:
        return False
    if leaf.kind is OpKind.OPAQUE:
        return True
    return any(isinstance(value, Tensor) and value.requires_grad for value in adapter_of(module).read(module))
