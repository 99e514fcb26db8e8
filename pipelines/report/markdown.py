"""The card of a run as markdown that also reads well as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from curation.dedup.edge_recall import told_of_recall

_ROLES = {"pool": "curated", "query": "query set", "benchmark": "kept apart from"}
_MODES = {"as_is": "as is", "sample": "sample", "cluster": "cluster", "balanced": "balanced"}
_KEPT = {
    "screened": "the address may be fetched and was not listed before",
    "fetched": "its bytes came",
    "safety": "it decodes and is neither small, blank nor explicit",
    "near": "no kept picture has nearly the same perceptual hash",
    "duplicates": "it is no copy of a kept picture",
    "leakage": "it is no copy of a picture of a benchmark",
    "semantic": "no picture before it in its cluster means nearly the same",
    "selection": "a query set asked for it",
    "as_is": "it belongs to a set that is taken as it is",
    "set": "",
    "samples": "a picture counts as often as it was taken",
}
_DIGEST_CHARS = 12
_COLUMNS = 100

Card = Mapping[str, Any]


def format_card(card: Card) -> str:
    """The card as markdown.

    Args:
        card: what ``pipelines.report.card.card`` gives, or ``card.json`` read again.
    """
    sections = [
        ("Counts", _counts(card)),
        ("Composition", _composition(card)),
        ("Sources", _sources(card)),
        ("Funnel", _funnel(card)),
        ("Hosts", _hosts(card)),
        ("Models", _models(card)),
        ("Thresholds", _thresholds(card)),
        ("Robots and opt-out", _policy(card)),
        ("Known limits", _limits(card)),
        ("Taking a picture out", _removal(card)),
        ("Recipe", _recipe(card)),
    ]
    blocks = [f"# {card['name']}", *_head(card)]
    for title, body in sections:
        lines = list(body)
        if lines:
            blocks += [f"## {title}", *lines]
    return "\n\n".join(blocks) + "\n"


# Sections, each as blocks of text


def _head(card: Card) -> Iterator[str]:
    counts = card["counts"]
    num_as_is = sum(part["num_final"] for part in card["composition"] if part["mode"] == "as_is")
    num_chosen = f"{counts['num_images'] - num_as_is:,} " if num_as_is else ""
    as_is = f", and {num_as_is:,} of sets that are taken as they are" if num_as_is else ""
    yield _text(
        f"{_many(counts['num_images'], 'picture')}: {num_chosen}out of {_many(counts['num_lines'], 'line')} of the "
        f"sources{as_is}. Finished on {card['finished']}."
    )
    if card["multiset"]:
        yield _text(
            f"The set is a multiset: {_many(counts['num_samples'], 'sample')}, one for each time that a query set took "
            "a picture, as the paper counts."
        )
    yield _text(
        "An image set made as LVD-142M was (DINOv2, arXiv:2304.07193, appendix A): pictures that are close to those of "
        "curated sets, without copies and without what benchmarks show, as far as the verdicts below tell. `lvd "
        "curate` made it; the table `manifest` says of each picture where it came from and in which tar it lies."
    )
    if card["fetched"] is not None:
        first, last = card["fetched"]["first"], card["fetched"]["last"]
        yield _text(f"Fetched from the web {f'on {first}' if first == last else f'between {first} and {last}'}.")
    if card["max_shards"] is not None:
        yield _text(
            f"Of the sources only the first {_many(card['max_shards'], 'shard')} were taken (`execution.max_shards`)."
        )


def _counts(card: Card) -> Iterator[str]:
    counts = card["counts"]
    rows = [
        ["pictures", f"{counts['num_images']:,}"],
        *([["samples of them", f"{counts['num_samples']:,}"]] if card["multiset"] else []),
        ["of them with blurred faces", f"{counts['num_blurred']:,}"],
        ["bytes of pictures", f"{counts['num_bytes']:,}"],
        ["tars", f"{counts['num_tars']:,}"],
        ["bytes of tars", f"{counts['num_tar_bytes']:,}"],
    ]
    yield _table(["what", "number"], rows, numbers=(1,))


def _composition(card: Card) -> Iterator[str]:
    parts = card["composition"]
    if not parts:
        return
    rows = [
        [
            _code(part["query_set"]),
            _MODES[part["mode"]],
            _number(part["num_images"]),
            _number(part["num_retrieved_nominal"]),
            _number(part["num_retrieved"]),
            _number(part["num_unique"]),
            f"{part['num_final']:,}",
            f"{part['share']:.1%}",
        ]
        for part in parts
    ]
    final, share = sum(part["num_final"] for part in parts), sum(part["share"] for part in parts)
    rows.append(["total", "", "", "", "", "", f"{final:,}", f"{share:.1%}"])
    names = ["query set", "mode", "images", "asked for", "retrieved", "unique", "final", "share"]
    yield _table(names, rows, numbers=(2, 3, 4, 5, 6, 7))
    rules: dict[str, list[str]] = {}
    for part in parts:
        rules.setdefault(_rule(part), []).append(_code(part["query_set"]))
    yield _list(f"{', '.join(sets)}: {rule}" for rule, sets in rules.items())
    unread = [part for part in parts if part["num_images"] and part["num_queries"] < part["num_images"]]
    if unread:
        told = ", ".join(
            f"{part['num_images'] - part['num_queries']:,} of {_code(part['query_set'])}" for part in unread
        )
        yield _text(f"Images that could not be read asked for nothing: {told}.")
    matching = [part for part in parts if part["num_test_matches"]]
    if matching:
        told = ", ".join(f"{part['num_test_matches']:,} of {_code(part['query_set'])}" for part in matching)
        yield _text(f"Images of sets that are taken as they are, left out because a benchmark holds them too: {told}.")
    yield from (_text(line) for line in _shortfall(parts))
    yield _text(
        "A picture is asked for and retrieved as often as queries ask for it, as in table 15 of the paper, and counts "
        "once among the unique ones, which leave out what the cap of its set cut. In the set a picture is "
        + (
            "as often as query sets took it."
            if card["multiset"]
            else "once, for the first query set that asked for it."
        )
    )


def _shortfall(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where less was retrieved than was asked for, and how much of what is nearest the search found."""
    short = [part for part in parts if part["shortfall"]]
    if short:
        told = ", ".join(
            f"{part['shortfall']:,} of {_code(part['query_set'])}"
            + (f" (in {_many(part['num_short'], 'cluster')})" if part["num_short"] else "")
            for part in short
        )
        yield f"More was asked for than the pool holds: {told}."
    searched = [part for part in parts if part["recall"] is not None]
    if searched:
        told = ", ".join(
            f"{part['recall']:.2%} for {_code(part['query_set'])} ({_many(part['num_sampled'], 'query')})"
            for part in searched
        )
        yield f"Neighbours that the search found, of those that an exact search of a sample of queries finds: {told}."


