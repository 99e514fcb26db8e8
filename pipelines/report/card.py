"""The card of a finished run, as plain data: what the set holds, how it came about, and what it does not promise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.ingest.fetch import FetchConfig
from curation.query import run_checks, run_sql
from curation.safety.look import LookConfig
from curation.schema import VERDICTS
from pipelines.report.funnel import FunnelRow, funnel
from pipelines.report.retrieval import query_sets
from pipelines.report.settings import ASKED, Settings, settings_of
from training.config import ConfigError

if TYPE_CHECKING:
    from pipelines.results import Database

_NUM_HOSTS = 20
# Of each verdict: reason, key of the recipe, and what is dropped. A key that holds null says nothing.
_RULES = {
    "screened": (("scheme", "screen.schemes", "any scheme but {}"),),
    "fetched": (
        ("too_large", "fetch.max_bytes", "more than {} bytes"),
        ("too_many_redirects", "fetch.max_redirects", "more than {} redirects"),
        ("timeout", "fetch.timeout_s", "a visit longer than {} s"),
    ),
    "safety": (
        ("decode_too_many_bytes", "look.max_bytes", "a file of more than {} bytes"),
        ("decode_too_many_pixels", "look.max_pixels", "more than {} pixels"),
        ("decode_timeout", "look.max_seconds", "decoding longer than {} s of CPU time, or a JPEG of hundreds of scans"),
        ("too_small", "safety.min_shortest_px", "shortest side below {} px"),
        ("too_few_pixels", "safety.min_pixels", "less than {} pixels"),
        ("aspect", "safety.max_aspect", "longest over shortest side above {}"),
        ("blank", "safety.min_luma_std", "standard deviation of luma below {}"),
        ("placeholder", "safety.max_flat_share", "more than {} of the pixels within a grey level of one luma"),
        ("nsfw_opinion", "safety.opinion_drop", "a second opinion of at least {}"),
    ),
    "near": (("near_duplicate", "near.radius_bits", "hash (near.hash) at most {} bits from that of the picture kept"),),
    "duplicates": (
        (
            "copy",
            "duplicates.threshold",
            "cosine of at least {} to another picture of the pool; with edges.verify, local features",
        ),
    ),
    "leakage": (
        (
            "leak",
            "leakage.threshold",
            "cosine of at least {} to a picture of a benchmark; with edges.verify, local features",
        ),
    ),
    "semantic": (("semantic_duplicate", "semdedup.eps", "1 - cosine below {} to a picture before it in its cluster"),),
}
# Licences that no run records. Other models and files are of others.
_LICENCES = {
    "nudenet": "AGPL-3.0 (the metadata of its wheel says MIT)",
    "yunet": "that of its origin: MIT (OpenCV) or Apache-2.0 (libfacedetection)",
    "sift-vlad-dct": "Apache-2.0, part of lvd",
    "hog-thumb": "Apache-2.0, part of lvd",
    "sscd": "MIT",
}
_SOURCES = """
    SELECT name, role, kind, num_rows, digest FROM sources ORDER BY role = 'benchmark', role = 'query', source_id
