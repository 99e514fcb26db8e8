"""One command on one recipe: preflight, leases, registration, plan, work, and what is said at the end."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from curation.export.objects import TARS, parts_of, unnamed_objects
from curation.export.purge import pending
from curation.ingest.crawl import Crawler
from curation.ingest.fetch import FetchStage
from curation.ingest.takedown import Rules as Takedowns
from curation.ingest.takedown import known_rules
from curation.lease import Lease, check_lease, lease_token
from curation.retrieve.plan import format_plan, planned
from curation.retrieve.quotas import num_qualifying
from curation.safety.look import LookStage
from curation.safety.originals import MARK as PURGED_BY
from curation.schema import Part
from curation.stage import Stage
from curation.store import LocalStore, Store, open_store, put_text, read_footer
from pipelines.crawl import crawl_pages, crawls_to_do, refusing
from pipelines.curate import CurateRecipe, build_stages
from pipelines.drive import Driver, PlanLine, Summary, plan
from pipelines.models import describe_models
from pipelines.plan import Ledger
from pipelines.preflight import Options, absolute, check_sources, named_sources, preflight
from pipelines.recipe import dump_recipe
from pipelines.registration import register_sources
from pipelines.removals import remove_pages, take_down, take_out_originals
from pipelines.runner import Executor, InlineExecutor
from pipelines.scratch import scratch_folder, sweep_scratch
from pipelines.work import Where, peak_bytes
from training.config import ConfigError

STATE = "state.json"
RECIPE = "recipe.yaml"
PAGES_PURGED = "pages_purged.txt"  # the facts that the last pages of a run were made with, or later ones
_BEFORE_FETCHED = ("screen_keys", "url_duplicates", "screened", "fetch")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command came to."""

    summary: Summary
    lines: list[PlanLine]
    wall_s: float
    driver_peak_bytes: int
    folders: dict[str, str]


def curate(recipe: CurateRecipe, options: Options, say: Callable[[str], None]) -> Outcome:
    """Do what is not done of a recipe.

    What look has met of the takedown list by its hash leaves the pool afterwards, and the verdicts follow.
    """
    _check_originals(recipe, options)
    if _purges_originals(recipe, options):
        preflight(recipe, build_stages(recipe), options)
        looked = _curate(recipe, replace(options, until=LookStage.name), say)
        later = replace(options, redo=_after_look(recipe, options), retry=())
        outcome = _joined(looked, _curate(recipe, later, say, is_looked_at=True))
    else:
        outcome = _curate(recipe, options, say)
    if options.dry_run or not outcome.summary.num_jobs or not pending(open_store(recipe.pool)):
        return outcome
    return _joined(outcome, _curate(recipe, replace(options, redo=(), retry=()), say))


def _joined(first: Outcome, second: Outcome) -> Outcome:
    """Two passes as one."""
    second.summary.add(first.summary)
    seen = {line.stage for line in first.lines}
    lines = [*first.lines, *(line for line in second.lines if line.stage not in seen)]
    return replace(second, lines=lines, wall_s=first.wall_s + second.wall_s)


def _purges_originals(recipe: CurateRecipe, options: Options) -> bool:
    """Whether originals go in this command: look is through before anything that follows begins."""
    names = [stage.name for stage in build_stages(recipe)]
    is_reached = options.until not in names[: names.index(LookStage.name)]
    return recipe.look.purge_originals and is_reached and not options.dry_run


def _check_originals(recipe: CurateRecipe, options: Options) -> None:
    """Pictures whose originals are gone cannot be looked at again: their facts are not thrown away for nothing."""
    if LookStage.name not in options.redo or FetchStage.name in options.redo:
        return
    pool = open_store(recipe.pool)
    for part in parts_of(pool, "images"):
        footer = read_footer(pool, part)
        if footer is not None and PURGED_BY in footer.inputs:
            raise ConfigError(
                "--redo look: originals were purged from this pool (look.purge_originals), so what shows a face cannot "
                "be looked at again; fetch it again as well: --redo fetch --redo look"
            )


def _take_out_originals(
    recipe: CurateRecipe, ledger: Ledger, scratch: Path, *, check: Callable[[], None], say: Callable[[str], None]
) -> None:
    """Originals with faces of the shards that this command looked at; once, the pages that a run made before."""
    pool, run = ledger.stores["pool"], ledger.stores["run"]
    folder = LookStage(recipe.look).facts_folder("detections")
    if not run.exists(PAGES_PURGED) or run.read(PAGES_PURGED).decode() != folder:
        remove_pages(run)
        put_text(run, PAGES_PURGED, folder, scratch)
    shards = ledger.shards(*LookStage.roles)
    take_out_originals(pool, shards, folder, scratch, check=check, say=say)


