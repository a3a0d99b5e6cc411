"""What the pickle inside a checkpoint may contain, found out before torch reads it.

torch.load(weights_only=True) runs nothing foreign, but takes a file's word for how much there is: a few hundred bytes
can ask for gigabytes, or for a hash that takes for ever. Our own checkpoints need very little of the format.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from typing import Any

GLOBALS = {
    "collections OrderedDict": OrderedDict,
    "torch._utils _rebuild_tensor_v2": lambda *parts: None,
    "torch FloatStorage": "float32",
    "torch ByteStorage": "uint8",
}
OPCODES = {
    "PROTO", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD",
    "BINPERSID",
}  # fmt: skip


class Rehearsal(pickle.Unpickler):
    """Reads a pickle without making a tensor: only GLOBALS are known, and only whole members of the archive."""

    def __init__(self, data: bytes, storages: set[str]):
        super().__init__(io.BytesIO(data))
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for one of GLOBALS."""
        return GLOBALS[f"{module} {name}"]

    def persistent_load(self, key: Any) -> None:
        """Check that a storage is a member by exactly that name: torch's reader would ignore its case."""
        if key[2] not in self.storages:
            raise pickle.UnpicklingError(f"there is no storage {key[2]!r}")


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive of which reading would take more than a few times its bytes.

    Args:
        archive: an open file of torch.save.
        size: of the file in bytes.

    Raises: ValueError, or one of pickle's many errors over what is no pickle.
    """
    entries = archive.infolist()
    names = [entry.filename.lower() for entry in entries]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > size:
        raise ValueError("its members overlap")
    folder = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
    data = archive.read(f"{folder}data.pkl")
    before, tuples = "", set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES or (opcode.name == "GLOBAL" and argument not in GLOBALS):
            raise ValueError(f"it may not contain {opcode.name} {str(argument or '')[:60]}")
        if opcode.name.endswith("BINPUT") and before.startswith("TUPLE"):
            tuples.add(argument)
        if opcode.name.endswith("BINGET") and argument in tuples:  # a tuple of tuples of tuples, each met twice
            raise ValueError("it refers to a tuple twice")
        before = opcode.name
    Rehearsal(data, {name.removeprefix(f"{folder}data/") for name in archive.namelist()}).load()
