"""Folders of save_pretrained, and repositories of the Hugging Face Hub. Nothing is downloaded."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from deeplab_fast.cli.errors import UserError
from deeplab_fast.cli.weights import load_model
from deeplab_fast.models import DeepLab, DeepLabV3, DeepLabV3Plus, Preprocessing

from .test_weights import transformers_state

FILES = ["README.md", "config.json", "model.safetensors"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model() -> DeepLabV3:
    torch.manual_seed(0)
    model = DeepLabV3("mobilenet_v2", 3, 16, (3, 5), align_corners=True, dropout=0.25).eval()
    model.preprocessing = Preprocessing((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 65, (33, 65))
    model.categories = ("sky", "tree", "`road` | path")
    return model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "new" / "model")
    return tmp_path / "new" / "model"


@pytest.fixture
def huggingface_hub():
    package = pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    importlib.import_module("huggingface_hub.errors")  # the package itself does so when needed
    return package


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_model(loaded: nn.Module, model: nn.Module) -> None:
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not loaded.training
    images = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        assert_close(dict(loaded(images)), dict(model(images)))


# --- folders


@pytest.mark.parametrize("source", ["folder", "folder/model.safetensors", "elsewhere.safetensors"])
def test_round_trip(model, folder, tmp_path, source):
    """The weights also work alone and under another name."""
    assert names(folder) == FILES
    shutil.copy(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (tmp_path / "folder").symlink_to(folder)
    loaded = DeepLabV3.from_pretrained(str(tmp_path / source))
    assert loaded.config == model.config
    assert loaded.preprocessing == model.preprocessing
    assert loaded.categories == model.categories
    assert_same_model(loaded, model)
    assert DeepLabV3.from_pretrained(folder, output_stride=8).config["output_stride"] == 8


def test_the_class_of_a_folder(folder, tmp_path):
    plus = DeepLabV3Plus("mobilenet_v2", 2, low_level_channels=8, aux_loss=True).eval()
    plus.save_pretrained(tmp_path / "plus")
    loaded = DeepLab.from_pretrained(tmp_path / "plus")
    assert type(loaded) is DeepLabV3Plus and loaded.config == plus.config
    assert_same_model(loaded, plus)
    assert type(DeepLab.from_pretrained(folder)) is DeepLabV3
    with pytest.raises(ValueError, match="expected a DeepLabV3, got a DeepLabV3Plus: load it with"):
        DeepLabV3.from_pretrained(tmp_path / "plus")


def test_config_json_holds_the_arguments_of_the_constructor(model, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["library_name"] == "deeplab-fast"
    assert config["architecture"] == "DeepLabV3"
    assert model.config.items() <= config.items()


def test_config_json_describes_the_model(folder):
    """Edited by hand, it counts more than the metadata of the weights."""
    edit(folder, categories=["a", "b", "c"], output_stride=8)
    loaded = DeepLabV3.from_pretrained(folder)
    assert loaded.categories == ("a", "b", "c") and loaded.config["output_stride"] == 8


def test_saving_again_replaces_the_model_and_keeps_the_card(model, folder):
    (folder / "README.md").write_text("mine")
    other = DeepLabV3("mobilenet_v2", 2, 16).eval()
    other.save_pretrained(folder)
    assert names(folder) == FILES
    assert (folder / "README.md").read_text() == "mine"
    loaded = DeepLabV3.from_pretrained(folder)
    assert loaded.config == other.config
    assert_same_model(loaded, other)


@pytest.mark.parametrize(
    "content, found",
    [
        ('{"architectures": ["SegformerForSemanticSegmentation"]}', "that of another project"),
        ('{"library_name": "deeplab-fast", "architecture": "DeepLabV3Plus"}', "a DeepLabV3Plus"),
        ("[]", "that of another project"),
        ("{", "that of another project"),
    ],
)
def test_config_of_another_model_is_not_overwritten(model, tmp_path, content, found):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileExistsError, match=f"config.json: expected none or .* got {found}"):
        model.save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text() == content


def test_paths_that_are_no_folder(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file: expected a folder or a name that ends in"):
        model.save_pretrained(tmp_path / "file")
    for name in ("model.pth", "model.bin"):
        with pytest.raises(ValueError, match=f"{name}: expected a folder or a name that ends in"):
            model.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="license: .*model.safetensors has no model card"):
        model.save_pretrained(tmp_path / "model.safetensors", license="mit")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", FILES)
def test_failed_save_leaves_whole_files(model, folder, monkeypatch, name):
    before = {name: (folder / name).read_bytes() for name in FILES}
    if name == "README.md":
        (folder / name).unlink()
        del before[name]
    replace = os.replace

    def fail(source, target):
        if Path(target).name == name:
            raise OSError("No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 2}, "expected format_version 1, got 2: a newer version"),
        ({"format_version": None}, "expected format_version 1, got None"),
        ({"preprocessing": None}, "malformed: AttributeError"),
        ({"preprocessing": {"resize": "big"}}, "resize: expected a positive int or None"),
        ({"categories": ["sky"]}, "expected as many categories as classes, got 1 for 3"),
        ({"architecture": "UNet"}, "expected a model of .*, got one of 'UNet'"),
        ({"depth": 3}, "unexpected keyword argument 'depth'"),
        ({"num_classes": 4, "categories": None}, "tensors do not fit"),
    ],
)
def test_malformed_config(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=rf"{folder.name}.*{message}"):
        DeepLabV3.from_pretrained(folder)


def test_incomplete_folder(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors: not found"):
        DeepLabV3.from_pretrained(folder)


# --- model cards


def test_card_has_the_metadata_of_the_hub(huggingface_hub, model, folder, tmp_path):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "deeplab-fast"
    assert card.data.pipeline_tag == "image-segmentation"
    assert {"image-segmentation", "deeplab", "deeplabv3", "mobilenet_v2"} <= set(card.data.tags)
    assert card.data.license is None
    model.save_pretrained(tmp_path / "licensed", license="apache-2.0")
    card = huggingface_hub.ModelCard.load(tmp_path / "licensed" / "README.md")
    assert card.data.license == "apache-2.0"


def test_card_describes_the_model(folder):
    card = (folder / "README.md").read_text()
    for text in [
        "# DeepLab-v3 with the backbone mobilenet_v2",
        "* 0: `sky`\n* 1: `tree`\n* 2: `'road' | path`\n",
        "output stride 16, with atrous rates [3, 5]",
        "mean [0.1, 0.2, 0.3]",
        "resized to 65 pixels, cropped to 33 x 65",
        "with aligned corners",
        "without an auxiliary classifier",
        "`dropout=0.25`",
    ]:
        assert text in card


def test_program_of_the_card_runs(folder, monkeypatch):
    """It loads the folder by its name, as from a repository."""
    (program,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(folder.parent)
    shutil.copy(Path(__file__).parents[2] / "docs" / "segmentation.jpg", "photo.jpg")
    variables: dict = {}
    exec(program, variables)
    assert variables["mask"].shape == variables["photo"].size[::-1]


def test_card_without_categories_or_colours(model, tmp_path):
    other = DeepLabV3("mobilenet_v2", 3, 16, aux_loss=True)
    other.config["in_channels"] = 4
    other.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "The 3 classes have no names." in card
    assert "float images [N, 4, H, W]" in card and "photo" not in card
    assert "with the usual atrous rates" in card and "at any size" in card
    assert "with an auxiliary classifier" in card


# --- from_pretrained of a repository


@pytest.fixture
def cache(folder, tmp_path) -> Path:
    """huggingface_hub's cache, with the folder as the repository owner/name."""
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    return tmp_path / "cache"


