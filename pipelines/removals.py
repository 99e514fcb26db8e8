"""What leaves a pool or a run before work: pictures that were taken down, originals with faces, pages with such."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from curation.export.purge import Purged, pending, pictures_named, purge
from curation.ingest.takedown import known_rules
from curation.safety.originals import purge_originals
from curation.schema import UNDER_WAY
from curation.store import Store

# Of a run: they hold pictures, and are written again when asked for.
PAGES = ("report.html", "held_out.parquet", "held_out.tmp")


def purge_pool(pool: Store, scratch: Path, check: Callable[[], None], say: Callable[[str], None]) -> Purged:
    """Take out of the pool, which is held, what its list names, and say so."""
    done = purge(pool, scratch, check)
    say(
        f"takedown: {len(done.image_ids):,} {'picture' if len(done.image_ids) == 1 else 'pictures'} taken out of the "
        f"pool; {done.num_parts:,} parts written again, "
        f"{done.num_deleted:,} tars removed ({done.deleted_bytes:,} bytes)"
        + (f", {done.num_fits:,} fits to be made again" if done.num_fits else "")
    )
    return done


def take_down(
    pool: Store, run: Store, scratch: Path, check: Callable[[], None], say: Callable[[str], None], *, dry_run: bool
) -> None:
    """What the list of the pool names and the pool still holds goes, before anything else is done."""
    if not pending(pool):
        return
    if dry_run:
        num_pictures = len(pictures_named(pool, known_rules(pool)))
        say(f"takedown: {num_pictures:,} pictures of the pool are on its list; the command takes them out first")
    else:
        purge_pool(pool, scratch, check, say)
        remove_under_way(run)


def take_out_originals(
    pool: Store,
    shards: Iterable[int],
    folder: str,
    scratch: Path,
    *,
    check: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Take originals in which ``folder`` of detections knows a face out of the pool, which is held, and say so."""
    done = purge_originals(pool, shards, folder, scratch, check)
    if done.did_anything:
        say(
            f"originals: {done.num_faces:,} with faces, {done.num_hiding:,} with frames or alpha and "
            f"{done.num_unseen:,} that nobody could look at taken out of the pool; "
            f"{done.num_deleted:,} tars removed ({done.deleted_bytes:,} bytes)"
            + (f"; {done.num_elsewhere:,} rows of other settings of look went too" if done.num_elsewhere else "")
        )


def remove_under_way(run: Store) -> None:
    """Remove what a run keeps of a fit that is not done: it may hold vectors that have been taken down."""
    for path in [path for table in UNDER_WAY for path in run.list(table)]:
        run.delete(path)


def remove_pages(run: Store) -> list[str]:
    """Remove files of a run that hold pictures which may have been taken down; those that were there."""
    there = [page for page in PAGES if run.exists(page)]
    for page in there:
        run.delete(page)
    return there
