"""The life of one picture: every verdict on it, what it was compared with, who chose it, where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.config import ConfigError

_NUM_SAME_ADDRESS = 20


def explain(connection: Any, id_or_url: str) -> str:
    """Tell all that a run knows about one picture, or about each line with one address.

    Args:
        connection: of ``curation.query.connect``.
        id_or_url: ``image_id`` in digits, or the address (or the local location) as the source has it.

    Raises:
        ConfigError: the run has no such line.
    """
    text = id_or_url.strip()
    column = "image_id = ?::BIGINT" if text.isdecimal() and len(text) < 19 else "url = ? OR location = ?"
    values = [text] if column.startswith("image_id") else [text, text]
    found = _rows(connection, f"SELECT image_id FROM urls WHERE {column} ORDER BY image_id", *values)
    if not found:
        raise ConfigError(
            f"picture {id_or_url!r} is not in this run; give an image_id or an address as the list has it, "
            "or look for it with a query on the view end_state (lvd sql FILE.sql)"
        )
    lives = ["\n".join(_life(connection, row["image_id"])) for row in found[:_NUM_SAME_ADDRESS]]
    if len(found) > _NUM_SAME_ADDRESS:
        lives.append(f"and {len(found) - _NUM_SAME_ADDRESS:,} lines more with this address")
    return "\n\n".join(lives)


def _life(connection: Any, image_id: int) -> Iterator[str]:
    (line,) = _rows(connection, "SELECT * FROM urls WHERE image_id = ?", image_id)
    (end,) = _rows(connection, "SELECT * FROM end_state WHERE image_id = ?", image_id)
    yield f"image {image_id}"
    yield _entry("source", f"{line['source']} ({end['role']}), line {line['line']:,}")
    for name in ("url", "location", "page_url", "alt_text", "label"):
        if line[name] is not None:
            yield _entry(name, str(line[name]))
    if line["error"] is not None:
        yield _entry("broken", line["error"])
    yield from _facts(connection, image_id)
    verdicts = _rows(connection, "SELECT * FROM verdicts WHERE image_id = ? ORDER BY place", image_id)
    for verdict in verdicts:
        judged = "kept" if verdict["keep"] else f"dropped: {verdict['reason']}"
        yield _entry(verdict["stage"], judged + _judged(verdict))
        for text in _beside(connection, verdict["stage"], image_id):
            yield _entry("", text)
    yield from _cluster(connection, image_id)
    yield from _sample(connection, image_id)
    ended = {"kept": "in the set", "reference": "a reference: compared with, never chosen", "pending": "not judged yet"}
    yield _entry("end", ended.get(end["stage"], f"{end['stage']}/{end['reason']}"))


def _facts(connection: Any, image_id: int) -> Iterator[str]:
    for row in _rows(connection, "SELECT * FROM images WHERE image_id = ?", image_id):
        status = "" if row["http_status"] is None else f", status {row['http_status']}"
        robots = "" if row["robots"] is None else f", robots {row['robots']}"
        if row["ok"]:
            yield _entry("bytes", f"{row['format']}, {row['num_bytes']:,} bytes{status}{robots}")
            yield _entry("sha256", row["sha256"])
        else:
            yield _entry("fetch", f"{row['reason']}{status}{robots}")
        if row["final_url"] is not None:
            yield _entry("final url", row["final_url"])
    for row in _rows(connection, "SELECT * FROM hashes WHERE image_id = ? AND ok", image_id):
        yield _entry("picture", f"{row['width_px']} x {row['height_px']} px, pHash {row['phash']:016x}")
    for row in _rows(connection, "SELECT * FROM detections WHERE image_id = ?", image_id):
        faces = f"{row['num_faces'] or 0} faces{' (blurred)' if row['blurred_object'] is not None else ''}"
        worst = "" if row["nsfw_label"] is None else f", {row['nsfw_label']} {row['nsfw_score']:.3f}"
        yield _entry("seen", faces + worst)


def _judged(verdict: dict[str, Any]) -> str:
    if verdict["score"] is None:
        return ""
    limit = "" if verdict["threshold"] is None else f", threshold {verdict['threshold']:.4g}"
    return f"  (score {verdict['score']:.4g}{limit})"


def _beside(connection: Any, stage: str, image_id: int) -> Iterator[str]:
    """What a verdict compared the picture with."""
    if stage == "screened":
        for row in _rows(connection, "SELECT first_id FROM url_duplicates WHERE image_id = ?", image_id):
            yield f"image {row['first_id']} has this address first"
    elif stage in ("near", "duplicates"):
        query = f"SELECT representative_id FROM {stage} WHERE image_id = ? AND representative_id <> image_id"
        for row in _rows(connection, query, image_id):
            yield f"image {row['representative_id']} stands for it{_address(connection, row['representative_id'])}"
        query = f"SELECT image_id FROM {stage} WHERE representative_id = ? AND image_id <> ? ORDER BY image_id"
        others = [str(row["image_id"]) for row in _rows(connection, query, image_id, image_id)]
        if others:
            more = f" and {len(others) - 10:,} more" if len(others) > 10 else ""
            yield f"it stands for {', '.join(others[:10])}{more}"
    elif stage == "leakage":
        query = "SELECT reference_id, benchmark FROM leakage WHERE image_id = ? AND reference_id IS NOT NULL"
        for row in _rows(connection, query, image_id):
            where = _address(connection, row["reference_id"])
            yield f"most like image {row['reference_id']} of benchmark {row['benchmark']}{where}"
    elif stage == "selection":
        for row in _rows(connection, "SELECT part, query_id, similarity FROM selection WHERE image_id = ?", image_id):
            if row["part"] is not None:
                yield f"for the set {row['part']}{_asked(connection, row)}"


def _asked(connection: Any, row: dict[str, Any]) -> str:
    alike = "" if row["similarity"] is None else f", similarity {row['similarity']:.4f}"
    if row["query_id"] is None:
        return alike
    return f", by query image {row['query_id']}{_address(connection, row['query_id'])}{alike}"


def _cluster(connection: Any, image_id: int) -> Iterator[str]:
    for row in _rows(connection, "SELECT cluster, similarity FROM clusters WHERE image_id = ?", image_id):
        yield _entry("cluster", f"{row['cluster']}, similarity {row['similarity']:.4f} to its centroid")
    query = "SELECT * FROM neighbours WHERE image_id = ? ORDER BY query_set, rank, query_id"
    for row in _rows(connection, query, image_id)[:10]:
        rank = "cut by the cap" if row["rank"] < 0 else f"rank {row['rank']}"
        yield _entry("retrieved", f"for {row['query_set']}, {rank}{_asked(connection, row)}")


def _sample(connection: Any, image_id: int) -> Iterator[str]:
    for row in _rows(connection, "SELECT * FROM manifest WHERE image_id = ?", image_id):
        blurred = ", faces blurred" if row["blurred"] else ""
        yield _entry("tar", f"{row['tar']}, key {row['key']}.{row['ext']}, offset {row['offset']:,}{blurred}")


def _address(connection: Any, image_id: int) -> str:
    rows = _rows(connection, "SELECT coalesce(url, location) AS address FROM urls WHERE image_id = ?", image_id)
    return f" ({rows[0]['address']})" if rows and rows[0]["address"] is not None else ""


def _entry(name: str, text: str) -> str:
    return f"  {name:<12}{text}"


def _rows(connection: Any, query: str, *values: Any) -> list[dict[str, Any]]:
    cursor = connection.execute(query, list(values))
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
