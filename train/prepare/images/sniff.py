"""What a file is, by its first bytes, and how large it says its picture is. Reads bytes, decodes nothing."""

from __future__ import annotations

EXTENSIONS = {
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif"), "png": (".png", ".apng"), "webp": (".webp",), "bmp": (".bmp", ".dib"),
    "gif": (".gif",), "avif": (".avif", ".avifs"), "tiff": (".tif", ".tiff"), "jxl": (".jxl",),
    "jpeg2000": (".jp2", ".j2k", ".jpx"), "ico": (".ico",), "psd": (".psd",), "heif": (".heic", ".heif"),
    "pdf": (".pdf",),
}  # fmt: skip
_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"GIF87a", "gif"), (b"GIF89a", "gif"),
    (b"II*\0", "tiff"), (b"MM\0*", "tiff"), (b"II+\0", "tiff"), (b"MM\0+", "tiff"), (b"8BPS", "psd"),
    (b"\0\0\1\0", "ico"), (b"\xff\x0a", "jxl"), (b"\0\0\0\x0cJXL ", "jxl"), (b"\0\0\0\x0cjP  ", "jpeg2000"),
    (b"%PDF-", "pdf"),
)  # fmt: skip
NO_PICTURES = ("video", "archive", "flash")  # what `sniff` calls things that no one means to train on as they are
_MEDIA_MAGIC = (
    (b"\x1aE\xdf\xa3", "video"), (b"FLV\x01", "video"), (b"FWS", "flash"), (b"CWS", "flash"), (b"ZWS", "flash"),
    (b"PK\x03\x04", "archive"), (b"Rar!\x1a\x07", "archive"), (b"7z\xbc\xaf\x27\x1c", "archive"),
)  # fmt: skip
_VIDEO_BRANDS = (b"isom", b"iso2", b"iso4", b"iso5", b"iso6", b"mp41", b"mp42", b"avc1", b"M4V ", b"MSNV", b"dash", b"qt  ", b"3gp4", b"3gp5")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def sniff(data: bytes) -> str | None:
    """Format by content (`jpeg`, `png`, ..., or one of NO_PICTURES), or None when nothing known begins like this."""
    for magic, name in (*_MAGIC, *_MEDIA_MAGIC):
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        brands = [data[at : at + 4] for at in (8, *range(16, min(_big(data, 0, 4), 64), 4))]
        if any(brand in _AVIF_BRANDS for brand in brands):
            return "avif"
        if brands[0] in _HEIF_BRANDS:
            return "heif"
        if brands[0] in _VIDEO_BRANDS:
            return "video"
    # Two letters alone would take in text that begins with "BM": the header's length must be one that exists.
    if data[:2] == b"BM" and _little(data, 14, 4) in (12, 16, 40, 52, 56, 64, 108, 124):
        return "bmp"
    return None


def ext_mismatch(found: str, extension: str) -> bool:
    """Whether a file name's extension (`.jpg`) belongs to another format than its content."""
    return extension.lower() not in EXTENSIONS.get(found, ())


def header_size(found: str, data: bytes) -> tuple[int, int] | None:
    """(width, height) of the canvas for formats whose decoder allocates it on opening; None for the others."""
    if found != "webp":
        return None
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return _little(data, 24, 3) + 1, _little(data, 27, 3) + 1
    if kind == b"VP8L" and len(data) >= 25:
        bits = _little(data, 21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(data) >= 30:
        return _little(data, 26, 2) & 0x3FFF, _little(data, 28, 2) & 0x3FFF
    return None


def ends_early(found: str, data: bytes) -> bool:
    """Whether the bytes stop before the end that the format announces: cut off, rather than never an image."""
    if found == "webp":
        return len(data) < 8 + _little(data, 4, 4)
    if found == "bmp":
        return len(data) < _little(data, 2, 4)
    if found == "avif":
        return _boxes_end(data) > len(data)
    endings = {"jpeg": b"\xff\xd9", "png": b"IEND\xaeB\x60\x82", "gif": b"\x3b"}
    return found in endings and endings[found] not in data[-64:]


def lacks_end(found: str, data: bytes) -> bool:
    """Whether the end marker of a JPEG or PNG occurs nowhere behind its start: decoders fill such pictures up in grey.

    Bytes behind the marker are no fault: cameras append whole films.
    """
    if found == "png":
        return data.find(b"IEND\xaeB\x60\x82") < 0
    return found == "jpeg" and data.find(b"\xff\xd9", _scan_start(data)) < 0


def jpeg_scans(data: bytes) -> int:
    """Scans of the (first) picture of a JPEG: inside the coded data the marker cannot occur by chance."""
    start = _scan_start(data)
    end = data.find(b"\xff\xd9", start)
    return data.count(b"\xff\xda", start, len(data) if end < 0 else end)


def _scan_start(data: bytes) -> int:
    """Where the first scan of a JPEG begins: a thumbnail in the segments before it has end markers of its own."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        at += 1 if data[at + 1] == 0xFF else 2 + _big(data, at + 2, 2)
    return at


def _boxes_end(data: bytes) -> int:
    """Where the last top-level box of an ISO media file would end."""
    at = 0
    while at + 8 <= len(data):
        size = _big(data, at, 4)
        if size == 1:
            size = _big(data, at + 8, 8)
        if size < 8:  # 0: up to the end of the file; anything else is nonsense
            return len(data)
        at += size
    return at


def _little(data: bytes, at: int, count: int) -> int:
    return int.from_bytes(data[at : at + count], "little")


def _big(data: bytes, at: int, count: int) -> int:
    return int.from_bytes(data[at : at + count], "big")
