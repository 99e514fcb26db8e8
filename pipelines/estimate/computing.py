"""What a stage computes, in units that ``rates.yaml`` has a rate for: rows, passes of a model, products of vectors.

Most stages go through their rows once, at the rate ``stages.NAME``. Those that do something else stand here by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from curation.dedup.copydescriptor import WEIGHT_FREE
from curation.represent.embed import HANDMADE
from curation.stage import Stage
from pipelines.estimate.scale import Scale
from training.config import ARCHITECTURES

_CLASS_PASS_PX = 320  # of NudeNet, for explicit classes
_MOST_ENLARGED = 2  # its input sizes above so many times the longest side are left out, the smallest apart
_ITERATIONS_OF_FAISS = 20

Uses = tuple["Use", ...]


@dataclass(frozen=True)
class Use:
    """So much of what one rate is of."""

    rate: str
    amount: float
    on_gpu: bool = False


def uses_of(scale: Scale, stage: Stage, rows: float) -> Uses:
    """What a stage computes on so many rows."""
    special = _SPECIAL.get(stage.name)
    return (Use(f"stages.{stage.name}", rows),) if special is None else special(scale, stage, rows)


# Pictures


def _fetch(scale: Scale, stage: Stage, rows: float) -> Uses:
    visited = scale.flow.web[0]
    return Use("stages.fetch", visited), Use("fetch.local", rows - visited)


def _look(scale: Scale, stage: Stage, rows: float) -> Uses:
    look = scale.recipe.look
    uses = [Use("stages.look", rows)]
    if look.detector == "nudenet":
        web = scale.recipe.sample_web is not None
        longest_px = scale.rates["picture.longest_px_sample_web" if web else "picture.longest_px"]
        sizes = sorted(set(look.face_input_px))
        sizes = [size for size in sizes if size == sizes[0] or size <= _MOST_ENLARGED * longest_px]
        passes = sum((size / _CLASS_PASS_PX) ** 2 for size in (_CLASS_PASS_PX, *sizes))
        on_gpu = stage.resources.gpus > 0 and bool(sizes)  # LookConfig.on_gpu
        uses.append(Use("look.nudenet_gpu" if on_gpu else "look.nudenet", rows * passes, on_gpu))
    if look.yunet is not None:
        uses.append(Use("look.yunet", rows * sum(scale**2 for scale in look.yunet_scales)))
    return tuple(uses)


def _opinion(scale: Scale, stage: Stage, rows: float) -> Uses:
    return _network(scale, stage, rows, scale.recipe.opinion) if rows else (Use("stages.opinion", 0.0),)


def _describe(scale: Scale, stage: Stage, rows: float) -> Uses:
    if scale.recipe.descriptor.kind == WEIGHT_FREE:
        return Use("stages.describe", rows), Use("small.decode", rows)
    return _network(scale, stage, rows, scale.recipe.descriptor)


def _embed(scale: Scale, stage: Stage, rows: float) -> Uses:
    if scale.recipe.embed.name == HANDMADE:
        return (Use("stages.embed", rows),)
    return _network(scale, stage, rows, scale.recipe.embed)


def _network(scale: Scale, stage: Stage, rows: float, model: _Model) -> Uses:
    """Pictures decoded and shown to a network."""
    on_gpu = stage.resources.gpus > 0
    gflop = vit_gflop(model.name, getattr(model, "size_px", None))
    if gflop is None:
        gflop = scale.rates[scale.rates.of_model("model", model.name)]
    rate = ("net.gpu" if on_gpu else "net.cpu") + ("" if model.precision == "fp32" else "_low")
    return Use("small.decode", rows), Use(rate, rows * gflop, on_gpu)


def _fit_quantiser(scale: Scale, stage: Stage, rows: float) -> Uses:
    products = _gflop(rows, scale.recipe.edges.num_lists, scale.copy_dim) * _ITERATIONS_OF_FAISS
    return Use("stages.fit_quantiser", rows), Use("gemm.faiss", products)


def _edges(scale: Scale, stage: Stage, rows: float) -> Uses:
    config, dim = scale.recipe.edges, scale.copy_dim
    looks, reference_looks = scale.looks(rows)
    products = _gflop(looks + reference_looks, rows / config.num_lists, dim)
    uses = [
        Use("stages.edges", (looks + reference_looks) * 2 * dim / 1000),
        _product("gemm.join", products, stage),
    ]
    if config.verify != "none":
        uses.append(Use("edges.check", rows * config.verify_nearest))
    return tuple(uses)


def _fit_kmeans(scale: Scale, stage: Stage, rows: float) -> Uses:
    config = scale.recipe.cluster
    products = _gflop(rows, config.num_clusters, scale.dim) * config.iterations
    return Use("stages.fit_kmeans", rows * config.iterations), _product("gemm.bf16", products, stage)


def _fit_hierarchy(scale: Scale, stage: Stage, rows: float) -> Uses:
    config, below = scale.recipe.hierarchy, rows
    gone = products = 0.0
    for level in config.levels:
        fits = config.iterations * (1 + level.resampling_steps)
        gone += below * fits
        products += _gflop(below, level.num_clusters, scale.dim) * fits
        below = level.num_clusters
    return Use("stages.fit_hierarchy", gone), Use("gemm.bf16", products)


def _cluster(scale: Scale, stage: Stage, rows: float) -> Uses:
    products = _gflop(rows, scale.recipe.cluster.num_clusters, scale.dim)
    return Use("stages.cluster", rows), _product("gemm.bf16", products, stage)


def _semantic_duplicates(scale: Scale, stage: Stage, rows: float) -> Uses:
    products = _gflop(rows, rows / scale.recipe.cluster.num_clusters, scale.dim)
    return Use("stages.semantic_duplicates", rows), Use("gemm.bf16", products)


def _candidates(scale: Scale, stage: Stage, rows: float) -> Uses:
    """Each block of queries goes through the pool; so does the sample for the recall, and each draw."""
    recipe, passes, products = scale.recipe, 0, 0.0
    searched = min(1.0, recipe.retrieve.probes / recipe.cluster.num_clusters)
    for name, query in recipe.queries.items():
        if query.mode == "sample":
            num = scale.flow.counts[name].rows
            recall = min(num, recipe.retrieve.recall_queries)
            passes += scale.blocks_of(name) + (recall > 0)
            products += _gflop(num, rows * searched, scale.dim) + _gflop(recall, rows, scale.dim)
        elif query.mode != "as_is":
            passes += 1
    return Use("stages.candidates", rows * passes), _product("gemm.lists", products, stage)


# Models


class _Model(Protocol):
    """Section of a recipe that names a model."""

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str: ...


def vit_gflop(name: str, size_px: int | None) -> float | None:
    """GFLOP of one picture through a vision transformer whose name says what it is; None where it does not.

    A block of width d takes 24 d^2 a token and, for N tokens, 4 N d more of attention.
    """
    found = re.search(r"(vit_(?:tiny|small|base|large|huge|giant2))_patch(\d+)(?:_\w*?(\d{3}))?", name)
    if found is None or found[1] not in ARCHITECTURES:
        return None
    dim, num_blocks, _ = ARCHITECTURES[found[1]]
    side = (size_px or int(found[3] or 224)) // int(found[2])
    num_tokens = side * side + 1
    return num_blocks * num_tokens * (24 * dim**2 + 4 * num_tokens * dim) / 1e9


def _gflop(rows: float, columns: float, dim: float) -> float:
    """Products of all of so many vectors with all of so many others."""
    return 2 * rows * columns * dim / 1e9


def _product(rate: str, amount: float, stage: Stage) -> Use:
    """Products, on the GPU where the stage has one."""
    return Use("gemm.gpu", amount, on_gpu=True) if stage.resources.gpus else Use(rate, amount)


_SPECIAL: dict[str, Callable[[Scale, Stage, float], Uses]] = {
    "fetch": _fetch,
    "look": _look,
    "opinion": _opinion,
    "describe": _describe,
    "fit_quantiser": _fit_quantiser,
    "edges": _edges,
    "embed": _embed,
    "fit_kmeans": _fit_kmeans,
    "fit_hierarchy": _fit_hierarchy,
    "cluster": _cluster,
    "semantic_duplicates": _semantic_duplicates,
    "candidates": _candidates,
}
