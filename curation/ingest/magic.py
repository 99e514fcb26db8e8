"""Picture formats told from the first bytes. What a server or a file name says is not believed."""

from __future__ import annotations

SNIFF_BYTES = 64  # enough for every signature below

EXTENSIONS = {
    "jpeg": "jpg",
    "png": "png",
    "gif": "gif",
    "webp": "webp",
    "bmp": "bmp",
    "tiff": "tif",
    "avif": "avif",
    "heif": "heic",
    "jxl": "jxl",
}
_SIGNATURES = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cJXL ", "jxl"),
)
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def sniff_format(data: bytes) -> str | None:
    """Format of a picture, one of ``EXTENSIONS``; None where the bytes begin like none of them."""
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    return _isobmff_format(data) if data[4:8] == b"ftyp" else None


def _isobmff_format(data: bytes) -> str | None:
    """AVIF and HEIF share their container; the brands of its first box tell them apart."""
    end = min(int.from_bytes(data[:4], "big"), SNIFF_BYTES)
    brands = [data[8:12], *(data[place : place + 4] for place in range(16, end, 4))]
    if any(brand in (b"avif", b"avis") for brand in brands):
        return "avif"
    return "heif" if any(brand in _HEIF_BRANDS for brand in brands) else None
