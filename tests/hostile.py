"""Hostile files: what a data folder of unknown origin, or a start image, can hold.

GOOD, BAD, GOOD_IMAGES and BAD_IMAGES hold, by the name of the hazard, a function
that writes the file of a given path.
"""

import os
import struct
import zlib
from pathlib import Path

import av
import numpy as np
from conftest import numbered_frames, write_mp4
from PIL import Image

FRAMES = 24
SELF_CONTAINED = {"x264-params": "repeat-headers=1", "threads": "1", "tune": "zerolatency"}
QUARTER_TURN = struct.pack(">9i", 0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30)
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/secret.ts\n"
POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(%pipe%touch /tmp/ran) (w) file\n"
EXIF_NOISE = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + np.random.default_rng(1).bytes(300)


def mp4(path, frames=FRAMES, size=(64, 64), **settings):
    """Write an ordinary file of numbered frames."""
    write_mp4(path, numbered_frames(frames, *size), **settings)


def video(edit=bytes, **settings):
    """A writer of `mp4`, whose bytes are then edited."""

    def write(path):
        mp4(path, **settings)
        path.write_bytes(edit(path.read_bytes()))

    return write


def image(convert=lambda image: image, edit=bytes, format="PNG", **settings):
    """A writer of a small picture, converted, saved by Pillow and edited."""

    def write(path):
        picture = Image.fromarray(numbered_frames(6, 48, 64)[5])
        convert(picture).save(path, format=format, **settings)
        path.write_bytes(edit(path.read_bytes()))

    return write


def put(name, offset, content):
    """An edit: these bytes at an offset from a box's name."""

    def edit(data):
        place = data.index(name) + offset
        return data[:place] + content + data[place + len(content) :]

    return edit


def cut_frames(data):
    return data[: data.index(b"mdat") + 2000]


