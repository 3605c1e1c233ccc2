# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA graphs on machines without a GPU, and calls that tests of recorded steps share."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import uncomp

NEW = 14
SMALL = {"budget": 48, "groups": 2}
WAYS = {  # a step that differs in what it does to the cache, by name
    "uncomp": {},
    "grows": {"decode": "grow", "max_new_tokens": 64},
    "covers": {"budget": 400},
    "query_head": {"rows": "query_head"},
    "model": {"group_scope": "model"},
    "adakv": {"policy": "adakv"},
    "h2o": {"policy": "h2o"},
    "tova": {"policy": "tova"},
    "streaming_llm": {"policy": "streaming_llm"},
    "full": {"policy": "full"},
}


class _Log(TorchDispatchMode):
    """Notes every operator of a function with its tensors, and what those that it writes to held before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The memory of a tensor, whatever becomes of the object."""
        return self.views.setdefault(id(tensor), (tensor, tensor.detach()))[1]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.name().split(".")[0] in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function.name()}")
        named = zip(function._schema.arguments, args, strict=False)
        for argument, value in [*named, *((a, kwargs.get(a.name)) for a in function._schema.arguments)]:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, torch.Tensor) and id(value) not in self.before:
                self.before[id(value)] = (value, value.clone())
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result


class Recording:
    """The operators of one call, and nothing of its Python.

    Recording undoes what the call did, because a capture runs nothing.
    """

    def __init__(self, function) -> None:
        random = torch.get_rng_state()
        with _Log() as log:
            result = function()
        torch.set_rng_state(random)
        for tensor, before in log.before.values():
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(before)

        def views(tree):
            return tree_map_only(torch.Tensor, log.view, tree)

        self._calls = [(f, views(args), views(kwargs), views(out)) for f, args, kwargs, out in log.calls]
        self.result = views(result)

    @torch.no_grad()
    def replay(self) -> None:
        """Calls the operators again; results go where they went the first time."""
        for function, args, kwargs, there in self._calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(there), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr() and old.numel():
                    old.copy_(new)


class ReplayMachine:
    """Takes the place of uncomp.graph.CudaGraphs in a patched model's handle."""

    device_type = "cpu"

    def __init__(self, handle) -> None:
        handle._recordings.machine = self

    def record(self, device, function) -> Recording:
        """See CudaGraphs."""
        return Recording(function)

    def order(self, device) -> None:
        """One thread, no streams."""

    def busy(self) -> bool:
        """Nobody else records."""
        return False

    def scratch_bytes(self) -> int:
        """Nothing is held."""
        return 0


def prompt(device: str, batch: int = 1, columns: int = 90, seed: int = 1):
    return torch.randint(3, 199, (batch, columns), generator=torch.Generator().manual_seed(seed)).to(device)


def padded(device: str, columns: int = 90):
    ids = prompt(device, 3, columns)
    mask = torch.ones_like(ids)
    for row, pads in ((1, 1), (2, columns - 57)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return ids, mask


def run(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


def patched(model, *, record: bool = True, **options):
    """A patched model whose steps are recorded, on a CPU by the stand-in; or whose steps never are."""
    options = {**SMALL, **options}
    handle = uncomp.patch(model, uncomp.UncompConfig(**options, graph="auto" if record else "off"))
    if record and model.device.type == "cpu":
        ReplayMachine(handle)
    return handle


def both(model, call, **options):
    """What a call gives with recorded steps, checked against the same call without; and the stats of the first."""
    with patched(model, record=False, **options) as handle:
        want = call(handle)
        assert handle.stats()["steps_replayed"] == 0
    with patched(model, **options) as handle:
        got, stats = call(handle), handle.stats()
    assert torch.equal(got, want)
    return stats