"""
# Of 327 labelled faces, those that NudeNet, YuNet, and both cover with the default settings: docs/safety.md.
_FACES_FOUND = {(True, False): 199, (False, True): 304, (True, True): 306}
_WEIGHT_FREE = ("sift-vlad-dct", "hog-thumb")


def card(database: Database, recipe: Mapping[str, Any], finished: str) -> dict[str, Any]:
    """The card as JSON-able data.

    Args:
        database: an opened run that has tars.
        recipe: the recipe of the run, as JSON-able values.
        finished: day on which the last tar was written, YYYY-MM-DD.

    Raises:
        ConfigError: the run was not gone through to its end with this recipe; one line.
    """
    for name, num_rows in run_checks(database.connection).items():
        raise ConfigError(
            f"run {database.run} is not whole: check {name} found {num_rows:,} rows; go on with lvd curate, or look at "
            f"them with lvd sql {name} --run {database.run}"
        )
    settings = settings_of(database, recipe)
    connection, sections = database.connection, settings.sections
    steps = funnel(connection)
    counts = _counts(connection, steps)
    return {
        "name": recipe["name"],
        "finished": finished,
        "fetched": _fetched(connection),
        "max_shards": recipe["execution"]["max_shards"],
        "counts": counts,
        "sources": _rows(connection, _SOURCES),
        "composition": _composition(connection, recipe["queries"], counts["num_samples"]),
        "multiset": sections["select"]["multiset"],
        "funnel": [vars(step) for step in steps],
        "hosts": _hosts(connection, counts["num_images"]),
        "models": list(_models(settings, recipe)),
        "thresholds": list(_thresholds(sections)),
        "edge_recall": _report(connection, "edge_recall"),
        "policy": _policy(connection, sections),
        "limits": list(_limits(sections)),
        "contact": sections["fetch"]["contact"] or None,
        "takedowns": _takedowns(connection),
        "recipe": dict(recipe),
    }


# What the set holds


def _counts(connection: Any, steps: Sequence[FunnelRow]) -> dict[str, int]:
    query = """
        SELECT count(DISTINCT image_id) AS num_images, count(*) AS num_samples,
            count(DISTINCT image_id) FILTER (
                WHERE blurred AND image_id IN (SELECT image_id FROM detections WHERE num_faces > 0)
            ) AS num_blurred,
            coalesce(sum(size), 0)::BIGINT AS num_bytes,
            (SELECT count(*) FROM shards) AS num_tars,
            (SELECT coalesce(sum(num_bytes), 0)::BIGINT FROM shards) AS num_tar_bytes
        FROM manifest
    """
    return {"num_lines": steps[0].num_in if steps else 0, **_rows(connection, query)[0]}


def _fetched(connection: Any) -> dict[str, str] | None:
    """First and last day of the visits; None where nothing came from the web."""
    (days,) = _rows(
        connection,
        "SELECT min(started_at)::DATE::VARCHAR AS first, max(started_at)::DATE::VARCHAR AS last FROM fetch_log",
    )
    return days if days["first"] is not None else None


_COUNTS = (
    "num_retrieved",
    "num_taken",
    "num_unique",
    "num_collisions",
    "shortfall",
    "num_clusters",
    "num_short",
    "num_test_matches",
    "num_sampled",
    "recall",
    "num_final",
)


def _composition(connection: Any, queries: Mapping[str, Any], num_samples: int) -> list[dict[str, Any]]:
    """A row for each query set, in the order of the recipe, as in table 15 of the DINOv2 paper."""
    counted = {row["query_set"]: row for row in query_sets(connection)}
    return [
        {
            "query_set": name,
            "mode": query["mode"],
            **{key: query[key] for key in ASKED[query["mode"]]},
            "num_images": counted[name]["num_images"],
            "num_queries": counted[name]["num_queries"],
            "num_retrieved_nominal": counted[name]["num_nominal"],
            "num_final_nominal": counted[name]["num_final_nominal"],
            **{key: counted[name][key] for key in _COUNTS},
            "share": _share(counted[name]["num_final"], num_samples),
        }
        for name, query in queries.items()
    ]


def _hosts(connection: Any, num_images: int) -> dict[str, Any]:
    """Hosts of the pool by pictures in the set."""
    asked = [row for row in _report(connection, "hosts") if row["host"] is not None]
    gave = sorted((row for row in asked if row["num_kept"]), key=lambda row: (-row["num_kept"], row["host"]))
    largest = [
        {"host": row["host"], "num_images": row["num_kept"], "share": _share(row["num_kept"], num_images),
         "num_lines": row["num_lines"]}
        for row in gave[:_NUM_HOSTS]
    ]  # fmt: skip
    return {"num_hosts": len(gave), "num_hosts_of_lines": len(asked), "largest": largest}


# Models


def _models(settings: Settings, recipe: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    look = settings.sections["look"]
    if look["detector"] != "none":
        use = "explicit pictures, faces" if look["face_input_px"] else "explicit pictures"
        source = "320n.onnx of the package nudenet"
        yield _model(use, "look.detector", look["detector"], digest=look.get("nudenet"), source=source)
    if look["yunet"]:
        source = f"file {Path(recipe['look']['yunet']).name}"
        yield _model("faces", "look.yunet", "yunet", digest=look["yunet"], source=source)
    for section, use in (("descriptor", "copies and leaks"), ("embed", "clusters and retrieval")):
        made = settings.sections[section]
        name = str(made["name"]).partition(":")[0]
        if name in _WEIGHT_FREE:
            digest = settings.fits.get(section)
            source = f"fitted on at most {made['fit_pictures']:,} pictures of the pool"
        else:
            digest = made.get("weights_sha256")
            source = _origin_of_weights(recipe[section])
        yield _model(use, f"{section}.name", str(made["name"]), digest=digest, source=source)


def _model(use: str, key: str, name: str, *, digest: str | None, source: str) -> dict[str, Any]:
    """``digest`` is the sha256 of the weights, or the content digest of what was fitted."""
    licence = _LICENCES.get(name.partition(":")[0]) or _stated_licence(name)
    return {"use": use, "key": key, "name": name, "digest": digest, "licence": licence, "source": source}


def _origin_of_weights(section: Mapping[str, Any]) -> str:
    kind, _, rest = str(section["name"]).partition(":")
    path = rest if kind in ("sscd", "checkpoint", "script") else section["weights"]
    return f"file {Path(path).name}" if path else "cache of Hugging Face"


def _stated_licence(name: str) -> str:
    """What timm states of its models; nothing states it of a file."""
    kind, _, rest = name.partition(":")
    if kind == "timm":
        import timm

        found = timm.get_pretrained_cfg(rest, allow_unregistered=True)
        if found is not None and found.license:
            return f"{found.license}, as timm states for weights of this name"
    return "not recorded; see the origin of the weights"


# What was judged, and how


def _thresholds(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each limit of a verdict, verdicts in their order; selection is told by the composition."""
    chained = {"duplicates": sections["duplicates"]["policy"], "leakage": sections["leakage"]["mode"]}
    for verdict in VERDICTS:
        for reason, key, text in _RULES.get(verdict, ()):
            section, _, field = key.partition(".")
            more = ", directly or through copies" if chained.get(verdict) == "component" else ""
            if sections[section][field] is not None:
                yield _rule(verdict, reason, key, sections[section][field], text + more)
        if verdict == "safety" and sections["look"]["detector"] != "none":
            for label, score in sections["safety"]["nsfw_threshold"].items():
                text = f"a box of {label} with a score of at least {{}}"
                yield _rule(verdict, "nsfw", f"safety.nsfw_threshold.{label}", score, text)
        if verdict == "safety":
            yield from _block_lists(sections["safety"])
        if verdict == "near" and (num := len(sections["near"]["blocked_hashes"])):
            yield _rule(
                verdict, "blocked_hash", "near.blocked_hashes", num, "pHash within these bits of one of {} blocked ones"
            )


