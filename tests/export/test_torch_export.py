"""Programs of torch.export, and packages of AOTInductor."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import deeplab_fast
from deeplab_fast.export import check, export_aoti, export_torch, torch_export
from deeplab_fast.export.check import CheckFailed
from deeplab_fast.export.program import job_of
from deeplab_fast.models.inference import prepare

from ..support.small_model import CATEGORIES, other_model, small_model

SHAPES = [(1, 3, 65, 81), (2, 3, 48, 33), (3, 3, 97, 64)]


def operators(program: torch.export.ExportedProgram) -> set[str]:
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return {str(node.target).partition(".default")[0] for node in nodes}


def assert_labels_agree(program, model, shapes=SHAPES) -> None:
    def engine(images):
        return program(torch.from_numpy(images)).numpy()

    check.compare(engine, lambda images: model(images)["out"], "labels", shapes)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def programs(model, tmp_path_factory):
    """Paths of a program with our ops and of a portable one."""
    folder = tmp_path_factory.mktemp("programs")
    for portable in (False, True):
        comparison = export_torch(
            model, folder / f"{portable}.pt2", dtype=torch.uint8, portable=portable
        )
        assert comparison.differing == 0 and len(comparison.shapes) == 3
    assert len([*folder.iterdir()]) == 2
    return folder / "False.pt2", folder / "True.pt2"


def test_programs_with_our_ops(programs, model):
    metadata = {torch_export.METADATA: ""}
    program = torch.export.load(programs[0], extra_files=metadata)
    assert {"deeplab_fast.aspp", "deeplab_fast.upsample_argmax"} <= operators(program)
    assert_labels_agree(program.module(), model)
    assert program.module()(torch.zeros(1, 3, 33, 33)).dtype == torch.uint8
    found = json.loads(metadata[torch_export.METADATA])
    assert json.loads(found["categories"]) == [*CATEGORIES] and found["labels_dtype"] == "uint8"


def test_portable_programs_have_no_ops_of_ours(programs):
    found = operators(torch.export.load(programs[1]))
    assert not [name for name in found if "deeplab_fast" in name]
    assert {"aten.upsample_bilinear2d", "aten.argmax"} <= found
    assert "aten.index.Tensor" not in found  # PyTorch's interpolation is not decomposed further


def test_portable_programs_load_without_this_package(programs, model, tmp_path):
    images = check.images_of((2, 3, 65, 81))
    torch.save(images, tmp_path / "images.pt")
    code = textwrap.dedent("""
        import sys
        sys.modules["deeplab_fast"] = None
        import torch
        folder = sys.argv[1]
        program = torch.export.load(sys.argv[2]).module()
        torch.save(program(torch.load(folder + "/images.pt")), folder + "/labels.pt")
    """)
    subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path), str(programs[1])], check=True, timeout=300
    )
    labels = torch.load(tmp_path / "labels.pt")
    assert labels.dtype == torch.uint8
    check.check_labels(labels, model(images)["out"].detach())


@pytest.mark.parametrize("index", [0, 1])
def test_programs_pass_nan_on(index, programs):
    """Like the model: a broken image does not look healthy, and does not change others."""
    path = programs[index]
    program = torch.export.load(path).module()
    images = check.images_of((2, 3, 33, 33))
    expected = program(images)[1]
    images[0] = torch.nan
    labels = program(images)
    assert labels[1].equal(expected)
    assert (labels[0] == 0).all()  # the first NaN wins, so all pixels get the first class


@pytest.mark.parametrize("portable", [False, True])
def test_a_model_that_sees_one_class_is_checked_by_its_logits(portable, tmp_path, monkeypatch):
    """Random images look like background to most trained models."""
    model, wrong = small_model(), False
    model.classifier[-1].bias.data[0] += 100.0

    def changed(*args):
        job = job_of(*args)
        if wrong:
            job.prepared.model.classifier[-1].bias.data[1] += 1.0
        return job

    monkeypatch.setattr(torch_export, "job_of", changed)
    options = {"size": (33, 33), "batch": 1, "portable": portable}
    comparison = export_torch(model, tmp_path / "model.pt2", **options)
    assert comparison.largest_difference is not None
    wrong = True
    with pytest.raises(CheckFailed, match="logits: expected a difference of at most"):
        export_torch(model, tmp_path / "model.pt2", **options)


def test_a_full_disk_is_an_error(model, tmp_path, monkeypatch):
    """PyTorch's own writer of files ends the process, because a destructor throws."""

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.pt2"
    path.write_text("an older file")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export_torch(model, path, size=(33, 33), batch=1)
    assert path.read_text() == "an older file" and [*tmp_path.iterdir()] == [path]