def in_cache(cache: Path) -> Path:
    return cache / "models--owner--name" / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_repository_in_the_cache(huggingface_hub, model, cache, revision):
    """huggingface_hub itself finds the files."""
    options = {"cache_dir": cache, "local_files_only": True, "revision": revision}
    loaded = DeepLabV3.from_pretrained("owner/name", **options, output_stride=8)
    assert loaded.config["output_stride"] == 8
    loaded = DeepLab.from_pretrained("owner/name", **options)
    assert loaded.categories == model.categories
    assert_same_model(loaded, model)
    path = huggingface_hub.hf_hub_download("owner/name", "model.safetensors", **options)
    assert_same_model(DeepLab.from_pretrained(path), model)


def test_repository_of_transformers(huggingface_hub, cache):
    snapshot = in_cache(cache)
    save_file(transformers_state(3), snapshot / "model.safetensors")
    config = {"architectures": ["MobileNetV2ForSemanticSegmentation"], "output_stride": 16}
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "preprocessor_config.json").write_text('{"do_resize": false}')
    with pytest.raises(ValueError, match="KeyError: 'crop_size'"):  # the file counts
        DeepLabV3.from_pretrained("owner/name", cache_dir=cache, local_files_only=True)
    (snapshot / "preprocessor_config.json").write_text(
        '{"do_resize": false, "do_center_crop": false}'
    )
    loaded = DeepLabV3.from_pretrained("owner/name", cache_dir=cache, local_files_only=True)
    assert loaded.config["tf_padding"] and loaded.config["num_classes"] == 3


