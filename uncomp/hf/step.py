# SPDX-License-Identifier: Apache-2.0
"""Stands in for the forward of a text stack: replays a recorded decode step where there is one, else runs the forward.

`generate` calls the model as ever; embedding, layers and the last norm are replayed, the output matrix and sampling
stay where they are. Where a step cannot be recorded the ordinary one runs, with the same result, and the reason is
kept in words.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from uncomp.graph import MOST_GRAPHS, Once, Recordings, StepGraph
from uncomp.hf import judge
from uncomp.hf.shared import SharedState, forget_pending


class Step:
    """The decode step of one patched model; `run` is what its text stack's forward becomes.

    Args:
        stack: the module that owns the decoder layers; its forward as it is now is what steps run.
        recordings: where recorded steps are kept.
        why_not: why steps of this model are never recorded, or None. asked: because the user wants it so.
        compiled: True compiles the step. joined: a context around compiled steps of several sequences.
        active: the state of the cache whose forward this thread is in, or None.
    """

    def __init__(
        self,
        stack: torch.nn.Module,
        recordings: Recordings,
        why_not: str | None,
        active: Callable[[], SharedState | None],
        *,
        asked: bool = False,
        compiled: bool = False,
        joined: AbstractContextManager | None = None,
    ) -> None:
        self.stack, self.recordings, self.why_not, self.active = stack, recordings, why_not, active
        self.asked = asked
        self._had_forward = "forward" in vars(stack)
        self.forward = stack.forward
        self._compiled, self._joined = compiled, joined or nullcontext()
        self._by_batch: dict[int, Callable[..., Any]] = {}
        self._warm: set[tuple] = set()  # keys whose step ran once: libraries have chosen and loaded their kernels
        self._failed: dict[tuple, str] = {}  # keys whose recording failed, and why
        self._removed = False

        @functools.wraps(self.forward)
        def run(*args, **kwargs):
            return self.run(*args, **kwargs)

        run.uncomp = True
        self._wrapper = run
        stack.forward = run

    def remove(self) -> None:
        """Gives the stack its forward back; if somebody wrapped ours, it only hands calls on from now on."""
        self._removed = True
        if vars(self.stack).get("forward") is not self._wrapper:
            return
        if self._had_forward:
            self.stack.forward = self.forward
        else:
            del self.stack.forward

    # ---- the stack's forward
    def run(self, *args, **kwargs) -> Any:
        """The stack's forward, replayed where this is a decode step that is recorded."""
        shared = None if self._removed else self.active()
        if shared is None or shared.clock.chunk is None or shared.clock.chunk.lengths is not None:
            return self.forward(*args, **kwargs)
        if shared.recording:  # a step that calls the whole model, see hf/loop.py
            return self.one_token(shared.plain, **(dict(zip(judge.ARGUMENTS, args, strict=False)) | kwargs))
        given = dict(zip(judge.ARGUMENTS, args, strict=False)) | kwargs
        states = given.get("inputs_embeds")
        kind = "input_ids" if states is None else "inputs_embeds"
        states = given[kind]
        reason = self.obstacle(shared, self.stack) or judge.argument(given, self.stack.config)
        if reason is not None:
            self.recordings.give_up(reason, loud=self._loud(reason, states.device))
            return self.forward(*args, **kwargs)
        positions = given.get("position_ids")

        def make() -> tuple[dict[str, Tensor], Callable[[], Any]]:
            inputs = {
                "states": self.static(states.shape, states.dtype, states.device),
                "positions": self.static((states.shape[0], 1), torch.int64, states.device),
            }

            def step() -> tuple[Tensor, type]:
                out = self.one_token(
                    False,
                    **{kind: inputs["states"]},
                    position_ids=inputs["positions"],
                    past_key_values=self.active().cache(),  # no reference to it stays behind
                )
                return out.last_hidden_state, type(out)

            return inputs, step

        # Recordings share scratch memory, and another one may write where this one leaves its result.
        with self.recordings.lock:
            self.recordings.machine.order(states.device)
            graph = self.prepare((kind, tuple(states.shape), states.dtype), shared, make, self.stack)
            graph.inputs["states"].copy_(states)
            if positions is None:
                graph.inputs["positions"].fill_(shared.clock.columns)
            else:
                graph.inputs["positions"].copy_(positions)
            hidden, output = self.replay(graph, shared)
            return output(last_hidden_state=hidden.clone(), past_key_values=given["past_key_values"])

    def one_token(self, plain: bool, **kwargs) -> Any:
        """The stack's forward for one token a sequence, compiled where that was asked for, unless `plain`."""
        # The same arguments whoever calls: others are off, and would only make torch.compile start again.
        kwargs = {name: kwargs[name] for name in judge.ARGUMENTS if kwargs.get(name) is not None}
        kwargs["use_cache"] = True
        if plain or not self._compiled:
            return self.forward(**kwargs)
        states = kwargs.get("inputs_embeds")
        batch = (kwargs["input_ids"] if states is None else states).shape[0]
        kind = min(batch, 2)
        if kind not in self._by_batch:
            # Shapes are constant, so nothing is guessed. With one sequence a product reads its matrix once, which a
            # generated reduction does faster than cuBLAS: the first option makes it one, and tunes it. The second
            # puts small kernels that do not wait for each other into one.
            options = {"coordinate_descent_tuning": True, "combo_kernels": True} if kind == 1 else {}
            self._by_batch[kind] = torch.compile(self.forward, dynamic=False, options=options)
        with self._joined if kind > 1 else nullcontext():  # tuned reductions are faster apart
            return self._by_batch[kind](**kwargs)

    @staticmethod
    def static(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros that every mode may write to: a copy into an inference tensor would be refused later."""
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=dtype, device=device)

    def replay(self, graph: StepGraph, shared: SharedState) -> Any:
        """Runs a prepared step of a cache on the current stream; gives what the recorded function returned."""
        with self.recordings.lock:
            self.recordings.machine.order(graph.position.device)
            shared.recording = True  # the layers count on the host later, see SharedState.settle
            try:
                graph.recording.replay()
            finally:
                shared.recording = False
            self.recordings.replayed += graph.kept
        shared.replayed = True
        shared.debt += 1
        return graph.recording.result

    # ---- recordings
    def prepare(
        self,
        key: tuple,
        shared: SharedState,
        make: Callable[[], tuple[dict[str, Tensor], Callable[[], Any]]],
        root: torch.nn.Module,
        obstacle: str | None = None,
    ) -> StepGraph:
        """A step that may be replayed once, or more often if it is `kept`: the recording for this cache as it is now.

        The first step of its kind runs as it is, so that libraries choose and load their kernels; so does one that
        cannot be recorded.

        Args:
            key: kind of step. make: gives static inputs and the function that is recorded.
            root: whose modules it runs. obstacle: why it must not be recorded.
        """
        key = (*key, torch.is_inference_mode_enabled())
        if shared.free_slots() == 0:
            shared.make_room()
        shared.plain = obstacle is not None
        graph = self._bound(key, shared, root) if obstacle is None else None
        if graph is not None:
            return graph
        reason = obstacle or self._failed.get(key)
        if reason is None and key not in self._warm:
            self._warm.add(key)
            reason = "the first step warms up"
        if reason is None and not self.recordings.room_for(shared):
            reason = f"more than {MOST_GRAPHS} caches are in use in turns"
        inputs, step = make()
        device = inputs["states"].device
        position, mark = shared.clock.position(device), ()
        recording: Any = Once(step)
        if reason is None:
            shared.recording = True
            try:
                recording, mark = self.recordings.machine.record(device, step), judge.mark(root)
            except Exception as error:  # whatever forbids a recording: the ordinary step gives the same result
                text = str(error).strip().split("\n")[0]
                reason = f"recording failed ({type(error).__name__}: {text})"
                if not isinstance(error, torch.OutOfMemoryError):  # memory may be free the next time
                    self._failed[key] = reason
            finally:
                shared.recording = False
                forget_pending()
        graph = StepGraph(
            key,
            recording,
            inputs,
            position,
            [layer.ragged for layer in shared.layers],
            mark,
            weakref.ref(shared),
            shared.generation,
            kept=reason is None,
            weights=judge.tensors(root) if reason is None else [],
        )
        if reason is not None:
            self.recordings.give_up(reason, loud=self._loud(reason, device))
            return graph
        self.recordings.recorded += 1
        self.recordings.add(graph)
        shared.checked = graph
        return graph

    def _loud(self, reason: str, device: torch.device) -> bool:
        """Whether a user should hear of it: not on a CPU, not where it was asked for, not of a warm-up."""
        failed = reason.startswith("recording failed")
        return failed or (device.type == "cuda" and not self.asked and "warms up" not in reason)

    def forget_failures(self) -> None:
        """Recordings that failed are tried again."""
        self._failed.clear()

    def _bound(self, key: tuple, shared: SharedState, root: torch.nn.Module) -> StepGraph | None:
        graph = self.recordings.find(key, shared)
        if graph is None:
            return None
        if shared.checked is not graph:  # once a turn
            if graph.mark != judge.mark(root):
                self.recordings.drop(graph)
                return None
            shared.checked = graph
        if shared.clock.position(graph.position.device) is not graph.position:
            shared.clock.keep_position_in(graph.position)
        return graph

    def obstacle(self, shared: SharedState, root: torch.nn.Module) -> str | None:
        """Why no step of this cache can be recorded now, whatever its arguments; None if it can.

        Args:
            root: what the recording holds, the stack or the whole model.
        """
        if self.why_not is not None:
            return self.why_not
        if torch.is_grad_enabled():
            return "gradients are on; call under torch.no_grad()"
        if torch.is_autocast_enabled("cuda"):
            return "autocast is on"
        if self.stack.training:
            return "the model is in training mode"
        if shared.layers[0].ragged is None:
            return "nothing is compressed yet"
        weight = judge.first_weight(self.stack)
        if shared.verdict is None or shared.verdict[:2] != (root, weight):  # once a turn: it looks at every module
            machine = self.recordings.machine
            reason = judge.forbidden(root, machine.device_type, whole=root is not self.stack)
            shared.verdict, shared.checked = (root, weight, reason), None
        if shared.verdict[2] is None and self.recordings.machine.busy():
            return "somebody else records the current stream"
        return shared.verdict[2]
