"""A generator of hostile files: what a data folder of unknown origin, or a start image, can hold.

    python tests/hostile.py FOLDER

writes all of them below FOLDER, for a look with other programs. GOOD, BAD, GOOD_IMAGES and BAD_IMAGES hold, by the name
of the hazard, a function that writes the file of a given path.
"""

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import av
import numpy as np
from PIL import Image

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import numbered_frames, write_mp4

FRAMES = 24
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}
SELF_CONTAINED = {"x264-params": "repeat-headers=1", "threads": "1", "tune": "zerolatency"}


def mp4(path, frames=FRAMES, size=(64, 64), **settings):
    """An ordinary file of numbered frames, encoded as asked; returns its bytes, too."""
    write_mp4(path, numbered_frames(frames, *size), **settings)
    return path.read_bytes()


def video(*changes, **settings):
    """A writer of `mp4`, with changes to its boxes: (a box's name, an offset from it, the bytes there)."""

    def write(path):
        whole = bytearray(mp4(path, **settings))
        for name, offset, content in changes:
            place = whole.index(name) + offset
            whole[place : place + len(content)] = content
        path.write_bytes(whole)

    return write


def u32(*numbers):
    """Unsigned 32-bit numbers as MP4 and PNG write them."""
    return struct.pack(f">{len(numbers)}I", *numbers)


def chunk(kind, content):
    """One PNG chunk."""
    return u32(len(content)) + kind + content + u32(zlib.crc32(kind + content))