def _after_look(recipe: CurateRecipe, options: Options) -> tuple[str, ...]:
    """Stages to be made again that the first pass has not made."""
    names = [stage.name for stage in build_stages(recipe)]
    later = names[names.index(LookStage.name) + 1 :]
    return tuple(name for name in options.redo if name in later)


def _curate(
    recipe: CurateRecipe, options: Options, say: Callable[[str], None], *, is_looked_at: bool = False
) -> Outcome:
    started = time.monotonic()
    stages = build_stages(recipe)
    preflight(recipe, stages, options)
    if options.until:
        stages = stages[: [stage.name for stage in stages].index(options.until) + 1]
    pool, run = open_store(recipe.pool), open_store(recipe.run)
    before = check_run(recipe, run)
    with ExitStack() as stack:
        sweep_scratch()
        scratch = stack.enter_context(scratch_folder())
        leases = take_leases(stack, (pool, run), scratch) if not options.dry_run else ("", "")

        def check() -> None:
            check_lease(pool, leases[0])
            check_lease(run, leases[1])

        take_down(pool, run, scratch, check, say, dry_run=options.dry_run)
        _make_ready(recipe, pool, options, scratch, check=check, say=say)
        unregistered: list[Part] = []
        sources = register_sources(recipe, pool, scratch, unregistered if options.dry_run else None, say)
        mine = {name for name, _, _ in named_sources(recipe)}
        ledger = Ledger(
            stores={"pool": pool, "run": run},
            stages=stages,
            registered=sources,
            source_ids={row["name"]: row["source_id"] for row in sources.to_pylist() if row["name"] in mine},
            redo=frozenset(options.redo),
            retry=options.retried(),
            max_shards=recipe.execution.max_shards,
            last_folders=before.get("folders", {}),
            unregistered=frozenset(unregistered),
        )
        if is_looked_at:
            _take_out_originals(recipe, ledger, scratch, check=check, say=say)
        lines = plan(ledger, stages)
        _say_before_work(recipe, stages, ledger, lines, say, dry_run=options.dry_run)
        if options.dry_run:
            if recipe.look.purge_originals:
                say(
                    "originals: once look is through, those with a face, with further frames or alpha, and files that "
                    "do not decode leave the pool"
                )
            return _outcome(Summary(), lines, started, ledger)
        put_text(run, RECIPE, dump_recipe(recipe), scratch)  # also for what changes no table, as a weight does
        if not any(line.num_undone for line in lines):
            _remove_tars(run, stages)
            return _outcome(Summary(), lines, started, ledger)
        for text in describe_plan(lines):
            say(text)
        if recipe.sample_web is not None and any(line.num_undone for line in lines if line.stage in _BEFORE_FETCHED):
            recipe = stack.enter_context(_served(recipe))
        where = Where(
            pool=absolute(recipe.pool),
            run=absolute(recipe.run),
            pool_token=leases[0],
            run_token=leases[1],
            recipe=located(recipe).model_dump_json(),
            roles=ledger.roles(),
            memory_bytes=recipe.execution.task_memory_mb * 1_000_000,
        )

        put_text(run, STATE, _state(recipe, ledger, before), scratch)  # so that status sees a run that lives
        driver = Driver(ledger, stages, lambda: make_executor(recipe, where), say, check)
        try:
            summary = driver.run()
            check()
            pool.sweep()  # what a worker that died left behind
            run.sweep()
            sweep_scratch()
            _remove_tars(run, stages)
            if summary.num_jobs and known_rules(pool):
                remove_pages(run)
        finally:
            if lease_token(run) == leases[1]:
                put_text(run, STATE, _state(recipe, ledger, before), scratch)
        return _outcome(summary, lines, started, ledger)


def _outcome(summary: Summary, lines: list[PlanLine], started: float, ledger: Ledger) -> Outcome:
    return Outcome(
        summary=summary,
        lines=lines,
        wall_s=time.monotonic() - started,
        driver_peak_bytes=peak_bytes(),
        folders=dict(ledger.folders),
    )


