"""The form zip: the same package in one file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from edgeq.cli import main
from edgeq.errors import OutputError
from edgeq.packaging import PACKAGES, unpacked, verify_package, write_directory
from tests.packaged import classifier, files


def test_a_zip_is_the_folder_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = classifier(tmp_path / "made")
    folder = write_directory(package, tmp_path / "net.edgeq")
    out = PACKAGES["zip"](package, tmp_path / "net.zip")
    with unpacked(out) as inside:
        assert files(inside) == files(folder)
        verify_package(inside)
    whole = out.read_bytes()
    PACKAGES["zip"](package, out, force=True)
    assert out.read_bytes() == whole  # the same package is the same bytes
    assert main(["package", str(out), "-o", str(tmp_path / "again.edgeq")]) == 0
    assert files(tmp_path / "again.edgeq") == files(folder)
    capsys.readouterr()
    assert main(["package", str(out), "--sign", "key"]) == 2
    assert "can't be signed in place" in capsys.readouterr().err


def test_a_zip_replaces_packages_only(tmp_path: Path) -> None:
    package = classifier(tmp_path / "made")
    (tmp_path / "text").write_text("mine")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("one.jpg", b"1")
    for name in ("text", "photos.zip"):
        with pytest.raises(OutputError, match="is no edgeq package"):
            PACKAGES["zip"](package, tmp_path / name, force=True)
    out = PACKAGES["zip"](package, tmp_path / "net.zip")
    with pytest.raises(OutputError, match="holds a package already"):
        PACKAGES["zip"](package, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "net.zip", "photos.zip", "text"]


def test_a_damaged_zip_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = PACKAGES["zip"](classifier(tmp_path / "made"), tmp_path / "net.zip")
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 3] + b"xyz" + whole[len(whole) // 3 + 3 :])
    assert main(["package", str(out)]) == 2
    assert "net.zip" in capsys.readouterr().err
