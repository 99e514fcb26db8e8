"""What a stage reads, writes and holds in memory, in bytes."""

from __future__ import annotations

from curation.dedup.copydescriptor import WEIGHT_FREE
from curation.represent.embed import HANDMADE
from curation.represent.fit_kmeans import AT_ONCE
from curation.stage import Stage
from pipelines.estimate.flow import LINES, Flow
from pipelines.estimate.rates import Rates
from pipelines.estimate.scale import Scale

_OF_SMALL = ("describe", "embed", "opinion", "pca_hash", "fit_descriptor", "fit_embedder", "fit_pca_hash")


def read_bytes(scale: Scale, name: str, rows: float) -> float:
    """Bytes that a stage reads: tables, and pictures and vectors where it asks for them."""
    flow, rates, recipe = scale.flow, scale.rates, scale.recipe
    pictures = flow.pool["fetched"] * flow.picture_bytes[0] + _reference_bytes(flow)
    small = rows * rates["picture.small"]
    passes = sum(scale.blocks_of(query_set) for query_set in flow.asked)
    numbers = {
        "fit_quantiser": rows * scale.copy_dim,
        "edges": (rows + sum(scale.looks(rows))) * scale.copy_dim,
        "edge_recall": rows * scale.copy_dim,
        "fit_kmeans": rows * scale.dim * (recipe.cluster.iterations + 1),
        "cluster": rows * scale.dim,
        "semantic_duplicates": rows * scale.dim * 2,
        "candidates": rows * scale.dim * passes,
    }
    files = {
        "fetch": pictures - flow.web[1] * flow.picture_bytes[0],
        "look": pictures,
        "export": _sample_bytes(flow),
        **dict.fromkeys(_OF_SMALL, small),
    }
    vectors = numbers.get(name, 0.0) * rates["bytes.vector"]
    return rows * rates["bytes.read"] + vectors + files.get(name, 0.0)


def written_bytes(scale: Scale, name: str, rows: float) -> tuple[float, float]:
    """Bytes that a stage writes and keeps, and bytes that are gone when it is through."""
    flow, rates, recipe = scale.flow, scale.rates, scale.recipe
    vector, copy_vector = scale.dim * rates["bytes.vector"], scale.copy_dim * rates["bytes.vector"]
    stored = {"candidates": scale.num_candidates(), "neighbours": flow.num_asked}.get(name, rows)
    num_pictures = flow.pool["fetched"] + flow.num_references
    blurred = rates["picture.share_blurred"] * (rates["picture.blurred"] + rates["picture.tar"])
    more = {
        "fetch": flow.pool["fetched"] * flow.picture_bytes[0]
        + _reference_bytes(flow)
        + num_pictures * rates["picture.tar"],
        "look": rows * (rates["picture.small"] + rates["picture.tar"] + blurred),
        "describe": rows * copy_vector,
        "fit_descriptor": rates["fit.descriptor"] if name == "fit_descriptor" and rows else 0.0,
        "fit_embedder": rates["fit.embedder"] if name == "fit_embedder" and rows else 0.0,
        "fit_quantiser": recipe.edges.num_lists * 4 * scale.copy_dim,
        "embed": rows * vector,
        "fit_kmeans": recipe.cluster.num_clusters * 4 * scale.dim,
        "semantic_duplicates": rows * vector,
        "export": tar_bytes_of(flow, rates),
    }
    table = stored * rates[f"bytes.{name}"] if f"bytes.{name}" in rates else 0.0
    scratch = sum(scale.looks(rows)) * copy_vector if name == "edges" else 0.0
    return table + more.get(name, 0.0), scratch


def memory_bytes(scale: Scale, stage: Stage) -> float:
    """Bytes of the largest task of a stage, without libraries."""
    recipe, rates, pool, rows = scale.recipe, scale.rates, scale.flow.pool, scale.rows_in(stage)
    edges, clusters = recipe.edges, recipe.cluster.num_clusters
    members = sum(scale.looks(rows)) / edges.num_lists  # of a list, and those that look into it
    task = 1e6 * recipe.execution.task_memory_mb
    model = 1e6 * rates["memory.model"]
    known = {
        "url_duplicates": min(1e6 * recipe.screen.memory_mb, 96 * pool[LINES]),  # bytes of a key while it is compared
        "near_pairs": rates["memory.code"] * pool["safety"] / recipe.near.key_ranges,
        "near_groups": rates["memory.node"] * pool["safety"],
        "fit_descriptor": 1e6 * rates["memory.fit_descriptor"] if rows else 0.0,
        "describe": 1e6 * rates["memory.describe"] if recipe.descriptor.kind == WEIGHT_FREE else model,
        "fit_quantiser": rows * (8 * scale.copy_dim + 256),  # vectors twice, sha256 as they are compared
        "edges": members * (6 * scale.copy_dim + 4 * edges.probes),  # fp16 and fp32, and the lists of each
        "components": rates["memory.node"] * pool["near"],
        "opinion": model if rows else 0.0,
        "embed": 0.0 if recipe.embed.name == HANDMADE else model,
        "fit_kmeans": rows * scale.dim * 6 if rows <= AT_ONCE else 24 * clusters * scale.dim + 2**28,
        "cluster": 8 * clusters * scale.dim + recipe.shard_rows * scale.dim * 6,
        "candidates": min(task, rows * scale.dim * 4),
    }
    return known.get(stage.name, 0.0)


def tar_bytes_of(flow: Flow, rates: Rates) -> float:
    """Bytes of the tars of the finished set."""
    return _sample_bytes(flow) + flow.num_samples * rates["picture.json"]


def _sample_bytes(flow: Flow) -> float:
    """Bytes of its pictures."""
    of_pool = flow.num_samples - flow.num_as_is
    return of_pool * flow.picture_bytes[0] + flow.num_as_is * flow.picture_bytes[1]


def _reference_bytes(flow: Flow) -> float:
    """Pictures of query sets and benchmarks."""
    return flow.num_references * flow.picture_bytes[1]
