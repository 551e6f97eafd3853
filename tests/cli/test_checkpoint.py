"""`elastic checkpoint`: facts of good checkpoints, and one line with an exit code for bad ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file

from cli import exits
from cli.main import main
from elastic.checkpoints import Snapshot, Store
from elastic.outer.state import Layout, Version


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2, bias=False))


def save(root: Path, *numbers: int, tag: str = "outer") -> Store:
    trained = model()
    layout = Layout(trained)
    store = Store(str(root), "c4-1b", tag)
    for number in numbers:
        shot = Snapshot(
            algorithm="DiLoCo(SGD(lr=1.0))",
            fingerprint=layout.fingerprint,
            versions=(Version(number, layout.read() + number, torch.zeros(layout.elements)),),
            parameters=(tuple((name, tuple(p.shape)) for name, p in trained.named_parameters()),),
            run_state=b"1234",
            summary={"rounds": number, "members": ["eu-1", "us-1"]},
            writer="eu-1",
        )
        store.save(shot, peer="eu-1", state={"steps": number})
    return store


def elastic(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def facts(*arguments: object) -> Any:
    result = elastic(*arguments, "--json")
    assert result.exit_code == exits.OK, result.output
    return json.loads(result.stdout)


def refused(code: int, *arguments: object) -> str:
    """The one line that it says."""
    result = elastic(*arguments)
    assert result.exit_code == code, result.output
    [line] = result.stderr.splitlines()
    assert line.startswith("elastic checkpoint: ")
    return line


def folder(store: Store, number: int) -> Path:
    return next(Path(entry.folder.path) for entry in store.entries() if entry.number == number)


def file_of(store: Store, number: int, pattern: str) -> Path:
    [file] = folder(store, number).glob(pattern)
    return file


@pytest.mark.parametrize("name", ["", "list", "inspect", "verify", "export"])
def test_help_has_an_example(name: str) -> None:
    result = elastic(*([name] if name else []), "--help")
    assert result.exit_code == exits.OK and f"Example: elastic checkpoint {name}" in result.output


def test_list_says_what_there_is(tmp_path: Path) -> None:
    store = save(tmp_path, 1, 2, 3)
    (folder(store, 2) / "manifest.json").unlink()
    os.truncate(file_of(store, 1, "outer-*"), 7)
    rows = facts("list", tmp_path)
    assert [(row["version"], row["state"].partition(":")[0]) for row in rows] == [
        (3, "complete"),
        (2, "unfinished"),
        (1, file_of(store, 1, "outer-*").name),
    ]
    assert rows[0]["run"] == "c4-1b" and rows[0]["peers"] == ["eu-1"] and rows[0]["writer"] == "eu-1"
    assert rows[0]["state_hash"].startswith(folder(store, 3).name.partition("-")[2])
    assert rows[0]["bytes"] == file_of(store, 3, "outer-*").stat().st_size
    shown = elastic("list", f"file://{tmp_path}/c4-1b").output.splitlines()
    assert len(shown) == 4 and shown[0].split()[0] == "checkpoint"
    assert folder(store, 3).name in shown[1] and "complete" in shown[1] and "c4-1b/outer" in shown[1]
    assert "has 7 bytes instead of" in shown[3]


def test_inspect_takes_a_checkpoint_or_the_newest(tmp_path: Path) -> None:
    store = save(tmp_path, 1, 2, 3)
    assert facts("inspect", tmp_path)["version"] == 3
    told = facts("inspect", folder(store, 1))
    assert told["version"] == 1 and told["summary"] == {"rounds": 1, "members": ["eu-1", "us-1"]}
    assert told["run_state_bytes"] == 4 and told["parameters"]["0.weight"] == [4, 6]
    assert told["algorithm"] == "DiLoCo(SGD(lr=1.0))" and told["library"]
    (folder(store, 3) / "manifest.json").write_text("{}")
    result = elastic("inspect", tmp_path)
    assert result.exit_code == exits.OK and "version          2" in result.stdout
    assert "manifest.json: is truncated or altered" in result.stderr
    assert "0.weight [4, 6]" in result.stdout


def test_verify_names_each_bad_file(tmp_path: Path) -> None:
    store = save(tmp_path, 1, 2, 3)
    assert [(r["version"], r["state"]) for r in facts("verify", tmp_path)] == [(3, "good")]
    assert [r["state"] for r in facts("verify", tmp_path, "--all")] == ["good"] * 3
    outer, part = file_of(store, 2, "outer-*"), file_of(store, 2, "peer-*.pt")
    for file in (outer, part):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert elastic("verify", tmp_path).exit_code == exits.OK
    result = elastic("verify", tmp_path, "--all")
    assert result.exit_code == exits.DATA
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["good", "bad", f"{outer.name}:", f"{part.name}:", "good"]
    assert elastic("verify", folder(store, 2), "--json").exit_code == exits.DATA


def test_verify_passes_over_what_was_never_finished(tmp_path: Path) -> None:
    store = save(tmp_path, 1, 2)
    (folder(store, 2) / "manifest.json").unlink()
    assert [(r["version"], r["state"]) for r in facts("verify", tmp_path)] == [(2, "unfinished"), (1, "good")]
    (folder(store, 1) / "manifest.json").unlink()
    assert elastic("verify", tmp_path).exit_code == exits.DATA


def test_export_is_the_model(tmp_path: Path) -> None:
    store = save(tmp_path / "ck", 1, 2)
    os.truncate(file_of(store, 2, "outer-*"), 100)
    out = tmp_path / "model.safetensors"
    result = elastic("export", tmp_path / "ck", out)
    assert result.exit_code == exits.OK and file_of(store, 2, "outer-*").name in result.stderr
    tensors = load_file(out)
    expected = {name: p.detach() + 1 for name, p in model().named_parameters()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) and tensors[name].dtype is torch.float32 for name in expected)
    loaded = model()
    missing, unexpected = loaded.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name.startswith("1.") for name in missing)
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert about["version"] == "1" and about["state_hash"].startswith(folder(store, 1).name.partition("-")[2])
    assert about["run"] == "c4-1b"


def test_export_says_why_it_cannot_write(tmp_path: Path) -> None:
    save(tmp_path / "ck", 1)
    out = tmp_path / "there"
    out.write_text("mine")
    assert "exists" in refused(exits.OUTPUT, "export", tmp_path / "ck", out)
    assert out.read_text() == "mine"
    assert "cannot write" in refused(exits.OUTPUT, "export", tmp_path / "ck", tmp_path / "no" / "folder")
    assert "cannot write" in refused(exits.OUTPUT, "export", tmp_path / "ck", out / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "there"]


@pytest.mark.parametrize("name", ["list", "inspect", "verify", "export"])
def test_bad_places_are_named(name: str, tmp_path: Path) -> None:
    rest = [tmp_path / "out"] if name == "export" else []
    (tmp_path / "file").write_text("no folder")
    for place in ("nothing", "file"):
        assert str(tmp_path / place) in refused(exits.DATA, name, tmp_path / place, *rest)
    assert "nonsense" in refused(exits.USAGE, name, "nonsense://x/y", *rest)
    assert elastic(name).exit_code == exits.USAGE


@pytest.mark.parametrize("name", ["inspect", "export"])
def test_one_checkpoint_is_needed(name: str, tmp_path: Path) -> None:
    rest = [tmp_path / "out"] if name == "export" else []
    store = save(tmp_path / "ck", 1)
    damaged = file_of(store, 1, "outer-*")
    os.truncate(damaged, 5)
    assert f"{damaged}: has 5 bytes instead of" in refused(exits.DATA, name, folder(store, 1), *rest)
    save(tmp_path / "ck", 1, tag="other")
    line = refused(exits.USAGE, name, tmp_path / "ck", *rest)
    assert "c4-1b/other" in line and "c4-1b/outer" in line
    save(tmp_path / "ck", 2)
    os.truncate(file_of(store, 2, "outer-*"), 5)
    result = elastic(name, tmp_path / "ck" / "c4-1b" / "outer", *rest)
    assert result.exit_code == exits.DATA and "is good" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path: Path) -> None:
    from elastic.checkpoints.manifest import seal, unseal

    store = save(tmp_path, 1)
    manifest = folder(store, 1) / "manifest.json"
    manifest.write_bytes(seal({**unseal(manifest.read_bytes()), "writer": "\x1b[2J", "algorithm": "a\nb"}))
    for name in ("list", "inspect"):
        result = elastic(name, tmp_path)
        assert result.exit_code == exits.OK and "\x1b" not in result.output and "?[2J" in result.output


def test_the_installed_command_knows_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    command = [sys.executable, "-m", "cli.main", "checkpoint", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == exits.OK and done.stdout.startswith("good") and done.stderr == ""
    done = subprocess.run([*command[:-2], "list", str(tmp_path / "no")], capture_output=True, text=True)
    assert done.returncode == exits.DATA and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