def png(width, height, rows, depth=8, colour=2, extra=b""):
    """A PNG file from its filtered rows, an iterable of bytes; `extra` chunks come before the picture."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    squeeze = zlib.compressobj(6)
    data = b"".join(map(squeeze.compress, rows)) + squeeze.flush()
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def picture():
    """A small ordinary picture, for Pillow."""
    return Image.fromarray(numbered_frames(6, 48, 64)[5])


def image(convert=lambda image: image, format="PNG", **settings):
    """A writer of `picture`, converted and saved as asked."""
    return lambda path: convert(picture()).save(path, format=format, **settings)


def orientation(number):
    """EXIF data of that orientation; there are 1 to 8."""
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


# --- videos -----------------------------------------------------------------------------------------------------------


def gif_renamed(path):
    pictures = [picture().rotate(10 * i) for i in range(12)]
    pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:])


def playlist_renamed(path):
    mp4(path.with_name("played.bin"))
    path.write_text("ffconcat version 1.0\nfile played.bin\n")


def index_cut_off(path):
    whole = mp4(path)
    path.write_bytes(whole[: len(whole) // 2])  # the index is at the end


def frames_cut_off(path):
    whole = mp4(path, frames=60, container={"movflags": "faststart"}, options={"g": "10"})
    index = whole.index(b"mdat")
    path.write_bytes(whole[: (index + len(whole)) // 2])  # the index is whole and promises 60


def damaged_in_the_middle(path):
    whole = bytearray(mp4(path, frames=60))
    middle = whole.index(b"mdat") + len(whole) // 4
    whole[middle : middle + 400] = bytes(400)
    path.write_bytes(whole)


def boxes_within_boxes(path):
    nested = b""
    while len(nested) < 160_000:
        nested = u32(8 + len(nested)) + b"moov" + nested
    start = b"ftyp" + b"isom\0\0\2\0isomiso2avc1mp41"
    path.write_bytes(u32(4 + len(start)) + start + nested)


def audio_only(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44_100
        for sound in (frame, None):
            container.mux(stream.encode(sound))


def frames_of_8192x8192(path):
    write_mp4(path, np.zeros((1, 8192, 8192, 3), np.uint8), options={"preset": "ultrafast"})


def frames_as_large_as_is_allowed(path):
    frames = np.broadcast_to(np.zeros((1, 2160, 3840, 3), np.uint8), (20, 2160, 3840, 3))
    # sixteen reference frames: as many as a decoder ever keeps
    write_mp4(path, frames, options={"preset": "ultrafast", "refs": "16", "bf": "3"})


def two_sizes(path):
    first, second = (encoded(numbered_frames(FRAMES // 2, *size)) for size in ((64, 64), (96, 128)))
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.options = 64, 64, "yuv420p", SELF_CONTAINED
        container.start_encoding()
        for number, (data, is_key) in enumerate([*first, *second]):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, stream.time_base
            packet.pts = packet.dts = int(number / 10 / stream.time_base)
            packet.is_keyframe = is_key
            container.mux(packet)


def encoded(frames):
    """Frames as H.264 packets that carry their own headers, in order, each with whether it is a keyframe."""
    context = av.CodecContext.create("libx264", "w")
    context.height, context.width, context.pix_fmt = *frames.shape[1:3], "yuv420p"
    context.framerate, context.options = 10, SELF_CONTAINED
    pictures = [av.VideoFrame.from_ndarray(pixels, format="rgb24") for pixels in frames]
    return [(bytes(packet), packet.is_keyframe) for frame in [*pictures, None] for packet in context.encode(frame)]


def folder(path):
    path.mkdir()
    (path / "readme.txt").write_text("a folder by that name")


def folder_in_a_circle(path):
    circle = path.with_suffix("")
    circle.mkdir()
    (circle / "again").symlink_to(circle.parent)


def no_permission(path):
    mp4(path)
    path.chmod(0)


def by_name(*writers):
    return {write.__name__: write for write in writers}


SPECIAL = {  # no file at all
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": folder,
    "link_to_itself": lambda path: path.symlink_to(path),
    "link_to_nothing": lambda path: path.symlink_to(path.with_name("nothing.mp4")),
}
GOOD = {  # that a run must use, whatever is odd about them
    **by_name(two_sizes, damaged_in_the_middle, frames_cut_off, frames_as_large_as_is_allowed),
    "rotated": video((b"tkhd", 44, struct.pack(">9i", 0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30)), size=(64, 96)),
    "variable_rate": video(rate=30, pts=np.cumsum([1 + (i * 7) % 5 for i in range(FRAMES)]).tolist()),
    "b_frames": video(options={"bf": "3", "g": "12"}),
    "ten_bit": video(pix_fmt="yuv420p10le"),
    "gray": video(pix_fmt="gray"),
    "odd_size": video(size=(35, 63), pix_fmt="yuv444p"),
    "very_wide": video(size=(16, 1024)),
    "fragmented": video(container=FRAGMENTED),
    "another_codec": video(codec="mpeg4"),
    "box_larger_than_the_file": video((b"moov", -4, u32(2**32 - 1))),
}
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n"
ONE_BYTE_EACH = [(b"stsz", 8, u32(1, 40_000_000))]  # the size of every sample, and the count
ONE_BYTE_EACH += [(b"stsc", 12, u32(1, 40_000_000, 1)), (b"stts", 12, u32(40_000_000, 512))]  # all in one chunk
BAD = {
    "zero_bytes": Path.touch,
    "random_bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(20_000)),
    "text": lambda path: path.write_text("not a video\n" * 100),
    "png_renamed": image(),
    "hls_renamed": lambda path: path.write_text(PLAYLIST),
    **by_name(gif_renamed, playlist_renamed, index_cut_off, boxes_within_boxes, audio_only, frames_of_8192x8192),
    "a_billion_frames_promised": video((b"stsz", 12, u32(10**9))),
    "forty_million_frames_of_one_byte": video(*ONE_BYTE_EACH),
    "fragment_of_two_hundred_million_frames": video((b"trun", 8, u32(200_000_000)), container=FRAGMENTED),
    "too_short": video(frames=3),
    **by_name(folder_in_a_circle, no_permission),
    **SPECIAL,
}
NAMES = ("-leading dash.mp4", "line\nbreak.mp4", "clip:01.mp4", "%d %s.mp4", "umlaut \u00fc \u6f22.MP4", "quote'\".mp4")


# --- images -----------------------------------------------------------------------------------------------------------


def cut_image(path):
    whole = io.BytesIO()
    picture().save(whole, format="PNG")
    path.write_bytes(whole.getvalue()[: whole.tell() // 2])


def bomb_of_900_megapixels(path):
    path.write_bytes(png(30_000, 30_000, (bytes(1 + 30_000 // 8) for _ in range(30_000)), depth=1, colour=0))


def bomb_of_64_megapixels(path):
    path.write_bytes(png(8000, 8000, (bytes(1 + 8000 * 3) for _ in range(8000))))


def as_large_as_is_allowed(path):
    row = bytes([0]) + bytes([255, 0, 0, 128]) * 4096
    path.write_bytes(png(4096, 4096, (row for _ in range(4096)), colour=6))


def bomb_of_text(path):
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(200_000_000), 9))
    path.write_bytes(png(4, 4, [bytes(13)] * 4, extra=text))


def gif_of_5000_frames(path):
    frames = [Image.new("P", (32, 32), i % 256) for i in range(2)] * 2500
    for i, frame in enumerate(frames):
        frame.putpixel((i % 32, i // 32 % 32), 7)
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def video_renamed(path):
    mp4(path.with_suffix(".mp4"))
    path.with_suffix(".mp4").rename(path)


def jpeg_of_10000_scans(path):
    whole = io.BytesIO()
    Image.new("L", (4096, 4096)).save(whole, format="JPEG", progressive=True)
    data = whole.getvalue()
    last = data.rindex(b"\xff\xda")
    path.write_bytes(data[:-2] + data[last:-2] * 10_000 + data[-2:])


def sixteen_bit_gray(path):
    Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21).save(path, format="PNG")


def sixteen_bit_colour(path):
    row = bytes([0]) + struct.pack(">3H", 65535, 256, 0) * 64
    path.write_bytes(png(64, 48, [row] * 48, depth=16))


NOISE = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + np.random.default_rng(1).bytes(300)
POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(%pipe%touch /tmp/ran) (w) file\nshowpage\n"
GOOD_IMAGES = {
    **by_name(as_large_as_is_allowed, gif_of_5000_frames, sixteen_bit_gray, sixteen_bit_colour),
    "senseless_exif": image(format="JPEG", exif=orientation(99)),
    "exif_of_noise": image(format="JPEG", exif=NOISE),
    "turned_by_exif": image(format="JPEG", exif=orientation(6)),
    "palette_with_transparency": image(lambda image: image.quantize(8), transparency=0),
    "gray_with_alpha": image(lambda image: image.convert("LA")),
    "one_bit": image(lambda image: image.convert("1")),
    "cmyk": image(lambda image: image.convert("CMYK"), format="JPEG"),
    "one_pixel": lambda path: path.write_bytes(png(1, 1, [bytes(4)])),
    "a_line": lambda path: path.write_bytes(png(100_000, 1, [bytes(1 + 300_000)])),
}
BAD_IMAGES = {
    "zero_bytes_image": Path.touch,
    "text_image": lambda path: path.write_text("not an image"),
    "postscript_renamed": lambda path: path.write_text(POSTSCRIPT),
    **by_name(cut_image, jpeg_of_10000_scans, bomb_of_900_megapixels, bomb_of_64_megapixels, bomb_of_text),
    **by_name(video_renamed),
    **SPECIAL,
}


def make_all(root):
    """Every hostile file below root/videos and root/images, and an ordinary video under each odd name."""
    for kind, suffix, writers in (("videos", ".mp4", GOOD | BAD), ("images", ".png", GOOD_IMAGES | BAD_IMAGES)):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(root / kind / f"{name}{suffix}")
    for name in NAMES:
        mp4(root / "videos" / name)


if __name__ == "__main__":
    make_all(Path(sys.argv[1]))
