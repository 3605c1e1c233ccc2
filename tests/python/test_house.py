# SPDX-License-Identifier: Apache-2.0
"""The floors of the project: who may include or import whom, and that each operator is complete on every floor."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import uncomp
from uncomp import _extension, _fake_checks, ops

ROOT = Path(__file__).resolve().parents[2]
OPS = _extension.op_names()

# Module, dotted from uncomp -> modules of uncomp that it may import. A new module is added here with its floor.
MAY_IMPORT = {
    "_version": set(),
    "_extension": {"_C"},
    "_fake_checks": {"_extension"},
    "_fakes": {"_fake_checks"},
    "ops": {"_fakes"},
    "testing": {"hf.load"},
    "whole_files": set(),
    "entropy": {"ops"},
    "grouping": {"ops"},
    "budget": {"grouping", "ops"},
    "presets": {"budget", "grouping"},
    "stages": set(),
    "layer_merge": {"calibration.profile", "models", "stages"},
    "calibration": set(),
    "calibration.fingerprint": set(),
    "calibration.checks": {"calibration.fingerprint"},
    "calibration.files": {"calibration.checks", "whole_files"},
    "calibration.profile": {
        "calibration.checks",
        "calibration.files",
        "calibration.fingerprint",
        "entropy",
        "grouping",
    },
    "calibration.named": {"calibration.files", "calibration.profile"},
    "calibration.samples": set(),
    "calibration.texts": set(),
    "calibration.sums": {
        "calibration.checks",
        "calibration.fingerprint",
        "calibration.summary",
        "entropy",
        "ops",
        "stages",
    },
    "calibration.state": {"calibration.files", "calibration.sums"},
    "calibration.watch": {"_extension", "entropy", "models", "ops"},
    "calibration.collect": {
        "calibration.checks",
        "calibration.files",
        "calibration.fingerprint",
        "calibration.profile",
        "calibration.samples",
        "calibration.state",
        "calibration.sums",
        "calibration.watch",
        "entropy",
        "models",
    },
    "calibration.votes": {"grouping", "whole_files"},
    "calibration.orders": {"config", "eval.perplexity"},
    "calibration.recent": {
        "budget",
        "calibration.samples",
        "config",
        "entropy",
        "models",
        "types",
        "view",
    },
    "hf": set(),
    "hf.compat": set(),
    "hf.convert": {"hf.compat"},
    "hf.load": {"hf.compat", "hf.convert", "transforms.lorc.files"},
    "fields": set(),
    "prefill": {"fields", "stages"},
    "config": {"fields", "prefill"},
    "pruning": {
        "calibration.named",
        "calibration.profile",
        "config",
        "grouping",
        "ops",
        "prefill",
        "stages",
        "types",
    },
    "types": set(),
    "deletion": set(),
    "latent": {"_extension", "ops"},
    "remade": {"latent"},
    "cache": {"deletion", "latent", "types"},
    "keys": {"cache", "latent", "ops", "remade"},
    "view": {"config", "deletion", "latent", "ops", "types"},
    "scoring": {"ops"},
    "rows": {"cache", "config", "keys", "ops", "scoring", "types", "view"},
    "eviction": {"cache", "config", "deletion", "keys", "latent", "ops", "scoring"},
    "attention": {"types"},
    "compressor": {"cache", "config", "deletion", "keys", "ops", "rows", "types", "view"},
    "extension": {"attention", "cache", "compressor", "deletion", "keys", "latent", "ops", "rows", "types", "view"},
    "report": {"keys"},
    "policies": {
        "policies.adakv",
        "policies.base",
        "policies.full",
        "policies.h2o",
        "policies.pyramidkv",
        "policies.random_scores",
        "policies.snapkv",
        "policies.streaming_llm",
        "policies.tova",
        "policies.uncomp",
    },
    "policies.base": {"budget", "config", "types", "view"},
    "policies.adakv": {"budget", "grouping", "ops", "policies.base", "policies.compete", "types"},
    "policies.compete": {"budget", "config", "grouping", "ops", "scoring", "types"},
    "policies.full": {"policies.base"},
    "policies.h2o": {"grouping", "policies.base", "types", "view"},
    "policies.pyramidkv": {"budget", "policies.base"},
    "policies.random_scores": {"policies.base", "scoring", "view"},
    "policies.snapkv": {"policies.base"},
    "policies.streaming_llm": {"policies.base", "types", "view"},
    "policies.tova": {"policies.base", "types", "view"},
    "policies.uncomp": {
        "budget",
        "calibration.named",
        "calibration.profile",
        "entropy",
        "grouping",
        "policies.base",
        "policies.compete",
        "presets",
        "types",
        "view",
    },
    "models": {"config", "models.base", "models.gemma", "models.llama", "models.mistral", "models.qwen"},
    "models.base": {"_extension", "calibration.fingerprint", "config", "types"},
    "models.gemma": {"models.base"},
    "models.llama": {"models.base"},
    "models.mistral": {"models.base"},
    "models.qwen": {"models.base"},
    "hf.clock": {"hf.compat", "types"},
    "graph": {"_extension", "cache"},
    "hf.shared": {"compressor", "config", "graph", "hf.clock", "hf.layer", "policies", "pruning", "types"},
    "hf.hidden": {"hf.clock", "hf.shared", "pruning"},
    "hf.attention": {"hf.cache", "hf.shared", "latent"},
    "hf.layer": {
        "attention",
        "cache",
        "eviction",
        "extension",
        "hf.clock",
        "hf.compat",
        "hf.shared",
        "latent",
        "view",
    },
    "hf.cache": {"config", "hf.compat", "hf.layer", "hf.shared", "models"},
    "hf.chunks": set(),
    "hf.joined": set(),
    "hf.judge": set(),
    "hf.step": {"graph", "hf.judge", "hf.shared"},
    "hf.choice": set(),
    "hf.reader": set(),
    "hf.loop": {"hf.choice", "hf.reader", "hf.shared", "hf.step"},
    "hf.forward": {"config", "graph", "hf.cache", "hf.hidden", "hf.shared", "latent", "report"},
    "patching": {
        "config",
        "graph",
        "hf.attention",
        "hf.cache",
        "hf.chunks",
        "hf.choice",
        "hf.forward",
        "hf.hidden",
        "hf.joined",
        "hf.loop",
        "hf.step",
        "models",
        "models.base",
        "policies",
        "pruning",
        "report",
    },
    "lorc": {"hf.compat", "transforms.lorc"},
    "transforms": {"transforms.lorc"},
    "transforms.lorc": {
        "transforms.lorc.apply",
        "transforms.lorc.calibrated",
        "transforms.lorc.config",
        "transforms.lorc.files",
        "transforms.lorc.handle",
        "transforms.lorc.loading",
        "transforms.lorc.schedule",
    },
    "transforms.lorc.config": {"fields"},
    "transforms.lorc.schedule": {"transforms.lorc.config"},
    "transforms.lorc.factors": set(),
    "transforms.lorc.constants": {"latent"},
    "transforms.lorc.modules": {"latent"},
    "transforms.lorc.places": {"config", "models", "transforms.lorc.modules"},
    "transforms.lorc.calibrated": {"latent", "transforms.lorc.config", "transforms.lorc.places"},
    "transforms.lorc.handle": {
        "latent",
        "transforms.lorc.config",
        "transforms.lorc.files",
        "transforms.lorc.places",
        "transforms.lorc.schedule",
    },
    "transforms.lorc.apply": {
        "latent",
        "transforms.lorc.calibrated",
        "transforms.lorc.config",
        "transforms.lorc.constants",
        "transforms.lorc.factors",
        "transforms.lorc.handle",
        "transforms.lorc.modules",
        "transforms.lorc.places",
        "transforms.lorc.schedule",
    },
    "transforms.lorc.files": {
        "latent",
        "transforms.lorc.apply",
        "transforms.lorc.config",
        "transforms.lorc.handle",
        "transforms.lorc.modules",
        "transforms.lorc.places",
        "transforms.lorc.schedule",
    },
    "transforms.lorc.loading": {"hf.load", "transforms.lorc.files"},
    "hf.environment": {"_extension", "hf.compat", "hf.load", "models"},
    "eval": set(),
    "eval.perplexity": {"config", "patching", "report"},
    "eval.effort": set(),
    "eval.metrics": set(),
    "eval.metrics_infinitebench": {"eval.metrics"},
    "eval.scores": {"eval.metrics", "eval.metrics_infinitebench"},
    "eval.continuations": {
        "config",
        "eval.effort",
        "eval.folder",
        "eval.perplexity",
        "eval.processes",
        "eval.prompts",
        "eval.runs",
        "patching",
    },
    "eval.agreement": {"config", "eval.metrics", "eval.perplexity"},
    "eval.reading": set(),
    "eval.prompts": set(),
    "eval.folder": {"whole_files"},
    "eval.processes": {"eval.folder"},
    "eval.runs": {"config", "eval.folder"},
    "eval.kept": {"cache"},
    "eval.batch": {"eval.kept", "eval.prompts", "hf.cache", "patching", "report"},
    "eval.records": {
        "eval.agreement",
        "eval.batch",
        "eval.metrics",
        "eval.metrics_infinitebench",
        "eval.prompts",
        "eval.runs",
        "eval.scores",
    },
    "eval.summary": {"eval.effort", "eval.runs"},
    "eval.bootstrap": set(),
    "eval.sample": {"testing"},
    "eval.hub": set(),
    "eval.compared": {"eval.folder", "eval.processes", "eval.runs"},
    "eval.partial": {"eval.folder"},
    "eval.weights": set(),
    "eval.finished": {"eval", "eval.folder", "eval.partial", "eval.runs"},
    "eval.tables": {"eval.bootstrap", "eval.finished", "eval.partial", "eval.runs"},
    "eval.report": {"eval.finished", "eval.tables", "eval.tasks.longbench"},
    "eval.task": {"eval.prompts"},
    "eval.runner": {
        "eval",
        "eval.agreement",
        "eval.batch",
        "eval.compared",
        "eval.effort",
        "eval.folder",
        "eval.processes",
        "eval.records",
        "eval.runs",
        "eval.summary",
        "eval.task",
        "patching",
    },
    "eval.tasks": {
        "eval.tasks.base",
        "eval.tasks.gsm8k",
        "eval.tasks.infinitebench",
        "eval.tasks.longbench",
        "eval.tasks.needle",
        "eval.tasks.ruler",
    },
    "eval.tasks.base": {"eval.prompts", "eval.reading"},
    "eval.tasks.gsm8k": {"eval.metrics", "eval.prompts", "eval.reading", "eval.tasks.base"},
    "eval.tasks.hay": {"eval.prompts", "eval.reading", "eval.tasks.base"},
    "eval.tasks.infinitebench": {"eval.prompts", "eval.reading", "eval.tasks.base"},
    "eval.tasks.longbench": {"eval", "eval.hub", "eval.prompts", "eval.reading", "eval.tasks.base"},
    "eval.tasks.needle": {"eval.prompts", "eval.reading", "eval.tasks.base", "eval.tasks.hay"},
    "eval.tasks.ruler": {
        "eval.prompts",
        "eval.reading",
        "eval.tasks",
        "eval.tasks.base",
        "eval.tasks.hay",
        "eval.tasks.ruler_lists",
    },
    "eval.tasks.ruler_lists": set(),
    "generation": {"config", "patching", "report"},
    "calibration.summary": {"budget", "calibration.profile", "entropy", "grouping", "presets", "stages"},
    "figures": {"figures.base", "figures.compare", "figures.evaluation", "figures.profile", "figures.run"},
    "figures.base": set(),
    "figures.compare": {"calibration.profile", "calibration.summary", "figures", "figures.base"},
    "figures.evaluation": {"figures", "figures.base"},
    "figures.profile": {"calibration.profile", "calibration.summary", "entropy", "figures", "figures.base"},
    "figures.run": {"figures", "figures.base"},
    "cli_options": set(),
    "cli_show": {"cli_options", "calibration.profile", "calibration.summary", "figures"},
    "cli_eval_options": {"cli_options", "config"},
    "cli_eval": {
        "__init__",
        "calibration.fingerprint",
        "cli_eval_options",
        "cli_options",
        "eval",
        "eval.continuations",
        "eval.effort",
        "eval.folder",
        "eval.processes",
        "eval.reading",
        "eval.runner",
        "eval.runs",
        "eval.task",
        "eval.tasks",
        "eval.weights",
        "hf.environment",
        "hf.load",
    },
    "cli_orders": {
        "cli_options",
        "calibration",
        "calibration.files",
        "calibration.orders",
        "calibration.texts",
        "hf.environment",
        "hf.load",
    },
    "cli_votes": {"cli_options", "calibration.files", "calibration.profile", "calibration.votes"},
    "cli_report": {"cli_options", "eval.folder", "eval.report", "eval.finished", "eval.tables", "figures"},
    "cli_study": {
        "cli_options",
        "cli_orders",
        "calibration",
        "calibration.files",
        "calibration.recent",
        "calibration.texts",
        "hf.environment",
        "hf.load",
    },
    "cli_prefill": {"prefill"},
    "cli_lorc": {
        "cli_options",
        "calibration.texts",
        "hf.environment",
        "hf.load",
        "transforms.lorc.apply",
        "transforms.lorc.config",
        "transforms.lorc.files",
    },
    "cli_calibrate": {"cli_options", "calibration.collect", "calibration.texts", "hf.environment", "hf.load"},
    "cli_generate": {
        "cli_options",
        "__init__",
        "calibration.files",
        "cli_prefill",
        "config",
        "figures",
        "generation",
        "hf.environment",
        "hf.load",
    },
    "cli": {
        "__init__",
        "cli_calibrate",
        "cli_eval",
        "cli_generate",
        "cli_lorc",
        "cli_report",
        "cli_show",
        "cli_study",
        "cli_votes",
        "config",
        "hf.environment",
    },
    "__main__": {"cli"},
    "__init__": {
        "_extension",
        "_version",
        "calibration.collect",
        "calibration.profile",
        "config",
        "hf.attention",
        "hf.compat",
        "layer_merge",
        "lorc",
        "ops",
        "patching",
        "policies",
        "prefill",
        "report",
    },
}


def sources(folder: str, *suffixes: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def base(op: str) -> str:
    """File name of an operator: in-place operators drop the underscore."""
    return op.rstrip("_")


# ---- floors of the C++ code
def test_core_knows_only_the_standard_library():
    for path in sources("csrc/core", ".h"):
        for name in includes(path):
            assert name.startswith("core/") or "/" not in name, f"{path.name} includes {name}"


def test_cpu_loops_know_the_standard_library_and_core():
    for path in sources("csrc/cpu", ".h", ".cpp"):
        for name in includes(path):
            assert name.startswith(("core/", "cpu/")) or "/" not in name, f"{path.name} includes {name}"


def test_copies_of_the_cpu_loops_share_no_function():
    """What one instruction set compiles must not be linked into another's loops: no inline function of core, no std."""
    for path in sources("csrc/cpu", ".h", ".cpp"):
        if path.stem in ("vectors", "attend", "matrix", "rows", "table", "baseline", "avx2", "avx512"):
            allowed = ("cpu/", "cstdint", "cstring", "immintrin.h")
            assert all(name.startswith(allowed) for name in includes(path)), path.name
            assert "std::" not in path.read_text().replace("std::memcpy", "").replace("std::memset", ""), path.name


