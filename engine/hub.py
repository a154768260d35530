"""Models by name: `OWNER/REPO` or `OWNER/REPO:Q4_K_M` is fetched from huggingface.co, once; a file on disk always wins.

What is fetched lies in huggingface_hub's cache, which other programs share, and is found there without a network too.
HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to that library.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from trichord.errors import GGUFError, RequestError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFERRED_TAG = "Q4_K_M"
_MAX_LISTED = 40

_NAME = re.compile(
    r"(?:(?:https?://)?(?:hf\.co|huggingface\.co)/)?"
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?::(?P<tag>[\w./-]+))?/?"
)
_PART = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})$")
_TAG = re.compile(r"(?:^|[-_.])(?P<tag>(?:UD-)?(?:I?Q\d\w*|TQ\d\w*|B?F\d+|MXFP4\w*|NVFP4))$", re.IGNORECASE)
_NO_MODEL = re.compile(r"(?:^|[-_.])(?:mmproj|imatrix)(?:[-_.]|$)", re.IGNORECASE)


class _Name(NamedTuple):
    repo: str
    tag: str | None


def names_model(text: str) -> bool:
    """Whether this looks like what `find_model` takes: a path that ends in .gguf or exists, or a name on the hub."""
    return text.lower().endswith(".gguf") or _exists(text) or _parse(text) is not None


def find_model(model: str | os.PathLike[str]) -> Path:
    """The path of a model's file, of its first part if it is split, fetched if it is named and not on disk yet.

    Raises GGUFError when there is no such file or repository or the download fails, RequestError when the name does not
    say which of a repository's files it means.
    """
    if _exists(model):
        return Path(model)
    name = _parse(model) if isinstance(model, str) else None
    if name is None:
        raise GGUFError(f"{model}: there is no such file")
    return _fetch(name)


def choose(files: Iterable[str], tag: str | None, where: str) -> list[str]:
    """Which of a repository's files are meant: the parts of one model, in order.

    tag: what the file's name says of its format ("Q4_K_M"), or the whole name; None is Q4_K_M, or the only model there
    is. Raises RequestError, with the choices, when that is none or several, GGUFError when parts are missing.
    """
    models: dict[str, list[str]] = defaultdict(list)
    for file in sorted(files):
        if file.lower().endswith(".gguf") and not _NO_MODEL.search(PurePosixPath(file).name):
            models[_PART.sub("", file[: -len(".gguf")])].append(file)
    if not models:
        raise RequestError(f"{where} has no GGUF model: name a repository with .gguf files.")
    found = _tagged(models, tag or PREFERRED_TAG)
    if tag is None and not found and len(models) == 1:
        found = list(models)
    if len(found) != 1:
        several = f"several models for {tag or PREFERRED_TAG}" if found else f"no model for {tag}"
        if not found and tag is None:
            several = "several models"
        raise RequestError(f"{where} has {several}: put one of these after a colon: {_listed(found or models)}.")
    return _complete(models[found[0]], where)


def _exists(path: str | os.PathLike[str]) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name too long, a null character
        return False


def _parse(text: str) -> _Name | None:
    match = _NAME.fullmatch(text)
    # A path that ends in .gguf was meant as a path.
    if match is None or (match["tag"] is None and text.lower().endswith(".gguf")):
        return None
    return _Name(match["repo"], match["tag"])


def _tagged(models: Iterable[str], tag: str) -> list[str]:
    """The models of this tag: whole words of the name, or the name itself."""
    whole = [model for model in models if tag.lower().removesuffix(".gguf") in (model.lower(), _base(model).lower())]
    word = re.compile(rf"(?:^|[-_.]){re.escape(tag)}(?:[-.]|$)", re.IGNORECASE)
    return whole or [model for model in models if word.search(_base(model))]


def _base(model: str) -> str:
    return PurePosixPath(model).name


def _listed(models: Iterable[str]) -> str:
    """What to write for each of the models: its tag, where that says which one is meant."""
    models = sorted(models)
    marks = [_TAG.search(_base(model)) for model in models]
    tags = [mark["tag"] if mark else "" for mark in marks]
    names = [tag if tags.count(tag) == 1 and tag else _base(model) for tag, model in zip(tags, models, strict=True)]
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def _complete(parts: list[str], where: str) -> list[str]:
    """The parts, if they are all there."""
    marks = [_PART.search(part[: -len(".gguf")]) for part in parts]
    count = int(marks[0]["count"]) if marks[0] else 1
    if [int(mark["number"]) if mark else 1 for mark in marks] != list(range(1, count + 1)):
        raise GGUFError(f"{where} has {len(parts)} of the {count} parts of {parts[0]}.")
    return parts


def _fetch(name: _Name) -> Path:
    from huggingface_hub import HfApi

    api = HfApi(library_name="trichord")
    where = f"{name.repo} on {re.sub('^https?://', '', api.endpoint)}"
    files, online = _files(api, name.repo, where)
    chosen = choose(files, name.tag, where)
    if not online:
        return files[chosen[0]]
    paths = [_download(api, name.repo, file, where) for file in chosen]
    return paths[0]


def _files(api: HfApi, repo: str, where: str) -> tuple[dict[str, Path | None], bool]:
    """The repository's files by name, and whether the hub answered; if not, those in the cache, with their paths."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return {sibling.rfilename: None for sibling in api.model_info(repo).siblings or ()}, True
    except RepositoryNotFoundError as error:
        if not isinstance(error, GatedRepoError):
            raise GGUFError(
                f"{repo}: there is no such file, and no such repository is open to you ({where}); set HF_TOKEN for one"
                " that is private"
            ) from None
        failure = _reason(error)
    except Exception as error:  # the network's many ways to fail, in the classes of whichever client the library uses
        failure = _reason(error)
    cached = _cached_files(repo)
    if not cached:
        raise GGUFError(f"{where} cannot be read, and nothing of it was fetched before: {failure}")
    return cached, False


def _cached_files(repo: str) -> dict[str, Path]:
    """Files of the newest revision in the cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return {}
    revisions = [
        revision for each in repos if each.repo_type == "model" and each.repo_id == repo for revision in each.revisions
    ]
    if not revisions:
        return {}
    newest = max(revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
    root = newest.snapshot_path
    return {file.file_path.relative_to(root).as_posix(): file.file_path for file in newest.files}


def _download(api: HfApi, repo: str, file: str, where: str) -> Path:
    try:
        return Path(api.hf_hub_download(repo, file))
    except Exception as error:  # as above; the disk may be full, too
        raise GGUFError(f"{file} of {where} cannot be fetched: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return "its terms must be accepted on its page first; then set HF_TOKEN"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
