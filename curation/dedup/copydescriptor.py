"""Copy descriptors by name: bytes of a picture in, one unit vector out.

``sift-vlad-dct``
    Weight-free. RootSIFT of the grey picture at a fixed size, aggregated (VLAD) and whitened by a PCA, joined with the
    low frequencies of its grey thumbnail. Words and whitening are fitted once on a sample of the pool. A picture and
    its mirror image have one vector, of 1,024 numbers.
``sscd:PATH``
    SSCD (Pizzi et al. 2022, arXiv:2202.10261), 512 or 1,024 numbers: a TorchScript file, or the state dict of its
    torchvision ResNet-50.
``timm:NAME``
    A timm model with weights from ``weights``; as many numbers as it has features.
``open_clip:NAME/TAG``
    The image tower of an open_clip model with weights from ``weights``, opened as an embedder is: it is shown a square
    of its own size out of the middle of a picture.

Thresholds belong to the descriptor. A descriptor without known ones needs them in the recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from curation.backbones import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig, open_backbone
from curation.weights import file_sha256
from training.config import EXECUTION, Config, ConfigError

WEIGHT_FREE = "sift-vlad-dct"
FIT_AT_LEAST = 800  # pictures: with fewer its thresholds say nothing
_ALLOWED = f"{WEIGHT_FREE}, sscd:PATH, timm:NAME, open_clip:NAME/TAG"
_PROBE_PX = 288  # a black picture, to learn how many features a model has


class Thresholds(NamedTuple):
    """Cosine at and above which two pictures are copies."""

    duplicate: float
    leakage: float


KNOWN_THRESHOLDS = {
    # DINOv2 (arXiv:2304.07193), appendix A.3.
    "sscd": Thresholds(0.60, 0.45),
    # .07 above the lowest with a precision of .99, for larger pools: make bench NAME=copies ARGS="--data DIR"
    WEIGHT_FREE: Thresholds(0.34, 0.34),
}


class DescriptorConfig(Config):
    """Which descriptor finds copies."""

    name: str = Field(WEIGHT_FREE, description=f"one of {_ALLOWED}")
    weights: str | None = Field(None, json_schema_extra=EXECUTION, description="file of timm or open_clip weights")
    duplicate_threshold: float | None = Field(None, gt=-1, lt=1, description="null: the descriptor's own")
    leakage_threshold: float | None = Field(None, gt=-1, lt=1, description="null: the descriptor's own")
    fit_pictures: int = Field(2000, ge=1, description="of sift-vlad-dct: pictures that fit words and whitening")
    fit_shards: int = Field(16, ge=1, description="first shards of the pool that they are drawn from")
    fit_at_least: int = Field(
        FIT_AT_LEAST,
        ge=1,
        description="fewer are topped up with crops of photographs that come with scikit-image; with less than "
        f"{FIT_AT_LEAST} of them cosines are higher, and the thresholds must be given",
    )
    fit_seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the products of models with weights; held against fp32 before work"
    )
    device: str = Field("cpu", pattern="^(cpu|cuda)$", json_schema_extra=EXECUTION, description="filled in")

    @property
    def kind(self) -> str:
        """sift-vlad-dct, sscd, timm or open_clip."""
        return self.name.partition(":")[0]

    @property
    def weights_path(self) -> str | None:
        """File that holds the weights; None where the descriptor has none."""
        return self.name.partition(":")[2] if self.kind == "sscd" else self.weights

    @property
    def weights_key(self) -> str:
        """Key of the recipe that names that file, for messages."""
        return "descriptor.name" if self.kind == "sscd" else "descriptor.weights"

    @property
    def backbone(self) -> BackboneConfig:
        """An open_clip model as it is opened; one picture at a time, so that no other decides its last bits."""
        return BackboneConfig(
            name=self.name, weights=self.weights, precision=self.precision, batch_size=1, device=self.device
        )

    def model_values(self) -> dict[str, Any]:
        """What decides the vectors: the name without a path, the digest of the weights, the fit; a precision if low."""
        if self.kind == WEIGHT_FREE:
            fewer = [] if self.fit_at_least == FIT_AT_LEAST else [self.fit_at_least]
            return {"name": self.name, "fit": [self.fit_pictures, self.fit_shards, self.fit_seed, *fewer]}
        name = "sscd" if self.kind == "sscd" else self.name
        path = self.weights_path
        low = {} if self.precision == "fp32" else {"precision": self.precision}
        return {"name": name, "weights_sha256": file_sha256(path, key=self.weights_key) if path else None, **low}

    def thresholds(self) -> Thresholds:
        """The recipe's thresholds, the descriptor's own where the recipe gives none.

        Raises:
            ConfigError: neither knows one.
        """
        is_poor = self.kind == WEIGHT_FREE and self.fit_at_least < FIT_AT_LEAST
        known = None if is_poor else KNOWN_THRESHOLDS.get(self.kind)
        given = {"duplicate_threshold": self.duplicate_threshold, "leakage_threshold": self.leakage_threshold}
        for key, value in given.items():
            if value is None and known is None:
                fit = f" with a fit of fewer than {FIT_AT_LEAST} pictures" if is_poor else ""
                raise ConfigError(
                    f"descriptor.{key}: got none, and none is known for {self.name!r}{fit}; allowed: a cosine between "
                    f"-1 and 1, or a descriptor with known thresholds ({', '.join(sorted(KNOWN_THRESHOLDS))}); "
                    "measure one with tests/benchmarks/copies.py"
                )
        return Thresholds(
            known.duplicate if self.duplicate_threshold is None and known else float(self.duplicate_threshold or 0),
            known.leakage if self.leakage_threshold is None and known else float(self.leakage_threshold or 0),
        )

    def check(self) -> None:
        """Refuse before any work what cannot run.

        Raises:
            ConfigError: unknown name, missing weights or thresholds, a precision that nothing is computed in.
        """
        rest = self.name.partition(":")[2]
        is_whole = all(self.backbone.clip) if self.kind == "open_clip" else bool(rest)
        if not (self.name == WEIGHT_FREE or (self.kind in ("sscd", "timm", "open_clip") and is_whole)):
            raise ConfigError(
                f"descriptor.name: got {self.name!r}, allowed: {_ALLOWED}; {WEIGHT_FREE} needs no weights"
            )
        if self.name == WEIGHT_FREE and self.precision != "fp32":
            raise ConfigError(f"descriptor.precision: got {self.precision!r}, allowed with {WEIGHT_FREE}: fp32")
        path = self.weights_path
        if self.name != WEIGHT_FREE and not (path and Path(path).is_file()):
            raise ConfigError(
                f"{self.weights_key}: got {path!r}, which is no file; allowed: a path of weights for {self.name!r}; "
                f"or set descriptor.name={WEIGHT_FREE}, which needs none"
            )
        self.thresholds()


class Descriptor(Protocol):
    """A loaded descriptor."""

    dim: int  # length of its vectors

    def vector(self, rgb: np.ndarray) -> np.ndarray:
        """RGB uint8 [H, W, 3] to a unit vector, float32 [dim]. A pure function of the pixels."""


def open_descriptor(config: DescriptorConfig, fit: dict[str, np.ndarray]) -> Descriptor:
    """Load a descriptor; ``fit`` holds the arrays that ``fit_descriptor`` stores, empty for models with weights.

    What a low precision makes of it is not looked at here: see ``curation.dedup.calibration.open_calibrated``.
    """
    config.check()
    if config.kind == WEIGHT_FREE:
        from curation.dedup.siftvlad import SiftVladDct

        return SiftVladDct(fit)
    if config.kind == "open_clip":
        return BackboneDescriptor(config.backbone)
    path, how = str(config.weights_path), {"device": config.device, "precision": config.precision}
    if config.kind == "sscd":
        return TorchDescriptor(load_sscd(path), **how)
    return TorchDescriptor(load_timm(config.name.partition(":")[2], path), **how)


def unit(features: np.ndarray) -> np.ndarray:
    """Float [D] to a unit vector, float32 [D].

    Raises:
        ValueError: a feature is no finite number.
    """
    if not np.isfinite(features).all():
        raise ValueError(
            "the descriptor gives features that are no finite numbers; allowed: descriptor.precision=fp32 and weights "
            "that are whole"
        )
    return np.asarray(features / max(float(np.linalg.norm(features)), 1e-12), np.float32)


# --- models with weights --------------------------------------------------------------------------------------------


class TorchDescriptor:
    """A torch model over 288-px pictures, one at a time: each keeps its aspect, as SSCD's README asks."""

    def __init__(self, model: Any, *, device: str, precision: str = "fp32") -> None:
        import torch

        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self.device = device
        self._kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.model = model.to(self.device).eval()
        self.dim = len(self._features(np.zeros((_PROBE_PX, _PROBE_PX, 3), np.uint8)))

    def vector(self, rgb: np.ndarray) -> np.ndarray:
        """See ``Descriptor``."""
        return unit(self._features(rgb))

    def _features(self, rgb: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(np.array(rgb, order="C")).to(self.device).permute(2, 0, 1)[None].float() / 255
            mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
            # Weights stay fp32, as those of embedders do.
            with torch.autocast(self.device, self._kind, enabled=self._kind is not None):
                features = self.model((pixels - mean) / std).flatten(1)[0].float().cpu().numpy()
        return np.asarray(features, np.float32)


class BackboneDescriptor:
    """A model that is opened as an embedder, over squares, one at a time."""

    def __init__(self, config: BackboneConfig) -> None:
        self._backbone = open_backbone(config, "descriptor")
        self.dim = self._backbone.dim

    def vector(self, rgb: np.ndarray) -> np.ndarray:
        """See ``Descriptor``."""
        return unit(self._backbone.embed(self._backbone.prepare(rgb)[None])[0])


def load_sscd(path: str) -> Any:
    """SSCD from a TorchScript file or from the state dict of its torchvision ResNet-50.

    Raises:
        ConfigError: the file is neither.
    """
    import torch

    try:
        return torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError:
        pass
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = sscd_resnet50(state["backbone.fc.weight"].shape[0])
        model.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()})
    except Exception as error:
        raise ConfigError(
            f"descriptor.name: got {path!r}, which holds neither a TorchScript model nor the state dict of SSCD's "
            f"torchvision ResNet-50 ({type(error).__name__}); give a *.torchscript.pt or *.torchvision.pt of SSCD"
        ) from None
    return model


def sscd_resnet50(dim: int) -> Any:
    """SSCD's torchvision form: ResNet-50, generalised-mean pooling with p = 3, a linear layer to ``dim``."""
    import torch
    from torchvision.models import resnet50

    class GeneralisedMean(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            mean = x.clamp(min=1e-6).pow(3.0).mean((2, 3), keepdim=True)
            return mean.pow(1.0 / 3.0)

    model = resnet50(weights=None, num_classes=dim)
    model.avgpool = GeneralisedMean()
    return model


def load_timm(name: str, path: str) -> Any:
    """A timm model without its classifier, weights from a file.

    Raises:
        ConfigError: no such model, or the file does not fit it.
    """
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=0, checkpoint_path=path)
    except Exception as error:
        raise ConfigError(
            f"descriptor: {path!r} does not load as timm:{name} ({error!s:.200}); give weights of that model"
        ) from None
