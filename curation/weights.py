"""The file that a model's weights are read from: the one a recipe names, else the one in the cache of Hugging Face.

Nobody is asked over the network; what is not there is one line that says where it can be had.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from training.config import ConfigError

if TYPE_CHECKING:
    from curation.backbones import BackboneConfig

KINDS = ("timm", "open_clip", "checkpoint", "script")
_WITHOUT = {"descriptor": "sift-vlad-dct", "opinion": "none"}  # what a section names that needs no weights


def stay_offline() -> None:
    """Keep the hub's client from retrying for a minute: what is needed is in a file or in its cache, or is an error."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def weights_file(config: BackboneConfig, key: str) -> Path:
    """The file that the weights come from: the one given, else the one in the cache of Hugging Face.

    Raises:
        ConfigError: the name is not known, or the weights are neither in a file nor in the cache; it says where they
            can be had.
    """
    without = _WITHOUT.get(key, "hog-thumb")
    if config.kind not in KINDS or not config.rest or (config.kind == "open_clip" and not all(config.clip)):
        raise ConfigError(f"{key}.name: got {config.name!r}, allowed: {without}, timm:NAME, open_clip:NAME/TAG, "
                          "checkpoint:PATH, script:PATH")  # fmt: skip
    given = config.rest if config.kind in ("checkpoint", "script") else config.weights
    if given is not None:
        if not Path(given).is_file():
            where = f"{key}.name" if config.kind in ("checkpoint", "script") else f"{key}.weights"
            raise ConfigError(
                f"{where}: got {given!r}, which is no file; give the path of the weights, or take {without}"
            )
        return Path(given)
    stay_offline()
    from huggingface_hub import constants, try_to_load_from_cache

    public = _published(config, key)
    for file in public.files:
        found = try_to_load_from_cache(public.repository, file, revision=public.revision)
        if isinstance(found, str):
            return Path(found)
    raise ConfigError(
        f"{key}.weights: got none, and {config.name!r} is not in the cache of Hugging Face ({constants.HF_HUB_CACHE}); "
        f"{public.way} and give {key}.weights=PATH, or take {key}.name={without}, which needs none"
    )


class _Published(NamedTuple):
    """Where the weights of a model can be had."""

    repository: str
    files: tuple[str, ...]
    revision: str | None
    way: str  # what a person does to have them


def _published(config: BackboneConfig, key: str) -> _Published:
    """What the library says of where its weights lie; it asks nobody.

    Raises:
        ConfigError: the library has no such model.
    """
    check_known(config, key)
    files: tuple[str, ...]
    if config.kind == "timm":
        import timm

        cfg = timm.get_pretrained_cfg(config.rest)
        place, url = getattr(cfg, "hf_hub_id", None) or "", getattr(cfg, "url", None)
        named = getattr(cfg, "hf_hub_filename", None)
        files = (named,) if named else ("model.safetensors", "pytorch_model.bin")
    else:
        import open_clip

        tag = open_clip.get_pretrained_cfg(*config.clip) or {}
        place, url = str(tag.get("hf_hub") or ""), tag.get("url")
        if place.count("/") == 2:  # OWNER/NAME/ or OWNER/NAME/FILE
            place, _, named = place.rpartition("/")
            files = (named,) if named else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        else:
            files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    repository, _, revision = place.partition("@")
    if repository:
        way = f"fetch it (hf download {repository} {files[0]}) or any file of its weights"
    else:
        way = f"fetch {url}" if url else "its library names no place; take a file of its weights"
    return _Published(repository, files if repository else (), revision or None, way)


def check_known(config: BackboneConfig, key: str) -> None:
    """The library has such a model.

    Raises:
        ConfigError: it has none.
    """
    if config.kind == "timm":
        import timm

        if not timm.is_model(config.rest):
            raise ConfigError(f"{key}.name: got {config.name!r}; timm {timm.__version__} has no model {config.rest!r}")
    if config.kind == "open_clip":
        import open_clip

        name, tag = config.clip
        if name not in open_clip.list_models():
            raise ConfigError(f"{key}.name: got {config.name!r}; open_clip has no model {name!r}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tags and not open_clip.get_pretrained_cfg(name, tag):
            raise ConfigError(
                f"{key}.name: got {config.name!r}; a tag says how pictures are shown, also with weights of your own; "
                f"allowed for {name}: {', '.join(tags)}"
            )


def weights_digest(config: BackboneConfig, key: str) -> str:
    """sha256 of the weights, hex."""
    return file_sha256(weights_file(config, key), key=f"{key}.weights")


def file_sha256(path: str | Path, *, key: str) -> str:
    """sha256 of a file of weights, hex. It is read once a process, for as long as it stays the same.

    Raises:
        ConfigError: there is no such file; one line that names ``key``.
    """
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise ConfigError(
            f"{key}: got {str(path)!r}, which cannot be read ({error.strerror}); give the path of a file"
        ) from None
    return _file_digest(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=16)
def _file_digest(path: str, mtime_ns: int, num_bytes: int) -> str:
    del mtime_ns, num_bytes  # part of the key only
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
