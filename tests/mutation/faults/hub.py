"""Faults in the folders of save_pretrained and in the access to the Hugging Face Hub."""

from __future__ import annotations

from .guards import Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/models/hub.py": [
        Fault(
            "paths that exist are looked for on the Hub",
            "        and not os.path.exists(path_or_name)\n",
            "",
        ),
        Fault(
            "path objects are looked for on the Hub",
            "isinstance(path_or_name, str)\n        and _REPO_ID.fullmatch(path_or_name)",
            "_REPO_ID.fullmatch(path_or_name := str(path_or_name))",
        ),
        Fault(
            "names of files are looked for on the Hub",
            '        and not path_or_name.endswith((".safetensors", *PICKLE_SUFFIXES))\n',
            "",
        ),
        Fault("the whole repository is downloaded", "allow_patterns=list(_DOWNLOADED), ", ""),
        Fault(
            "transformers' preprocessing is not downloaded",
            '(CONFIG, WEIGHTS, "preprocessor_config.json")',
            "(CONFIG, WEIGHTS)",
        ),
        Fault("options do not reach the download", "library_name=LIBRARY, **options", ""),
        Fault("an incomplete repository is not reported", "    if missing:\n", "    if False:\n"),
        Fault(
            "the card of the repository is replaced",
            "if api.file_exists(repo_id, CARD, revision=branch):",
            "if False:",
        ),
        Fault(
            "the card of another branch is looked for",
            "api.file_exists(repo_id, CARD, revision=branch)",
            "api.file_exists(repo_id, CARD, revision=None)",
        ),
        Fault("uploads go to the main branch", "            revision=branch,\n", ""),
        Fault("new repositories are public", "private=private, ", "private=None, "),
        Fault("no pull request URL", "commit.pr_url or commit.commit_url", "commit.commit_url"),
        Fault("no license in the card", "    if license is not None:\n", "    if False:\n"),
        Fault("backticks in names of classes", 'name.replace("`", "\'")', "name"),
        Fault(
            "corners the other way round",
            'corners = "with" if',
            'corners = "with" if not',
        ),
        Fault(
            "a gated repository is one that does not exist",
            "    except errors.GatedRepoError as error:\n",
            "    except errors.DisabledRepoError as error:\n",
        ),
        Fault(
            "denied access is a failed connection",
            " in (401, 403)",
            " in ()",
        ),
        Fault(
            "messages of several lines", "return lines[0] if lines", "return str(error) if lines"
        ),
    ],
    "deeplab_fast/models/checkpoints/folder.py": [
        Fault(
            "config.json of another model is overwritten",
            "    _check_overwritten(folder, checkpoint.architecture)\n",
            "",
        ),
        Fault(
            "config.json of the other DeepLab is overwritten",
            'if config is None or config.get("architecture") != architecture:',
            "if config is None:",
        ),
        Fault("the card is overwritten", "    if not (folder / CARD).exists():", "    if True:"),
        Fault("files of newer versions are read", "if version != _FORMAT_VERSION:", "if False:"),
        Fault(
            "config.json is not replaced atomically",
            "    with replacing(path) as partial:\n        partial.write_text(",
            "    if True:\n        path.write_text(",
        ),
        Fault(
            "folders of other projects are taken for ours",
            ' and config.get("library_name") == LIBRARY',
            "",
        ),
        Fault(
            "weights that are missing are not reported",
            "if not (folder / WEIGHTS).exists():",
            "if False:",
        ),
    ],
}
