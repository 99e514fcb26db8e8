"""Tables of what is seen in a picture, and of the verdict on it."""

import pyarrow as pa

from curation.schema.table import ID, SHA, VERDICT, Table, columns

BOX = pa.struct(
    [
        ("label", pa.string()),
        ("score", pa.float32()),
        ("x_px", pa.float32()),
        ("y_px", pa.float32()),
        ("w_px", pa.float32()),
        ("h_px", pa.float32()),
    ]
)
TABLES = (
    Table(
        name="hashes",
        root="pool",
        kind="facts",
        row="one picture that was looked at",
        schema=columns(
            ID,
            SHA,
            ("ok", pa.bool_(), "it decoded"),
            ("reason", pa.string(), "decode failure class; null where ok"),
            ("width_px", pa.int32(), "after orientation"),
            ("height_px", pa.int32(), "after orientation"),
            ("format", pa.string(), "as the decoder says"),
            ("num_frames", pa.int32(), "1 for a still picture, 1,000 for that many or more; the first one is used"),
            ("pixel_sha256", pa.string(), "sha256 of shape and RGB bytes"),
            ("phash", pa.uint64(), "imagehash.phash, most significant bit first"),
            ("dhash", pa.uint64(), "imagehash.dhash, most significant bit first"),
            ("pdq", pa.string(), "PDQ, 64 hex digits, most significant bit first; null where it did not decode"),
            ("pdq_quality", pa.int16(), "of PDQ, 0 to 100; below 50 it is not trusted"),
            ("luma_std", pa.float32(), "standard deviation of luma, 0 to 127; near 0 is a blank picture"),
            (
                "flat_share",
                pa.float32(),
                "largest share of pixels within a grey level of one luma; near 1 is a placeholder",
            ),
        ),
    ),
    Table(
        name="detections",
        root="pool",
        kind="facts",
        row="one picture that was looked at",
        schema=columns(
            ID,
            SHA,
            ("boxes", pa.list_(BOX), "all boxes above the floor, pixels of the oriented picture"),
            (
                "class_scores",
                pa.map_(pa.string(), pa.float32()),
                "largest score of every class of NudeNet, before overlaps are suppressed; empty without NudeNet",
            ),
            ("nsfw_label", pa.string(), "explicit class with the highest of them; null where there are none"),
            ("nsfw_score", pa.float32(), "that score, 0 where there are none"),
            ("faces", pa.list_(BOX), "boxes that were blurred, dilated"),
            ("num_faces", pa.int32(), "length of faces"),
            (
                "blurred_object",
                pa.string(),
                "tar of the blurred version; without faces: of what was seen of a file that holds more; else null",
            ),
            ("blurred_offset", pa.int64(), "of its first byte"),
            ("blurred_bytes", pa.int64(), "its size"),
            (
                "small_object",
                pa.string(),
                "tar of the 288-px intermediate (faces blurred); null where it did not decode",
            ),
            ("small_offset", pa.int64(), "of its first byte"),
            ("small_bytes", pa.int64(), "its size"),
        ),
    ),
    Table(
        name="opinions",
        root="pool",
        kind="facts",
        row="one picture that was looked at; none where opinion.name is none",
        schema=columns(
            ID,
            SHA,
            ("score", pa.float32(), "of the head that gives a second opinion; null where it was not asked"),
        ),
    ),
    Table(name="safety", root="run", kind="verdict", row="one fetched picture", schema=columns(*VERDICT)),
)
