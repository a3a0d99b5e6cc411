"""A generator of hostile files: what a data folder of unknown origin, or a start image, can hold.

    python tests/hostile.py FOLDER

writes all of them below FOLDER, for a look with other programs. Each file is made by a function of its path, by whose
name in GOOD, BAD, GOOD_IMAGES or BAD_IMAGES the hazard is known.
"""

import io
import os
import struct
import sys
import zlib
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from conftest import numbered_frames, write_mp4

FRAMES = 24


def mp4(path, frames=FRAMES, size=(64, 64), **settings):
    """An ordinary file of numbered frames, encoded as asked; returns its bytes, too."""
    write_mp4(path, numbered_frames(frames, *size), **settings)
    return path.read_bytes()


def box(kind, content=b""):
    """One MP4 box."""
    return struct.pack(">I", 8 + len(content)) + kind + content


def chunk(kind, content):
    """One PNG chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, rows, depth=8, colour=2, extra=b""):
    """A PNG file from its filtered rows, an iterable of bytes; `extra` chunks come before the picture."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    squeeze = zlib.compressobj(6)
    data = b"".join(map(squeeze.compress, rows)) + squeeze.flush()
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def picture():
    """A small ordinary picture, for Pillow."""
    from PIL import Image

    return Image.fromarray(numbered_frames(6, 48, 64)[5])


# --- videos: every function writes the file it is given ---------------------------------------------------------------


def zero_bytes(path):
    path.touch()


def random_bytes(path):
    path.write_bytes(np.random.default_rng(0).bytes(20_000))


def text(path):
    path.write_text("not a video\n" * 100)


def png_renamed(path):
    picture().save(path, format="PNG")


def gif_renamed(path):
    pictures = [picture().rotate(10 * i) for i in range(12)]
    pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:])


def playlist_renamed(path):
    mp4(path.with_name("played.bin"))
    path.write_text("ffconcat version 1.0\nfile played.bin\n")


def hls_renamed(path):
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n")


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


def a_billion_frames_promised(path):
    whole = bytearray(mp4(path))
    place = whole.index(b"stsz") + 12  # after version and flags, and the common size: the count
    whole[place : place + 4] = struct.pack(">I", 10**9)
    path.write_bytes(whole)


def forty_million_frames_of_one_byte(path):
    whole = bytearray(mp4(path))
    place = whole.index(b"stsz") + 8  # the size of every sample, and the count
    whole[place : place + 8] = struct.pack(">II", 1, 40_000_000)
    chunks = whole.index(b"stsc") + 12  # all in one chunk
    whole[chunks : chunks + 12] = struct.pack(">III", 1, 40_000_000, 1)
    times = whole.index(b"stts") + 12
    whole[times : times + 8] = struct.pack(">II", 40_000_000, 512)
    path.write_bytes(whole)


def fragment_of_two_hundred_million_frames(path):
    whole = bytearray(mp4(path, container={"movflags": "frag_keyframe+empty_moov"}))
    place = whole.index(b"trun") + 8
    whole[place : place + 4] = struct.pack(">I", 200_000_000)
    path.write_bytes(whole)


def box_larger_than_the_file(path):
    whole = bytearray(mp4(path))
    place = whole.index(b"moov") - 4
    whole[place : place + 4] = struct.pack(">I", 2**32 - 1)
    path.write_bytes(whole)


