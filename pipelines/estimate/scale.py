"""A recipe at the size that it has: rows, vectors and tasks of each stage."""

from __future__ import annotations

import math

from curation.dedup.copydescriptor import WEIGHT_FREE
from curation.ingest.screen import num_ranges_of
from curation.represent.embed import HANDMADE
from curation.represent.fit_kmeans import AT_ONCE, piece_rows
from curation.retrieve.candidates import BLOCK_QUERIES
from curation.retrieve.retrieve import GROUP_SHARDS, MAX_GROUPS
from curation.schema import VERDICTS
from curation.stage import ShardStage, Stage
from pipelines.curate import CurateRecipe
from pipelines.estimate.flow import LINES, Flow
from pipelines.estimate.rates import Rates

FITS = ("fit_pca_hash", "fit_descriptor", "fit_quantiser", "fit_embedder", "fit_kmeans", "fit_hierarchy")
_KEYS_IN_ORDER = 1 << 21  # of url_order: rows of a part
_KEYS, _CODES = 15, 1 << 23  # of near_codes: keys of a hash at radius 4, rows of a part
# The verdict that lets rows through to a stage that names none.
_AFTER = {
    "screen_keys": LINES, "url_duplicates": LINES, "screened": LINES, "opinion": "fetched", "pca_hash": "safety",
    "near_codes": "safety", "near_pairs": "safety", "near_groups": "safety", "edges": "near", "edge_recall": "near",
    "components": "near", "leaks": "near", "semantic_duplicates": "leakage", "candidates": "semantic",
}  # fmt: skip


class Scale:
    """A recipe with its rows.

    Attributes:
        recipe: that is estimated.
        flow: its rows.
        rates: what a unit costs.
        copy_dim: numbers of a descriptor.
        dim: numbers of an embedding.
    """

    def __init__(self, recipe: CurateRecipe, flow: Flow, rates: Rates) -> None:
        self.recipe, self.flow, self.rates = recipe, flow, rates
        self.copy_dim = rates[rates.of_model("dim", recipe.descriptor.name)]
        self.dim = rates[rates.of_model("dim", recipe.embed.name)]

    # Rows

    def rows_in(self, stage: Stage) -> float:
        """Rows that a stage goes through; of a fit, pictures that it is made on."""
        recipe, flow, name = self.recipe, self.flow, stage.name
        if name in FITS:
            return self.fitted(name)
        known = {
            "queries": flow.num_queries,
            "quotas": flow.num_queries,
            "neighbours": self.num_candidates(),
            "offers": flow.num_asked,
            "export": flow.num_samples,
        }
        if recipe.near.hash != "pca_hash":
            known["pca_hash"] = 0.0
        if not recipe.opinion.is_asked:
            known["opinion"] = 0.0
        if recipe.semdedup.eps is None:
            known["semantic_duplicates"] = 0.0
        if name in known:
            return known[name]
        after = getattr(stage, "after", None) or _AFTER[name]
        more = {"query": flow.num_queries, "benchmark": flow.num_benchmarks}
        return flow.pool[after] + sum(more.get(role, 0.0) for role in stage.roles)

    def fitted(self, name: str) -> float:
        """Pictures that a fit is made on."""
        recipe, pool = self.recipe, self.flow.pool
        match name:
            case "fit_pca_hash":
                return min(recipe.pca_hash.fit_pictures, pool["safety"]) if recipe.near.hash == "pca_hash" else 0.0
            case "fit_descriptor":
                needed = recipe.descriptor.kind == WEIGHT_FREE
                return min(recipe.descriptor.fit_pictures, pool["safety"]) if needed else 0.0
            case "fit_quantiser":
                return min(recipe.edges.fit_pictures, pool["near"])
            case "fit_embedder":
                return min(recipe.embed.fit_pictures, pool["safety"]) if recipe.embed.name == HANDMADE else 0.0
            case "fit_kmeans":
                return min(recipe.cluster.sample, pool["leakage"])
            case _:
                return float(recipe.cluster.num_clusters) if recipe.hierarchy.levels else 0.0

    def rows_out(self, stage: Stage, rows: float) -> float | None:
        """Rows that go on; None of a fit, which lets none through."""
        pool, name = self.flow.pool, stage.name
        if name in FITS:
            return None
        known = {
            "candidates": self.num_candidates(),
            "neighbours": self.flow.num_asked,
            "selection": pool["selection"] + self.flow.num_as_is,
        }
        if name in VERDICTS and name not in known:
            place = VERDICTS.index(name)
            return rows - pool[VERDICTS[place - 1] if place else LINES] + pool[name]
        return known.get(name, rows)

    # Vectors

    def looks(self, rows: float) -> tuple[float, float]:
        """Lists that all pictures of the pool look into, and those that all benchmark pictures do."""
        config = self.recipe.edges
        probes, reference_probes = (min(n, config.num_lists) for n in (config.probes, config.reference_probes))
        return rows * probes, self.flow.num_benchmarks * reference_probes

    def num_groups(self) -> int:
        """Groups of shards of the pool that are searched one by one."""
        shards, size = self.flow.num_shards["pool"], GROUP_SHARDS
        while shards > size * MAX_GROUPS:
            size *= 2
        return math.ceil(shards / size)

    def num_candidates(self) -> float:
        """What all groups of the pool offer together."""
        return self.flow.num_asked * self.num_groups()

    def blocks_of(self, query_set: str) -> int:
        """Blocks of queries of a set, each of which goes through the pool; a draw is one."""
        if self.recipe.queries[query_set].mode != "sample":
            return 1
        return math.ceil(self.flow.counts[query_set].rows / BLOCK_QUERIES)

    # Tasks

    def tasks(self, stage: Stage) -> tuple[float, float]:
        """Jobs of a stage, and how many of them may run at once."""
        recipe, flow = self.recipe, self.flow
        if isinstance(stage, ShardStage):
            num = float(sum(flow.num_shards[role] for role in stage.roles))
            return num, num
        shards, groups, lists = flow.num_shards["pool"], self.num_groups(), recipe.edges.num_lists
        fitted, iterations = self.fitted("fit_kmeans"), recipe.cluster.iterations
        pieces = 1 if fitted <= AT_ONCE else math.ceil(fitted / piece_rows(recipe.cluster.num_clusters))
        blocks = max(1, sum(self.blocks_of(name) for name in flow.asked))
        codes = math.ceil(flow.pool["safety"] * min(_KEYS, recipe.near.key_ranges) / _CODES)
        addresses = math.ceil(flow.pool[LINES] / _KEYS_IN_ORDER)
        ranges = num_ranges_of(int(flow.pool[LINES]), recipe.screen.memory_mb * 1_000_000)
        tars = max(1, math.ceil(flow.num_samples / recipe.export.samples_per_tar))
        known: dict[str, tuple[float, float]] = {
            "url_duplicates": (2 * addresses + ranges, min(addresses, ranges)),
            "near_codes": (codes, codes),
            "near_pairs": (recipe.near.key_ranges, recipe.near.key_ranges),
            "edges": (2 * lists + shards, 2 * lists),
            "edge_recall": (2 + groups, groups),
            "components": (2, 2),
            "leaks": (2, 2),
            "fit_kmeans": (1 if pieces == 1 else (pieces + 1) * (iterations + 1), pieces),
            "semantic_duplicates": (0, 1) if recipe.semdedup.eps is None else (shards, shards),
            "candidates": (blocks * groups, blocks * groups),
            "neighbours": (blocks, blocks),
            "export": (tars, tars),
        }
        return known.get(stage.name, (1, 1))
