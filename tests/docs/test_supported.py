"""docs/supported.py, which makes docs/supported.md from the tests that are marked ``parity``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "supported.py"

# Other projects cannot be imported.
WITHOUT_PEERS = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in (
            "huggingface_hub", "segmentation_models_pytorch", "timm", "torchvision", "transformers"
        ):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


spec = importlib.util.spec_from_file_location("supported", SCRIPT)
supported = importlib.util.module_from_spec(spec)
spec.loader.exec_module(supported)


def table_of(tests: str, folder: Path) -> list[str]:
    """The lines of the table that a file with these tests gives."""
    (folder / "test_parity.py").write_text(f"import pytest\n{tests}")
    page = supported.page(supported.rows(supported.collect(folder)))
    return page.partition("|---|---|---|---|\n")[2].splitlines()


def test_page_is_up_to_date_whatever_is_installed(tmp_path):
    code = f"""
{WITHOUT_PEERS}
import runpy
sys.argv = [{str(SCRIPT)!r}, "--check"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rows(tmp_path):
    tests = """
pair = pytest.mark.parametrize(
    "model, weights", [("DeepLabV3", "torchvision"), ("DeepLabV3Plus", "smp")]
)

@pair
@pytest.mark.parametrize("backbone", ["timm/a", "resnet101", "resnet50"])
@pytest.mark.parity
def test_outputs(model, backbone, weights): ...

@pytest.mark.slow
@pytest.mark.parity(model="DeepLabV3", weights="torchvision")
@pytest.mark.parametrize("backbone", ["resnet101", "resnet50"])
def test_training_step(backbone): ...

@pytest.fixture
def peer():
    pytest.importorskip("absent")

@pytest.mark.skipif(True, reason="this machine")
@pytest.mark.parity("labels", "areas", model="DeepLabV3", weights="random", backbone="resnet50")
def test_labels(peer): ...

@pytest.mark.parity(model="DeepLabV3", weights="random")
@pytest.mark.parametrize("backbone", [
    pytest.param("resnet34", marks=pytest.mark.skip),
    pytest.param("resnet18", marks=pytest.mark.xfail),
])
def test_gradients(backbone): ...

def test_other(): ...
"""
    assert table_of(tests, tmp_path) == [
        "| `DeepLabV3` | torchvision | `resnet50`, `resnet101` | outputs, one training step |",
        "| `DeepLabV3` | torchvision | `timm/a` | outputs |",
        "| `DeepLabV3` | random | `resnet50` | areas, labels |",
        "| `DeepLabV3Plus` | smp | `resnet50`, `resnet101`, `timm/a` | outputs |",
    ]


def test_file_that_needs_a_package_is_an_error(tmp_path):
    """It would leave its rows out where the package is absent."""
    with pytest.raises(SystemExit, match="test_parity.py: not collected: .*absent_package"):
        table_of("pytest.importorskip('absent_package')  # pytest.mark.parity", tmp_path)


def test_missing_parameters_are_an_error(tmp_path):
    message = "test_parity.py::test_a: expected the parameters backbone, weights"
    with pytest.raises(SystemExit, match=message):
        table_of("@pytest.mark.parity(model='DeepLabV3')\ndef test_a(): ...", tmp_path)
