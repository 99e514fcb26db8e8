"""`lvd curate`: what a recipe holds, and the stages in their order. Read this file first.

Each stage reads tables and writes tables (``curation/schema/``); the runner does what is not done.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from curation.dedup.components import Components, Duplicates, DuplicatesConfig
from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.describe import Describe, FitDescriptor
from curation.dedup.edge_recall import EdgeRecall
from curation.dedup.edges import Edges, EdgesConfig, FitQuantiser
from curation.dedup.groups import Near, NearGroups
from curation.dedup.leakage import Leakage, LeakageConfig, Leaks
from curation.dedup.near import NearConfig, NearPairs
from curation.dedup.near_codes import NearCodes
from curation.dedup.pcahash import FitPcaHash, PcaHashConfig, PcaHashes
from curation.export.export import Export, ExportConfig
from curation.ingest.fetch import FetchConfig, Fetched, FetchStage
from curation.ingest.screen import ScreenConfig, Screened, ScreenKeys, UrlDuplicates
from curation.ingest.sources import QueryConfig, SourceConfig
from curation.represent.cluster import ClusterConfig, Clusters
from curation.represent.embed import Embed, EmbedConfig, FitEmbedder
from curation.represent.fit_kmeans import FitKmeans
from curation.represent.hierarchy import FitHierarchy, HierarchyConfig, check_levels
from curation.represent.semdedup import Semantic, SemanticDuplicates, SemdedupConfig
from curation.retrieve.candidates import Candidates
from curation.retrieve.neighbours import Neighbours
from curation.retrieve.offers import Offers
from curation.retrieve.quotas import Quotas
from curation.retrieve.retrieve import Queries, RetrieveConfig
from curation.retrieve.select import SelectConfig, Selection
from curation.safety.look import LookConfig, LookStage
from curation.safety.opinion import OpinionConfig, SecondOpinion
from curation.safety.verdict import SafetyConfig, SafetyStage
from curation.schema import ROWS_PER_SHARD_LIMIT
from curation.stage import DEFAULT_MEMORY_BYTES, Resources, Stage
from pipelines.sample_web.config import SampleWebConfig
from training.config import EXECUTION, Config


class ExecutionConfig(Config):
    """How, not what. Only ``max_shards`` changes the result: it takes less of the pool."""

    executor: Literal["auto", "inline", "ray"] = Field(
        default="auto", description="inline: one after another in this process; auto and ray: worker processes"
    )
    workers: int | None = Field(default=None, ge=1, description="CPU workers; null: one for each CPU of the cluster")
    fetchers: int = Field(default=2, ge=1, description="workers that wait on the network")
    gpu_workers: int | None = Field(default=None, ge=1, description="null: one for each GPU of the cluster")
    device: Literal["cpu", "cuda"] = "cpu"
    task_memory_mb: int = Field(
        default=DEFAULT_MEMORY_BYTES // 1_000_000,
        ge=64,
        description="what one task may hold in arrays, beside its models; a worker does one at a time",
    )
    min_free_gb: float = Field(default=1.0, ge=0, description="refuse to start with less free disk than this")
    max_shards: int | None = Field(default=None, ge=1, description="take only the first shards of the pool's sources")


class ExpectedConfig(Config):
    """Share of its rows that a verdict is expected to keep: `lvd estimate` counts on it, nothing else asks.

    Where it is null, a sample web knows, or ``pipelines/estimate/rates.yaml`` has a share for any pool (``keep.*``).
    """

    screened: float | None = Field(default=None, ge=0, le=1, description="of all lines")
    fetched: float | None = Field(default=None, ge=0, le=1, description="of addresses; local pictures are all there")
    safety: float | None = Field(default=None, ge=0, le=1)
    near: float | None = Field(default=None, ge=0, le=1)
    duplicates: float | None = Field(default=None, ge=0, le=1)
    leakage: float | None = Field(default=None, ge=0, le=1)
    semantic: float | None = Field(default=None, ge=0, le=1, description="where semdedup.eps is given")


class CurateRecipe(Config):
    """Everything that `lvd curate` needs to know."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="a run belongs to one recipe name")
    pool: str = Field(
        description="root of bytes, facts, vectors and fits; shared by recipes", json_schema_extra=EXECUTION
    )
    run: str = Field(description="root of verdicts, selection and tars", json_schema_extra=EXECUTION)
    shard_rows: int = Field(default=10_000, ge=1, le=ROWS_PER_SHARD_LIMIT, description="fixed when a pool is made")
    sample_web: SampleWebConfig | None = Field(default=None, description="build and serve a website with a known truth")
    sources: dict[str, SourceConfig] = Field(min_length=1, description="what is curated")
    queries: dict[str, QueryConfig] = Field(
        default_factory=dict, description="curated sets to be retrieved for, in order"
    )
    benchmarks: dict[str, SourceConfig] = Field(default_factory=dict, description="sets to be kept out")
    screen: ScreenConfig = ScreenConfig()
    fetch: FetchConfig = FetchConfig()
    look: LookConfig = LookConfig()
    opinion: OpinionConfig = OpinionConfig()
    safety: SafetyConfig = SafetyConfig()
    pca_hash: PcaHashConfig = PcaHashConfig()
    near: NearConfig = NearConfig()
    descriptor: DescriptorConfig = DescriptorConfig()
    edges: EdgesConfig = EdgesConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    leakage: LeakageConfig = LeakageConfig()
    embed: EmbedConfig = EmbedConfig()
    cluster: ClusterConfig = ClusterConfig()
    hierarchy: HierarchyConfig = HierarchyConfig()
    semdedup: SemdedupConfig = SemdedupConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    select: SelectConfig = SelectConfig()
    export: ExportConfig = ExportConfig()
    execution: ExecutionConfig = Field(default=ExecutionConfig(), json_schema_extra=EXECUTION)
    expected: ExpectedConfig = Field(default=ExpectedConfig(), json_schema_extra=EXECUTION)

    @model_validator(mode="after")
    def _names_are_unique(self) -> CurateRecipe:
        names = [*self.sources, *self.queries, *self.benchmarks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"the name {twice[0]!r} stands twice among sources, queries and benchmarks; names are unique"
            )
        return self

    @model_validator(mode="after")
    def _weights_leave_room(self) -> CurateRecipe:
        weights = [query.weight for query in self.queries.values() if query.weight is not None]
        if len(weights) < len(self.queries) and sum(weights) >= 1:
            without = next(name for name, query in self.queries.items() if query.weight is None)
            raise ValueError(
                f"queries: weights add up to {sum(weights):g} and {without!r} has none; give a weight to every set, or "
                "weights below 1 in all, so that the rest is left for the others"
            )
        return self

    @model_validator(mode="after")
    def _benchmarks_are_there(self) -> CurateRecipe:
        unknown = sorted(set(self.leakage.benchmarks or ()) - set(self.benchmarks))
        if unknown:
            known = ", ".join(self.benchmarks) or "none"
            raise ValueError(f"leakage.benchmarks names {unknown[0]!r}; benchmarks of the recipe: {known}")
        return self

    @model_validator(mode="after")
    def _opinions_are_judged(self) -> CurateRecipe:
        thresholds = (self.safety.opinion_drop, self.safety.opinion_clear)
        if self.opinion.is_asked and thresholds == (None, None):
            raise ValueError(
                "opinion.name asks for a second opinion, and nothing is made of it: give safety.opinion_drop, "
                "safety.opinion_clear or both; thresholds belong to the head, and none is known"
            )
        if not self.opinion.is_asked and thresholds != (None, None):
            raise ValueError(
                "safety.opinion_drop and safety.opinion_clear judge a second opinion, and opinion.name is none"
            )
        return self

    @model_validator(mode="after")
    def _levels_stand_on_the_clusters(self) -> CurateRecipe:
        if self.hierarchy.levels:
            check_levels(self.hierarchy.levels, self.cluster.num_clusters)
        return self