def test_what_is_downloaded(huggingface_hub, folder, monkeypatch):
    """Weights in other formats stay on the Hub."""
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = {"revision": "v1", "token": "hf_x", "cache_dir": "cache", "local_files_only": False}
    DeepLabV3.from_pretrained("owner/name", **options)
    ((repo_id, passed),) = calls
    assert repo_id == "owner/name" and options.items() <= passed.items()
    files = [*FILES, "preprocessor_config.json", "pytorch_model.bin", "runs/model.safetensors"]
    chosen = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=passed["allow_patterns"]
    )
    assert sorted(chosen) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="owner/name: .* got one without model.safetensors"):
        DeepLabV3.from_pretrained("owner/name")


def test_local_paths_come_first(huggingface_hub, model, monkeypatch, tmp_path):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **options: pytest.fail("asked the Hub")
    )
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("owner/name")
    assert_same_model(DeepLabV3.from_pretrained("owner/name"), model)
    for absent in [Path("owner/other"), "owner/other.ckpt", "owner/other.safetensors", "a/b/c"]:
        with pytest.raises(
            FileNotFoundError, match="no such file or folder. Expected a checkpoint"
        ):
            DeepLabV3.from_pretrained(absent)


def response(status: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers={}, request=None)


ERRORS = [
    ("GatedRepoError", 403, PermissionError, "owner/name: gated: accept its conditions.*token="),
    ("RepositoryNotFoundError", 404, FileNotFoundError, "owner/name: no such file .*hf auth login"),
    ("RevisionNotFoundError", 404, FileNotFoundError, "owner/name: no such revision"),
    ("HfHubHTTPError", 401, PermissionError, "owner/name: first line: log in"),
    ("HfHubHTTPError", 503, ConnectionError, "owner/name: request .* failed: first line$"),
    ("LocalEntryNotFoundError", None, ConnectionError, "not in the cache .* downloads are turned"),
    ("HFValidationError", None, ValueError, "owner/name: first line$"),
]


@pytest.mark.parametrize("name, status, kind, message", ERRORS)
def test_errors_of_the_hub_are_one_line(huggingface_hub, monkeypatch, name, status, kind, message):
    arguments = {} if status is None else {"response": response(status)}
    error = getattr(huggingface_hub.errors, name)("first line\nsecond line", **arguments)

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=message) as caught:
        DeepLabV3.from_pretrained("owner/name")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
    with pytest.raises(UserError, match="^--weights: owner/name: "):
        load_model("owner/name")


def test_nothing_in_the_cache(huggingface_hub, tmp_path):
    with pytest.raises(ConnectionError, match="^owner/name: no such file or folder, not in the ca"):
        DeepLabV3.from_pretrained("owner/name", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(ValueError, match="^a/b--c: Cannot have -- or .. in repo_id"):
        DeepLabV3.from_pretrained("a/b--c", cache_dir=tmp_path, local_files_only=True)


def test_command_line_takes_folders_and_repositories(huggingface_hub, model, cache, monkeypatch):
    assert_same_model(load_model(str(in_cache(cache))), model)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: str(in_cache(cache)))
    assert_same_model(load_model("owner/name"), model)


# --- push_to_hub


class FakeApi:
    """The methods of HfApi that are called. ``files`` is the content of the repository."""

    files: dict[str, bytes] = {}
    calls: list[tuple[str, dict]] = []

    def __init__(self, **options) -> None:
        self.calls.append(("HfApi", options))

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=f"owner/{repo_id.removeprefix('owner/')}")

    def file_exists(self, repo_id, name, *, revision):
        self.calls.append(("file_exists", {"repo_id": repo_id, "revision": revision}))
        return name in self.files

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload_folder", options))
        for path in Path(folder_path).iterdir():
            self.files[path.name] = path.read_bytes()
        pull = "https://hf.co/owner/name/discussions/1" if options["create_pr"] else None
        return SimpleNamespace(commit_url="https://hf.co/owner/name/commit/1", pr_url=pull)


@pytest.fixture
def api(huggingface_hub, monkeypatch) -> type[FakeApi]:
    monkeypatch.setattr(FakeApi, "files", {})
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return FakeApi