def _rule(part: Mapping[str, Any]) -> str:
    if part["mode"] == "as_is":
        return "its images themselves"
    if part["mode"] == "sample":
        return (
            f"the nearest {_many(part['k'], 'picture')} of each image"
            if part["k"] > 1
            else "the nearest picture of each image"
        )
    if part["mode"] == "balanced":
        return f"{_many(part['total'], 'picture')}, as many from each cluster of the pool as from any other"
    return (
        f"up to {_many(part['per_cluster'], 'picture')} of each cluster that holds more than "
        f"{_many(part['min_queries'], 'image')} of the set, at most {part['cap']:,} in all"
    )


def _sources(card: Card) -> Iterator[str]:
    rows = [
        [
            _code(row["name"]),
            _ROLES[row["role"]],
            row["kind"],
            f"{row['num_rows']:,}",
            _digest(row["digest"]),
        ]
        for row in card["sources"]
    ]
    yield _table(["source", "role", "kind", "lines", "digest"], rows, numbers=(3,))


def _funnel(card: Card) -> Iterator[str]:
    steps = card["funnel"]
    if not steps:
        return
    num_lines = steps[0]["num_in"]
    rows = [["lines", "", "", f"{num_lines:,}", "100.0%"]] if num_lines else []
    for step in steps:
        extra = step["stage"] in ("as_is", "set", "samples")
        dropped = "" if step["stage"] in ("set", "samples") else f"{step['num_dropped']:,}"
        left = f"+{step['num_left']:,}" if step["stage"] == "as_is" else f"{step['num_left']:,}"
        share = "" if extra or not num_lines else f"{step['num_left'] / num_lines:.1%}"
        rows.append([_stage(step), _KEPT[step["stage"]], dropped, left, share])
    yield _table(["stage", "kept if", "dropped", "left", "of lines"], rows, numbers=(2, 3, 4))
    reasons = [
        [_stage(step), _code(reason), f"{num:,}", "" if step["stage"] == "as_is" else f"{num / num_lines:.1%}"]
        for step in steps
        for reason, num in step["reasons"].items()
    ]
    if reasons:
        yield _text("Why the others went:")
        yield _table(["stage", "reason", "dropped", "of lines"], reasons, numbers=(2, 3))


def _stage(step: Mapping[str, Any]) -> str:
    return {"as_is": "as-is sets", "set": "set", "samples": "samples"}.get(step["stage"], _code(step["stage"]))


def _hosts(card: Card) -> Iterator[str]:
    hosts = card["hosts"]
    if not hosts["largest"]:
        return
    first = hosts["largest"][0]
    yield _text(
        f"Pictures of the set came from {_many(hosts['num_hosts'], 'host')}, of {hosts['num_hosts_of_lines']:,} in the "
        f"sources. The largest, {_code(first['host'])}, gave {first['share']:.1%} of the set."
    )
    if hosts["num_hosts"] > len(hosts["largest"]):
        yield _text(f"The {len(hosts['largest']):,} that gave most:")
    rows = [
        [_code(row["host"]), f"{row['num_images']:,}", f"{row['share']:.1%}", f"{row['num_lines']:,}"]
        for row in hosts["largest"]
    ]
    yield _table(["host", "pictures", "of the set", "lines"], rows, numbers=(1, 2, 3))


