"""Models on the Hugging Face Hub: download, upload and model cards.

The methods and files follow huggingface_hub's ModelHubMixin. The models do not inherit from it,
because huggingface_hub is optional: it is imported only when a repository is named.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checkpoints.checkpoint import Checkpoint
from .checkpoints.folder import CARD, CONFIG, LIBRARY, WEIGHTS, write_folder

# Suffixes of files that torch.save writes.
PICKLE_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt")

_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_DOWNLOADED = (CONFIG, WEIGHTS, "preprocessor_config.json")  # the last one is transformers'

_NAMES = {"DeepLabV3": "DeepLab-v3", "DeepLabV3Plus": "DeepLab-v3+"}


def is_repo_id(path_or_name: str | os.PathLike[str]) -> bool:
    """True if an argument of from_pretrained names a repository "owner/name" of the Hub.

    Path objects, existing paths and names with the suffix of a checkpoint are always local.
    """
    return (
        isinstance(path_or_name, str)
        and _REPO_ID.fullmatch(path_or_name) is not None
        and not path_or_name.endswith((".safetensors", *PICKLE_SUFFIXES))
        and not os.path.exists(path_or_name)
    )


def download(repo_id: str, **options: Any) -> Path:
    """The folder in huggingface_hub's cache with the files of a repository that we read.

    Args:
        repo_id: "owner/name".
        options: ``revision``, ``token``, ``cache_dir`` and ``local_files_only`` of
            huggingface_hub's ``snapshot_download``.

    Raises:
        FileNotFoundError: there is no such repository or revision, or it lacks a file.
        PermissionError: the repository is gated.
        ConnectionError: the Hub cannot be reached, and the files are not in the cache.
        ImportError: huggingface_hub is not installed.
    """
    hub = _huggingface_hub(f"{repo_id}: no such file or folder. To load it from the Hub")
    with _clear_errors(repo_id):
        folder = hub.snapshot_download(
            repo_id, allow_patterns=list(_DOWNLOADED), library_name=LIBRARY, **options
        )
    missing = [name for name in (CONFIG, WEIGHTS) if not os.path.exists(f"{folder}/{name}")]
    if missing:
        raise FileNotFoundError(
            f"{repo_id}: expected a repository with {CONFIG} and {WEIGHTS}, got one without "
            f"{' and '.join(missing)}"
        )
    return Path(folder)


def push(
    checkpoint: Checkpoint,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    commit_message: str,
    branch: str | None,
    create_pr: bool | None,
    license: str | None,
) -> str:
    """Upload a checkpoint; see ``DeepLabV3.push_to_hub``."""
    hub = _huggingface_hub("push_to_hub")
    with _clear_errors(repo_id), tempfile.TemporaryDirectory() as folder:
        api = hub.HfApi(token=token, library_name=LIBRARY)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        write_folder(Path(folder), checkpoint, model_card(checkpoint, repo_id, license))
        if api.file_exists(repo_id, CARD, revision=branch):  # its author may have edited it
            os.remove(f"{folder}/{CARD}")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def model_card(checkpoint: Checkpoint, source: str, license: str | None) -> str:
    """README.md of a model: metadata of the Hub, how to load it, its classes and configuration.

    Args:
        checkpoint: the model.
        source: the argument of from_pretrained, a repository or a folder.
        license: identifier of the license, such as "apache-2.0", or None.
    """
    config = checkpoint.config
    name = _NAMES.get(checkpoint.architecture, checkpoint.architecture)
    tags = ["image-segmentation", "semantic-segmentation", "deeplab"]
    tags += [checkpoint.architecture.lower(), config["backbone"]]
    header = [f"library_name: {LIBRARY}"]
    if license is not None:
        header.append(f"license: {json.dumps(license)}")
    header += ["pipeline_tag: image-segmentation", "tags:"]
    header += [f"- {json.dumps(tag)}" for tag in tags]
    return "\n".join([
        "---",
        *header,
        "---",
        "",
        f"# {name} with the backbone {config['backbone']}",
        "",
        f"A network for semantic segmentation with {config['num_classes']} classes, of the Python "
        f"package {LIBRARY}.",
        "",
        "## How to load it",
        "",
        "```python",
        *_usage(checkpoint, source),
        "```",
        "",
        f'To load it from the Hugging Face Hub, install `"{LIBRARY}[hub]"`.',
        "",
        "## Classes",
        "",
        *_classes(checkpoint),
        "",
        "## Configuration",
        "",
        *_configuration(checkpoint),
        "",
    ])  # fmt: skip


def _usage(checkpoint: Checkpoint, source: str) -> list[str]:
    """Program that loads and calls a model."""
    kind = checkpoint.architecture
    load = f"model = {kind}.from_pretrained({json.dumps(source)}).prepare_for_inference()"
    if checkpoint.config["in_channels"] != 3:
        channels = checkpoint.config["in_channels"]
        return [
            f"from deeplab_fast import {kind}",
            "",
            load,
            f"labels = model.predict(images)  # float images [N, {channels}, H, W], normalised",
        ]
    return [
        "from PIL import Image",
        f"from deeplab_fast import {kind}",
        "",
        load,
        'photo = Image.open("photo.jpg")',
        "mask = model.predict(model.preprocessing(photo), size=(photo.height, photo.width))",
    ]


def _classes(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.categories is None:
        return [f"The {checkpoint.config['num_classes']} classes have no names."]
    names = [" ".join(name.replace("`", "'").split()) for name in checkpoint.categories]
    return [f"* {i}: `{name}`" if name else f"* {i}" for i, name in enumerate(names)]


def _configuration(checkpoint: Checkpoint) -> list[str]:
    """The configuration in words, and the arguments of the constructor that need none."""
    config, preprocessing = dict(checkpoint.config), checkpoint.preprocessing
    stride, rates = config.pop("output_stride"), config.pop("atrous_rates")
    rates = "the usual atrous rates" if rates is None else f"atrous rates {rates}"
    size = "at any size"
    if preprocessing.resize is not None:
        size = f"the shorter side resized to {preprocessing.resize} pixels"
    if preprocessing.crop is not None:
        size += f", cropped to {' x '.join(map(str, preprocessing.crop))}"
    corners = "with" if config.pop("align_corners") else "without"
    auxiliary = "with" if config.pop("aux_loss") else "without"
    rest = ", ".join(f"`{name}={value!r}`" for name, value in config.items())
    return [
        f"* features at output stride {stride}, with {rates} in ASPP",
        f"* images with values from 0 to 1, normalised with mean {list(preprocessing.mean)} and "
        f"standard deviation {list(preprocessing.std)}, {size}",
        f"* logits upsampled bilinearly, {corners} aligned corners",
        f"* {auxiliary} an auxiliary classifier for training",
        f"* arguments of the constructor: {rest}",
    ]


def _huggingface_hub(purpose: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f'{purpose}: pip install "{LIBRARY}[hub]"') from error
    return huggingface_hub


@contextlib.contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into errors of one line that say what to do."""
    from huggingface_hub import errors

    # The base of all errors of its HTTP client, which is another package in each major version.
    http_error: Any = errors.HfHubHTTPError.__bases__[0]
    log_in = "log in with `hf auth login`, or pass token="
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo_id}: gated: accept its conditions on its page of the Hugging Face Hub, then "
            f"{log_in}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id}: no such file or folder, and no such repository on the Hugging Face Hub. "
            f"If it is private, {log_in}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id}: no such revision on the Hugging Face Hub") from error
    except errors.LocalEntryNotFoundError as error:
        reason = _first_line(error.__cause__) if error.__cause__ else "downloads are turned off"
        raise ConnectionError(
            f"{repo_id}: no such file or folder, not in the cache of huggingface_hub, and the "
            f"Hugging Face Hub was not reached: {reason}"
        ) from error
    except http_error as error:
        denied = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        if denied:
            raise PermissionError(f"{repo_id}: {_first_line(error)}: {log_in}") from error
        raise ConnectionError(
            f"{repo_id}: request to the Hugging Face Hub failed: {_first_line(error)}"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{repo_id}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
