"""hubconf.py: torch.hub.load from a checkout without compiled kernels."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deeplab_fast.models import DeepLabV3

HUBCONF = Path(__file__).parents[2] / "hubconf.py"

# Finds the package nowhere but in the folders that sys.path had not at the start.
NOT_INSTALLED = """
import importlib.machinery, sys
class NotInstalled:
    before = sys.path.copy()
    def find_spec(self, name, path=None, target=None):
        if name == "deeplab_fast":
            path = [entry for entry in sys.path if entry not in self.before]
        return importlib.machinery.PathFinder.find_spec(name, path)
sys.meta_path[:] = [f for f in sys.meta_path if "ditable" not in str(f)]
sys.meta_path[-1:] = [NotInstalled()]
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout whose package must not be imported."""
    folder = tmp_path / "checkout"
    (folder / "deeplab_fast").mkdir(parents=True)
    (folder / "deeplab_fast" / "__init__.py").write_text("raise ImportError('the checkout')")
    shutil.copy(HUBCONF, folder)
    return folder


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program whose sys.path has neither the working folder nor the checkout."""
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_models_of_the_installed_package(checkout, tmp_path):
    DeepLabV3("mobilenet_v2", 3, 16).save_pretrained(tmp_path / "model.safetensors")
    code = """
import sys, torch
before = sys.path.copy()
load = lambda folder, *args, **options: torch.hub.load(folder, *args, source="local", **options)
model = load("checkout", "deeplabv3", "mobilenet_v2", 4, output_stride=16)
print(type(model).__name__, model.config["num_classes"], model.training)
model = load("./checkout/", "deeplabv3plus", backbone="mobilenet_v2", num_classes=5)
print(type(model).__name__, model.config["num_classes"])
model = load("checkout", "deeplabv3", weights="model.safetensors", output_stride=8)
print(model.config["num_classes"], model.config["output_stride"], model.training)
try:
    load("checkout", "deeplabv3", "resnet50", weights="model.safetensors")
except TypeError as error:
    print(error)
assert sys.path == before
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "DeepLabV3 4 True",
        "DeepLabV3Plus 5",
        "3 8 False",
        "weights: expected only named arguments beside it, got ('resnet50',)",
    ]


def test_without_the_package_the_error_says_how_to_install_it(checkout):
    code = f"{NOT_INSTALLED}\nimport torch\ntorch.hub.load('.', 'deeplabv3', source='local')"
    done = run(code, checkout)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: deeplab_fast is not installed, which compiles its kernels: "
        f"pip install {checkout}"
    )


def test_listed_entry_points():
    """torch.hub.list lists what is callable and public."""
    spec = importlib.util.spec_from_file_location("hubconf", HUBCONF)
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    names = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"]
    assert names == ["deeplabv3", "deeplabv3plus"]