def _models(card: Card) -> Iterator[str]:
    rows = [
        [model["use"], _code(model["name"]), _digest(model["digest"]), model["licence"], model["source"]]
        for model in card["models"]
    ]
    yield _table(["for", "model", "digest", "licence", "source"], rows)
    yield _text("A digest is the sha256 of the weights, or of what was fitted; `card.json` has all of it.")


def _thresholds(card: Card) -> Iterator[str]:
    rows = [
        [_code(row["verdict"]), _code(row["reason"]), row["dropped"], _code(row["key"])] for row in card["thresholds"]
    ]
    yield _table(["verdict", "reason", "what is dropped", "key"], rows)
    if card["edge_recall"]:
        yield _text("Copies and leaks are searched for, and an exact search of a sample tells how many were found:")
        yield _list(f"{told_of_recall(row)}." for row in card["edge_recall"])


def _policy(card: Card) -> Iterator[str]:
    policy = card["policy"]
    dropped, fetched = policy["num_dropped"], policy["num_addresses"] > 0

    def told(*reasons: str) -> str:
        return ", ".join(f"{dropped[reason]:,}\xa0{_code(reason)}" for reason in reasons)

    def lines() -> Iterator[str]:
        if not fetched:
            yield "All pictures are local files: no address was visited."
        elif policy["respect_robots"]:
            by_robots = told("robots_denied", "robots_unreachable")
            yield f"robots.txt was asked for first and obeyed. Lines dropped: {by_robots}."
        else:
            yield "robots.txt was **not** asked for (`fetch.respect_robots`)."
        if fetched and policy["respect_opt_out"]:
            yield (
                "Headers that forbid use (`X-Robots-Tag` with noai, noimageai, noml, noindex, noimageindex or none; "
                f"`tdm-reservation: 1`) were obeyed. Lines dropped: {told('opt_out')}."
            )
        elif fetched:
            yield "Headers that forbid use were **not** obeyed (`fetch.respect_opt_out`)."
        if fetched:
            yield f"The visits said who came: `User-Agent: {policy['user_agent']}`."
        kinds = (("num_blocked_hosts", "host"), ("num_blocked_urls", "address"), ("num_block_lists", "list"))
        blocked = [_many(policy[key], kind) for key, kind in kinds if policy[key]]
        if blocked:
            yield f"Blocked by the recipe: {', '.join(blocked)}. Lines dropped: {told('blocked_host', 'blocked_url')}."

    yield _list(lines())


def _limits(card: Card) -> Iterator[str]:
    yield _list(card["limits"])
    yield _text("More, and how it was measured, stands in `docs/safety.md` of lvd.")


def _removal(card: Card) -> Iterator[str]:
    if card["contact"] is not None:
        yield _text(f"Write to {card['contact']} and name the address of the picture, or its key in the tars.")
    else:
        yield _text("The recipe names no contact (`fetch.contact`). Whoever passes the set on should name one here.")
    yield _text(
        "Who keeps the set runs `lvd takedown LIST` with a list of addresses, sha256 or hashes: the pictures leave "
        "the pool and the tars, and no later run fetches them again."
    )
    taken = card["takedowns"]
    if taken["num_rules"]:
        yield _text(
            f"The takedown list of the pool has {_many(taken['num_rules'], 'rule')}, those that follow from others "
            f"too; {_many(taken['num_lines'], 'line')} of this run ended by it."
        )


def _recipe(card: Card) -> Iterator[str]:
    text = yaml.safe_dump(card["recipe"], sort_keys=False, allow_unicode=True, width=120)
    yield _text("As it resolved; saved as a file that ends in `.yaml` it runs again.")
    yield f"```yaml\n{text}```"


# Pieces


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Cells padded to the width of their column, numbers to the right; a column without any text is left out."""
    widths = [max(3, *(len(row[n]) for row in (names, *rows))) for n in range(len(names))]
    filled = [n for n in range(len(names)) if any(row[n] for row in rows)]
    rule = ["-" * (width - 1) + ":" if n in numbers else "-" * width for n, width in enumerate(widths)]
    lines = []
    for row in (names, rule, *rows):
        cells = [row[n].rjust(widths[n]) if n in numbers else row[n].ljust(widths[n]) for n in filled]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _list(items: Iterable[str]) -> str:
    return "\n".join(_text(item, "- ", "  ") for item in items)


def _text(text: str, first: str = "", others: str = "") -> str:
    """A paragraph or an item of a list; a no-break space keeps two words on one line."""
    filled = textwrap.fill(
        text, _COLUMNS, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
    return filled.replace("\xa0", " ")


def _code(text: str) -> str:
    """Text of others as it stands: nothing in it is markup, nor ends a cell."""
    plain = " ".join(text.split()).replace("|", "\\|")
    return f"`` {plain} ``" if "`" in plain else f"`{plain}`"


def _digest(digest: str | None) -> str:
    return f"`{digest[:_DIGEST_CHARS]}`" if digest else ""


def _number(num: int | None) -> str:
    return "–" if num is None else f"{num:,}"


def _many(num: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{num:,} {noun if num == 1 else plural}"