def make_executor(recipe: CurateRecipe, where: Where) -> Executor:
    """The executor that a recipe asks for."""
    execution = recipe.execution
    if execution.executor == "inline":
        return InlineExecutor(where)
    from pipelines.runner import RayExecutor

    return RayExecutor(where, workers=execution.workers, fetchers=execution.fetchers, gpu_workers=execution.gpu_workers)


def _say_before_work(
    recipe: CurateRecipe,
    stages: Sequence[Stage],
    ledger: Ledger,
    lines: Sequence[PlanLine],
    say: Callable[[str], None],
    *,
    dry_run: bool,
) -> None:
    """Which models will be read, and what the query sets ask for; nothing where nothing is left to do."""
    is_work = any(line.num_undone for line in lines)
    if is_work:
        for text in describe_models(stages, lines, recipe.execution.device):
            say(text)
    if is_work or dry_run:
        for text in describe_queries(recipe, ledger, lines):
            say(text)


def describe_queries(recipe: CurateRecipe, ledger: Ledger, lines: Sequence[PlanLine]) -> Iterator[str]:
    """What the query sets ask for, as text; how many clusters hold enough queries once the stage ``quotas`` is done."""
    rows = ledger.sources().to_pylist()
    images = {row["name"]: row["num_rows"] for row in rows if row["role"] == "query"}
    counted = any(line.stage == "quotas" and line.known and not line.num_undone for line in lines)
    asked = planned(
        recipe.queries,
        images=images,
        qualifying=num_qualifying(ledger, recipe.queries) if counted else None,
        num_clusters=recipe.cluster.num_clusters,
        num_pool=sum(row["num_rows"] for row in rows if row["role"] == "pool"),
    )
    if asked:
        yield "query sets"
        yield from format_plan(asked)


def describe_plan(lines: Sequence[PlanLine]) -> Iterator[str]:
    """The plan as text: what is done, missing, stale and why."""
    yield "plan"
    later = [line.stage for line in lines if not line.known and not line.why]
    for line in lines:
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(line.why.items()))
        if not line.known:
            if why:
                yield f"  {line.stage:<16} after that: {why}"
        elif line.num_undone:
            yield f"  {line.stage:<16} {line.num_undone:,} of {line.num_done + line.num_undone:,} to do: {why}"
        else:
            yield f"  {line.stage:<16} done"
    if later:
        yield f"  then, as far as it is not done: {', '.join(later)}"


def check_run(recipe: CurateRecipe, run: Store) -> dict[str, Any]:
    """A run belongs to one recipe; what the last command wrote about it, empty where there was none.

    Raises:
        ConfigError: the run was made under another name.
    """
    state = read_state(run)
    if state is not None and state["recipe"] != recipe.name:
        raise ConfigError(
            f"key 'run': {recipe.run} holds a run of recipe {state['recipe']!r}, not of {recipe.name!r}; "
            "give another run=FOLDER, or the recipe of that name"
        )
    return state or {}


def read_state(run: Store) -> dict[str, Any] | None:
    """What the last command wrote about a run; None where there is none."""
    try:
        state: dict[str, Any] = json.loads(run.read(STATE))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(f"{run.location}/{STATE} is damaged; remove it, lvd curate writes it again") from None
    return state


def _state(recipe: CurateRecipe, ledger: Ledger, before: dict[str, Any]) -> str:
    """What later commands need to know, as JSON; tables that this command has not reached stand as they did."""
    parts = {table: list(indices) for table, indices in ledger.task_parts.items()}
    is_list = any(source.kind != "pages" for source in recipe.sources.values())  # truth goes by the lines of its list
    state = {
        "recipe": recipe.name,
        "pool": recipe.pool,
        "folders": {**before.get("folders", {}), **ledger.folders},
        "sources": ledger.source_ids,
        "parts": {**before.get("parts", {}), **parts},
        "truth": f"{recipe.sample_web.path}/truth.parquet" if recipe.sample_web is not None and is_list else None,
    }
    return json.dumps(state, indent=1)


def _remove_tars(run: Store, stages: Sequence[Stage]) -> None:
    """Remove tars of an earlier state of the recipe, once its export is through."""
    if stages[-1].name == "export":
        for path in unnamed_objects(run, TARS):
            run.delete(path)


def take_leases(stack: ExitStack, stores: Sequence[Store], scratch: Path) -> tuple[str, str]:
    """Hold a pool and a run until the stack is closed; their tokens."""
    tokens = []
    for store in stores:
        lease = Lease(store, scratch)
        stack.callback(lease.release)
        store.sweep()
        tokens.append(lease.token)
    return tokens[0], tokens[1]


