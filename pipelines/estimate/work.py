"""What each stage does, in units that ``rates.yaml`` has a rate for: rows, passes of a model, products of vectors.

Most stages go through their rows once, at the rate ``stages.NAME``. Those that do something else stand below by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from curation.dedup.copydescriptor import WEIGHT_FREE
from curation.represent.embed import HANDMADE
from curation.represent.fit_kmeans import AT_ONCE, piece_rows
from curation.retrieve.candidates import BLOCK_QUERIES
from curation.retrieve.retrieve import GROUP_SHARDS, MAX_GROUPS
from curation.schema import VERDICTS
from curation.stage import ShardStage, Stage
from pipelines.curate import CurateRecipe
from pipelines.estimate.flow import LINES, Flow
from pipelines.estimate.rates import Rates
from training.config import ARCHITECTURES

REGISTER = "register"  # what the driver does before the first stage

# The verdict that lets rows through to a stage over all shards; a stage by shard says so itself, or stands here too.
_AFTER = {
    "screen_keys": LINES, "url_duplicates": LINES, "screened": LINES, "opinion": "fetched", "pca_hash": "safety",
    "near_codes": "safety", "near_pairs": "safety", "near_groups": "safety", "edges": "near", "edge_recall": "near",
    "components": "near", "leaks": "near", "semantic_duplicates": "leakage", "candidates": "semantic",
}  # fmt: skip
_FITS = ("fit_pca_hash", "fit_descriptor", "fit_quantiser", "fit_embedder", "fit_kmeans", "fit_hierarchy")
_OF_QUERIES = ("queries", "quotas")
_CLASS_PASS_PX = 320  # of NudeNet, for explicit classes
_MOST_ENLARGED = 2  # input sizes above so many times the longest side are left out, the smallest apart


@dataclass(frozen=True)
class Use:
    """So much of what one rate is of."""

    rate: str
    amount: float
    on_gpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one stage takes, before it is priced.

    Attributes:
        stage: its name.
        rows_in: rows that it goes through; of a fit, pictures that are fitted on.
        rows_out: rows that go on; None of a fit, which lets none through.
        uses: what it computes.
        num_jobs: parts that are committed.
        num_tasks: of these, how many may be done at once.
        on_gpu: a worker of it holds a GPU.
        read_bytes: from the two roots and from local sources.
        kept_bytes: written, and there at the end.
        scratch_bytes: written, and gone when the stage is through.
        download_bytes: from the web.
        visits: addresses that are waited for.
        memory_bytes: of a worker at its largest task.
    """

    stage: str
    rows_in: float
    rows_out: float | None
    uses: tuple[Use, ...]
    num_jobs: float = 1
    num_tasks: float = 1
    on_gpu: bool = False
    read_bytes: float = 0
    kept_bytes: float = 0
    scratch_bytes: float = 0
    download_bytes: float = 0
    visits: float = 0
    memory_bytes: float = 0


def works_of(recipe: CurateRecipe, stages: Sequence[Stage], flow: Flow, rates: Rates) -> list[Work]:
    """The work of a recipe, stage by stage, registration first."""
    scale = _Scale(recipe, flow, rates)
    lines = flow.pool[LINES] + flow.num_references
    parts = sum(flow.num_shards.values())
    registered = Work(
        stage=REGISTER,
        rows_in=lines,
        rows_out=lines,
        uses=(Use("stages.register", lines),),
        num_jobs=parts,
        read_bytes=lines * rates["bytes.register"],
        kept_bytes=lines * rates["bytes.register"] + parts * rates["bytes.part"],
        memory_bytes=1e6 * rates["memory.worker"],
    )
    return [registered, *(scale.work_of(stage) for stage in stages)]


# Models


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


