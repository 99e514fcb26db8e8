"""Where weights are read from: a file first, then the cache, never the network; what is missing is one line at once."""

import hashlib
import socket
import time
from pathlib import Path

import pytest

from curation.backbones import BackboneConfig, open_backbone
from curation.outline import backbone_facts
from curation.weights import file_sha256, weights_digest, weights_file
from training.config import ConfigError

torch = pytest.importorskip("torch")
VIT = "test_vit.r160_in1k"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of Hugging Face; its client is told nothing of being offline."""
    import huggingface_hub.constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch) -> list[object]:
    """What was to be looked up or connected to; every such try is refused."""
    record: list[object] = []

    def refuse(*address: object, **more: object) -> None:
        record.append(address)
        raise OSError("no test asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return record


def put(cache: Path, repository: str, file: str, path: Path) -> Path:
    """A file where the client of the hub keeps it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    place = folder / "snapshots" / "0123" / file
    place.parent.mkdir(parents=True)
    place.write_bytes(path.read_bytes())
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    return place


@pytest.fixture
def vit(tmp_path) -> Path:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model(VIT).state_dict(), str(tmp_path / "vit.safetensors"))
    return tmp_path / "vit.safetensors"


def test_a_model_in_the_cache_is_opened_without_the_network(cache, asked, vit):
    config = BackboneConfig(name=f"timm:{VIT}")
    place = put(cache, "timm/test_vit.r160_in1k", "model.safetensors", vit)
    assert weights_file(config, "embed") == place
    facts = backbone_facts(config)
    assert (facts.dim, facts.takes, facts.license, facts.is_cached) == (64, "160 px", "apache-2.0", True)
    assert facts.cells("cuda")[1:4] == ("160 px -> 64", "fp32 cuda", "apache-2.0")
    assert facts.cells("cpu")[4].startswith(f"in the Hugging Face cache: {place} (")
    assert facts.cells("cpu")[4].endswith(f"sha256 {hashlib.sha256(vit.read_bytes()).hexdigest()[:8]})")
    assert open_backbone(config).dim == 64
    assert weights_file(BackboneConfig(name=f"timm:{VIT}", weights=str(vit)), "embed") == vit  # a file comes first
    assert asked == []
    with pytest.raises(OSError, match="no test asks the network"):
        socket.create_connection(("127.0.0.1", 9))
    assert asked != []


def test_a_file_that_an_open_clip_tag_names_is_found(cache, asked, vit):
    config = BackboneConfig(name="open_clip:ViTamin-S/datacomp1b")
    with pytest.raises(ConfigError, match=r"\(hf download jienengchen/ViTamin-S pytorch_model.bin\)"):
        weights_file(config, "embed")
    place = put(cache, "jienengchen/ViTamin-S", "pytorch_model.bin", vit)
    assert weights_file(config, "embed") == place
    assert asked == []


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet50", None, r"embed.name: got 'resnet50', allowed: hog-thumb, timm:NAME"),
        ("open_clip:ViT-B-32", None, r"embed.name: got 'open_clip:ViT-B-32', allowed: .*open_clip:NAME/TAG"),
        ("timm:vit_nowhere", None, r"embed.name: got 'timm:vit_nowhere'; timm .* has no model 'vit_nowhere'"),
        ("open_clip:No/tag", None, r"embed.name: got 'open_clip:No/tag'; open_clip has no model 'No'"),
        ("open_clip:ViT-B-32/opanai", None, r"a tag says how .*; allowed for ViT-B-32: openai, laion400m_e31"),
        ("timm:resnet10t", "/none/w.pt", r"embed.weights: got '/none/w.pt', which is no file; give the path"),
        ("checkpoint:/none/t.st", None, r"embed.name: got '/none/t.st', which is no file"),
        (
            "timm:resnet10t",
            None,
            r"embed.weights: got none, and 'timm:resnet10t' is not in the cache of Hugging Face \(.*cache\); fetch it "
            r"\(hf download timm/resnet10t.c3_in1k model.safetensors\) or any file of its weights and give "
            r"embed.weights=PATH, or take embed.name=hog-thumb, which needs none",
        ),
        ("timm:gcvit_tiny", None, r"fetch https://github.com/\S+ and give embed.weights=PATH"),
        (
            "open_clip:ViT-B-32/laion2b_s34b_b79k",
            None,
            r"\(hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K open_clip_model.safetensors\)",
        ),
    ],
)
def test_bad_names_are_one_line_at_once(cache, asked, name, weights, message):
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as caught:
        weights_file(BackboneConfig(name=name, weights=weights), "embed")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - started < 20
    assert asked == []


def test_digest_is_of_the_bytes(vit, tmp_path):
    config = BackboneConfig(name=f"timm:{VIT}", weights=str(vit))
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(vit.read_bytes())
    assert weights_digest(config, "embed") == weights_digest(config.model_copy(update={"weights": str(copy)}), "embed")
    copy.write_bytes(vit.read_bytes() + b" ")
    assert weights_digest(config, "embed") != weights_digest(config.model_copy(update={"weights": str(copy)}), "embed")


def test_digest_of_a_file_that_changes_or_is_not_there(tmp_path):
    path = tmp_path / "weights"
    for data in (b"one", b"four"):
        path.write_bytes(data)
        assert file_sha256(path, key="k") == file_sha256(str(path), key="k") == hashlib.sha256(data).hexdigest()
    path.unlink()
    with pytest.raises(ConfigError, match=r"^descriptor.weights: got '.*weights', which cannot be read \(No such file"):
        file_sha256(path, key="descriptor.weights")