def test_a_missing_compiler_is_named(model, tmp_path):
    from torch._inductor import config

    without = config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))})
    with without, pytest.raises(FileNotFoundError, match="no C.. compiler .expected g"):
        export_aoti(model, tmp_path / "model.pt2", size=(33, 33), batch=1)
    assert not [*tmp_path.iterdir()]


def test_our_ops_keep_the_repair_of_nan():
    """On a CPU oneDNN's ReLU turns NaN into 0."""
    model = prepare(small_model(), None, False)
    program = torch.export.export(model, (torch.zeros(2, 3, 33, 33),), strict=False)
    assert "deeplab_fast.with_nan_of" in operators(program)
    images = torch.zeros(2, 3, 33, 33)
    images[1, 0, 0, 0] = torch.inf
    output = program.module()(images)["out"]
    assert output[0].isfinite().all() and output[1].isnan().all()
    standard = program.run_decompositions(torch._decomp.decomposition_table)
    assert not [name for name in operators(standard) if "deeplab_fast" in name]


def test_fixed_sizes_and_logits(tmp_path):
    model = deeplab_fast.accelerate(other_model(), inference=True)
    comparison = export_torch(model, tmp_path / "x.pt2", result="logits", size=(64, 96), batch=2)
    assert comparison.shapes == ((2, 3, 64, 96),)
    program = torch.export.load(tmp_path / "x.pt2").module()
    images = check.images_of((2, 3, 64, 96))
    check.check_logits(program(images), model(images))
    with pytest.raises((RuntimeError, AssertionError)):
        program(images[:1])


@pytest.mark.parametrize("export", [export_torch, export_aoti])
def test_the_suffix_is_that_of_torch(export, model, tmp_path):
    with pytest.raises(ValueError, match="path: expected a name that ends in .pt2, got x.pth"):
        export(model, tmp_path / "x.pth")


def test_a_failed_check_leaves_no_file(model, tmp_path, monkeypatch):
    job_of = torch_export.job_of

    def changed(*args):
        job = job_of(*args)
        with torch.no_grad():
            job.prepared.model.classifier[-1].weight.mul_(1.001)
        return job

    monkeypatch.setattr(torch_export, "job_of", changed)
    with pytest.raises(CheckFailed, match="logits"):
        export_torch(model, tmp_path / "x.pt2", result="logits", size=(33, 33))
    assert not [*tmp_path.iterdir()]


def assert_package_agrees(path: Path, model, shapes) -> None:
    package = torch._inductor.aoti_load_package(str(path))
    assert json.loads(package.get_metadata()["categories"]) == [*CATEGORIES]
    with torch.no_grad():
        assert_labels_agree(package, model, shapes)


@pytest.mark.slow
def test_aotinductor(tmp_path):
    model = small_model(align_corners=True)
    comparison = export_aoti(model, tmp_path / "x.pt2", size=(33, 33), batch=1)
    assert comparison.differing == 0
    assert_package_agrees(tmp_path / "x.pt2", model, [(1, 3, 33, 33)])


@pytest.mark.slow
def test_aotinductor_with_any_size_without_this_package(model, tmp_path):
    path = tmp_path / "x.pt2"
    export_aoti(model, path)
    assert_package_agrees(path, model, SHAPES)
    images = check.images_of((2, 3, 65, 81))
    torch.save(images, tmp_path / "images.pt")
    code = textwrap.dedent("""
        import sys
        sys.modules["deeplab_fast"] = None
        import torch, torch._inductor
        folder = sys.argv[1]
        package = torch._inductor.aoti_load_package(folder + "/x.pt2")
        torch.save(package(torch.load(folder + "/images.pt")), folder + "/labels.pt")
    """)
    subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], check=True, timeout=300)
    check.check_labels(torch.load(tmp_path / "labels.pt"), model(images)["out"].detach())