def build_stages(recipe: CurateRecipe) -> list[Stage]:
    """The stages of a recipe, in order. Consecutive stages by shard run one behind the other, shard by shard."""
    stages = _ordered(recipe)
    if recipe.execution.device == "cuda":
        for stage in stages:
            on_gpu = (Describe, Embed, FitKmeans, Clusters, Candidates)
            # Decoding, hashes and YuNet stay on processors: only NudeNet's passes for faces are worth a GPU.
            if isinstance(stage, LookStage) and recipe.look.detector == "nudenet" and recipe.look.face_input_px:
                stage.resources = Resources(gpus=1)
            if isinstance(stage, SecondOpinion) and recipe.opinion.is_asked:
                stage.resources = Resources(gpus=1)
            # Local features are compared on processors, and there are more of these.
            if isinstance(stage, on_gpu) or (isinstance(stage, Edges) and recipe.edges.verify == "none"):
                stage.resources = Resources(gpus=1)
    return stages


def _ordered(recipe: CurateRecipe) -> list[Stage]:
    duplicate = recipe.duplicates.resolved_threshold(recipe.descriptor, recipe.edges)
    leakage = recipe.leakage.resolved_threshold(recipe.descriptor, recipe.edges)
    return [
        # lines -> addresses that may be fetched
        ScreenKeys(recipe.screen),
        UrlDuplicates(recipe.screen),
        Screened(recipe.screen),
        # addresses -> bytes -> facts about pixels -> what is safe to keep
        FetchStage(recipe.fetch, recipe.screen),
        Fetched(recipe.fetch),
        LookStage(recipe.look),
        SecondOpinion(recipe.opinion),
        SafetyStage(recipe.safety),
        # equal and nearly equal pictures, by hash
        FitPcaHash(recipe.pca_hash, recipe.near.hash),
        PcaHashes(recipe.pca_hash, recipe.near.hash),
        NearCodes(recipe.near),
        NearPairs(recipe.near),
        NearGroups(recipe.near),
        FitDescriptor(recipe.descriptor),
        Near(recipe.near),
        # copies and leaks, by descriptor
        Describe(recipe.descriptor),
        FitQuantiser(recipe.edges),
        Edges(recipe.edges, recipe.descriptor, [name for name, query in recipe.queries.items() if query.is_checked]),
        EdgeRecall(recipe.edges, duplicate, leakage),
        Components(recipe.duplicates, recipe.descriptor, recipe.edges),
        Leaks(recipe.leakage, recipe.descriptor, recipe.edges),
        FitEmbedder(recipe.embed),
        Duplicates(recipe.duplicates, recipe.descriptor, recipe.edges),
        Leakage(recipe.leakage, recipe.descriptor, recipe.edges),
        # meaning
        Embed(recipe.embed),
        FitKmeans(recipe.cluster),
        FitHierarchy(recipe.hierarchy),
        Clusters(recipe.cluster),
        SemanticDuplicates(recipe.semdedup),
        Semantic(recipe.semdedup),
        # what the curated sets ask for
        Queries(recipe.retrieve, recipe.queries),
        Quotas(recipe.retrieve, recipe.queries),
        Candidates(recipe.retrieve, recipe.queries),
        Neighbours(recipe.retrieve, recipe.queries),
        Offers(recipe.retrieve, recipe.queries),
        Selection(recipe.select, recipe.queries, leakage),
        Export(recipe.export),
    ]
