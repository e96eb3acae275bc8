"""What a JPEG says of itself before it is decoded.

DALI is given what it surely reads as PIL does: baseline or progressive JPEGs of one or three components whose header is in
order. All else (PNG, CMYK, arithmetic coding, cut-off files, ...) goes to PIL. No matter of taste: DALI 2.4 crashed over
batches in which several headers were damaged.
"""

_PADDING = 1024  # bytes after the end of the image that some writers leave
_MOST_PIXELS = 178_956_970  # what PIL opens without calling it a decompression bomb
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential, progressive; all with Huffman codes
_START_OF_SCAN = 0xDA
_SEGMENTS = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)  # tables, restart interval, application data, comment


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels of an ordinary JPEG; None for anything else (ITU-T T.81, annex B)."""
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data[-_PADDING:]:
        return None
    at, size = 2, None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker == _START_OF_SCAN:
            return size
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAMES and size is None:
            size = _frame_size(data[at + 4 : at + 2 + length])
            if size is None:
                return None
        elif marker not in _SEGMENTS or length < 2:
            return None
        at += 2 + length
    return None


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """From the bytes of a frame header: precision, height, width, components, and three bytes for each of them."""
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3) or len(frame) != 6 + 3 * frame[5]:
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    return (height, width) if 0 < height * width <= _MOST_PIXELS else None