def test_push_uploads_a_folder_that_can_be_loaded(huggingface_hub, model, api, tmp_path):
    url = model.push_to_hub("name", private=True, token="hf_x", license="mit")
    assert url == "https://hf.co/owner/name/commit/1"
    calls = dict(api.calls)
    assert calls["HfApi"]["token"] == "hf_x"
    assert calls["create_repo"] == {"repo_id": "name", "private": True, "exist_ok": True}
    assert calls["upload_folder"]["repo_id"] == "owner/name"
    assert sorted(api.files) == FILES
    for name, content in api.files.items():
        (tmp_path / name).write_bytes(content)
    assert_same_model(DeepLabV3.from_pretrained(tmp_path), model)
    assert huggingface_hub.ModelCard.load(tmp_path / "README.md").data.license == "mit"
    assert 'from_pretrained("owner/name")' in (tmp_path / "README.md").read_text()


def test_push_to_a_branch_keeps_its_card(model, api):
    api.files["README.md"] = b"mine"
    url = model.push_to_hub("owner/name", branch="dev", create_pr=True, commit_message="second")
    assert url == "https://hf.co/owner/name/discussions/1"
    assert api.files["README.md"] == b"mine" and "config.json" in api.files
    calls = dict(api.calls)
    assert calls["file_exists"] == {"repo_id": "owner/name", "revision": "dev"}
    expected = {"revision": "dev", "create_pr": True, "commit_message": "second"}
    assert expected.items() <= calls["upload_folder"].items()


def test_push_without_a_login(huggingface_hub, model, api, monkeypatch):
    def fail(self, repo_id, **options):
        raise huggingface_hub.errors.HfHubHTTPError("401\nsecond line", response=response(401))

    monkeypatch.setattr(FakeApi, "create_repo", fail)
    with pytest.raises(PermissionError, match="^owner/name: 401: log in with `hf auth login`"):
        model.push_to_hub("owner/name")
    assert api.files == {}


# --- huggingface_hub is optional


def test_package_imports_huggingface_hub_only_for_the_hub(folder):
    code = f"""
import sys
class Absent:
    names = []
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("huggingface_hub", "timm", "transformers"):
            self.names.append(name)
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from deeplab_fast import DeepLabV3
model = DeepLabV3.from_pretrained({str(folder)!r})
model.save_pretrained({str(folder / "copy")!r})
print(Absent.names)
for load in (DeepLabV3.from_pretrained, model.push_to_hub):
    try:
        load("owner/name")
    except ImportError as error:
        print(error)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    install = 'pip install "deeplab-fast[hub]"'
    assert done.stdout.splitlines() == [
        "[]",
        f"owner/name: no such file or folder. To load it from the Hub: {install}",
        f"push_to_hub: {install}",
    ]
    assert names(folder / "copy") == FILES


# --- huggingface_hub's mixin in the user's classes


def test_class_that_adds_the_mixin_to_ours(huggingface_hub, folder, model, tmp_path):
    class Ours(DeepLabV3, huggingface_hub.PyTorchModelHubMixin):
        """Our methods come first, and write our format."""

    loaded = Ours.from_pretrained(folder)
    assert type(loaded) is Ours
    assert_same_model(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(DeepLabV3.from_pretrained(tmp_path / "again"), model)


def test_mixin_loads_our_folders(huggingface_hub, folder, model, tmp_path):
    class Theirs(huggingface_hub.PyTorchModelHubMixin, DeepLabV3):
        """The mixin's methods come first. It takes the constructor's arguments from config.json."""

    loaded = Theirs.from_pretrained(folder, strict=True).eval()
    assert loaded.config == model.config
    assert_same_model(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(Theirs.from_pretrained(tmp_path / "again", strict=True).eval(), model)


def test_mixin_around_our_model(huggingface_hub, model, tmp_path):
    class Segmenter(nn.Module, huggingface_hub.PyTorchModelHubMixin):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.net = DeepLabV3("mobilenet_v2", classes, 16, (3, 5), align_corners=True)

        def forward(self, images):
            return self.net(images)

    segmenter = Segmenter(classes=3)
    segmenter.net.load_state_dict(model.state_dict())
    segmenter.save_pretrained(tmp_path / "segmenter")
    loaded = Segmenter.from_pretrained(tmp_path / "segmenter", strict=True).eval()
    assert_same_model(loaded.net, model)
