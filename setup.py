"""Builds pipekern._C with CMake and ninja. Without a C++ compiler the package installs as pure Python.

What was built, by which compiler, or why nothing was, is written to pipekern/_build.json, where
`pipekern doctor` reads it: the tier is "cuda" with kernels compiled by nvcc, "cpu" where NVRTC compiles them at run
time, "python" where nothing was compiled. Neither torch nor a CUDA driver is needed to build.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PROBE = "#include <Python.h>\n#include <atomic>\n#include <thread>\nint main() { return 0; }\n"


NOTE = "_build.json"


def replace(source: Path, target: Path) -> None:
    """Copy in one step: a process that runs the old module keeps its pages."""
    staged = target.with_suffix(".new")
    shutil.copyfile(source, staged)
    os.replace(staged, target)


def find_compiler() -> list[str] | None:
    """The C++ compiler's command line: $CXX, else the first of the usual names."""
    if os.environ.get("CXX"):
        words = shlex.split(os.environ["CXX"])
        return words if shutil.which(words[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def why_not() -> str:
    """The reason why no extension can be built here; empty when it can."""
    if not sys.platform.startswith("linux"):
        return f"the shared-memory transport needs Linux (memfd, pidfd, futex); this is {sys.platform}"
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler: install g++ or clang++, or set CXX, then install pipekern again"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [*compiler, "-std=c++17", "-fsyntax-only", include, str(source)]
        probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode == 0:
        return ""
    first = next(iter(probe.stderr.strip().splitlines()), f"exit status {probe.returncode}")
    return f"{compiler[0]} cannot compile C++17 against Python's headers (is python3-dev there?): {first}"


class CMakeBuild(build_ext):
    """Runs CMake in build/ (kept between calls, so that a rebuild compiles only what changed)."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        reason = why_not()
        if reason:
            target.unlink(missing_ok=True)  # one of an earlier build would not match this source
            self.warn(f"pipekern is installed as pure Python, over gloo: {reason}")
            note = {"tier": "python", "compiler": "", "reason": reason}
        else:
            compiler, kernels = self.compile(target)
            tier = "cuda" if kernels.startswith("embedded") else "cpu"
            note = {"tier": tier, "compiler": compiler, "kernels": kernels, "reason": ""}
        note["version"] = self.distribution.get_version()
        (target.parent / NOTE).write_text(json.dumps(note, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Editable installs and --inplace: the module and the note go beside the Python files, or neither stays."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            source = ROOT / self.get_ext_filename(ext.name)
            shutil.copyfile(built.parent / NOTE, source.parent / NOTE)
            if built.exists():
                replace(built, source)
            else:
                source.unlink(missing_ok=True)

    def compile(self, target: Path) -> tuple[str, str]:
        """Configure, build and copy the module to ``target``; returns the compiler, and how the kernels were made."""
        import pybind11  # a build requirement; not needed where there is no compiler

        build = ROOT / "build" / f"cmake-{self.plat_name}-{sys.implementation.cache_tag}"
        cmake = shutil.which("cmake") or "cmake"
        ninja = shutil.which("ninja") or "ninja"
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PIPEKERN_MODULE_NAME": target.name,
        }
        flags = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *flags], check=True)
        subprocess.run([cmake, "--build", str(build), "--target", "_C"], check=True)
        replace(build / target.name, target)
        return (build / "compiler.txt").read_text().strip(), (build / "kernels.txt").read_text().strip()


setup(
    packages=[*find_packages(include=["pipekern", "pipekern.*"]), "pipekern.kernels", "pipekern.kernels.reference"],
    package_dir={"pipekern.kernels": "kernels"},
    ext_modules=[Extension("pipekern._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
