# SPDX-License-Identifier: Apache-2.0
"""Hooks that shorten a prompt between decoder layers, and the refusal of callers who want what is then missing.

The variables of the model's own loop stay full length, so every layer's hook hands it the shortened ones again. A hook
looks at nothing but a shape where a single token passes: such steps are recorded and compiled.
Source: docs/method.md "Hidden-state pruning".
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uncomp.hf.clock import Clock
from uncomp.hf.shared import SharedState
from uncomp.pruning import PrunedPrompt

# Options of generate under which a first forward is not the prompt.
_NO_WHOLE_PROMPT = {
    "prefill_chunk_size": "a chunk cannot know which tokens the end of the prompt will look at",
    "prompt_lookup_num_tokens": "the drafts behind the prompt would choose its tokens",
    "assistant_model": "the drafts behind the prompt would choose its tokens",
    "assistant_early_exit": "the drafts behind the prompt would choose its tokens",
}
_FOLLOW = ("position_ids", "attention_mask")  # beside position_embeddings, what a layer gets of every token


class HiddenPruning:
    """The hooks of one patched model.

    Args:
        model: what was patched. stack: the module that owns the decoder layers.
    Raises:
        NotImplementedError: no causal language model that can be asked for some of its logits.
    """

    def __init__(self, model: torch.nn.Module, stack: torch.nn.Module) -> None:
        self._model, self._stack = asked_model(model, stack), stack
        self._arguments = list(inspect.signature(type(self._model).forward).parameters)[1:]
        # Of this thread. asked: arguments of the model's forward; pruned: the prompt in it; rest: see _enter.
        self._local = threading.local()
        self._hooks = [
            self._model.register_forward_pre_hook(self._note, with_kwargs=True),
            self._model.register_forward_hook(self._forget, with_kwargs=True, always_call=True),
            *(
                layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)
                for index, layer in enumerate(stack.layers)
                if index > 0
            ),
        ]
        self._generate = self._wrap_generate()

    def remove(self) -> None:
        """Gives the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        ours, before = self._generate
        if ours is not None and vars(self._model).get("generate") is ours:
            if before is None:
                del self._model.generate
            else:
                self._model.generate = before

    # ---- one forward
    def begin(self, shared: SharedState, given: dict[str, Any], states: Tensor) -> None:
        """Prepares the forward of a first prompt; tokens leave if the schedule says so for one of its sequences.

        Args:
            given: arguments of the stack's forward. states: its ids or embeddings.
        Raises:
            NotImplementedError: the caller wants more than the last tokens' logits.
        """
        chunk = shared.clock.chunk
        if shared.schedule is None or shared.clock.seen is not None or chunk.lengths is None:
            return
        pruned = PrunedPrompt(shared.schedule, chunk.lengths, chunk.pack, states.device)
        if pruned.first is None:
            shared.reached = None
            return
        try:
            self._check(given, pruned)
        except NotImplementedError:
            shared.clock = Clock()  # nothing ran: the cache is as empty as it was
            raise
        shared.pruned = self._local.pruned = pruned
        self._local.rest = {}

    def end(self, shared: SharedState) -> None:
        """The forward is over, however it went."""
        self._local.pruned = self._local.rest = None
        if shared.pruned is not None:
            shared.reached, shared.pruned = shared.pruned.reached, None

    def _hook(self, index: int) -> Callable:
        def hook(layer, args, kwargs):
            if args and args[0].shape[1] == 1:
                return None
            pruned = getattr(self._local, "pruned", None)
            return None if pruned is None or index < pruned.first else self._enter(pruned, index, args, kwargs)

        hook.uncomp = True
        return hook

    def _enter(self, pruned: PrunedPrompt, index: int, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """What a layer gets: of the tokens that reach it.

        `rest` is what goes with the hidden states, shortened; filled at the first border, used by all layers behind.
        """
        states, *others = args or (None,)
        rest = self._local.rest
        if index in pruned.borders:
            source = rest or _along(kwargs, states)
            names = list(source)
            states, *moved = pruned.enter(index, [states, *(source[name].to(states.device) for name in names)])
            rest.update(zip(names, moved, strict=True))
        else:
            rest.update({name: tensor.to(states.device) for name, tensor in rest.items()})
        changed = {name: rest[name] for name in _FOLLOW if name in rest}
        return (states, *others), {**kwargs, **changed, "position_embeddings": (rest["cos"], rest["sin"])}

    # ---- what a caller may ask
    def _note(self, model, args, kwargs):
        self._local.asked = dict(zip(self._arguments, args, strict=False)) | kwargs

    _note.uncomp = True

    def _forget(self, model, args, kwargs, output):
        self._local.asked = None

    _forget.uncomp = True

    def _check(self, given: dict[str, Any], pruned: PrunedPrompt) -> None:
        asked, newest = getattr(self._local, "asked", None), pruned.schedule.newest
        if asked is None:
            raise NotImplementedError(
                f"uncomp: a pruned prompt has no hidden state of every token: call the {type(self._model).__name__}, "
                f"not the {type(self._stack).__name__} inside"
            )
        why = f"of a prompt that is pruned only the last {newest} tokens are sure to reach the last layer"
        if asked.get("labels") is not None:
            raise NotImplementedError(f"uncomp: labels (a loss over the prompt) cannot be had: {why}")
        hidden = asked.get("output_hidden_states")
        if hidden is None:
            hidden = given.get("output_hidden_states")
        if self._stack.config.output_hidden_states if hidden is None else hidden:
            raise NotImplementedError(f"uncomp: output_hidden_states cannot be had: {why}")
        keep = asked.get("logits_to_keep", 0)
        if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= newest:
            got = keep if isinstance(keep, int) else type(keep).__name__
            raise NotImplementedError(
                f"uncomp: logits_to_keep must be an integer from 1 to {newest}, because {why}; got {got}"
                + (" (all tokens)" if got == 0 else "")
            )
        states = given.get("inputs_embeds")
        wanted = any(p.requires_grad for p in self._stack.parameters()) or (states is not None and states.requires_grad)
        if torch.is_grad_enabled() and wanted:
            raise NotImplementedError("uncomp: a prompt is pruned without gradients: call under torch.no_grad()")

    def _wrap_generate(self) -> tuple[Callable | None, Callable | None]:
        """Refuses a prompt in chunks or with drafts behind it, which no forward can tell from others.

        Returns:
            (wrapper, what stood there).
        """
        model, before = self._model, vars(self._model).get("generate")
        if not hasattr(model, "generate"):
            return None, None
        inner = model.generate

        @functools.wraps(inner)
        def generate(*args, **kwargs):
            config = kwargs.get("generation_config") or next(
                (a for a in args if hasattr(a, "prefill_chunk_size")), None
            )
            for name, why in _NO_WHOLE_PROMPT.items():
                found = [getattr(c, name, None) for c in (config, model.generation_config)]
                value = kwargs.get(name, next((v for v in found if v is not None), None))
                if value is not None and self._hooks:
                    got = value if isinstance(value, int) else type(value).__name__
                    raise NotImplementedError(
                        f"uncomp: {name} must be left out where prompts are pruned, because {why}; got {got}"
                    )
            return inner(*args, **kwargs)

        model.generate = generate
        return generate, before


def asked_model(model: torch.nn.Module, stack: torch.nn.Module) -> torch.nn.Module:
    """The module around the stack that can be asked for the logits of some tokens."""
    for module in model.modules():
        if module is not stack and "logits_to_keep" in inspect.signature(type(module).forward).parameters:
            return module
    raise NotImplementedError(
        "uncomp.patch: prefill pruning needs a causal language model whose forward takes logits_to_keep; got "
        f"{type(model).__name__}"
    )


def _along(kwargs: dict[str, Any], states: Tensor) -> dict[str, Tensor]:
    """What goes with the hidden states: cos, sin, and tensors of every token.

    Raises:
        NotImplementedError: a layer is called in a way that is not known, or with a tensor that would stay too long.
    """
    pair = kwargs.get("position_embeddings")
    if not isinstance(states, Tensor) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise NotImplementedError(
            "uncomp: prefill pruning needs decoder layers that take hidden states first and position_embeddings=(cos, "
            f"sin); got {', '.join(kwargs)}"
        )
    found = {"cos": pair[0], "sin": pair[1]}
    for name, value in kwargs.items():
        if name in _FOLLOW and isinstance(value, Tensor):
            found[name] = value[:, : states.shape[1]]
        elif isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == states.shape[1]:
            raise NotImplementedError(f"uncomp: prefill pruning does not know how to shorten {name} of a decoder layer")
    return found