def first_half(data):
    return data[: len(data) // 2]


def scans_10000_times(data):
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 10_000 + data[-2:]


def u32(*numbers):
    return struct.pack(f">{len(numbers)}I", *numbers)


def chunk(kind, content):
    return u32(len(content)) + kind + content + u32(zlib.crc32(kind + content))


def png(width, height, row, depth=8, colour=2, extra=b""):
    """A writer of a PNG whose filtered rows are equal; `extra` chunks come first."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    squeeze = zlib.compressobj(6)

    def write(path):
        data = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
        end = chunk(b"IDAT", data) + chunk(b"IEND", b"")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + end)

    return write


def bomb_of_text(path):
    text = b"comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    png(4, 4, bytes(13), extra=chunk(b"zTXt", text))(path)


def boxes_within_boxes(path):
    nested = b""
    while len(nested) < 160_000:
        nested = u32(8 + len(nested)) + b"moov" + nested
    path.write_bytes(u32(32) + b"ftypisom\0\0\2\0isomiso2avc1mp41" + nested)


def audio_only(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100)
        silence = np.zeros((1, 4096), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 44_100
        container.mux([*stream.encode(frame), *stream.encode(None)])


def large(count, height, width, **options):
    """A writer of large black frames."""
    frames = np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (count, height, width, 3))
    return lambda path: write_mp4(path, frames, options={"preset": "ultrafast", **options})


def two_sizes(path):
    """Packets of two encoders, with headers of their own, in one stream."""
    packets = []
    for height, width in ((64, 64), (96, 128)):
        context = av.CodecContext.create("libx264", "w")
        context.height, context.width, context.pix_fmt = height, width, "yuv420p"
        context.framerate, context.options = 10, SELF_CONTAINED
        for pixels in numbered_frames(FRAMES // 2, height, width):
            packets += context.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
        packets += context.encode(None)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.options = SELF_CONTAINED
        container.start_encoding()
        for number, packet in enumerate(packets):
            packet.stream, packet.time_base = stream, stream.time_base
            packet.pts = packet.dts = int(number / 10 / stream.time_base)
            container.mux(packet)


SPECIAL = {  # no file at all
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link_to_itself": lambda path: path.symlink_to(path),
    "link_to_nothing": lambda path: path.symlink_to(path.with_name("nothing.mp4")),
}
GOOD = {  # that a run must use, whatever is odd about them
    "rotated": video(put(b"tkhd", 44, QUARTER_TURN), size=(64, 96)),
    "variable_rate": video(pts=np.cumsum([1 + i * 7 % 5 for i in range(FRAMES)]).tolist()),
    "b_frames": video(options={"bf": "3", "g": "12"}),
    "ten_bit": video(pix_fmt="yuv420p10le"),
    "odd_size": video(size=(35, 63), pix_fmt="yuv444p"),
    "very_wide": video(size=(16, 1024)),
    "two_sizes": two_sizes,
    "fragmented": video(container={"movflags": "frag_keyframe+empty_moov"}),
    "another_codec": video(codec="mpeg4"),
    "box_larger_than_the_file": video(put(b"moov", -4, u32(2**32 - 1))),
    "damaged_in_the_middle": video(put(b"mdat", 2000, bytes(400)), frames=60),
    # The index comes first and promises all frames.
    "frames_cut_off": video(cut_frames, frames=60, container={"movflags": "faststart"}),
    # Sixteen reference frames are as many as a decoder ever keeps.
    "frames_as_large_as_is_allowed": large(20, 2160, 3840, refs="16", bf="3"),
}
BAD = {
    "zero_bytes": Path.touch,
    "random_bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(20_000)),
    "text": lambda path: path.write_text("not a video\n" * 100),
    "png_renamed": image(),
    "gif_renamed": image(format="GIF"),
    "hls_renamed": lambda path: path.write_text(PLAYLIST),
    "playlist_renamed": lambda path: path.write_text("ffconcat version 1.0\nfile odd_size.mp4\n"),
    "index_cut_off": video(first_half),  # the index is at the end
    "boxes_within_boxes": boxes_within_boxes,
    "audio_only": audio_only,
    "frames_of_8192x8192": large(1, 8192, 8192),
    "too_short": video(frames=3),
    "no_permission": lambda path: (mp4(path), path.chmod(0)),
    **SPECIAL,
}
GOOD_IMAGES = {
    "as_large_as_is_allowed": png(4096, 4096, b"\0" + b"\xff\0\0\x80" * 4096, colour=6),
    "sixteen_bit_gray": png(64, 48, b"\0" + bytes(range(128)), depth=16, colour=0),
    "exif_of_noise": image(format="JPEG", exif=EXIF_NOISE),
    "palette_with_transparency": image(lambda image: image.quantize(8), transparency=0),
    "gray_with_alpha": image(lambda image: image.convert("LA")),
    "cmyk": image(lambda image: image.convert("CMYK"), format="JPEG"),
    "a_line": png(100_000, 1, bytes(1 + 300_000)),
}
BAD_IMAGES = {
    "zero_bytes_image": Path.touch,
    "text_image": lambda path: path.write_text("not an image"),
    "postscript_renamed": lambda path: path.write_text(POSTSCRIPT),
    "cut_image": image(edit=first_half),
    "jpeg_of_10000_scans": image(
        lambda _: Image.new("L", (4096, 4096)), scans_10000_times, format="JPEG", progressive=True
    ),
    "bomb_of_64_megapixels": png(8000, 8000, bytes(1 + 8000 * 3)),
    "bomb_that_pillow_refuses": png(20_000, 20_000, bytes(1 + 2500), depth=1, colour=0),
    "bomb_of_text": bomb_of_text,
    "video_renamed": video(),
    **SPECIAL,
}
NAMES = ("-leading dash.mp4", "line\nbreak.mp4", "clip:01.mp4", "%d %s.mp4", "\u00fc \u6f22.MP4")


def make_all(root):
    """Write every hostile file below root/videos and root/images, and a video of each name."""
    kinds = (("videos", ".mp4", GOOD | BAD), ("images", ".png", GOOD_IMAGES | BAD_IMAGES))
    for kind, suffix, writers in kinds:
        (root / kind).mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(root / kind / f"{name}{suffix}")
    for name in NAMES:
        mp4(root / "videos" / name)