class _Scale:
    """A recipe with its rows, and what each stage makes of them."""

    def __init__(self, recipe: CurateRecipe, flow: Flow, rates: Rates) -> None:
        self._recipe, self._flow, self._rates = recipe, flow, rates
        self._copy_dim = rates[f"dim.{_rate_of(rates, 'dim', recipe.descriptor.name)}"]
        self._dim = rates[f"dim.{_rate_of(rates, 'dim', recipe.embed.name)}"]
        self._special: dict[str, Callable[[Stage, float], tuple[Use, ...]]] = {
            "fetch": self._fetch,
            "look": self._look,
            "opinion": self._opinion,
            "describe": self._describe,
            "fit_quantiser": self._fit_quantiser,
            "edges": self._edges,
            "embed": self._embed,
            "fit_kmeans": self._fit_kmeans,
            "fit_hierarchy": self._fit_hierarchy,
            "cluster": self._cluster,
            "semantic_duplicates": self._semantic_duplicates,
            "candidates": self._candidates,
            "neighbours": lambda _, rows: (Use("stages.neighbours", rows),),
        }

    def work_of(self, stage: Stage) -> Work:
        """What a stage takes."""
        name, rates, flow = stage.name, self._rates, self._flow
        rows = self._rows_in(stage)
        uses = self._special.get(name, lambda _, rows: (Use(f"stages.{name}", rows),))(stage, rows)
        num_jobs, num_tasks = self._tasks(stage)
        kept, scratch = self._written(name, rows)
        pictures = flow.web[1] if name == "fetch" else 0.0
        return Work(
            stage=name,
            rows_in=rows,
            rows_out=self._rows_out(stage, rows),
            uses=uses,
            num_jobs=num_jobs,
            num_tasks=num_tasks,
            on_gpu=stage.resources.gpus > 0,
            read_bytes=self._read(name, rows),
            kept_bytes=kept + num_jobs * rates["bytes.part"],
            scratch_bytes=scratch,
            download_bytes=pictures * flow.picture_bytes[0],
            visits=flow.web[0] if name == "fetch" else 0.0,
            memory_bytes=1e6 * rates["memory.worker"] + self._memory(stage),
        )

    # Rows

    def _rows_in(self, stage: Stage) -> float:
        recipe, flow, name = self._recipe, self._flow, stage.name
        if name in _FITS:
            return self._fitted(name)
        if name in _OF_QUERIES:
            return flow.num_queries
        if name == "neighbours":
            return sum(flow.asked.values()) * self._num_groups()
        if name == "offers":
            return sum(flow.asked.values())
        if name == "export":
            return flow.num_samples
        idle = (
            (name == "pca_hash" and recipe.near.hash != "pca_hash")
            or (name == "opinion" and not recipe.opinion.is_asked)
            or (name == "semantic_duplicates" and recipe.semdedup.eps is None)
        )
        if idle:
            return 0.0
        after = getattr(stage, "after", None) or _AFTER[name]
        more = {"query": flow.num_queries, "benchmark": flow.num_benchmarks}
        return flow.pool[after] + sum(more.get(role, 0.0) for role in stage.roles)

    def _fitted(self, name: str) -> float:
        """Pictures that a fit is made on."""
        recipe, pool = self._recipe, self._flow.pool
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

    def _rows_out(self, stage: Stage, rows: float) -> float | None:
        pool, name = self._flow.pool, stage.name
        if name in _FITS:
            return None
        if name == "candidates":
            return sum(self._flow.asked.values()) * self._num_groups()
        if name in ("neighbours", "offers"):
            return sum(self._flow.asked.values())
        if name == "selection":
            return pool[name] + self._flow.num_as_is
        if name in pool:
            return pool[name] + rows - pool[_before(name)]
        return rows

    # What is computed

    def _fetch(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        visited = self._flow.web[0]
        return Use("stages.fetch", visited), Use("fetch.local", rows - visited)

    def _look(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        look = self._recipe.look
        uses = [Use("stages.look", rows)]
        if look.detector == "nudenet":
            web = self._recipe.sample_web is not None
            longest_px = self._rates["picture.longest_px_sample_web" if web else "picture.longest_px"]
            sizes = sorted(set(look.face_input_px))
            sizes = [size for size in sizes if size == sizes[0] or size <= _MOST_ENLARGED * longest_px]
            passes = sum((size / _CLASS_PASS_PX) ** 2 for size in (_CLASS_PASS_PX, *sizes))
            on_gpu = stage.resources.gpus > 0 and bool(sizes)  # LookConfig.on_gpu
            uses.append(Use("look.nudenet_gpu" if on_gpu else "look.nudenet", rows * passes, on_gpu))
        if look.yunet is not None:
            uses.append(Use("look.yunet", rows * sum(scale**2 for scale in look.yunet_scales)))
        return tuple(uses)

    def _opinion(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        return self._network(stage, rows, self._recipe.opinion) if rows else (Use("stages.opinion", 0.0),)

    def _describe(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        if self._recipe.descriptor.kind == WEIGHT_FREE:
            return Use("stages.describe", rows), Use("small.decode", rows)
        return self._network(stage, rows, self._recipe.descriptor)

    def _embed(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        if self._recipe.embed.name == HANDMADE:
            return (Use("stages.embed", rows),)
        return self._network(stage, rows, self._recipe.embed)

    def _network(self, stage: Stage, rows: float, model: _Model) -> tuple[Use, ...]:
        """Pictures decoded and shown to a network."""
        on_gpu = stage.resources.gpus > 0
        gflop = vit_gflop(model.name, getattr(model, "size_px", None))
        if gflop is None:
            gflop = self._rates[f"model.{_rate_of(self._rates, 'model', model.name)}"]
        rate = ("net.gpu" if on_gpu else "net.cpu") + ("" if model.precision == "fp32" else "_low")
        return Use("small.decode", rows), Use(rate, rows * gflop, on_gpu)

    def _fit_quantiser(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        products = _gflop(rows, self._recipe.edges.num_lists, self._copy_dim) * 20  # iterations of Faiss
        return Use("stages.fit_quantiser", rows), Use("gemm.faiss", products)

    def _edges(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        config, flow, dim = self._recipe.edges, self._flow, self._copy_dim
        looks, reference_looks = self._looks(rows)
        products = _gflop(looks + reference_looks, rows / config.num_lists, dim)
        uses = [
            Use("stages.edges", (looks + reference_looks) * 2 * dim / 1000),
            _product("gemm.join", products, stage),
        ]
        if config.verify != "none":
            uses.append(Use("edges.check", rows * config.verify_nearest))
        del flow
        return tuple(uses)

    def _looks(self, rows: float) -> tuple[float, float]:
        """Lists that all pictures of the pool look into, and those that all benchmark pictures do."""
        config = self._recipe.edges
        probes, reference_probes = (min(n, config.num_lists) for n in (config.probes, config.reference_probes))
        return rows * probes, self._flow.num_benchmarks * reference_probes

    def _fit_kmeans(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        config = self._recipe.cluster
        products = _gflop(rows, config.num_clusters, self._dim) * config.iterations
        return Use("stages.fit_kmeans", rows * config.iterations), _product("gemm.bf16", products, stage)

    def _fit_hierarchy(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        config, below = self._recipe.hierarchy, rows
        gone = products = 0.0
        for level in config.levels:
            fits = config.iterations * (1 + level.resampling_steps)
            gone += below * fits
            products += _gflop(below, level.num_clusters, self._dim) * fits
            below = level.num_clusters
        return Use("stages.fit_hierarchy", gone), Use("gemm.bf16", products)

    def _cluster(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        products = _gflop(rows, self._recipe.cluster.num_clusters, self._dim)
        return Use("stages.cluster", rows), _product("gemm.bf16", products, stage)

    def _semantic_duplicates(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        products = _gflop(rows, rows / self._recipe.cluster.num_clusters, self._dim)
        return Use("stages.semantic_duplicates", rows), Use("gemm.bf16", products)

    def _candidates(self, stage: Stage, rows: float) -> tuple[Use, ...]:
        """Each block of queries goes through the pool; so does the sample for the recall, and each draw."""
        recipe, passes, products = self._recipe, 0, 0.0
        searched = min(1.0, recipe.retrieve.probes / recipe.cluster.num_clusters)
        for name, query in recipe.queries.items():
            if query.mode == "sample":
                num = self._flow.counts[name].rows
                recall = min(num, recipe.retrieve.recall_queries)
                passes += math.ceil(num / BLOCK_QUERIES) + (recall > 0)
                products += _gflop(num, rows * searched, self._dim) + _gflop(recall, rows, self._dim)
            elif query.mode != "as_is":
                passes += 1
        return Use("stages.candidates", rows * passes), _product("gemm.lists", products, stage)

    def _num_groups(self) -> int:
        """Groups of shards of the pool that are searched one by one."""
        shards, size = self._flow.num_shards["pool"], GROUP_SHARDS
        while shards > size * MAX_GROUPS:
            size *= 2
        return math.ceil(shards / size)

    # Tasks

    def _tasks(self, stage: Stage) -> tuple[float, float]:
        """Jobs of a stage, and how many of them may run at once."""
        recipe, flow = self._recipe, self._flow
        shards = flow.num_shards["pool"]
        if isinstance(stage, ShardStage):
            num = float(sum(flow.num_shards[role] for role in stage.roles))
            return num, num
        match stage.name:
            case "url_duplicates":
                return recipe.screen.key_ranges, recipe.screen.key_ranges
            case "near_pairs":
                return recipe.near.key_ranges, recipe.near.key_ranges
            case "near_codes":
                num = math.ceil(flow.pool["safety"] * min(15, recipe.near.key_ranges) / 2**23)
                return num, num
            case "edges":
                return 2 * recipe.edges.num_lists + shards, 2 * recipe.edges.num_lists
            case "edge_recall":
                return 2 + self._num_groups(), self._num_groups()
            case "components" | "leaks":
                return 2, 2
            case "fit_kmeans":
                rows = self._fitted("fit_kmeans")
                pieces = 1 if rows <= AT_ONCE else math.ceil(rows / piece_rows(recipe.cluster.num_clusters))
                return 1 if pieces == 1 else (pieces + 1) * (recipe.cluster.iterations + 1), pieces
            case "candidates":
                blocks = sum(self._blocks(name) for name in flow.asked)
                return blocks * self._num_groups(), max(1, blocks * self._num_groups())
            case "neighbours":
                blocks = max(1, sum(self._blocks(name) for name in flow.asked))
                return blocks, blocks
            case "semantic_duplicates":
                return (shards, shards) if recipe.semdedup.eps is not None else (0, 1)
            case "export":
                num = math.ceil(flow.num_samples / recipe.export.samples_per_tar)
                return num, max(1, num)
            case _:
                return 1, 1

    def _blocks(self, query_set: str) -> int:
        if self._recipe.queries[query_set].mode != "sample":
            return 1
        return math.ceil(self._flow.counts[query_set].rows / BLOCK_QUERIES)

    # Bytes

    def _read(self, name: str, rows: float) -> float:
        """Bytes that a stage reads: pictures and vectors where it asks for them, and tables."""
        flow, rates, recipe = self._flow, self._rates, self._recipe
        tables = rows * rates["bytes.read"]
        vectors = {
            "fit_quantiser": self._copy_dim,
            "edge_recall": self._copy_dim,
            "fit_kmeans": self._dim * (recipe.cluster.iterations + 1),
            "cluster": self._dim,
            "semantic_duplicates": 2 * self._dim,
        }
        if name in vectors:
            return rows * vectors[name] * rates["bytes.vector"]
        if name == "edges":
            return (rows + sum(self._looks(rows))) * self._copy_dim * rates["bytes.vector"]
        if name == "candidates":
            passes = sum(self._blocks(query_set) for query_set in flow.asked)
            return rows * passes * self._dim * rates["bytes.vector"]
        if name == "fetch":
            return tables + (flow.pool["fetched"] - flow.web[1]) * flow.picture_bytes[0] + self._reference_bytes()
        if name == "look":
            return tables + flow.pool["fetched"] * flow.picture_bytes[0] + self._reference_bytes()
        if name in ("describe", "embed", "opinion", "pca_hash", "fit_descriptor", "fit_embedder", "fit_pca_hash"):
            return tables + rows * rates["picture.small"]
        if name == "export":
            return tables + _sample_bytes(flow)
        return tables

    def _reference_bytes(self) -> float:
        return self._flow.num_references * self._flow.picture_bytes[1]

    def _written(self, name: str, rows: float) -> tuple[float, float]:
        """Bytes that a stage writes and keeps, and bytes that are gone when it is through."""
        flow, rates = self._flow, self._rates
        kept = rows * rates[f"bytes.{name}"] if f"bytes.{name}" in rates else 0.0
        scratch = 0.0
        match name:
            case "fetch":
                num = flow.pool["fetched"] + flow.num_references
                kept += flow.pool["fetched"] * flow.picture_bytes[0] + self._reference_bytes()
                kept += num * rates["picture.tar"]
            case "look":
                kept += rows * (rates["picture.small"] + rates["picture.tar"])
                kept += rows * rates["picture.share_blurred"] * (rates["picture.blurred"] + rates["picture.tar"])
            case "describe":
                kept += rows * self._copy_dim * rates["bytes.vector"]
            case "embed":
                kept += rows * self._dim * rates["bytes.vector"]
            case "edges":
                scratch = sum(self._looks(rows)) * self._copy_dim * rates["bytes.vector"]
            case "candidates":
                kept = sum(flow.asked.values()) * self._num_groups() * rates["bytes.candidates"]
            case "neighbours":
                kept = sum(flow.asked.values()) * rates["bytes.neighbours"]
            case "semantic_duplicates":
                kept += rows * self._dim * rates["bytes.vector"]
            case "export":
                kept += tar_bytes_of(flow, rates)
        return kept, scratch

    # Memory

    def _memory(self, stage: Stage) -> float:
        """Bytes of the largest task of a stage, without libraries."""
        recipe, flow, rates, pool = self._recipe, self._flow, self._rates, self._flow.pool
        config = recipe.edges
        match stage.name:
            case "url_duplicates":
                return 16 * pool[LINES] / recipe.screen.key_ranges  # a key and an id
            case "near_pairs":
                return rates["memory.code"] * pool["safety"] / recipe.near.key_ranges
            case "near_groups" | "components":
                return rates["memory.node"] * pool["safety" if stage.name == "near_groups" else "near"]
            case "fit_quantiser":  # vectors twice, sha256 as they are compared
                return self._fitted(stage.name) * (8 * self._copy_dim + 256)
            case "edges":  # members of a list: their vectors in fp16 and fp32, and the lists that they look into
                members = sum(self._looks(self._rows_in(stage))) / config.num_lists
                return members * (6 * self._copy_dim + 4 * config.probes)
            case "fit_kmeans":
                rows = self._fitted(stage.name)
                at_once = rows * self._dim * 6
                return at_once if rows <= AT_ONCE else 24 * recipe.cluster.num_clusters * self._dim + 2**28
            case "cluster":
                return 8 * recipe.cluster.num_clusters * self._dim + recipe.shard_rows * self._dim * 6
            case "candidates":
                return min(1e6 * recipe.execution.task_memory_mb, pool["semantic"] * self._dim * 4)
            case "fit_descriptor":
                return 1e6 * rates["memory.fit_descriptor"] if self._fitted(stage.name) else 0.0
            case "describe":
                weight_free = recipe.descriptor.kind == WEIGHT_FREE
                return 1e6 * rates["memory.describe" if weight_free else "memory.model"]
            case "embed":
                return 0.0 if recipe.embed.name == HANDMADE else 1e6 * rates["memory.model"]
            case "opinion":
                return 1e6 * rates["memory.model"] if recipe.opinion.is_asked else 0.0
            case _:
                del flow
                return 0.0


def tar_bytes_of(flow: Flow, rates: Rates) -> float:
    """Bytes of the tars of the finished set."""
    return _sample_bytes(flow) + flow.num_samples * rates["picture.json"]


def _sample_bytes(flow: Flow) -> float:
    """Bytes of its pictures."""
    of_pool = flow.num_samples - flow.num_as_is
    return of_pool * flow.picture_bytes[0] + flow.num_as_is * flow.picture_bytes[1]


def _before(verdict: str) -> str:
    """The verdict before one, ``LINES`` before the first."""
    place = VERDICTS.index(verdict)
    return VERDICTS[place - 1] if place else LINES


def _rate_of(rates: Rates, kind: str, name: str) -> str:
    """Under which name rates of a model stand: its own, that of what stands before the colon, or ``other``."""
    for one in (name, name.partition(":")[0]):
        if f"{kind}.{one}" in rates:
            return one
    return "other"


def _gflop(rows: float, columns: float, dim: float) -> float:
    """Products of all of so many vectors with all of so many others."""
    return 2 * rows * columns * dim / 1e9


def _product(rate: str, amount: float, stage: Stage) -> Use:
    """Products, on the GPU where the stage has one."""
    return Use("gemm.gpu", amount, on_gpu=True) if stage.resources.gpus else Use(rate, amount)
