"""Originals that show a face leave the pool (``look.purge_originals``), once look has stored what it needs of them.

Of the shards that a command has looked at, what stays of stored bytes is what was looked at and shows no face that
was found. So these go: pictures with a face, which have a blurred version; files that hold more than was looked at
(other frames, pixels hidden by alpha), of which look has stored what it saw; files that do not decode, in which no face
can be looked for; and pictures that the command's screening does not let through to look. What other settings of look
made of a picture goes too, where it does not cover the same faces or these settings never saw it: it may show them.

The order makes it safe to be killed at any moment, and to be run again: tars are written again without the pictures,
then the part that names them is swapped, then old tars are deleted, then the part is marked as purged by these facts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curation.export.objects import BLURRED, BYTES, SMALL, Place, parts_of, rewritten, swap
from curation.schema import Part
from curation.store import Store, read_footer, read_part

PURGED = "original_purged"  # reason of a picture that other settings would look at, and that is no longer there
MARK = "purged_by"  # in the footer of a part of ``images``
_COVERED = 0.5  # share of a face box that one box of other settings has to hold


@dataclass(kw_only=True)
class PurgedOriginals:
    """What a purge did."""

    num_faces: int = 0  # pictures with a face whose original went
    num_hiding: int = 0  # pictures without one whose original went for what else it holds
    num_unseen: int = 0  # files that do not decode or were not looked at
    num_elsewhere: int = 0  # pictures whose facts by other settings went
    num_deleted: int = 0  # tars
    deleted_bytes: int = 0

    @property
    def did_anything(self) -> bool:
        """Whether it changed what is stored."""
        return bool(self.num_faces or self.num_hiding or self.num_unseen or self.num_elsewhere or self.num_deleted)


def purge_originals(
    pool: Store, shards: Iterable[int], folder: str, scratch: Path, check: Callable[[], None]
) -> PurgedOriginals:
    """Take out of a pool the originals that show faces, and files that nobody could look at.

    Shards that are done with the same facts are passed over by the footers of their parts.

    Args:
        pool: held by the caller's lease.
        shards: look is through with all of them that the verdicts let in.
        folder: of the ``detections`` that say where faces are; their ``hashes`` have the same key.
        scratch: a folder on this disk.
        check: called before each write; raises when the lease is lost.
    """
    purge = _Purge(pool, folder, scratch, check)
    pending = {shard: mark for shard in shards if (mark := purge.pending_mark(shard)) is not None}
    if pending:
        purge.list_what_is_stored()
    for shard, mark in pending.items():
        purge.shard(shard, mark)
    return purge.done


class _Purge:
    """The pool, what lies in it, and what was done."""

    def __init__(self, pool: Store, folder: str, scratch: Path, check: Callable[[], None]) -> None:
        self.done = PurgedOriginals()
        self._pool, self._folder, self._scratch, self._check = pool, folder, scratch, check
        self._elsewhere: dict[int, list[Part]] = defaultdict(list)  # shard -> detections by other settings
        self._tars: dict[Place, dict[int, list[str]]] = {}

    def pending_mark(self, shard: int) -> str | None:
        """What will mark a shard as purged by these facts; None where it bears that mark, or was not looked at."""
        facts = read_footer(self._pool, Part("pool", self._folder, shard))
        images = read_footer(self._pool, Part("pool", "images", shard))
        if facts is None or images is None:
            return None
        mark = f"{self._folder} {facts.digest}"
        return None if images.inputs.get(MARK) == mark else mark

    def list_what_is_stored(self) -> None:
        """Tars, and facts by other settings, by shard."""
        for place in (BYTES, BLURRED, SMALL):
            by_shard = self._tars.setdefault(place, defaultdict(list))
            for path in self._pool.list(place.folder):
                by_shard[int(path.rpartition("/")[2][:9])].append(path)
        for part in parts_of(self._pool, "detections"):
            if part.folder != self._folder:
                self._elsewhere[part.index].append(part)

    def shard(self, shard: int, mark: str) -> None:
        """All of one shard, up to its mark."""
        images = Part("pool", "images", shard)
        faces, unseen = self._purge_bytes(images)
        for part in self._elsewhere[shard]:
            self._purge_facts(part, faces, unseen)
        facts = [Part("pool", self._folder, shard), *self._elsewhere[shard]]
        for place, tars in self._tars.items():
            self._delete_unnamed(place, [images] if place is BYTES else facts, tars[shard])
        self._swap(images, read_part(self._pool, images), **{MARK: mark})

    def _purge_bytes(self, part: Part) -> tuple[dict[int, list[dict[str, Any]]], set[int]]:
        """Originals of one shard; face boxes of all pictures with a blurred version, and pictures that nobody saw."""
        shard = part.index
        columns = ["image_id", "faces", "blurred_object"]
        seen = read_part(self._pool, Part("pool", self._folder, shard), columns)
        hashes = read_part(self._pool, Part("pool", _hashes_of(self._folder), shard), ["image_id", "ok", "reason"])
        faces = {row["image_id"]: row["faces"] or [] for row in seen.to_pylist() if row["blurred_object"] is not None}
        decoded = set(hashes.filter(hashes["ok"])["image_id"].to_pylist())
        known = {row["image_id"] for row in hashes.to_pylist() if row["ok"] or row["reason"] == PURGED}
        images = read_part(self._pool, part)
        unseen = set(images["image_id"].to_pylist()) - known
        stays = pc.is_in(images["image_id"], value_set=pa.array(sorted(decoded - faces.keys()), pa.int64()))
        gone = pc.and_(pc.is_valid(images["object"]), pc.invert(stays)).combine_chunks()
        if not pc.any(gone).as_py():
            return faces, unseen
        went = images["image_id"].filter(gone).to_pylist()
        self.done.num_faces += sum(bool(faces.get(image_id)) for image_id in went)
        self.done.num_hiding += sum(faces.get(image_id) == [] for image_id in went)
        self.done.num_unseen += sum(image_id not in faces for image_id in went)
        self._check()
        images = rewritten(self._pool, BYTES, images, gone, shard=shard, scratch=self._scratch)
        for name in (BYTES.object, BYTES.offset):
            column = images.schema.field(name)
            emptied = pc.if_else(gone, pa.scalar(None, column.type), images[name])
            images = images.set_column(images.schema.get_field_index(name), column, emptied)
        self._swap(part, images)
        return faces, unseen

    def _purge_facts(self, part: Part, faces: dict[int, list[dict[str, Any]]], unseen: set[int]) -> None:
        """Rows of other settings' facts whose pixels may show one of these faces, with these pixels."""
        table = read_part(self._pool, part)
        rows = table.select(["image_id", "faces", "small_object", "blurred_object"]).to_pylist()
        shown = [
            row["small_object"] is not None
            and (row["image_id"] in unseen or (row["image_id"] in faces and not _covers(row, faces[row["image_id"]])))
            for row in rows
        ]
        if not any(shown):
            return
        self.done.num_elsewhere += sum(shown)
        gone = pa.array(shown, pa.bool_())
        for place in (BLURRED, SMALL):
            self._check()
            table = rewritten(self._pool, place, table, gone, shard=part.index, scratch=self._scratch)
        named = table["image_id"].filter(gone).combine_chunks()
        hashes = Part("pool", _hashes_of(part.folder), part.index)
        # The hashes say what is done, so they go first.
        for facts, held in ((hashes, read_part(self._pool, hashes)), (part, table)):
            self._swap(facts, held.filter(pc.invert(pc.is_in(held["image_id"], value_set=named))))

    def _delete_unnamed(self, place: Place, parts: Iterable[Part], tars: Iterable[str]) -> None:
        """Tars of a shard that none of its parts names, what a killed worker left among them."""
        named: set[str | None] = set()
        for part in parts:
            named.update(read_part(self._pool, part, [place.object])[place.object].unique().to_pylist())
        for path in tars:
            if path not in named:
                self._check()
                self.done.num_deleted += 1
                self.done.deleted_bytes += self._pool.size(path)
                self._pool.delete(path)

    def _swap(self, part: Part, table: pa.Table, **note: str) -> None:
        self._check()
        swap(self._pool, part, table, self._scratch, **note)


def _hashes_of(folder: str) -> str:
    """Folder of the hashes that were made in one pass with some detections."""
    return folder.replace("detections", "hashes", 1)


def _covers(row: dict[str, Any], faces: Iterable[dict[str, Any]]) -> bool:
    """Whether these facts have a version of their own in which each face is held by a box that was blurred."""
    boxes = row["faces"] or []
    return row["blurred_object"] is not None and all(
        any(_share(face, box) >= _COVERED for box in boxes) for face in faces
    )


def _share(face: dict[str, Any], box: dict[str, Any]) -> float:
    """Share of a face box that lies in another box."""
    width, height = (
        max(0.0, min(face[at] + face[size], box[at] + box[size]) - max(face[at], box[at]))
        for at, size in (("x_px", "w_px"), ("y_px", "h_px"))
    )
    return float(width * height / max(face["w_px"] * face["h_px"], 1e-9))
