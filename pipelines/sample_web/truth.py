"""Every kind of line that is planted, and where a correct run ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

KEPT = "kept"  # it survives everything up to and including leakage; what semantic and selection do then is not judged

# own: a picture of its own; copy: derived from a base picture that nothing else derives from; any: some base picture's
# bytes, which are never accepted; none: no picture of the site.
Needs = Literal["own", "copy", "any", "none"]


class Kind(NamedTuple):
    """One kind: how many of it, what it needs, where it ends. Alternatives are joined by ``|``."""

    name: str
    per_mille: float
    needs: Needs
    end_stage: str
    reason: str = ""
    most: int = 1_000_000  # kinds that cost seconds a line stay few however large the site is


KINDS = (
    # copies: the base line comes first and has the most pixels and bytes, so it is the one that stays
    Kind("exact_copy", 30, "copy", "near", "exact_duplicate"),
    Kind("reencoded", 40, "copy", "near|duplicates", "near_duplicate|copy"),
    Kind("resized", 30, "copy", "near|duplicates", "near_duplicate|copy"),
    Kind("crop", 30, "copy", "near|duplicates", "near_duplicate|copy"),
    Kind("overlay", 30, "copy", "near|duplicates", "near_duplicate|copy"),
    Kind("benchmark_equal", 10, "none", "leakage", "leak"),
    # lines that screening ends
    Kind("url_repeat", 25, "copy", "screened", "duplicate_url"),
    Kind("url_variant", 20, "copy", "screened", "duplicate_url"),
    Kind("broken_line", 15, "none", "screened", "broken_line"),
    Kind("scheme", 10, "none", "screened", "scheme"),
    Kind("blocked_host", 20, "none", "screened", "blocked_host"),
    # what may not be fetched
    Kind("robots_denied", 20, "any", "fetched", "robots_denied"),
    Kind("robots_unreachable", 3, "any", "fetched", "robots_unreachable", 20),
    Kind("opt_out", 20, "any", "fetched", "opt_out"),
    # what servers do
    Kind("not_found", 15, "none", "fetched", "http_4xx"),
    Kind("gone", 5, "none", "fetched", "http_4xx"),
    Kind("server_error", 8, "none", "fetched", "http_5xx", 40),
    Kind("rate_limited_ok", 6, "own", KEPT, most=16),
    Kind("rate_limited", 6, "any", "fetched", "rate_limited", 16),
    Kind("slow_ok", 10, "own", KEPT, most=40),
    Kind("slow_drip", 4, "any", "fetched", "timeout", 8),
    Kind("redirect_ok", 15, "own", KEPT),
    Kind("redirect_private", 10, "none", "fetched", "forbidden_address"),
    Kind("redirect_loop", 4, "none", "fetched", "too_many_redirects", 16),
    Kind("truncated_body", 6, "any", "fetched", "truncated_body", 40),
    Kind("too_large", 2, "any", "fetched", "too_large", 8),
    Kind("wrong_mime", 6, "own", KEPT),
    Kind("html_as_jpg", 10, "none", "fetched", "not_an_image"),
    # bytes that are no good picture
    Kind("truncated_file", 10, "any", "safety", "decode_truncated"),
    Kind("corrupt", 8, "none", "safety", "decode_corrupt|decode_truncated|decode_unsupported"),
    Kind("bomb", 3, "none", "safety", "decode_too_many_pixels", 12),
    Kind("tiny", 8, "none", "safety", "too_small"),
    Kind("wide", 6, "none", "safety", "aspect"),
    Kind("blank", 8, "none", "safety", "blank"),
    # odd but good
    Kind("cmyk_jpeg", 5, "own", KEPT),
    Kind("png16", 5, "own", KEPT),
    Kind("animated_gif", 5, "own", KEPT),
    Kind("exif_rotated", 5, "own", KEPT),
    Kind("alpha_png", 5, "own", KEPT),
    Kind("grey_jpeg", 5, "own", KEPT),
    Kind("webp", 5, "own", KEPT),
    Kind("face", 10, "own", KEPT),
)
BASE = Kind("base", 0, "own", KEPT)
KIND_OF = {kind.name: kind for kind in (BASE, *KINDS)}

# Nobody may ask for these; a request for one is a forbidden contact.
NEVER_REQUESTED = ("robots_denied", "robots_unreachable", "blocked_host")
# The header that forbids use comes with the answer, so a request is allowed and reading the body to its end is not.
NEVER_READ = ("opt_out",)

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("line", pa.int64(), metadata={"doc": "position in urls.csv, from 0"}),
        pa.field("url", pa.string(), metadata={"doc": "as written in the list"}),
        pa.field("kind", pa.string(), metadata={"doc": "what was planted; `base` where nothing was"}),
        pa.field("end_stage", pa.string(), metadata={"doc": "verdict that ends it, alternatives joined by |, or kept"}),
        pa.field("reason", pa.string(), metadata={"doc": "reason there, alternatives joined by |; null where kept"}),
        pa.field("scene", pa.string(), metadata={"doc": "photograph that the picture was made from; null where none"}),
        pa.field("base_line", pa.int64(), metadata={"doc": "line of the picture it derives from; null where none"}),
        pa.field(
            "face_box",
            pa.struct([(name, pa.float32()) for name in ("x_px", "y_px", "w_px", "h_px")]),
            metadata={"doc": "the planted face; null where none"},
        ),
    ]
)


def counts(num_urls: int) -> dict[str, int]:
    """How many lines of each kind a site of ``num_urls`` lines has, base included."""
    planted = {kind.name: min(kind.most, max(1, round(kind.per_mille * num_urls / 1000))) for kind in KINDS}
    return {BASE.name: num_urls - sum(planted.values()), **planted}


def read_truth(folder: Path) -> pa.Table:
    """The truth of a site, one row a line."""
    return pq.read_table(folder / "truth.parquet", schema=TRUTH_SCHEMA)
