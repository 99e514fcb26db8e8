"""`lvd takedown`: pictures are put on the pool's list and leave the pool, and the run follows.

What it leaves behind names no picture's content: the line of the source, the visits, the rule itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curation.export.objects import TARS
from curation.export.purge import Purged, pending, pictures_named, put_rules, with_bytes_of
from curation.ingest.takedown import known_rules, merged, read_rules
from curation.lease import check_lease
from curation.store import Store, open_store
from pipelines.curate import CurateRecipe
from pipelines.preflight import Options
from pipelines.recipe import load_recipe
from pipelines.removals import purge_pool, remove_pages, remove_under_way
from pipelines.results import opened, state_of
from pipelines.session import RECIPE, curate, take_leases
from training.config import ConfigError

_NUM_LISTED = 20
_PICTURES = """
    SELECT u.image_id, coalesce(u.url, u.location) AS address, u.source,
        u.image_id IN (SELECT image_id FROM manifest) AS in_set
    FROM urls u
    WHERE u.image_id IN (SELECT unnest(?::BIGINT[])) ORDER BY u.image_id
"""
# Pictures that one of these stood for, or that stood for one of these, and that stay.
_COPIES = """
    WITH gone AS (SELECT unnest(?::BIGINT[]) AS image_id),
    near_copies AS (
        SELECT image_id FROM near
        WHERE representative_id IN (SELECT representative_id FROM near SEMI JOIN gone USING (image_id))
    ),
    copies AS (
        SELECT image_id FROM duplicates
        WHERE component_id IN (SELECT component_id FROM duplicates SEMI JOIN gone USING (image_id))
    )
    SELECT u.image_id, coalesce(u.url, u.location) AS address, u.source,
        u.image_id IN (SELECT image_id FROM manifest) AS in_set
    FROM urls u
    WHERE u.image_id IN (FROM near_copies UNION FROM copies) AND u.image_id NOT IN (FROM gone) ORDER BY u.image_id
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for; see ``curation.ingest.takedown.read_rules``."""

    entries: Sequence[str]
    kind: str | None = None
    radius_bits: int | None = None
    reason: str | None = None
    dry_run: bool = False


@dataclass(kw_only=True)
class Takedown:
    """What a takedown came to."""

    pool: str
    num_rules: int  # on the list, those that follow from others too
    num_new: int
    pictures: list[dict[str, Any]]  # of this run and stored until now: image_id, address, source, in_set
    copies: list[dict[str, Any]]  # of these, and still there
    num_elsewhere: int  # pictures of sources that this run does not have
    purged: Purged = field(default_factory=Purged)
    followed: bool = False  # the run has tars, and they were brought up to date


def takedown(run: str, request: Request, say: Callable[[str], None]) -> Takedown:
    """Put pictures on the list of a run's pool, purge the pool, and let the run follow.

    Raises:
        ConfigError: there is no run, an entry cannot be read, or somebody works on the pool or the run.
    """
    pool_root = state_of(run)["pool"]
    pool, store = open_store(pool_root), open_store(run)
    asked = read_rules(request.entries, kind=request.kind, radius_bits=request.radius_bits, reason=request.reason)
    known = known_rules(pool)
    rules = with_bytes_of(pool, merged(known, asked))
    ids = pictures_named(pool, rules)
    told = _told(run, ids)
    told |= {"pool": pool_root, "num_new": len(rules) - len(known)}
    if request.dry_run:
        return Takedown(**told, num_rules=len(rules))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lvd-")))
        tokens = take_leases(stack, (pool, store), scratch)

        def check() -> None:
            check_lease(pool, tokens[0])
            check_lease(store, tokens[1])

        known = known_rules(pool)
        if (listed := merged(known, asked)) != known:
            put_rules(pool, listed, scratch)
        purged = purge_pool(pool, scratch, check, say) if pending(pool) else Purged()
        remove_under_way(store)
        for page in remove_pages(store):
            say(f"takedown: {page} of the run may show them and is removed")
    followed = _follow(run, pool_root, store, say)
    return Takedown(**told, num_rules=len(known_rules(pool)), purged=purged, followed=followed)


def _told(run: str, ids: Collection[int]) -> dict[str, Any]:
    """What the tables of a run say about pictures, before they go."""
    with opened(run) as database:
        pictures, copies = (_rows(database.connection, query, ids) for query in (_PICTURES, _COPIES))
    return {"pictures": pictures, "copies": copies, "num_elsewhere": len(ids) - len(pictures)}


def _follow(run: str, pool: str, store: Store, say: Callable[[str], None]) -> bool:
    """Do what is not done of a run that has tars; one without holds no picture."""
    if not any(True for _ in store.list(TARS.folder)):
        return False
    if not store.exists(RECIPE):
        raise ConfigError(
            f"the pool is purged, but run {run} has lost its {RECIPE}: its tars stay until lvd curate RECIPE"
        )
    with tempfile.TemporaryDirectory(prefix="lvd-") as temporary:
        file = Path(temporary) / RECIPE
        file.write_bytes(store.read(RECIPE))
        recipe = load_recipe(CurateRecipe, str(file), [f"pool={pool}", f"run={run}"])
    try:
        curate(recipe, Options(), say)
    except ConfigError as error:
        raise ConfigError(
            f"the pool is purged, but run {run} does not follow, and its tars stay as they are: {error}"
        ) from None
    return True


def _rows(connection: Any, query: str, ids: Collection[int]) -> list[dict[str, Any]]:
    cursor = connection.execute(query, [sorted(ids)])
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


# For people


def lines_of(found: Takedown, run: str, *, dry_run: bool) -> list[str]:
    """What to print at the end of the command."""
    lines = [f"list      {_many(found.num_rules, 'rule')} in {found.pool}, {found.num_new:,} of them new"]
    num_in_set = sum(row["in_set"] for row in found.pictures)
    goes = "would go" if dry_run else "gone"
    lines.append(f"pictures  {len(found.pictures):,} of this run {goes}, {num_in_set:,} of them in the set")
    lines += _listed(found.pictures)
    if found.num_elsewhere:
        lines.append(f"          and {found.num_elsewhere:,} of sources that this run does not have")
    if found.copies:
        stay = "would stay" if dry_run else "still there"
        copies = _many(len(found.copies), "copy")
        lines.append(f"copies    {copies} of these {stay} and may take the place; name what is to go too")
        lines += _listed(found.copies)
    if dry_run:
        return [*lines, "nothing was done; the same command without --dry-run does it"]
    lines.append(
        f"run       {run} follows: its tars hold none of them; lvd verify --run {run}"
        if found.followed
        else f"run       {run} has no tars yet, so none of them; its next lvd curate follows"
    )
    lines.append("others    other runs over this pool keep them in their tars until their next lvd curate")
    return lines


def _listed(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"          {row['image_id']}  {row['address']}  ({row['source']}{', in the set' if row['in_set'] else ''})"
        for row in rows[:_NUM_LISTED]
    ]
    return lines if len(rows) <= _NUM_LISTED else [*lines, f"          and {len(rows) - _NUM_LISTED:,} more"]


def _many(num: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{num:,} {noun if num == 1 else plural}"
