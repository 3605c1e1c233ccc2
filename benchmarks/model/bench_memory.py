# SPDX-License-Identifier: Apache-2.0
"""Memory and time of one long prompt: the stock cache against the compressed one, same weights, same process.

    python benchmarks/model/bench_memory.py --context 32768 --budget 1552 --groups 8 --json out.json

Random weights in the shape of Llama-3-8B unless --model names a real one. Bytes come from torch's allocator; a prefill
is timed as it runs (the second of two), a decode step as the median of eager steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import uncomp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run import commit


def llama_3_8b(layers: int) -> torch.nn.Module:
    """The shape of Llama-3-8B with random bfloat16 weights, made on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model


def measure(model, ids: torch.Tensor, steps: int) -> dict[str, object]:
    """Prefill and a few decode steps; peaks in bytes above the weights."""
    times = []
    for _ in range(2):
        state = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        with torch.no_grad():
            state = model(ids, logits_to_keep=1, use_cache=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    peak, cache = torch.cuda.max_memory_allocated() - weights, state.past_key_values
    token = state.logits[:, -1:].argmax(-1)
    del state
    after = torch.cuda.memory_allocated() - weights
    torch.cuda.reset_peak_memory_stats()
    step_times = []
    with torch.no_grad():
        for _ in range(steps):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            step_times.append(time.perf_counter() - begin)
    found = {
        "weights_bytes": weights,
        "prefill_seconds": times[-1],
        "prefill_peak_bytes": peak,
        "held_after_prefill_bytes": after,
        "decode_peak_bytes": torch.cuda.max_memory_allocated() - weights,
        "decode_ms": 1e3 * statistics.median(step_times),
    }
    if getattr(cache, "uncomp", None) is not None:
        stats = uncomp.cache_stats(cache)
        found |= {k: stats[k] for k in ("cache_bytes", "state_bytes", "stored_tokens_mean")}
        found |= {k: stats[k] for k in ("stored_tokens_min", "stored_tokens_max", "full_cache_bytes")}
    else:
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        found["cache_bytes"] = sum(t.numel() * t.element_size() for t in tensors)
        found["stored_tokens_mean"] = float(ids.shape[1])
    return found


def main() -> int:
    """Prints one line an engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or name of a real model; default: random weights, Llama-3-8B shape")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=int, default=1552)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--policies", nargs="+", default=["uncomp", "snapkv", "adakv"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model:
        from uncomp.hf.load import load_model

        model, _ = load_model(args.model, dtype="bfloat16", device="cuda")
    else:
        model = llama_3_8b(args.layers)
    torch.manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (args.batch, args.context), device="cuda")
    shared = {
        "what": "memory",
        "model": args.model or f"Llama-3-8B shape, {args.layers} layers, random weights",
        "batch": args.batch,
        "context": args.context,
        "budget": args.budget,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    rows = [{**shared, "engine": "stock DynamicCache", **measure(model, ids, args.steps)}]
    for policy in args.policies:
        options = {"groups": args.groups} if policy == "uncomp" else {}
        config = uncomp.UncompConfig(policy=policy, budget=args.budget, **options)
        with uncomp.patch(model, config):
            rows.append({**shared, "engine": f"uncomp, policy {policy}", **measure(model, ids, args.steps)})
    heads = ("prefill s", "peak GB", "held GB", "cache GB", "tokens", "ms/token")
    print(f"{'engine':26s} " + " ".join(f"{h:>9s}" for h in heads))
    for row in rows:
        gb = {k: row[k] / 1e9 for k in ("prefill_peak_bytes", "held_after_prefill_bytes", "cache_bytes")}
        print(
            f"{row['engine']:26s} {row['prefill_seconds']:9.3f} {gb['prefill_peak_bytes']:9.3f} "
            f"{gb['held_after_prefill_bytes']:9.3f} {gb['cache_bytes']:9.3f} {row['stored_tokens_mean']:9.1f} "
            f"{row['decode_ms']:9.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
