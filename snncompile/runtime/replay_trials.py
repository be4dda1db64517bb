"""Decides whether a plan's chunks are replayed: where that is allowed, gives the same bits, and is faster if tried."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import reset_net
from ..ir import Decision, OpKind, StepGraph, TensorType, Verdict, tensor_types
from ..schedule import Schedule, output_names, state_bytes
from ..torch_private import tree_leaves
from .chunk_replays import FEWEST_CHUNKS, CudaRecorder, Recorder
from .program import Program
from .trial_runs import trial_copy, trial_inputs, trial_obstacle

_GAIN = 0.95  # what replays may take of the time that launches take
_ROUNDS = 3
_GIVEN = (OpKind.INPUT, OpKind.CONSTANT, OpKind.OUTPUT)
_PASS = "cuda-graphs"


def replay_chunks(
    program: Program, inputs: Sequence[TensorType], room_bytes: float = math.inf, recorder: Recorder | None = None
) -> tuple[Decision, ...]:
    """Let a program on CUDA replay its chunks, if that is right and pays; says what was decided.

    Args:
        program: For inference.
        inputs: Types of what it is called with.
        room_bytes: How much more memory it may take.
        recorder: Records chunks; None: CUDA does.
    """
    if recorder is None:
        devices = {leaf.device for leaf in inputs}
        if any(device.type != "cuda" for device in devices) or len(devices) > 1:
            return ()
        recorder = CudaRecorder(devices.pop())
    refusal = _obstacle(program) or _shortage(program, inputs, room_bytes)
    if not refusal:
        try:
            launched, replayed = _race(program, inputs, recorder)
        except Exception as failure:  # whatever cannot be recorded raises
            refusal = f"a chunk cannot be recorded: {type(failure).__name__}: {str(failure)[:200]}"
        else:
            times = f"{1e6 * replayed:.0f} us a chunk, launched operation by operation {1e6 * launched:.0f} us"
            if replayed <= _GAIN * launched:
                program.replay_chunks(recorder)
                return (Decision(_PASS, "", Verdict.DONE, f"chunks are replayed: {times}"),)
            refusal = f"chunks are launched: replayed {times}"
    return (Decision(_PASS, "", Verdict.REFUSED, refusal),)


def replay_bytes(graph: StepGraph, schedule: Schedule, inputs: Sequence[TensorType], *, is_static: bool) -> int:
    """What replays hold beside what a chunk holds: its inputs and outputs, and the states twice."""
    chunk = schedule.root.chunk
    read = sum(0 if is_static else leaf.of_length(chunk).nbytes for leaf in inputs)
    outputs = sum(chunk * leaf.nbytes for name in output_names(graph) for leaf in tensor_types(graph[name].value))
    states = sum(state_bytes(graph, node.name) for node in graph)
    return read + outputs + 2 * states


def _obstacle(program: Program) -> str:
    """Why a program's chunks may not be replayed; empty if they may."""
    graph, schedule = program.graph, program.schedule
    whole = schedule.steps // schedule.root.chunk
    if program.needs_grad:
        return "gradients are recorded"
    if whole < FEWEST_CHUNKS:
        return f"{whole} whole chunks are fewer than the {FEWEST_CHUNKS} from which on replays pay"
    once = next((node for node in graph if node.invariant and node.kind not in _GIVEN), None)
    return trial_obstacle(program.net, graph) or (
        f"{once.where or once.name} is computed once for all steps" if once else ""
    )


def _shortage(program: Program, inputs: Sequence[TensorType], room_bytes: float) -> str:
    held = replay_bytes(program.graph, program.schedule, inputs, is_static=program.is_static)
    return f"replays hold {held} bytes more than the budget leaves" if held > room_bytes else ""


def _race(program: Program, inputs: Sequence[TensorType], recorder: Recorder) -> tuple[float, float]:
    """Seconds of a chunk, launched and replayed.

    Raises:
        ArithmeticError: Results differ.
    """
    net = trial_copy(program.net)
    chunk = program.schedule.root.chunk
    steps = min(program.schedule.steps, 2 * FEWEST_CHUNKS * chunk)
    given = trial_inputs(inputs, steps, is_static=program.is_static)
    seconds, results = [], []
    with torch.no_grad():
        for replays in (False, True):
            own = program.of_steps(net, steps)
            if replays:
                own.replay_chunks(recorder)
            best = math.inf
            for _ in range(_ROUNDS):
                reset_net(net)
                _wait(inputs)
                started = time.perf_counter()
                outputs = own(*given)
                _wait(inputs)
                best = min(best, time.perf_counter() - started)
            seconds.append(best / (steps // chunk))
            results.append([*tree_leaves(outputs), *_states(own)])
    if not all(map(_same, *results)):
        raise ArithmeticError("replayed, it rounds differently")
    return seconds[0], seconds[1]


def _wait(inputs: Sequence[TensorType]) -> None:
    for device in {leaf.device for leaf in inputs if leaf.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def _states(program: Program) -> list[Any]:
    return [value for slot in program.states().values() for value in slot.states]


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
