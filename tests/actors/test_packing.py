"""What of a folder goes along with a job."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from actors.packing import LIMIT, PACKAGES, UnusableFiles, files, pack, pack_packages


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def names(folder: Path, *excludes: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in files(folder, excludes)]


def packed(folder: Path, *excludes: str) -> bytes:
    file = io.BytesIO()
    pack(folder, excludes, file)
    return file.getvalue()


def test_ignore_files_count_in_their_folder_and_below(tmp_path: Path) -> None:
    tree(tmp_path, "a.bin", "a.py", "sub/b.bin", "sub/keep.bin", "sub/c.py", "sub/out/d.py", "out/e.py", "other/f.log")
    (tmp_path / ".gitignore").write_text("*.bin\nout/\n")
    (tmp_path / "other" / ".rayignore").write_text("# logs\n*.log\n")
    assert names(tmp_path) == [".gitignore", "a.py", "other/.rayignore", "sub/c.py"]


def test_a_pattern_can_be_taken_back_in_its_own_file(tmp_path: Path) -> None:
    tree(tmp_path, "a.bin", "b.bin")
    (tmp_path / ".gitignore").write_text("*.bin\n!b.bin\n")
    assert names(tmp_path) == [".gitignore", "b.bin"]


def test_so_do_those_above_in_the_same_checkout_and_no_further(tmp_path: Path) -> None:
    tree(tmp_path, "repo/.git/HEAD", "repo/jobs/a.bin", "repo/jobs/a.log", "repo/jobs/a.py")
    (tmp_path / ".gitignore").write_text("*.py\n")
    (tmp_path / "repo" / ".gitignore").write_text("*.bin\n/jobs/a.log\n")
    assert names(tmp_path / "repo" / "jobs") == ["a.py"]


def test_a_folder_that_is_ignored_itself_goes_along_when_asked_for(tmp_path: Path) -> None:
    tree(tmp_path, ".git/HEAD", "runs/one/a.py", "runs/one/a.bin")
    (tmp_path / ".gitignore").write_text("runs/\n")
    assert names(tmp_path / "runs" / "one") == ["a.bin", "a.py"]


def test_some_things_never_go_along_and_some_not_if_told(tmp_path: Path) -> None:
    tree(tmp_path, ".git/HEAD", ".venv/bin/python", "pkg/__pycache__/m.pyc", "pkg/m.py", "data/x", "pkg/data/y")
    assert names(tmp_path) == ["data/x", "pkg/data/y", "pkg/m.py"]
    assert names(tmp_path, "/data") == ["pkg/data/y", "pkg/m.py"]
    assert names(tmp_path, "data", "*.py") == []


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    tree(tmp_path, "here/a.py", "there/b.py")
    (tmp_path / "here" / "there").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "nowhere").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "here" / "pipe")
    assert names(tmp_path / "here") == ["a.py", "there/b.py"]


def test_equal_files_make_equal_bytes_and_come_out_as_they_were(tmp_path: Path) -> None:
    for name in ("one", "two"):
        tree(tmp_path / name, "a.py", "sub/run.sh")
        (tmp_path / name / "sub" / "run.sh").chmod(0o755)
        os.utime(tmp_path / name / "a.py", (time.time() - 1e6,) * 2 if name == "two" else None)
    first = packed(tmp_path / "one")
    assert first == packed(tmp_path / "two")
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert archive.read("sub/run.sh") == b"sub/run.sh"
        assert archive.getinfo("sub/run.sh").external_attr >> 16 == 0o755


def test_too_big_names_the_biggest_and_what_compresses_is_not(tmp_path: Path) -> None:
    tree(tmp_path, "a.py")
    (tmp_path / "zeros").write_bytes(bytes(8 << 20))
    pack(tmp_path, (), io.BytesIO(), limit=1 << 20)
    (tmp_path / "data").mkdir()
    for i in range(3):
        (tmp_path / "data" / str(i)).write_bytes(random.Random(i).randbytes(1 << 20))
    with pytest.raises(UnusableFiles) as caught:
        pack(tmp_path, (), io.BytesIO(), limit=1 << 20)
    assert f"{tmp_path} is more than 1.0 MiB zipped" in str(caught.value)
    assert "Biggest: zeros (8.0 MiB), data/ (3.0 MiB), a.py (0.0 MiB)" in str(caught.value)
    pack(tmp_path, ("data",), io.BytesIO(), limit=1 << 20)


def test_a_file_far_too_big_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "data").open("wb") as file:
        file.write(random.Random(0).randbytes(8 << 20))
        file.truncate(32 << 30)  # in holes
    with pytest.raises(UnusableFiles, match=r"32\.0 GiB"):
        pack(tmp_path, (), io.BytesIO(), limit=1 << 20)


def test_our_own_packages_work_from_the_zip(tmp_path: Path) -> None:
    file = io.BytesIO()
    pack_packages(file)
    assert len(file.getvalue()) < LIMIT // 20
    with zipfile.ZipFile(file) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == set(PACKAGES)
        archive.extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import cli.submit; print(cli.__file__)"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tmp_path / "cli" / "__init__.py")
