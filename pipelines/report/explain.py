"""The life of one picture: every verdict on it, what it was compared with, who asked for it, where it lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from curation.ingest.takedown import TAKEN_DOWN, Rules, from_table
from pipelines.report.lookup import find_lines, rows_of

_NUM_SAME_ADDRESS = 20
_NUM_LISTED = 10  # of copies, of neighbours, of samples
_ENDS = {"kept": "in the set", "reference": "a reference: compared with, never chosen", "pending": "not judged yet"}

_NEAR = """
    SELECT n.image_id, g.exact, g.distance_bits, n.representative_id
    FROM near n LEFT JOIN near_groups g USING (image_id)
    WHERE n.representative_id = (SELECT representative_id FROM near WHERE image_id = ?1) AND n.image_id <> ?1
    ORDER BY n.image_id <> n.representative_id, g.distance_bits, n.image_id
"""
# Of the pictures of its component: similarity of the edge to it, null where only others join them.
_COPIES = """
    SELECT d.image_id, max(e.similarity) AS similarity, bool_or(e.verified) AS verified
    FROM duplicates d
    LEFT JOIN edges e ON (e.a = ?1 AND e.b = d.image_id) OR (e.b = ?1 AND e.a = d.image_id)
    WHERE d.component_id = (SELECT component_id FROM duplicates WHERE image_id = ?1) AND d.image_id <> ?1
    GROUP BY ALL ORDER BY similarity DESC NULLS LAST, d.image_id
"""
_BELOW = """
    SELECT if(a = ?1, b, a) AS image_id, similarity, verified FROM edges WHERE (a = ?1 OR b = ?1)
    AND if(a = ?1, b, a) NOT IN (
        SELECT image_id FROM duplicates
        WHERE component_id = (SELECT component_id FROM duplicates WHERE image_id = ?1)
    )
    ORDER BY similarity DESC, image_id
"""
_REFERENCES = """
    SELECT reference_id AS image_id, similarity, verified FROM reference_edges WHERE image_id = ?
    ORDER BY similarity DESC, reference_id
"""
_DECIDES = """
    SELECT v.reference_id AS image_id, s.name AS benchmark, nullif(l.via_id, v.image_id) AS via_id
    FROM (SELECT image_id, reference_id FROM leakage UNION ALL SELECT image_id, reference_id FROM selection) v
    JOIN sources s ON s.source_id = v.reference_id // 1000000000000
    LEFT JOIN leaks l USING (image_id)
    WHERE v.image_id = ?
"""
_ASKED = "SELECT * FROM neighbours WHERE image_id = ? ORDER BY query_set, rank < 0, similarity DESC, query_id"
_RETRIEVED = """
    SELECT n.image_id, n.rank, n.similarity, e.stage, e.reason, coalesce(c.part, s.part) AS part,
        c.image_id IS NOT NULL AS is_chooser
    FROM neighbours n JOIN end_state e USING (image_id) LEFT JOIN selection s USING (image_id)
    LEFT JOIN choices c ON c.image_id = n.image_id AND c.query_id = n.query_id
    WHERE n.query_id = ? ORDER BY n.rank