def test_kernels_know_no_torch():
    for path in sources("csrc/kernels", ".h", ".cu", ".cuh"):
        for name in includes(path):
            assert not name.startswith(("torch/", "ATen/", "c10/", "ops/", "bindings/", "pybind11/")), (
                f"{path.name} includes {name}"
            )


def test_kernel_headers_are_plain_cpp():
    for path in sources("csrc/kernels", ".h"):
        assert not [n for n in includes(path) if n.endswith(".cuh") or n == "cuda_runtime.h"], path.name
        assert "__global__" not in path.read_text(), path.name


def test_ops_know_no_cuda_header_of_torch():
    for path in sources("csrc/ops", ".h", ".cpp"):
        for name in includes(path):
            assert not name.startswith(("ATen/cuda", "c10/cuda", "bindings/", "torch/csrc")), f"{path.name}: {name}"
            assert not name.endswith(".cuh"), f"{path.name} includes {name}"


def test_threads_come_from_one_place():
    """at::parallel_for compiled here runs on one thread."""
    assert not [path.name for path in sources("csrc", ".cpp", ".h") if "parallel_for(" in path.read_text()]


@pytest.mark.parametrize("floor", ["core", "cpu", "kernels", "ops"])
def test_cases_of_one_executable_have_names_of_their_own(floor):
    """Catch2 v2 runs nothing at all where two are equal."""
    text = "".join(path.read_text() for path in (ROOT / "tests/cpp" / floor).glob("*.cpp"))
    names = re.findall(r'TEST_CASE\(\s*("(?:[^"\\]|\\.)*")', text)
    assert len(names) == text.count("TEST_CASE(")
    assert sorted(names) == sorted(set(names))


