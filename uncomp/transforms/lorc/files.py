# SPDX-License-Identifier: Apache-2.0
"""A compressed model in a folder: what transformers writes without the replaced projections, and beside it the factors.

FOLDER/uncomp_lorc.json        version, configuration, ranks
FOLDER/uncomp_lorc.safetensors factors by the names of the modules that hold them
The rest is an ordinary folder of transformers, so `from_pretrained` makes the model and `attach` completes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uncomp import latent
from uncomp.transforms.lorc.apply import check_key_mode, joined, set_codec
from uncomp.transforms.lorc.config import STEP, LorcConfig, is_rank
from uncomp.transforms.lorc.handle import LorcHandle
from uncomp.transforms.lorc.modules import FoldedOutput, PaddedProjection, Rebuilt
from uncomp.transforms.lorc.places import DTYPES, FUSED, NAMES, Places, makes_ordinary_tensors
from uncomp.transforms.lorc.schedule import Ranks

RECORD, FACTORS = "uncomp_lorc.json", "uncomp_lorc.safetensors"
VERSION = 1
_BAD = "uncomp.lorc.load"


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a model that was compressed here; one of whose two files is lost counts too."""
    return any((Path(folder) / name).is_file() for name in (RECORD, FACTORS))


def check_complete(model: torch.nn.Module, folder: str | os.PathLike[str], missing: Iterable[str]) -> None:
    """Refuses a completed model with weights that are in no file of its folder.

    Args:
        model: what `attach` completed. missing: the weights that `from_pretrained(folder)` made up.
    Raises:
        ValueError: names the first.
    """
    with _opened(Path(folder)) as factors:
        lost = sorted((set(missing) & set(model.state_dict())) - set(factors.keys()))
    if lost:
        raise ValueError(f'{_BAD}: folder "{folder}" must hold {lost[0]}; it does not')


def check_target(folder: str | os.PathLike[str]) -> Path:
    """A folder that a checkpoint may be written to.

    Raises:
        ValueError: it holds something already, is a file, or lies in no folder.
        OSError: nothing can be written there.
    """
    try:
        path = Path(folder).resolve()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f'uncomp.lorc: folder "{folder}" must be new or empty; it holds something')
        if not path.parent.is_dir():
            raise ValueError(f'uncomp.lorc: folder "{folder}" must lie in a folder that exists; it does not')
        partial = _partial(path)  # tried out now, because what comes before the writing may take minutes
        partial.mkdir()
        partial.rmdir()
    except OSError as error:
        raise _unwritable(folder, error) from error
    return path


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial.{os.getpid()}")


def _unwritable(folder: str | os.PathLike[str], error: Exception) -> OSError:
    return OSError(f'uncomp.lorc: folder "{folder}" cannot be written ({_line(error)})')