"""


def explain(connection: Any, id_or_url: str) -> str:
    """Tell all that a run knows about one picture, or about each line with one address.

    Args:
        connection: of ``curation.query.connect``.
        id_or_url: ``image_id`` in digits, or the address (or the local location), see ``lookup.find_lines``.

    Raises:
        ConfigError: the run has no such line.
    """
    found = find_lines(connection, id_or_url)
    lives = ["\n".join(_life(connection, image_id)) for image_id in found[:_NUM_SAME_ADDRESS]]
    if len(found) > _NUM_SAME_ADDRESS:
        lives.append(f"and {len(found) - _NUM_SAME_ADDRESS:,} lines more with this address")
    return "\n\n".join(lives)


def _life(connection: Any, image_id: int) -> Iterator[str]:
    (line,) = rows_of(connection, "SELECT * FROM urls WHERE image_id = ?", image_id)
    (end,) = rows_of(connection, "SELECT * FROM end_state WHERE image_id = ?", image_id)
    yield f"image {image_id}"
    yield _entry("source", f"{line['source']} ({end['role']}), line {line['line']:,}")
    if line.get("file_line") is not None:  # pools of before do not tell
        yield _entry("file", f"{line['file']}, line {line['file_line']:,}")
    for name in ("url", "location", "page_url", "alt_text", "label"):
        if line[name] is not None:
            yield _entry(name.replace("_", " "), str(line[name]))
    if line["error"] is not None:
        yield _entry("broken", line["error"])
    yield from _facts(connection, image_id, line["url"])
    for verdict in rows_of(connection, "SELECT * FROM verdicts WHERE image_id = ? ORDER BY place", image_id):
        judged = "kept" if verdict["keep"] else f"dropped: {verdict['reason']}"
        if verdict["stage"] == "selection":  # where it lies among others comes before what was made of that
            yield from _cluster(connection, image_id)
            yield from _asked_for(connection, image_id)
            if end["stage"] == "reference":  # it asks, and nobody asks for it
                continue
        yield _entry(verdict["stage"], judged + _judged(verdict))
        for text in _beside(connection, verdict, line["url"]):
            yield _entry("", text)
    yield from _query(connection, image_id)
    yield from _sample(connection, image_id)
    yield _entry("end", _end(end))


def _end(end: dict[str, Any]) -> str:
    return _ENDS.get(end["stage"], f"{end['stage']}/{end['reason']}")


# Facts


def _facts(connection: Any, image_id: int, url: str | None) -> Iterator[str]:
    yield from _visits(connection, image_id)
    for row in rows_of(connection, "SELECT * FROM images WHERE image_id = ?", image_id):
        robots = "" if row["robots"] is None else f", robots.txt {row['robots']}"
        if row["ok"]:
            gone = "" if row["object"] is not None else ", original purged"
            yield _entry("bytes", f"{row['format']}, {row['num_bytes']:,} bytes{_status(row)}{robots}{gone}")
            yield _entry("sha256", row["sha256"])
        else:
            opt_out = "" if row["opt_out"] is None else f", header {row['opt_out']}"
            yield _entry("fetch", f"{row['reason']}{_status(row)}{robots}{opt_out}")
        if row["final_url"] is not None and row["final_url"] != url:
            yield _entry("final url", row["final_url"])
    for row in rows_of(connection, "SELECT * FROM hashes WHERE image_id = ? AND ok", image_id):
        yield _entry("picture", f"{row['width_px']} x {row['height_px']} px, pHash {row['phash']:016x}")
        if row.get("pdq") is not None:
            yield _entry("PDQ", f"{row['pdq']}, quality {row['pdq_quality']}")
    for row in rows_of(connection, "SELECT * FROM detections WHERE image_id = ?", image_id):
        is_blurred = row["num_faces"] and row["blurred_object"] is not None
        faces = _many(row["num_faces"] or 0, "face") + (" (blurred)" if is_blurred else "")
        worst = "" if row["nsfw_label"] is None else f", {row['nsfw_label']} {row['nsfw_score']:.3f}"
        yield _entry("seen", faces + worst)
    for row in rows_of(connection, "SELECT score FROM opinions WHERE image_id = ? AND score IS NOT NULL", image_id):
        yield _entry("opinion", f"{row['score']:.3f}")


def _status(row: dict[str, Any]) -> str:
    return "" if row["http_status"] is None else f", status {row['http_status']}"


def _visits(connection: Any, image_id: int) -> Iterator[str]:
    """Visits to servers, where there was more than one; of one, what came of it says enough."""
    query = """
        SELECT left(started_at::VARCHAR, 16) AS day, url, outcome, http_status
        FROM fetch_log WHERE image_id = ? ORDER BY started_at
    """
    visits = rows_of(connection, query, image_id)
    for number, row in enumerate(visits if len(visits) > 1 else ()):
        yield _entry("" if number else "visits", f"{row['day']} {row['url']} {row['outcome']}{_status(row)}")
    if len(visits) == 1 and visits[0]["day"] is not None:
        yield _entry("visited", visits[0]["day"])


# Verdicts, and what they compared the picture with


def _judged(verdict: dict[str, Any]) -> str:
    if verdict["score"] is None or verdict["stage"] == "selection":
        return ""
    limit = "" if verdict["threshold"] is None else f", threshold {verdict['threshold']:.4g}"
    return f"  (score {verdict['score']:.4g}{limit})"


def _beside(connection: Any, verdict: dict[str, Any], url: str | None) -> Iterator[str]:
    image_id = verdict["image_id"]
    if verdict["stage"] == "screened":
        for row in rows_of(connection, "SELECT first_id FROM url_duplicates WHERE image_id = ?", image_id):
            yield f"image {row['first_id']} has this address first"
    elif verdict["stage"] == "fetched" and verdict["reason"] == TAKEN_DOWN:
        yield _taken_down(connection, url)
    elif verdict["stage"] == "near":
        yield from _near(connection, image_id)
    elif verdict["stage"] == "duplicates":
        yield from _copies(connection, image_id)
    elif verdict["stage"] == "leakage":
        yield from _leaks(connection, image_id)
    elif verdict["stage"] == "semantic":
        yield from _means_the_same(connection, image_id)
    elif verdict["stage"] == "selection":
        query = "SELECT part, query_id, similarity FROM choices WHERE image_id = ? ORDER BY copy"
        samples = rows_of(connection, query, image_id)
        for row in samples[:_NUM_LISTED]:
            yield f"for the set {row['part']}{_by(connection, row)}"
        if len(samples) > _NUM_LISTED:
            yield f"and {len(samples) - _NUM_LISTED:,} times more"
        if verdict["reason"] == "test_match":
            yield from _leaks(connection, image_id)
        if verdict["reason"] == "not_retrieved":
            yield "no query set asked for it"


def _taken_down(connection: Any, url: str | None) -> str:
    rules = from_table(connection.sql("SELECT * FROM takedowns").to_arrow_table())
    for rule in rules:
        if Rules([rule]).url(url):
            return f"its address is on the takedown list{f': {rule.reason}' if rule.reason else ''}"
    return "its bytes, or where it leads, are on the takedown list"


def _near(connection: Any, image_id: int) -> Iterator[str]:
    others = rows_of(connection, _NEAR, image_id)
    if not others:
        return
    stands_for_it = others[0]["image_id"] == others[0]["representative_id"]
    own = rows_of(connection, "SELECT * FROM near_groups WHERE image_id = ?", image_id)
    if stands_for_it:
        first, others = others[0], others[1:]
        yield f"image {first['image_id']} stands for it{_apart(own[0] if own else None)}{_address(connection, first)}"
    yield from _listed(
        connection,
        others,
        f"it stands for {_many(len(others), 'near copy')}" if not stands_for_it else "and for",
        _apart,
    )


def _apart(row: dict[str, Any] | None) -> str:
    if row is None or row["distance_bits"] is None:
        return ""
    return ", the same bytes" if row["exact"] else f", {_many(row['distance_bits'], 'bit')} apart"


def _copies(connection: Any, image_id: int) -> Iterator[str]:
    others = rows_of(connection, _COPIES, image_id)
    num_pictures = len(others) + 1
    query = "SELECT representative_id FROM duplicates WHERE image_id = ? AND representative_id <> image_id"
    for kept in rows_of(connection, query, image_id):
        first = [row for row in others if row["image_id"] == kept["representative_id"]]
        others = [row for row in others if row not in first]
        for row in first:
            yield f"image {row['image_id']} stands for it{_alike(row)}{_address(connection, row)}"
    yield from _listed(connection, others, f"others of its component of {num_pictures:,} pictures", _alike)
    yield from _listed(connection, rows_of(connection, _BELOW, image_id), "like it, but no copies", _alike)


def _leaks(connection: Any, image_id: int) -> Iterator[str]:
    references = rows_of(connection, _REFERENCES, image_id)
    for told in rows_of(connection, _DECIDES, image_id):
        via = "" if told["via_id"] is None else f", joined by image {told['via_id']} of its component"
        yield f"most like image {told['image_id']} of benchmark {told['benchmark']}{via}{_address(connection, told)}"
        references = [row for row in references if row["image_id"] != told["image_id"]]
    yield from _listed(connection, references, "pictures of benchmarks that are like it", _alike)


def _means_the_same(connection: Any, image_id: int) -> Iterator[str]:
    """What it is too like, and what stays for it; how many it stands for."""
    query = "SELECT nearest_id, representative_id AS image_id FROM semantic WHERE image_id = ? AND NOT keep"
    for row in rows_of(connection, query, image_id):
        if row["nearest_id"] != row["image_id"]:
            yield f"too like image {row['nearest_id']} of its cluster, which goes for another"
        yield f"image {row['image_id']} of its cluster stays for it{_address(connection, row)}"
    query = "SELECT image_id FROM semantic WHERE representative_id = ? AND NOT keep ORDER BY image_id"
    others = rows_of(connection, query, image_id)
    told = f"it stays for {_many(len(others), 'picture')} of its cluster"
    yield from _listed(connection, others, told, lambda row: "")


def _alike(row: dict[str, Any]) -> str:
    if row["similarity"] is None:
        return ", joined by others"
    seen = "" if row["verified"] is None else ", local features agree" if row["verified"] else ", local features differ"
    return f", similarity {row['similarity']:.4f}{seen}"


# Meaning


def _cluster(connection: Any, image_id: int) -> Iterator[str]:
    query = """
        SELECT c.cluster, c.similarity, (
            SELECT count(*) FROM clusters o JOIN sources s ON s.source_id = o.image_id // 1000000000000
            WHERE o.cluster = c.cluster AND s.role = 'pool'
        ) AS num_pictures
        FROM clusters c WHERE image_id = ?
    """
    for row in rows_of(connection, query, image_id):
        holds = f"which holds {_many(row['num_pictures'], 'picture')} of the pool"
        yield _entry("cluster", f"{row['cluster']}, {holds}, similarity {row['similarity']:.4f} to its centroid")


def _asked_for(connection: Any, image_id: int) -> Iterator[str]:
    """Queries that retrieved a pool picture, the nearest first."""
    rows = rows_of(connection, _ASKED, image_id)
    for number, row in enumerate(rows[:_NUM_LISTED]):
        rank = "cut by the cap" if row["rank"] < 0 else f"rank {row['rank']}"
        place = f"{rank}{' in its cluster' if row['query_id'] is None and row['rank'] >= 0 else ''}"
        yield _entry("" if number else "asked for", f"for {row['query_set']}, {place}{_by(connection, row)}")
    if len(rows) > _NUM_LISTED:
        yield _entry("", f"and {len(rows) - _NUM_LISTED:,} times more")


def _by(connection: Any, row: dict[str, Any]) -> str:
    """Which query asked, with its address and label, and how alike it is."""
    if row["query_id"] is None:
        return "" if row["similarity"] is None else f", similarity {row['similarity']:.4f} to its centroid"
    query = "SELECT label FROM urls WHERE image_id = ? AND label IS NOT NULL"
    label = "".join(f", label {found['label']}" for found in rows_of(connection, query, row["query_id"]))
    address = _address(connection, {"image_id": row["query_id"]})
    return f", by query image {row['query_id']}{address}{label}, similarity {row['similarity']:.4f}"


def _query(connection: Any, image_id: int) -> Iterator[str]:
    """What a query picture asked for, and what became of that."""
    for row in rows_of(connection, "SELECT * FROM queries WHERE query_id = ?", image_id):
        if row["mode"] == "cluster":
            yield _entry("asks for", _of_cluster(connection, row))
        elif row["mode"] == "sample":
            yield from _nearest(connection, row)


def _of_cluster(connection: Any, row: dict[str, Any]) -> str:
    query = """
        SELECT count(*) FILTER (WHERE rank >= 0) AS num,
            (SELECT count(*) FROM queries WHERE cluster = ?1 AND query_set = ?2) AS num_queries
        FROM neighbours WHERE cluster = ?1 AND query_set = ?2 AND query_id IS NULL
    """
    (counts,) = rows_of(connection, query, row["cluster"], row["query_set"])
    asked = f"{_many(counts['num'], 'picture')} of cluster" if counts["num"] else "nothing of cluster"
    return f"{asked} {row['cluster']}, which holds {_many(counts['num_queries'], 'picture')} of its set"


def _nearest(connection: Any, row: dict[str, Any]) -> Iterator[str]:
    retrieved = rows_of(connection, _RETRIEVED, row["query_id"])
    num_in_set = sum(found["stage"] == "kept" for found in retrieved)
    num_chosen = sum(bool(found["is_chooser"]) for found in retrieved)
    told = f"{len(retrieved):,} retrieved, {num_in_set:,} of them in the set, {num_chosen:,} by this query"
    yield _entry("asks for", f"the {_many(row['k'], 'picture')} nearest to it: {told}")
    for found in retrieved[:_NUM_LISTED]:
        end = _end(found)
        if found["stage"] == "kept":
            end = f"in the set for {found['part']}{'' if found['is_chooser'] else ', by another query'}"
        alike = f"rank {found['rank']}, similarity {found['similarity']:.4f}"
        yield _entry("", f"{alike}, image {found['image_id']}, {end}{_address(connection, found)}")
    if len(retrieved) > _NUM_LISTED:
        yield _entry("", f"and {len(retrieved) - _NUM_LISTED:,} more")


def _sample(connection: Any, image_id: int) -> Iterator[str]:
    query = "SELECT m.*, d.num_faces FROM manifest m LEFT JOIN detections d USING (image_id) WHERE image_id = ?"
    for row in rows_of(connection, query, image_id):
        blurred = (", faces blurred" if row["num_faces"] else ", what was seen of it") if row["blurred"] else ""
        yield _entry("tar", f"{row['tar']}, key {row['key']}.{row['ext']}, offset {row['offset']:,}{blurred}")


# Pieces


def _listed(connection: Any, rows: Sequence[dict[str, Any]], title: str, beside: Any) -> Iterator[str]:
    if not rows:
        return
    yield f"{title}:"
    for row in rows[:_NUM_LISTED]:
        yield f"  image {row['image_id']}{beside(row)}{_address(connection, row)}"
    if len(rows) > _NUM_LISTED:
        yield f"  and {len(rows) - _NUM_LISTED:,} more"


def _address(connection: Any, row: dict[str, Any]) -> str:
    rows = rows_of(
        connection, "SELECT coalesce(url, location) AS address FROM urls WHERE image_id = ?", row["image_id"]
    )
    return f"  {rows[0]['address']}" if rows and rows[0]["address"] is not None else ""


def _many(num: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{num:,} {noun if num == 1 else plural}"


def _entry(name: str, text: str) -> str:
    return f"  {name:<12}{text}"
