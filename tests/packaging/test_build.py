"""The build: source distribution, dependencies of the compiled module, choice of CUDA compiler."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import types
from importlib.metadata import version
from pathlib import Path

import pybind11
import pytest

import deeplab_fast
from deeplab_fast import _C

from ..support.toolchain import ROOT

MODULE = Path(_C.__file__)
SOURCES = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def test_sdist_contains_all_files_of_a_build(tmp_path):
    # A copy, because setuptools also packs whatever an earlier build listed in its egg-info.
    ignored = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, tmp_path / "src", ignore=ignored)
    options = ["--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", tmp_path]
    run(sys.executable, "-m", "build", *options, tmp_path / "src")

    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"deeplab_fast-{version('deeplab-fast')}.tar.gz"
    assert archive.stat().st_size < 2_000_000
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {str(path.relative_to(ROOT)) for path in SOURCES} <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert {
        "tests/packaging/test_build.py",
        "benchmarks/bench_aspp.py",
        "hubconf.py",
        "deeplab_fast/py.typed",
    } <= names
    assert "deeplab_fast/backends/dispatch_table.csv" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_kernels_know_no_framework():
    framework = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)/")
    assert not [path for path in SOURCES if framework.search(path.read_text())]
    python = re.compile(r"#\s*include\s*[<\"](pybind11/|Python\.h)")
    users = {path.relative_to(ROOT / "csrc") for path in SOURCES if python.search(path.read_text())}
    assert {str(path) for path in users if path.parts[0] != "bindings"} == {"emulator/module.cpp"}


def test_versions_agree():
    (stated,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert deeplab_fast.__version__ == version("deeplab-fast") == stated
    assert _C.build_info()["version"] == stated


def test_module_imports_without_torch_and_without_a_driver():
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {str(MODULE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if module.build_info()["cuda"]:
    info = module.cuda.device_info()
    assert info["runtime_version"] >= 12000, info
    assert len(info["devices"]) == 0 or info["driver_version"] > 0, info
assert "torch" not in sys.modules
"""
    run(sys.executable, "-I", "-c", code)


@pytest.mark.skipif(not shutil.which("ldd"), reason="needs ldd")
def test_module_needs_no_driver_and_no_torch():
    # A repaired wheel has copies of libraries with a hash in their name.
    pattern = r"^\s*(?:/\S*/)?(\S+?)(?:-[0-9a-f]{8})?\.so"
    libraries = re.findall(pattern, run("ldd", MODULE), re.M)
    allowed = {"libstdc++", "libgomp", "libgcc_s", "libc", "libm", "linux-vdso", "libmvec"}
    allowed |= {"libpthread", "libdl", "librt", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert set(libraries) - allowed == set()


@pytest.fixture
def configure(tmp_path):
    """Run CMake's configuration, which decides about CUDA; compile none of the sources."""

    def configure(
        wanted: str, compiler: str | None, *more: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDAARCHS")}
        if compiler:
            environment["CUDACXX"] = compiler
        options = [
            f"-DDEEPLAB_FAST_CUDA={wanted}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *more,
        ]
        return subprocess.run(
            ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options],
            env=environment,
            capture_output=True,
            text=True,
        )

    return configure


@pytest.mark.parametrize("wanted", ["AUTO", "TRY"])
def test_build_without_a_cuda_compiler_is_for_the_cpu(configure, wanted):
    done = configure(wanted, None)
    assert done.returncode == 0, done.stderr
    assert "no CUDA compiler found, building for the CPU only" in done.stdout


def test_cuda_compiler_that_fails_when_tried_leaves_a_cpu_build_and_a_log(configure):
    done = configure("TRY", "/bin/false")
    assert done.returncode == 0, done.stderr
    assert "/bin/false does not work, building for the CPU only" in done.stderr
    assert "is not able to compile a simple test program" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "wanted, compiler", [("ON", "/nowhere/nvcc"), ("AUTO", "/nowhere/nvcc"), ("AUTO", "/bin/false")]
)
def test_named_cuda_compiler_must_work(configure, wanted, compiler):
    done = configure(wanted, compiler)
    assert done.returncode != 0
    assert compiler in done.stderr


@pytest.mark.parametrize("wanted", ["AUTO", "TRY"])
def test_cuda_compiler_named_to_cmake_must_work(configure, wanted):
    done = configure(wanted, None, "-DCMAKE_CUDA_COMPILER=/nowhere/nvcc")
    assert done.returncode != 0
    assert "/nowhere/nvcc" in done.stderr


@pytest.fixture
def cuda_compiler(monkeypatch, tmp_path):
    """setup.py's choice if the path has an nvcc of this release, or none."""
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    for name in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def cuda_compiler(release: str | None = None) -> tuple[dict[str, str], str]:
        monkeypatch.setenv("PATH", str(tmp_path))
        if release:
            (tmp_path / "nvcc").write_text(
                f"#!/bin/sh\necho 'Cuda, release {release}, V{release}.1'"
            )
            (tmp_path / "nvcc").chmod(0o755)
        return runpy.run_path(str(ROOT / "setup.py"))["cuda_compiler"]()

    return cuda_compiler


def test_nvcc_from_the_path_or_environment_must_work(cuda_compiler, monkeypatch, tmp_path):
    assert cuda_compiler("12.5") == ({"CUDACXX": str(tmp_path / "nvcc")}, "ON")
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert cuda_compiler("12.5") == ({"CUDACXX": "/opt/cuda/bin/nvcc"}, "ON")
    monkeypatch.setenv("CUDACXX", "/else/nvcc")
    assert cuda_compiler("12.5") == ({"CUDACXX": "/else/nvcc"}, "ON")


@pytest.mark.parametrize("release", ["12.4", None])
def test_nvcc_from_wheels_is_tried(cuda_compiler, monkeypatch, tmp_path, release):
    wheels = types.ModuleType("nvidia.cu13")
    wheels.__path__ = [str(tmp_path / "wheels")]
    monkeypatch.setitem(sys.modules, "nvidia", types.ModuleType("nvidia"))
    sys.modules["nvidia"].cu13 = wheels
    monkeypatch.setitem(sys.modules, "nvidia.cu13", wheels)
    assert cuda_compiler(release) == ({}, "AUTO")
    nvcc = tmp_path / "wheels" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    environment = {"CUDACXX": str(nvcc), "LIBRARY_PATH": str(tmp_path / "wheels" / "lib")}
    assert cuda_compiler(release) == (environment, "TRY")


def test_too_old_nvcc_is_reported(cuda_compiler, tmp_path, capsys):
    cuda_compiler("12.4")
    assert f"{tmp_path / 'nvcc'} is not used" in capsys.readouterr().out


def test_import_without_compiled_module_gives_advice(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "deeplab_fast", tmp_path / "deeplab_fast", ignore=ignored)
    # Removes the import hook of an editable installation, which would find the module.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in str(f)]; "
        "import deeplab_fast"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"ImportError: {tmp_path / 'deeplab_fast'} has no compiled kernels")
    assert last_line.endswith("pip install --editable .")
