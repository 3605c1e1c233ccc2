# SPDX-License-Identifier: Apache-2.0
"""Drives CMake and nothing else.

Reads UNCOMP_CUDA, UNCOMP_CUDA_ARCHS, UNCOMP_BUILD_TESTS, UNCOMP_BUILD_DIR and MAX_JOBS.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CMAKE_MINIMUM = (3, 25)
TORCH_WANTED = "torch>=2.11"


def stop(text):
    """Ends the build with one line that says what to install."""
    sys.exit(f"uncomp: {text}")


def cmake_version(path):
    """(major, minor) of a cmake program, (0, 0) when there is none that runs."""
    if not path:
        return (0, 0)
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def missing_tools():
    """PyPI names of build tools that this machine lacks."""
    missing = []
    if cmake_version(shutil.which("cmake")) < CMAKE_MINIMUM:
        missing.append(f"cmake>={CMAKE_MINIMUM[0]}.{CMAKE_MINIMUM[1]}")
    if not shutil.which("ninja"):
        missing.append("ninja")
    return missing


def torch_environment():
    """Environment in which `sys.executable` sees the torch that the package will run with.

    pip builds in an isolated environment that hides it through PYTHONPATH. A torch fetched into that environment
    could differ from the one that later loads the module, so we look past the isolation instead.
    """
    environment = dict(os.environ)
    probe = [sys.executable, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"]
    if subprocess.run(probe, env=environment, capture_output=True, check=False).returncode != 0:
        environment.pop("PYTHONPATH", None)
        if subprocess.run(probe, env=environment, capture_output=True, check=False).returncode != 0:
            stop(f"torch is missing in {sys.prefix}: install it first with `pip install '{TORCH_WANTED}'`")
    try:
        import pybind11
    except ImportError:
        stop("pybind11 is missing: install it with `pip install 'pybind11>=3,<4'`")
    environment["UNCOMP_PYBIND11_INCLUDE"] = pybind11.get_include()
    return environment


def compile_failure(compiler):
    """Why the compiler cannot build an empty program, None where it can."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*shlex.split(compiler), "-std=c++20", "-x", "c++", "-", "-o", os.path.join(folder, "program")]
        try:
            result = subprocess.run(command, input="int main() {}\n", capture_output=True, text=True, check=False)
        except OSError as error:
            return error.strerror
    if result.returncode == 0:
        return None
    said = result.stderr.strip().splitlines()
    return said[0] if said else f"exit status {result.returncode}"


def check_build_folder(build):
    """Makes the build folder; stops with one line where it cannot be written."""
    try:
        build.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=build).close()
    except OSError as error:
        stop(f"the build folder {build} cannot be written ({error.strerror}): name another in UNCOMP_BUILD_DIR")


def check_tools():
    """Stops with one line when a compiler or a build tool is missing or does not work."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get("CXX") and not shutil.which(compiler.split()[0]):
        stop(f"CXX={compiler} is not a program that can be run: name a C++ compiler, g++ 11 or newer")
    if not compiler:
        stop("no C++ compiler found: install g++ 11 or newer (or clang 14), or name one in CXX")
    why = compile_failure(compiler)
    if why:
        stop(f"the C++ compiler {compiler} cannot build a C++20 program ({why}): name g++ 11 or newer in CXX")
    for tool in missing_tools():
        stop(f"{tool} is missing: install it with `pip install '{tool}'`")


class CMakeBuild(build_ext):
    """Configures and builds the `_C` target, and with UNCOMP_BUILD_TESTS=1 the C++ tests."""

    def build_extension(self, ext):
        """Called by setuptools for the one extension."""
        check_tools()
        environment = torch_environment()
        described = subprocess.run(
            [sys.executable, str(ROOT / "cmake" / "describe_torch.py")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if described.returncode != 0:
            sys.exit(described.stderr.strip())
        build = Path(os.environ.get("UNCOMP_BUILD_DIR", ROOT / "build" / sys.implementation.cache_tag)).resolve()
        check_build_folder(build)
        tests = os.environ.get("UNCOMP_BUILD_TESTS", "0") not in ("", "0")
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DUNCOMP_PYTHON={sys.executable}",
            f"-DUNCOMP_CUDA={os.environ.get('UNCOMP_CUDA') or 'auto'}",
            f"-DUNCOMP_CUDA_ARCHS={os.environ.get('UNCOMP_CUDA_ARCHS') or '80;90a'}",
            f"-DUNCOMP_BUILD_TESTS={'ON' if tests else 'OFF'}",
        ]
        jobs = os.environ.get("MAX_JOBS")
        compile_ = ["cmake", "--build", str(build)] + (["--parallel", jobs] if jobs else [])
        if not tests:
            compile_ += ["--target", "_C"]
        self.run_tool(configure, environment)
        self.run_tool(compile_, environment)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "lib" / f"_C{suffix}", target)

    def run_tool(self, command, environment):
        """Runs a tool; its own message is the last thing the user reads when it fails."""
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        ours = [line.strip() for line in (result.stdout + result.stderr).splitlines() if "uncomp: " in line]
        if result.returncode == 0:
            print("\n".join(ours))
            return
        sys.stderr.write(result.stdout[-8000:] + result.stderr[-8000:])
        stop(ours[-1].removeprefix("uncomp: ") if ours else f"`{' '.join(command[:3])}` failed, see above")


setup(
    ext_modules=[Extension("uncomp._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=missing_tools(),
)