# Sources


def _make_ready(
    recipe: CurateRecipe,
    pool: Store,
    options: Options,
    scratch: Path,
    *,
    check: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Build the sample web, and visit what sources of kind pages name and lead to, as far as it was not visited."""
    if recipe.sample_web is not None:
        _build_sample_web(recipe, options, say)
    retried = options.retried()
    crawls = crawls_to_do(named_sources(recipe), pool, retried)
    if options.dry_run:
        for crawl in crawls:
            say(f"crawl {crawl.name!r}: not through; the command visits pages first, a dry run asks for none")
    if options.dry_run or not crawls:
        return
    with ExitStack() as stack:
        if recipe.sample_web is not None:
            recipe = stack.enter_context(_served(recipe))
        crawler = Crawler(recipe.fetch, taken_down=Takedowns(known_rules(pool)))
        for crawl in crawls:
            refuses = refusing(recipe.screen) if crawl.role == "pool" else lambda url: None
            crawl_pages(crawl, pool, crawler, refuses=refuses, retried=retried, scratch=scratch, check=check, say=say)


def located(recipe: CurateRecipe) -> CurateRecipe:
    """The recipe for workers: places of sources told to fetch, the device to models, every local path made absolute.

    A worker on another node stands in another folder. None of these values enters a fingerprint.
    """
    named = named_sources(recipe)
    fetch = recipe.fetch.model_copy(
        update={
            "locations": {name: absolute(source.location) for name, _, source in named},
            "kinds": {name: source.kind for name, _, source in named},
        }
    )
    device = recipe.execution.device
    look, screen, safety = recipe.look, recipe.screen, recipe.safety
    blocked = ("blocked_sha256_files", "blocked_pdq_files")
    updates: dict[str, Any] = {
        "fetch": fetch,
        "screen": screen.model_copy(update={"block_list_files": [absolute(p) for p in screen.block_list_files]}),
        "safety": safety.model_copy(update={key: [absolute(p) for p in getattr(safety, key)] for key in blocked}),
        "look": look.model_copy(update={"device": device, "yunet": absolute(look.yunet) if look.yunet else None}),
    }
    for section in ("embed", "descriptor", "opinion"):
        config = getattr(recipe, section)
        weights = absolute(config.weights) if config.weights else None
        kind, _, path = config.name.partition(":")
        name = f"{kind}:{absolute(path)}" if kind in ("sscd", "checkpoint", "script") else config.name
        updates[section] = config.model_copy(update={"device": device, "weights": weights, "name": name})
    if recipe.opinion.head:
        updates["opinion"] = updates["opinion"].model_copy(update={"head": absolute(recipe.opinion.head)})
    return recipe.model_copy(update=updates)


# The sample web


def _build_sample_web(recipe: CurateRecipe, options: Options, say: Callable[[str], None]) -> None:
    assert recipe.sample_web is not None
    from pipelines.sample_web.build import build

    if options.dry_run and not Path(recipe.sample_web.path).exists():
        raise ConfigError(f"the sample web {recipe.sample_web.path} is not built yet; run once without --dry-run")
    build(recipe.sample_web, say)
    check_sources(recipe)


@contextmanager
def _served(recipe: CurateRecipe) -> Iterator[CurateRecipe]:
    assert recipe.sample_web is not None
    from pipelines.sample_web.serve import LOG, serving

    # One log for each pool: what it asked for, and nothing that another pool did.
    log = None if recipe.pool.startswith("s3://") else Path(recipe.pool) / LOG
    with serving(Path(recipe.sample_web.path), log=log) as site:
        fetch = recipe.fetch.model_copy(update={"resolve": {**recipe.fetch.resolve, **site.resolve}})
        yield recipe.model_copy(update={"fetch": fetch})


# Reading


@contextmanager
def local_copy(location: str, folders: Sequence[str]) -> Iterator[Path]:
    """A root as a folder: itself, or the tables of an object store copied to a temporary one."""
    store = open_store(location)
    if isinstance(store, LocalStore):
        yield store.path
        return
    with tempfile.TemporaryDirectory(prefix="lvd-") as temporary:
        for folder in folders:
            for path in store.list(folder):
                if path.endswith(".parquet"):
                    target = Path(temporary) / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(store.read(path))
        yield Path(temporary)
