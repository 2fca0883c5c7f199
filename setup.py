"""How is pyfused built? By setuptools, which calls CMake (CMakeLists.txt) for the extensions pyfused._cpu and pyfused._cuda.

The extensions are optional: without a compiler pyfused is installed as pure Python, and `pyfused env` says what is missing.
Environment variables:
    PYFUSED_BUILD_CUDA=0                     do not build _cuda, even if nvcc is there
    PYFUSED_BUILD_ISAS="baseline avx2"       build _cpu for these instruction sets only
    PYFUSED_BUILD_ARCHITECTURES="90a-real"   build _cuda for these chips only, named as in CMake
    PYFUSED_REQUIRE_EXTENSIONS=1             fail if an extension cannot be built
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
# Packages whose folders are outside pyfused/.
FOLDERS = {f"pyfused.kernels.{p.name}": f"kernels/{p.name}" for p in sorted((ROOT / "kernels").iterdir()) if p.is_dir()}
FOLDERS["pyfused.bench.benchmarks"] = "benchmarks"
INTERFACE = runpy.run_path(str(ROOT / "pyfused" / "interface.py"))["digest"]  # importing pyfused would need torch


class CMakeBuild(build_ext):
    """Builds every CMake target and copies the extensions to setuptools' places."""

    def run(self):
        try:
            self.build_with_cmake()
        except Exception as error:
            if os.environ.get("PYFUSED_REQUIRE_EXTENSIONS") == "1":
                raise
            self.extensions = []
            self.forget(ROOT.glob("pyfused/_c*.so"))
            print(f"warning: pyfused is installed without its native kernels: {error}", file=sys.stderr)

    def keeps(self):
        """Whether the object files stay. setuptools deletes those of an editable install, but the next build and the
        machine-code tests use them."""
        return self.inplace or getattr(self, "editable_mode", False)

    def forget(self, extensions):
        """Removes extensions of other sources, which an editable install would load."""
        for extension in extensions if self.keeps() else ():
            extension.unlink(missing_ok=True)

    def build_with_cmake(self):
        import pybind11

        folder = ROOT / "build" / f"temp.{sys.implementation.cache_tag}"
        build = folder if self.keeps() else Path(self.build_temp).resolve()
        build = build / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        out = build / "out"
        if out.exists():
            shutil.rmtree(out)
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake is not on the PATH")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        arguments = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYFUSED_BUILD_CUDA={os.environ.get('PYFUSED_BUILD_CUDA', '1')}",
            f"-DPYFUSED_BUILD_ISAS={os.environ.get('PYFUSED_BUILD_ISAS', '').replace(' ', ';')}",
            f"-DPYFUSED_BUILD_ARCHITECTURES={os.environ.get('PYFUSED_BUILD_ARCHITECTURES', '').replace(' ', ';')}",
            *(f"-DPYFUSED_INTERFACE{name}={INTERFACE(name)}" for name in ("_cpu", "_cuda")),
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        # pip's build environment, and ninja in it, have another place each time. The object files stay.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *generator, *arguments], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        built = {path.name.split(".")[0]: path for path in out.glob("*.so")}
        # CMake builds _cuda only if it finds nvcc. Do not install an extension that was not built.
        self.forget(path for path in ROOT.glob("pyfused/_c*.so") if path.name.split(".")[0] not in built)
        self.extensions = [ext for ext in self.extensions if ext.name.split(".")[-1] in built]
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built[extension.name.split(".")[-1]], target)
        if self.inplace:
            self.extensions = []

    def get_outputs(self):
        return [self.get_ext_fullpath(ext.name) for ext in self.extensions]


class Modules(build_py):
    """The wheel has only the files of benchmarks/ that `pyfused bench` runs. The others need a source tree."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        if package != "pyfused.bench.benchmarks":
            return found
        return [row for row in found if row[1].startswith("bench_") or row[1] in ("__init__", "models")]


setup(
    packages=[*find_packages(include=["pyfused", "pyfused.*"]), *FOLDERS],
    package_dir={"": ".", **FOLDERS},
    include_package_data=False,  # the wheel gets package_data; MANIFEST.in is for the sdist
    package_data={"pyfused": ["py.typed", "presets/*/*"], "pyfused.evidence": ["*.json"]},
    ext_modules=[Extension("pyfused._cpu", []), Extension("pyfused._cuda", [])],
    cmdclass={"build_ext": CMakeBuild, "build_py": Modules},
)
