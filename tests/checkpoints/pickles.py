"""Hostile pickles, by hand: each is the body of a protocol-2 pickle whose effect, were it run, an audit hook would see."""

from __future__ import annotations

import struct
from collections import OrderedDict

from tests.checkpoints.mutants import rezip


def call(module: str, name: str, argument: str = "echo transept") -> bytes:
    """GLOBAL, one text, TUPLE1, REDUCE."""
    return f"c{module}\n{name}\n".encode() + word(argument) + b"\x85R."


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


STORAGE = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word("0") + word("cpu") + b"K\x06tQ"


def tensor(tail: bytes, storage: bytes = STORAGE, name: str = "_rebuild_tensor_v2") -> bytes:
    """{'a': rebuild(storage, *tail)}."""
    return b"}" + word("a") + f"ctorch._utils\n{name}\n(".encode() + storage + tail + b"tRs."


GOOD_TAIL = b"K\x00K\x06\x85K\x01\x85\x89ccollections\nOrderedDict\n)R"
CALLS = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("os", "popen"),
    ("os", "execv"),
    ("os", "remove"),
    ("os", "putenv"),
    ("subprocess", "Popen"),
    ("subprocess", "check_output"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "compile"),
    ("builtins", "open"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("__builtin__", "eval"),
    ("__builtin__", "execfile"),
    ("importlib", "import_module"),
    ("runpy", "run_path"),
    ("pty", "spawn"),
    ("socket", "create_connection"),
    ("urllib.request", "urlopen"),
    ("webbrowser", "open"),
    ("shutil", "rmtree"),
    ("pathlib", "Path"),
    ("ctypes", "CDLL"),
    ("code", "InteractiveInterpreter"),
    ("timeit", "timeit"),
    ("pdb", "run"),
    ("profile", "run"),
    ("pickle", "loads"),
    ("_pickle", "Unpickler"),
    ("marshal", "loads"),
    ("types", "FunctionType"),
    ("operator", "attrgetter"),
    ("operator", "methodcaller"),
    ("functools", "partial"),
    ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.jit", "load"),
    ("torch.serialization", "load"),
    ("torch.utils.cpp_extension", "load_inline"),
    ("torch.storage", "_load_from_bytes"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("torch._utils", "_rebuild_nested_tensor"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "FloatStorage.__class__"),
    ("collections", "OrderedDict.__init__"),
    ("collections", "namedtuple"),
    ("transept.checkpoints.statepickle", "walk"),
    ("torch._utils\u200b", "_rebuild_tensor_v2"),
    ("TORCH._utils", "_rebuild_tensor_v2"),
    ("", ""),
]
PICKLES: dict[str, bytes] = {
    **{f"call {module}.{name}": call(module, name) for module, name in CALLS},
    "stack global": word("os") + word("system") + b"\x93" + word("x") + b"\x85R.",
    "short stack global": b"\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
    "inst": b"(" + word("x") + b"ios\nsystem\n.",
    "obj": b"(cos\nsystem\n" + word("x") + b"o.",
    "obj of an allowed name": b"(ccollections\nOrderedDict\no.",
    "newobj": b"cos\nsystem\n)\x81.",
    "newobj of an allowed name": b"ccollections\nOrderedDict\n)\x81.",
    "newobj_ex": b"ccollections\nOrderedDict\n)}\x92.",
    "ext1": b"\x82\x01.",
    "ext2": b"\x83\x01\x00.",
    "ext4": b"\x84\x01\x00\x00\x00.",
    "persid": b"Pos.system\n.",
    "persistent id that is text": word("os.system") + b"Q.",
    "persistent id of four": b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word("0") + word("cpu") + b"tQ.",
    "persistent id of another word": STORAGE.replace(b"storage", b"modules") + b".",
    "persistent id of no storage type": STORAGE.replace(b"torch\nFloatStorage", b"torch\nSize") + b".",
    "persistent id of negative length": STORAGE.replace(b"K\x06", b"J\xff\xff\xff\xff") + b".",
    "persistent id with a number for a key": STORAGE.replace(word("0"), b"K\x00") + b".",
    "one storage with two lengths": b"(" + STORAGE + STORAGE.replace(b"K\x06", b"K\x05") + b"t.",
    "one storage with two types": b"(" + STORAGE + STORAGE.replace(b"FloatStorage", b"LongStorage") + b"t.",
    "build on a table": b"}" + b"}" + word("__class__") + b"K\x01sb.",
    "build with a text": b"}" + word("x") + b"b.",
    "build with slots": b"}" + b"N}" + word("a") + b"K\x01s\x86b.",
    "call of a table": b"})R.",
    "call of a tensor rule with nothing": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "call without a tuple": b"ccollections\nOrderedDict\n]R.",
    "ordered dict from a list": b"ccollections\nOrderedDict\n]\x85R.",
    "storage type that is called": b"ctorch\nFloatStorage\nK\x08\x85R.",
    "parameter of a text": b"ctorch._utils\n_rebuild_parameter\n" + word("a") + b"\x88}\x87R.",
    "size of texts": b"ctorch\nSize\n" + word("a") + b"\x85\x85R.",
    "a name in place of a tensor": b"}" + word("a") + b"ctorch\nSize\ns.",
    "a bare storage as a value": b"}" + word("a") + STORAGE + b"s.",
    "memo entry never kept": b"h\x07.",
    "memo of nothing": b"q\x00.",
    "memo of a mark": b"(q\x00.",
    "list that holds itself": b"}" + word("a") + b"]q\x00h\x00as.",
    "table that holds itself": b"}q\x00" + word("a") + b"h\x00s.",
    "a billion leaves from one kilobyte": b"}q\x00" + b"".join(
        b"}q" + bytes([i + 1]) + b"(" + b"".join(word(str(n)) + b"h" + bytes([i]) for n in range(9)) + b"u" for i in range(8)
    ) + b".",
    "a million marks": b"(" * 1_000_000 + b".",
    "a million nested tuples": b")" + b"\x85" * 1_000_000 + b".",
    "a million nested lists": b"](" * 500_000 + b"e" * 500_000 + b".",
    "a million tables": b"(" + b"}" * 1_000_000 + b"t.",
    "text of 4 GB": b"X\xff\xff\xff\xffabc.",
    "text of 2^64 bytes": b"\x8d" + b"\xff" * 8 + b"abc.",
    "number of 2 GB": b"\x8b\xff\xff\xff\x7f.",
    "number of 255 bytes": b"\x8a\xff" + b"\x01" * 255 + b".",
    "text that is no UTF-8": b"X\x02\x00\x00\x00\xff\xfe.",
    "no stop": b"}",
    "nothing": b"",
    "stop at once": b".",
    "two values": b"}}.",
    "bytes behind the stop": b"}.cos\nsystem\n",
    "second pickle behind the first": b"}.\x80\x02cos\nsystem\n)R.",
    "key that is a table": b"}}K\x01s.",
    "key given twice": b"}" + word("a") + b"K\x01s" + word("a") + b"K\x02s.",
    "odd number of items": b"}(" + word("a") + b"u.",
    "items of a list": b"](" + word("a") + b"K\x01u.",
    "append to a table": b"}K\x01a.",
    "pop of a mark": b"(a.",
    "name without an end": b"c" + b"a" * 500 + b".",
    "root that is a list": b"].",
    "root that is a tensor": tensor(GOOD_TAIL)[8:-2] + b".",
    "shape beyond the storage": tensor(GOOD_TAIL.replace(b"K\x06", b"K\x07")),
    "offset beyond the storage": tensor(b"K\x01" + GOOD_TAIL[2:]),
    "negative offset": tensor(b"J\xff\xff\xff\xff" + GOOD_TAIL[2:]),
    "negative stride": tensor(GOOD_TAIL.replace(b"K\x01\x85", b"J\xff\xff\xff\xff\x85")),
    "stride beyond the storage": tensor(GOOD_TAIL.replace(b"K\x01\x85", b"K\x02\x85")),
    "stride of nothing, repeated for ever": tensor(b"K\x00\x8a\x06\x00\x00\x00\x00\x00\x01\x85K\x00\x85" + GOOD_TAIL[8:]),
    "product of 2^66": tensor(b"K\x00J\x00\x00\x00\x40J\x00\x00\x00\x40M\x00\x40\x87K\x01K\x01K\x01\x87" + GOOD_TAIL[8:]),
    "more strides than dimensions": tensor(GOOD_TAIL.replace(b"K\x01\x85", b"K\x01K\x01\x86")),
    "storage longer than its record": tensor(GOOD_TAIL, STORAGE.replace(b"K\x06", b"K\x07")),
    "storage shorter than its record": tensor(GOOD_TAIL.replace(b"K\x06", b"K\x05"), STORAGE.replace(b"K\x06", b"K\x05")),
    "storage without a record": tensor(GOOD_TAIL, STORAGE.replace(word("0"), word("9"))),
    "storage outside the folder": tensor(GOOD_TAIL, STORAGE.replace(word("0"), word("../data.pkl"))),
    "tensor that is a number": tensor(GOOD_TAIL, b"K\x00"),
    "hooks that are a name": tensor(GOOD_TAIL.replace(b"ccollections\nOrderedDict\n)R", b"ctorch\nSize\n")),
}


def bundle(program: bytes) -> bytes:
    """A sound zip around a pickle, with one storage of 24 bytes."""
    return rezip(OrderedDict({"m/data.pkl": program, "m/byteorder": b"little", "m/data/0": bytes(24), "m/version": b"3\n"}))
