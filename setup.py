"""Builds the extension module with CMake. All other settings are in pyproject.toml."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_CUDA = (12, 5)  # as in CMakeLists.txt


def cuda_compiler() -> tuple[dict[str, str], str]:
    """Environment variables for the CUDA compiler, and the value of DEEPLAB_FAST_CUDA.

    ON: a compiler that the user has must work, because pip hides the warning of a build for the CPU
    only. TRY: the compiler comes from the wheels that an isolated build installs, and may not work.
    AUTO: there is none.
    """
    if nvcc := os.environ.get("CUDACXX"):
        return {"CUDACXX": nvcc}, "ON"
    if home := os.environ.get("CUDA_HOME"):
        return {"CUDACXX": f"{home}/bin/nvcc"}, "ON"
    nvcc = shutil.which("nvcc")
    if nvcc and release(nvcc) >= OLDEST_CUDA:
        return {"CUDACXX": nvcc}, "ON"
    if nvcc:
        print(f"deeplab_fast: {nvcc} is not used: it is older than CUDA 12.5 or does not run")
    try:
        import nvidia.cu13 as wheels
    except ImportError:
        return {}, "AUTO"
    for root in wheels.__path__:
        if os.path.exists(f"{root}/bin/nvcc"):  # it searches lib64, but the wheels have lib
            return {"CUDACXX": f"{root}/bin/nvcc", "LIBRARY_PATH": f"{root}/lib"}, "TRY"
    return {}, "AUTO"


def release(nvcc: str) -> tuple[int, ...]:
    says = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", says)
    return tuple(map(int, found.groups())) if found else ()


def run(command: list[str], environment: dict[str, str]) -> None:
    if subprocess.run(command, env=os.environ | environment).returncode != 0:
        sys.exit(f"deeplab_fast: the build failed, see the log above: {shlex.join(command)}")


class CMakeBuild(build_ext):
    """Keeps a build folder for each Python, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # needed to compile, not to make an sdist

        folder = ROOT / "build" / str(sys.implementation.cache_tag)
        cuda, wanted = cuda_compiler()
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDEEPLAB_FAST_VERSION={self.distribution.get_version()}",
            f"-DDEEPLAB_FAST_CUDA={wanted}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        # Every isolated build has its own tools, so configure again if the tools changed.
        stamp = folder / "configured_with.txt"
        variables = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "CUDAARCHS", "CUDAFLAGS")]
        tools = repr((configure, shutil.which("ninja"), cuda, variables))
        if not stamp.exists() or stamp.read_text() != tools:
            stamp.unlink(missing_ok=True)
            run([*configure, "--fresh"], cuda)
            stamp.write_text(tools)
        run(["cmake", "--build", str(folder), "--target", "_C"], cuda)
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(folder / "_C.so", module)


setup(
    ext_modules=[Extension("deeplab_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