def test_every_source_opens_with_its_licence():
    for path in sources("csrc", ".h", ".cpp", ".cu", ".cuh") + sources("uncomp", ".py") + sources("tests", ".py"):
        assert "SPDX-License-Identifier: Apache-2.0" in path.read_text().split("\n", 1)[0], path


# ---- arrows between Python modules
def module_name(path: Path) -> str:
    """Dotted name below uncomp: "ops", "calibration.profile", "calibration" for a package, "__init__" for uncomp."""
    parts = path.relative_to(ROOT / "uncomp").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("uncomp."):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                module = ROOT / name.replace(".", "/")
                whole = module.is_dir() or module.with_suffix(".py").exists() or node.module == "uncomp"
                found.add((name if whole else node.module).removeprefix("uncomp."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("uncomp.") for alias in node.names if alias.name.startswith("uncomp.")}
    return found


@pytest.mark.parametrize("path", sources("uncomp", ".py"), ids=module_name)
def test_imports_follow_the_floors(path):
    name = module_name(path)
    assert name in MAY_IMPORT, f"{path.name}: name its floor in MAY_IMPORT"
    assert imported_modules(path) <= MAY_IMPORT[name]


def test_only_ops_says_torch_ops():
    for path in sources("uncomp", ".py"):
        code = ast.dump(ast.parse(path.read_text()))
        says = "attr='ops'" in code and "id='torch'" in code and re.search(r"torch\.ops\b", path.read_text())
        assert not says or module_name(path) in ("ops", "_extension"), path.name


def test_import_has_no_side_effects():
    code = (
        "import sys, uncomp, uncomp.hf.load; "
        "assert 'transformers' not in sys.modules and 'numpy.testing' not in sys.modules; "
        "print(uncomp.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == uncomp.__version__


# ---- operators: one name from kernel to benchmark
def test_one_list_of_operators():
    library = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/bindings/library.cpp").read_text())
    module = re.findall(r'^\s*expose\(m, "(\w+)"', (ROOT / "csrc/bindings/module.cpp").read_text(), re.MULTILINE)
    module = [name for name in module if name not in ("warmup", "take_device_error")]
    assert library == OPS
    assert module == OPS
    assert list(_fake_checks.KERNELS) == OPS
    for op in OPS:
        assert callable(getattr(ops, op)), op


@pytest.mark.parametrize("op", OPS)
def test_an_operator_is_complete_on_every_floor(op):
    name = base(op)
    wanted = [
        f"csrc/ops/{name}.h",
        f"csrc/ops/{name}.cpp",
        f"csrc/ops/{name}_cuda.cpp",
        f"tests/cpp/ops/test_{name}.cpp",
        f"tests/cpp/kernels/test_{name}.cpp",
        f"tests/python/ops/test_{name}.py",
        f"tests/python/reference/{name}.py",
        f"benchmarks/kernels/bench_{name}.py",
    ]
    assert [path for path in wanted if not (ROOT / path).exists()] == []
    assert sources("csrc/kernels", ".cu") and [
        p for p in sources("csrc/kernels", ".cu") if name in (p.stem, p.parent.name)
    ], f"no kernel named {name}"
    text = (ROOT / f"tests/python/ops/test_{name}.py").read_text()
    headings = re.findall(r"^# ---- (values|edges|errors|opcheck|compile)\b", text, re.MULTILINE)
    assert headings == ["values", "edges", "errors", "opcheck", "compile"]


@pytest.mark.parametrize("op", OPS)
def test_an_operator_is_registered_for_every_key(op):
    for key in ("CPU", "CUDA", "Autograd", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"uncomp::{op}", key) or key == "Meta", key
    assert torch._library.simple_registry.singleton.find(f"uncomp::{op}").fake_impl.kernel is not None


@pytest.mark.parametrize("op", OPS)
def test_a_fake_kernel_describes_every_tensor_of_the_schema(op):
    arguments = getattr(torch.ops.uncomp, op).default._schema.arguments
    kernel, wanted = _fake_checks.KERNELS[op]
    assert list(inspect.signature(kernel).parameters) == [argument.name for argument in arguments]
    assert wanted.keys() == {argument.name for argument in arguments if "Tensor" in str(argument.type)}


@pytest.mark.parametrize("op", OPS)
def test_the_pybind11_door_names_its_arguments(op):
    schema = getattr(torch.ops.uncomp, op).default._schema
    doc = getattr(_extension._C, op).__doc__
    for argument in schema.arguments:
        assert re.search(rf"\b{argument.name}\b", doc), f"{op}: {argument.name} is not in the docstring"
    assert "Args:" in doc


def test_every_named_source_exists_and_every_source_is_named():
    text = (ROOT / "CMakeLists.txt").read_text()
    named = set(re.findall(r"^\s*(csrc/\S+\.(?:cu|cpp))", text, re.MULTILINE)) | {"csrc/bindings/module.cpp"}
    present = {str(p.relative_to(ROOT)) for p in sources("csrc", ".cu", ".cpp")}
    assert named == present


def test_build_info_and_limits():
    info = uncomp.build_info()
    assert info["version"] == uncomp.__version__
    assert {"torch", "cuda", "cuda_version", "cuda_archs", "head_dims"} <= info.keys()
    assert uncomp.limits()["max_head_dim"] == max(info["head_dims"])