def save(
    places: Places, config: LorcConfig, ranks: Ranks, folder: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """Writes a compressed model; nothing is left behind if that fails.

    Raises:
        ValueError, OSError: see check_target; or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = check_target(folder)
    model = places.model
    names = {id(module): name for name, module in model.named_modules()}
    replaced = {}
    for i, index in enumerate(places.layers):
        if ranks.key[i] is None:
            continue
        attention = places.attention(index)
        for name in NAMES:
            holder = places.holder(attention, name)
            module = getattr(holder, name)
            if holder is not attention or isinstance(module, (Rebuilt, PaddedProjection, FoldedOutput)):
                replaced[f"{names[id(holder)]}.{name}"] = module
    factors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, module in replaced.items()
        for key, tensor in module.state_dict().items()
    }
    rest = {key: tensor for key, tensor in model.state_dict().items() if key not in factors}
    partial = _partial(path)
    try:
        type(model).save_pretrained(model, partial, state_dict=rest)  # the model's own refuses
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        save_file(factors, partial / FACTORS)
        record = {
            "version": VERSION,
            "config": config.to_dict(),
            "layers": list(places.layers),
            "rank_k": list(ranks.key),
            "rank_v": list(ranks.value),
        }
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if path.is_dir():
            path.rmdir()
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@makes_ordinary_tensors
def attach(model: torch.nn.Module, folder: str | os.PathLike[str]) -> LorcHandle:
    """Completes a model that `from_pretrained(folder)` made: its missing projections are replaced by the factors.

    Args:
        model: of the same sizes; the weights of its key, value and output projections are let go.
        folder: a checkpoint of low rank.
    Returns:
        a handle whose `.remove()` raises: the original weights are not in the folder.
    Raises:
        ValueError: no such checkpoint, a damaged one, or one of another model. The model is untouched then.
    """
    config, ranks, layers = _record(Path(folder))
    places = Places(model)
    if getattr(places.stack, latent.MARK, None) is not None:
        raise ValueError(f"{_BAD}: the model is compressed already")
    if layers != places.layers:
        raise ValueError(f'{_BAD}: folder "{folder}" is of layers {layers}; the model has {places.layers}')
    places.check()
    names = {id(module): name for name, module in model.named_modules()}
    made, known = [], set()
    with _opened(Path(folder)) as factors:
        for i, index in enumerate(layers):
            if ranks.key[i] is None:
                continue
            check_key_mode(places, index, config.key_mode)
            attention = places.attention(index)
            prefix = names[id(attention)]
            made.append((attention, _modules(places, attention, prefix, ranks, i, config, factors)))
            known |= {f"{prefix}.{name}.{key}" for name, module in made[-1][1].items() for key in module.state_dict()}
        spare = sorted(set(factors.keys()) - known)
    if spare:  # left out, they would leave projections as from_pretrained made them up
        raise ValueError(f"{_BAD}: {FACTORS} must hold what the ranks in {RECORD} say and no more; got {spare[0]}")
    handle = LorcHandle(places, config, ranks, [], keeps=False)
    for attention, modules in made:
        handle.replace(attention, modules)
    return handle


def _record(folder: Path) -> tuple[LorcConfig, Ranks, list[int]]:
    try:
        record = json.loads((folder / RECORD).read_text())
        if record["version"] != VERSION:
            raise ValueError(f"version {record['version']} is not {VERSION}")
        ranks = Ranks(tuple(record["rank_k"]), tuple(record["rank_v"]))
        layers = [int(i) for i in record["layers"]]
        if not len(ranks.key) == len(ranks.value) == len(layers):
            raise ValueError("ranks and layers differ in number")
        for pair in zip(ranks.key, ranks.value, strict=True):
            if pair != (None, None) and not all(map(is_rank, pair)):
                raise ValueError(f"ranks must be multiples of {STEP}, or none of both; got {pair}")
        config = LorcConfig.from_dict(record["config"])
        if config.exact_prefill:
            raise ValueError("exact_prefill needs weights that a checkpoint lacks")
        return config, ranks, layers
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'{_BAD}: "{folder / RECORD}" cannot be read ({_line(error)})') from error


def _opened(folder: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(folder / FACTORS, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f'{_BAD}: "{folder / FACTORS}" cannot be read ({_line(error)})') from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def _modules(places: Places, attention, prefix: str, ranks: Ranks, i: int, config: LorcConfig, factors: Any) -> dict:
    """The modules of one layer, filled from a file; shapes are those that the model and the ranks ask for."""
    shape, have = places.shape, set(factors.keys())
    dim, heads, queries = shape.head_dim, shape.num_kv_heads, shape.num_q_heads
    rank_k, rank_v = ranks.key[i], ranks.value[i]
    whole = {name: places.projection(attention, name) for name in NAMES}
    like = {name: projection.weight for name, projection in whole.items()}
    biased = {name for name, projection in whole.items() if projection.bias is not None}
    width, out = like["k_proj"].shape[1], like["o_proj"].shape[0]

    def read(name: str, key: str, *wanted: int) -> Tensor:
        inside = places.fused(attention) and name != "o_proj"
        full = f"{prefix}.{FUSED}.{name}.{key}" if inside else f"{prefix}.{name}.{key}"
        if full not in have:
            raise ValueError(f"{_BAD}: {FACTORS} must hold {full}; it does not")
        tensor = factors.get_tensor(full)
        if tensor.shape != wanted:
            raise ValueError(f"{_BAD}: {full} must be {list(wanted)}; got {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{_BAD}: {full} must be float32, float16 or bfloat16; got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{_BAD}: {full} must be finite; got NaN or infinity")
        return tensor

    def bias_of(name: str, channels: int, *sources: str) -> Tensor | None:
        return read(name, "bias", channels) if biased & set(sources) else None

    made = {}
    together = config.heads_together(heads)

    def rebuilt(name: str, rank: int) -> Rebuilt:
        down = read(name, "down", heads * rank, width)
        basis = read(name, "basis", heads // together, rank * together, dim * together)
        return Rebuilt(down, basis, bias_of(name, heads * dim, name), like[name])

    if config.key_mode == "rebuild":
        made["k_proj"] = rebuilt("k_proj", rank_k)
        if places.fused(attention):
            made["q_proj"] = query = places.projection(attention, "q_proj")
            for key, held in list(query.named_parameters()):
                found = read("q_proj", key, *held.shape).to(held.device, held.dtype)
                setattr(query, key, torch.nn.Parameter(found, requires_grad=False))
    else:
        narrow = read("k_proj", "down", heads * rank_k, width)
        made["k_proj"] = PaddedProjection(narrow, None, heads, dim, like["k_proj"])
        bias = bias_of("q_proj", queries * rank_k, "q_proj")
        down = read("q_proj", "down", queries * rank_k, width)
        made["q_proj"] = PaddedProjection(down, bias, queries, dim, like["q_proj"])
    if together > 1:
        made["v_proj"] = rebuilt("v_proj", rank_v)
    else:
        down = read("v_proj", "down", heads * rank_v, width)
        made["v_proj"] = PaddedProjection(down, None, heads, dim, like["v_proj"])
        weight, bias = read("o_proj", "weight", out, queries * rank_v), bias_of("o_proj", out, "o_proj", "v_proj")
        made["o_proj"] = FoldedOutput(weight, bias, queries, dim, like["o_proj"])
    set_codec(places, attention, made)
    return joined(places, attention, made)
