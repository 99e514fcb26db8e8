"""What looks at a run that is there: its tables in DuckDB, score, state, page and card, and what may be removed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.export.objects import OF_POOL, TARS, unnamed_objects
from curation.lease import Lease, lease_holder
from curation.query import connect
from curation.schema import LAST_VERDICT_OF_REFERENCES, TABLES, VERDICTS, Part, first_shard
from curation.store import LocalStore, Store, open_store, put_text, read_footer, read_part
from pipelines.scratch import scratch_folder
from pipelines.session import RECIPE, local_copy, read_state
from training.config import ConfigError

if TYPE_CHECKING:
    from pipelines.report.score import Score

_LIST_OF_TARS = Part("run", "shards", 0).path
CARD, CARD_JSON = "card.md", "card.json"


@dataclass(frozen=True, kw_only=True)
class Database:
    """An opened run."""

    connection: Any  # duckdb.DuckDBPyConnection, see curation.query.connect
    truth: Path | None  # of the sample web that it was made from
    pool: str
    run: str
    state: Mapping[str, Any]


def state_of(run: str) -> dict[str, Any]:
    """What the last command wrote about a run.

    Raises:
        ConfigError: there is no run.
    """
    state = read_state(open_store(run))
    if state is None:
        raise ConfigError(f"no run at {run}; make one with lvd curate smoke, or name another with --run ROOT")
    return state


@contextmanager
def opened(run: str) -> Iterator[Database]:
    """The tables of a run and its pool in DuckDB; those of an object store are copied for the while.

    Raises:
        ConfigError: there is no run.
    """
    state = state_of(run)
    folders: dict[str, str] = state["folders"]
    with ExitStack() as stack:
        local = {
            root: stack.enter_context(
                local_copy(
                    place, [folders.get(table.name, table.name) for table in TABLES.values() if table.root == root]
                )
            )
            for root, place in (("pool", state["pool"]), ("run", run))
        }
        shards = _shards(state, open_store(state["pool"]), open_store(run))
        connection = connect(local["pool"], local["run"], folders, set(state["sources"].values()), shards)
        stack.callback(connection.close)
        truth = Path(state["truth"]) if state["truth"] is not None else None
        yield Database(connection=connection, truth=truth, pool=state["pool"], run=run, state=state)


def score_run(database: Database, truth: Path | None = None) -> Score:
    """Hold the end states of a run against the truth of its sample web.

    Args:
        database: the opened run.
        truth: another truth than that of the sample web which the run was made from.

    Raises:
        ConfigError: there is no truth.
    """
    import pyarrow.parquet as pq

    from pipelines.report.score import score
    from pipelines.sample_web.serve import LOG, read_requests

    path = truth or database.truth
    if path is None:
        raise ConfigError(f"{database.run} was not made from a sample web; name the truth with --truth PARQUET")
    if not path.is_file():
        raise ConfigError(f"truth {str(path)!r} is not there; build the sample web again, or give --truth PARQUET")
    # A recipe may add sources of its own to the sample web's list: the truth speaks of that list only.
    ends = database.connection.sql(
        """
        SELECT e.image_id, e.line, e.stage AS end_stage, e.reason
        FROM end_state e JOIN sources s ON s.source_id = e.image_id // 1000000000000
        WHERE s.role = 'pool' AND (starts_with(s.location, ?) OR (SELECT count(*) FROM sources WHERE role = 'pool') = 1)
        ORDER BY e.image_id
        """,
        params=[f"{path.parent}/"],
    ).to_arrow_table()
    # The log lies in the pool, beside what was fetched; a pool in an object store leaves it beside the truth.
    here = Path(database.pool) / LOG
    log = here if here.is_file() else path.parent / LOG
    return score(ends, pq.read_table(path), read_requests(log) if log.is_file() else None)


# State


def status(run: str, as_json: bool) -> str:
    """What is there of a run: parts and rows of each table, and who works on it."""
    state = state_of(run)
    stores = {"pool": open_store(state["pool"]), "run": open_store(run)}
    shards = _shards(state, stores["pool"], stores["run"])
    tables = [_table_status(name, stores[TABLES[name].root], state, shards) for name in TABLES]
    holders = {root: lease_holder(store) for root, store in stores.items()}
    if as_json:
        return json.dumps(
            {"recipe": state["recipe"], "pool": state["pool"], "run": run, "at_work": holders, "tables": tables}
        )
    lines = [f"recipe    {state['recipe']}", f"pool      {state['pool']}", f"run       {run}"]
    lines += [f"at work   {holder} on the {root}" for root, holder in holders.items() if holder is not None]
    if not any(holders.values()):
        lines.append("at work   nobody")
    lines += ["", f"{'table':<17}{'kind':<9}{'parts':>9}{'of':>9}{'rows':>16}"]
    for table in tables:
        of = "" if table["num_shards"] is None else f"{table['num_shards']:,}"
        lines.append(f"{table['table']:<17}{table['kind']:<9}{table['num_parts']:>9,}{of:>9}{table['num_rows']:>16,}")
    return "\n".join(lines)


def _shards(state: Mapping[str, Any], pool: Store, run: Store) -> dict[int, str]:
    """Role of each shard of a run, which may take only the first shards of its pool sources."""
    import yaml

    roles: dict[int, str] = {}
    mine = set(state["sources"].values())
    for row in read_part(pool, Part("pool", "sources", 0)).to_pylist():
        if row["source_id"] in mine:
            first = first_shard(row["source_id"])
            roles.update(dict.fromkeys(range(first, first + row["num_shards"]), row["role"]))
    recipe = yaml.safe_load(run.read(RECIPE)) if run.exists(RECIPE) else {}
    max_shards = recipe.get("execution", {}).get("max_shards")
    of_pool = sorted(shard for shard, role in roles.items() if role == "pool")
    for shard in of_pool[max_shards:] if max_shards is not None else []:
        del roles[shard]
    return roles


def _roles_of(table: str) -> tuple[str, ...]:
    """Roles of the shards that have a part of a per-shard table."""
    if table == "queries":
        return ("query",)
    if table in ("embeddings", "selection", "choices", "clusters"):
        return ("pool", "query")
    late = table in VERDICTS and VERDICTS.index(table) > VERDICTS.index(LAST_VERDICT_OF_REFERENCES)
    return ("pool",) if late else ("pool", "query", "benchmark")


def _table_status(name: str, store: Store, state: Mapping[str, Any], shards: Mapping[int, str]) -> dict[str, Any]:
    table = TABLES[name]
    folder = state["folders"].get(name, name)
    there = [Part(table.root, folder, int(path[-17:-8])) for path in store.list(folder) if path.endswith(".parquet")]
    num_shards = None
    if table.parts == "shard":
        wanted = {shard for shard, role in shards.items() if role in _roles_of(name)}
        there = [part for part in there if part.index in wanted]
        num_shards = len(wanted)
    footers = [read_footer(store, part) for part in there]
    num_rows = sum(footer.num_rows for footer in footers if footer is not None)
    return {"table": name, "kind": table.kind, "num_parts": len(there), "num_shards": num_shards, "num_rows": num_rows}


# Tars, page, card, objects


def verify_run(run: str) -> tuple[list[str], int]:
    """Read every tar of a run; what is wrong, and how many samples were read.

    Raises:
        ConfigError: there is no run, or it has no tars.
    """
    from curation.export.verify import verify

    return verify(_with_tars(run))


def _with_tars(run: str) -> Store:
    state_of(run)
    store = open_store(run)
    if not store.exists(_LIST_OF_TARS):
        raise ConfigError(f"run {run} has no tars yet; go on with lvd curate")
    return store


def write_page(run: str) -> Path:
    """Write ``report.html`` into the run, or into the working folder for a run in an object store; its path."""
    from pipelines.report.html import write_report

    with opened(run) as database:
        pool, store = open_store(database.pool), open_store(run)
        path = (store.path if isinstance(store, LocalStore) else Path()) / "report.html"
        write_report(database.connection, path, pool.read_range)
    return path


def write_card(run: str) -> dict[str, Any]:
    """Write ``card.md`` and ``card.json`` into a finished run; what they say, see ``pipelines.report.card``.

    Raises:
        ConfigError: there is no run, it is not finished, or somebody works on it.
    """
    from pipelines.curate import CurateRecipe
    from pipelines.recipe import load_recipe
    from pipelines.report.card import card
    from pipelines.report.markdown import format_card

    store = _with_tars(run)
    if (holder := lease_holder(store)) is not None:
        raise ConfigError(f"run {run}: {holder} works on it; wait for it")
    if not store.exists(RECIPE):
        raise ConfigError(f"run {run} has lost its {RECIPE}, which says what it was made by; put it back")
    with opened(run) as database, tempfile.TemporaryDirectory(prefix="lvd-") as temporary:
        scratch = Path(temporary)
        (scratch / RECIPE).write_bytes(store.read(RECIPE))
        recipe = load_recipe(CurateRecipe, str(scratch / RECIPE)).model_dump(mode="json")
        found = card(database, recipe, finished=store.modified(_LIST_OF_TARS).date().isoformat())
        put_text(store, CARD, format_card(found), scratch)
        put_text(store, CARD_JSON, json.dumps(found, indent=1, ensure_ascii=False), scratch)
    return found


def clean(run: str) -> dict[str, int]:
    """Remove stored objects of pool and run that no table names: what killed, repeated or replaced work left.

    Returns:
        ``objects`` and ``bytes`` that were removed.

    Raises:
        ConfigError: there is no run, or somebody works on it or on its pool.
    """
    state = state_of(run)
    pool, store = open_store(state["pool"]), open_store(run)
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        for root in (pool, store):  # what a living driver has stored and not yet named must stay
            stack.callback(Lease(root, scratch).release)
        unnamed = [(store, path) for path in unnamed_objects(store, TARS)]
        for place in OF_POOL:
            unnamed += [(pool, path) for path in unnamed_objects(pool, place)]
        removed = {"objects": len(unnamed), "bytes": sum(root.size(path) for root, path in unnamed)}
        for root, path in unnamed:
            root.delete(path)
    return removed