def _block_lists(safety: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rules of the lists that hold something; their entries were counted when the pictures were judged."""
    if num := _num_blocked(safety, "sha256"):
        text = "sha256 of the bytes is one of {} blocked ones"
        yield _rule("safety", "blocked_sha256", "safety.blocked_sha256_files", num, text)
    if num := _num_blocked(safety, "pdq"):
        text = f"PDQ at most {safety['blocked_pdq_radius_bits']} bits from one of {{}} blocked ones"
        yield _rule("safety", "blocked_pdq", "safety.blocked_pdq_files", num, text)


def _num_blocked(safety: Mapping[str, Any], kind: str) -> int:
    return int(safety.get(f"blocked_{kind}", {"entries": 0})["entries"])


def _rule(verdict: str, reason: str, key: str, value: Any, text: str) -> dict[str, Any]:
    told = ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return {"verdict": verdict, "reason": reason, "key": key, "value": value, "dropped": text.format(told)}


def _policy(connection: Any, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What pages and hosts could forbid, and how often they did."""
    fetch, screen = sections["fetch"], sections["screen"]
    query = "SELECT reason, count(*) AS num FROM end_state WHERE role = 'pool' AND reason IS NOT NULL GROUP BY reason"
    ended = {row["reason"]: row["num"] for row in _rows(connection, query)}
    (num_addresses,) = connection.execute(
        "SELECT count(*) FROM urls WHERE url IS NOT NULL AND location IS NULL AND error IS NULL"
    ).fetchone()
    reasons = ("robots_denied", "robots_unreachable", "opt_out", "blocked_host", "blocked_url")
    return {
        "user_agent": FetchConfig(agent=fetch["agent"], contact=fetch["contact"]).user_agent,
        "num_addresses": num_addresses,
        "respect_robots": fetch["respect_robots"],
        "respect_opt_out": fetch["respect_opt_out"],
        "num_blocked_hosts": len(screen["blocked_hosts"]),
        "num_blocked_urls": len(screen["blocked_urls"]),
        "num_block_lists": len(screen["block_list_files"]),
        "num_dropped": {reason: ended.get(reason, 0) for reason in reasons},
    }


def _faces_left(look: Mapping[str, Any], *, by_nudenet: bool) -> str:
    """What share of faces these settings blurred where they were measured: `make bench NAME=faces`."""
    defaults = LookConfig().model_dump(mode="json")
    keys = ["face_dilation"]
    keys += ["face_input_px", "face_thresholds"] if by_nudenet else []
    keys += ["yunet_scales", "yunet_thresholds"] if look["yunet"] else []
    if any(look[key] != defaults[key] for key in keys):
        return "Not every face is blurred: what share is was not measured with these settings."
    found = _FACES_FOUND[by_nudenet, bool(look["yunet"])]
    file = " with yunet_n_dynamic.onnx of libfacedetection" if look["yunet"] else ""
    return f"Not every face is blurred: these settings covered {found} of 327 labelled ones of at least 16 px{file}."


def _limits(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is not promised, in the words of docs/safety.md, as far as it holds for these settings."""
    look, fetch = sections["look"], sections["fetch"]
    by_nudenet = look["detector"] != "none" and bool(look["face_input_px"])
    if not by_nudenet and not look["yunet"]:
        yield "Faces were neither looked for nor blurred."
    elif not look["blur"]:
        yield "Faces were looked for, and not blurred."
    else:
        yield _faces_left(look, by_nudenet=by_nudenet)
        if look["purge_originals"]:
            yield (
                "Originals of pictures with a face that was found are gone from the pool, and so are other frames and "
                "what alpha hides; missed faces are in theirs."
            )
        else:
            yield "The pool keeps the original bytes: who may read it may see the faces."
    if look["detector"] == "none":
        yield "No picture was judged as explicit."
    else:
        yield "Not every explicit picture is dropped: how many pass was not measured."
    yield "Text, number plates, tattoos and anything else that tells who a person is were not looked at."
    obeyed = (("respect_robots", "robots.txt"), ("respect_opt_out", "opt-out headers"))
    beyond = " and ".join(text for key, text in obeyed if fetch[key])
    yield f"Licences and consent of pictures were not looked at{beyond and f' beyond {beyond}'}."
    brought = [
        name
        for name, is_there in (
            ("sha256", _num_blocked(sections["safety"], "sha256")),
            ("PDQ hashes", _num_blocked(sections["safety"], "pdq")),
            ("pHashes", sections["near"]["blocked_hashes"]),
        )
        if is_there
    ]
    but = f" but the {' and '.join(brought)} that the recipe brings" if brought else ""
    yield f"Nothing was compared with any list of known illegal material{but}."
    if sections["embed"]["name"] == "hog-thumb":
        yield "hog-thumb, which chose by meaning, is far below a learned model."


def _takedowns(connection: Any) -> dict[str, int]:
    """Rules of the pool's takedown list, those that follow from others too, and lines of this run that they ended."""
    query = """
        SELECT (SELECT count(*) FROM takedowns) AS num_rules,
            (SELECT count(*) FROM end_state WHERE reason = 'taken_down') AS num_lines
    """
    return {name: int(count) for name, count in _rows(connection, query)[0].items()}


# Rows


def _share(num: int, num_all: int) -> float:
    return num / num_all if num_all else 0.0


def _report(connection: Any, name: str) -> list[dict[str, Any]]:
    """Rows of a report as plain numbers and text, missing values as None."""
    frame = run_sql(connection, name)
    plain = frame.astype(object).where(frame.notna(), None)
    return [dict(zip(plain.columns, row, strict=True)) for row in plain.values.tolist()]


def _rows(connection: Any, query: str) -> list[dict[str, Any]]:
    cursor = connection.execute(query)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