def boxes_within_boxes(path):
    nested = b""
    for _ in range(20_000):
        nested = box(b"moov", nested) if len(nested) < 160_000 else nested
    path.write_bytes(box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41") + nested)


def audio_only(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def frames_of_8192x8192(path):
    write_mp4(path, np.zeros((1, 8192, 8192, 3), np.uint8), options={"preset": "ultrafast"})


def frames_as_large_as_is_allowed(path):
    # sixteen reference frames: as many as a decoder ever keeps
    one = np.zeros((1, 2160, 3840, 3), np.uint8)
    frames = np.broadcast_to(one, (20, *one.shape[1:]))
    write_mp4(path, frames, options={"preset": "ultrafast", "refs": "16", "bf": "3"})


def two_sizes(path):
    first, second = (encoded(numbered_frames(FRAMES // 2, *size)) for size in ((64, 64), (96, 128)))
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.options = {"x264-params": "repeat-headers=1", "threads": "1", "tune": "zerolatency"}
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
    context.framerate = 10
    context.options = {"x264-params": "repeat-headers=1", "threads": "1", "tune": "zerolatency"}
    packets = []
    for pixels in [*frames, None]:
        frame = None if pixels is None else av.VideoFrame.from_ndarray(pixels, format="rgb24")
        packets += [(bytes(packet), packet.is_keyframe) for packet in context.encode(frame)]
    return packets


def rotated(path):
    whole = bytearray(mp4(path, size=(64, 96)))
    matrix = whole.index(b"tkhd") + 4 + 40  # of version 0
    whole[matrix : matrix + 36] = struct.pack(">9i", 0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30)
    path.write_bytes(whole)


def variable_rate(path):
    steps = np.cumsum([1 + (i * 7) % 5 for i in range(FRAMES)])
    mp4(path, rate=30, pts=steps.tolist())


def b_frames(path):
    mp4(path, options={"bf": "3", "g": "12"})


def ten_bit(path):
    mp4(path, pix_fmt="yuv420p10le")


def gray(path):
    mp4(path, pix_fmt="gray")


def odd_size(path):
    mp4(path, size=(35, 63), pix_fmt="yuv444p")


def very_wide(path):
    mp4(path, size=(16, 1024))


def fragmented(path):
    mp4(path, container={"movflags": "frag_keyframe+empty_moov"})


def another_codec(path):
    mp4(path, codec="mpeg4")


def too_short(path):
    mp4(path, frames=3)


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()
    (path / "readme.txt").write_text("a folder by that name")


def link_to_itself(path):
    path.symlink_to(path)


def link_to_nothing(path):
    path.symlink_to(path.with_name("nothing.mp4"))


def folder_in_a_circle(path):
    circle = path.with_suffix("")
    circle.mkdir()
    (circle / "again").symlink_to(circle.parent)


def no_permission(path):
    mp4(path)
    path.chmod(0)


GOOD = (  # that a run must use, whatever is odd about them
    two_sizes, rotated, variable_rate, b_frames, ten_bit, gray, odd_size, very_wide, fragmented, another_codec,
    damaged_in_the_middle, frames_cut_off, frames_as_large_as_is_allowed, box_larger_than_the_file,
)  # fmt: skip
BAD = (
    zero_bytes, random_bytes, text, png_renamed, gif_renamed, playlist_renamed, hls_renamed, index_cut_off,
    a_billion_frames_promised, forty_million_frames_of_one_byte,
    fragment_of_two_hundred_million_frames, boxes_within_boxes, audio_only,
    frames_of_8192x8192, too_short, fifo, device, folder, link_to_itself, link_to_nothing, folder_in_a_circle,
    no_permission,
)  # fmt: skip
NAMES = ("-leading dash.mp4", "line\nbreak.mp4", "clip:01.mp4", "%d %s.mp4", "umlaut \u00fc \u6f22.MP4", "quote'\".mp4")


# --- images -----------------------------------------------------------------------------------------------------------


def zero_bytes_image(path):
    path.touch()


def text_image(path):
    path.write_text("not an image")


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
    words = zlib.compress(bytes(200_000_000), 9)
    extra = chunk(b"zTXt", b"comment\0\0" + words)
    path.write_bytes(png(4, 4, [bytes(13)] * 4, extra=extra))


def gif_of_5000_frames(path):
    from PIL import Image

    frames = [Image.new("P", (32, 32), i % 256) for i in range(2)] * 2500
    for i, frame in enumerate(frames):
        frame.putpixel((i % 32, i // 32 % 32), 7)
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def video_renamed(path):
    mp4(path.with_suffix(".mp4"))
    path.with_suffix(".mp4").rename(path)


def postscript_renamed(path):
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(%pipe%touch /tmp/ran) (w) file\nshowpage\n")


def jpeg_of_10000_scans(path):
    from PIL import Image

    whole = io.BytesIO()
    Image.new("L", (4096, 4096)).save(whole, format="JPEG", progressive=True)
    data = whole.getvalue()
    last = data.rindex(b"\xff\xda")
    path.write_bytes(data[:-2] + data[last:-2] * 10_000 + data[-2:])


def senseless_exif(path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 99  # orientations are 1 to 8
    picture().save(path, format="JPEG", exif=exif)


def exif_of_noise(path):
    whole = io.BytesIO()
    picture().save(whole, format="JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + np.random.default_rng(1).bytes(300))
    path.write_bytes(whole.getvalue())


def turned_by_exif(path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(path, format="JPEG", exif=exif)


def palette_with_transparency(path):
    picture().quantize(8).save(path, format="PNG", transparency=0)


def gray_with_alpha(path):
    picture().convert("LA").save(path, format="PNG")


def sixteen_bit_gray(path):
    from PIL import Image

    Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21).save(path, format="PNG")


def sixteen_bit_colour(path):
    row = bytes([0]) + struct.pack(">3H", 65535, 256, 0) * 64
    path.write_bytes(png(64, 48, [row] * 48, depth=16))


def one_bit(path):
    picture().convert("1").save(path, format="PNG")


def cmyk(path):
    picture().convert("CMYK").save(path, format="JPEG")


def one_pixel(path):
    path.write_bytes(png(1, 1, [bytes(4)]))


def a_line(path):
    path.write_bytes(png(100_000, 1, [bytes(1 + 300_000)]))


GOOD_IMAGES = (
    as_large_as_is_allowed, gif_of_5000_frames, senseless_exif, exif_of_noise, turned_by_exif,
    palette_with_transparency, gray_with_alpha, sixteen_bit_gray, sixteen_bit_colour, one_bit, cmyk, one_pixel, a_line,
)  # fmt: skip
BAD_IMAGES = (
    zero_bytes_image, text_image, cut_image, jpeg_of_10000_scans, bomb_of_900_megapixels, bomb_of_64_megapixels,
    bomb_of_text, video_renamed, postscript_renamed, fifo, device, folder, link_to_itself, link_to_nothing,
)  # fmt: skip


def make_videos(root):
    """All hostile videos below `root`, and an ordinary one under each odd name."""
    root.mkdir(parents=True, exist_ok=True)
    for make in (*GOOD, *BAD):
        make(root / f"{make.__name__}.mp4")
    for name in NAMES:
        mp4(root / name)


def make_images(root):
    """All hostile images below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for make in (*GOOD_IMAGES, *BAD_IMAGES):
        make(root / f"{make.__name__}.png")


if __name__ == "__main__":
    make_videos(Path(sys.argv[1]) / "videos")
    make_images(Path(sys.argv[1]) / "images")
