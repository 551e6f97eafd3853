"""Checkpoints: bit for bit as written, or refused by name; whole whatever dies; and never in training's way."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
import xxhash
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import elastic.checkpoints
from elastic import CheckpointMismatch, Checkpoints, ConfigurationError
from elastic.checkpoints import Refusal, Snapshot, Store
from elastic.checkpoints.entries import Entry, find
from elastic.checkpoints.manifest import seal, unseal
from elastic.checkpoints.portable import checked, portable, random_state, restore_random_state
from elastic.checkpoints.writer import Writer
from elastic.outer.state import Version

ALGORITHM, FINGERPRINT = "DiLoCo(Nesterov(lr=0.7, momentum=0.9))", "0123456789abcdef"
KILLS = Path(__file__).with_name("checkpoint_kills.py")
SIZES = ((3, 4), (5,), ())


def version(number: int, elements: int) -> Version:
    generator = torch.Generator().manual_seed(number)
    parameters, momentum = (torch.randn(elements, generator=generator) for _ in range(2))
    return Version(number, parameters, momentum)


def snapshot(number: int, *, fragments: int = 1, **changes: Any) -> Snapshot:
    names = tuple(tuple((f"{i}.{k}", shape) for k, shape in enumerate(SIZES)) for i in range(fragments))
    fields: dict[str, Any] = {
        "algorithm": ALGORITHM,
        "fingerprint": FINGERPRINT,
        "versions": tuple(version(number, 18) for _ in range(fragments)),
        "parameters": names,
        "run_state": b"\0cursors\xff",
        "summary": {"rounds": number, "cursors": {10: 3, 9: 1}, "members": ["eu-1", "ü"], "rate": 0.1},
        "writer": "eu-1",
    }
    return Snapshot(**{**fields, **changes})


def newest(store: Store) -> tuple[int, list[Refusal]]:
    refused: list[Refusal] = []
    outer = store.newest(algorithm=ALGORITHM, fingerprint=FINGERPRINT, refused=refused.append)
    return outer.entry.number if outer else 0, refused


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.fixture(params=["path", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fragments", [1, 3])
def test_what_is_written_is_read_bit_for_bit(url: str, fragments: int) -> None:
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, 3.4e38] * 3 + [0.0, -1.0, 1 / 3])
    shot = snapshot(7, fragments=fragments)
    shot = snapshot(7, fragments=fragments, versions=(Version(7, odd, -odd), *shot.versions[1:]))
    store = Store(url, "run", "outer")
    store.write_outer(shot)
    outer = store.newest(algorithm=ALGORITHM, fingerprint=FINGERPRINT)
    assert outer is not None
    for written, read in zip(shot.versions, outer.versions, strict=True):
        assert read.number == written.number and read.state_hash == written.state_hash
        assert same_bits(read.parameters, written.parameters) and same_bits(read.momentum, written.momentum)
    manifest = outer.manifest
    assert (manifest.run, manifest.tag, manifest.writer) == ("run", "outer", "eu-1")
    assert manifest.identity == shot.identity and outer.entry.number == 7 * fragments
    assert manifest.run_state == b"\0cursors\xff"
    assert manifest.summary["cursors"] == {"10": 3, "9": 1} and manifest.summary["members"] == ["eu-1", "ü"]
    assert abs(manifest.time_unix - time.time()) < 60
    assert outer.entry.name == f"v{7 * fragments:08d}-{shot.identity[1][:12]}"


def test_parameters_come_back_under_their_names_and_shapes(tmp_path: Path) -> None:
    shot = snapshot(1, fragments=2)
    store = Store(str(tmp_path), "run", "outer")
    store.write_outer(shot)
    named = store.read(store.entry(*shot.identity)).parameters()
    assert {name: tuple(tensor.shape) for name, tensor in named.items()} == {
        f"{i}.{k}": shape for i in range(2) for k, shape in enumerate(SIZES)
    }
    assert same_bits(named["1.1"], shot.versions[1].parameters[12:17])


def test_the_outer_file_is_plain_safetensors(tmp_path: Path) -> None:
    shot = snapshot(1, fragments=2)
    Store(str(tmp_path), "run", "outer").write_outer(shot)
    [file] = tmp_path.rglob("outer-*.safetensors")
    tensors = load_file(file)
    assert tensors.keys() == {"parameters.0", "momentum.0", "parameters.1", "momentum.1"}
    assert same_bits(tensors["momentum.1"], shot.versions[1].momentum)
    Store(str(tmp_path / "single"), "run", "outer").write_outer(snapshot(1))
    [file] = (tmp_path / "single").rglob("outer-*.safetensors")
    assert load_file(file).keys() == {"parameters", "momentum"}


def test_a_peer_goes_on_from_its_part_as_if_nothing_had_happened(url: str) -> None:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    model = torch.nn.Linear(6, 2)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> float:
        inner.zero_grad()
        loss = (model(torch.randn(4, 6)) * random.gauss() * float(np.random.standard_normal())).square().sum()
        loss.backward()
        inner.step()
        return float(loss.detach())

    step()
    state = {"inner": inner.state_dict(), "model": model.state_dict(), "random": random_state(), "steps": 1}
    store, shot = Store(url, "run", "outer"), snapshot(1)
    store.save(shot, peer="eu-1", state=portable(state))
    expected = [step() for _ in range(3)]
    part = store.read_peer(store.entry(*shot.identity), "eu-1")
    assert part is not None and part["steps"] == 1
    inner.load_state_dict(part["inner"])
    model.load_state_dict(part["model"])
    restore_random_state(part["random"])
    assert [step() for _ in range(3)] == expected


def test_parts_of_peers_are_apart(url: str) -> None:
    store, shot = Store(url, "run", "outer"), snapshot(1)
    store.save(shot, peer="eu-1", state={"name": "eu-1"})
    store.write_peer(*shot.identity, "us.2-b", {"name": "us.2-b"})
    store.write_peer(*shot.identity, "us.2-b", {"name": "us.2-b", "again": True})
    entry = store.entry(*shot.identity)
    assert entry.peers() == ["eu-1", "us.2-b"]
    assert store.read_peer(entry, "us.2-b") == {"name": "us.2-b", "again": True}
    assert store.read_peer(entry, "nobody") is None
    assert entry.problems() == []


def test_a_snapshot_that_cannot_be_right_is_refused_at_once() -> None:
    good = snapshot(1)
    for changes in (
        {"versions": ()},
        {"versions": (version(1, 17),)},
        {"versions": (Version(1, torch.zeros(18), torch.zeros(17)),)},
        {"versions": (Version(1, torch.zeros(18, dtype=torch.float64), torch.zeros(18)),)},
        {"versions": (Version(1, torch.zeros(36)[::2], torch.zeros(18)),)},
        {"summary": {"loss": float("nan")}},
        {"summary": {"tensor": torch.zeros(1)}},
    ):
        with pytest.raises(ConfigurationError):
            snapshot(1, **changes)
    assert good.identity == (1, good.versions[0].state_hash)


def test_tensors_that_changed_after_they_were_hashed_are_not_written(tmp_path: Path) -> None:
    shot = snapshot(3)
    assert shot.identity
    shot.versions[0].momentum[4] += 1
    with pytest.raises(CheckpointMismatch, match="fragment 0 of version 3 has changed"):
        Store(str(tmp_path), "run", "outer").write_outer(shot)
    assert list(tmp_path.rglob("*")) == []


def test_portable_copies_what_can_be_kept_and_names_what_cannot() -> None:
    base = torch.arange(1000.0)
    state = {
        "view": base[:2],
        "p": torch.nn.Parameter(base[:1]),
        "n": np.float64(2),
        "a": np.arange(2),
        "t": (1, [None]),
    }
    copy = portable(state)
    base.zero_()
    assert copy["view"].tolist() == [0, 1] and copy["view"].untyped_storage().nbytes() == 8
    assert type(copy["p"]) is torch.Tensor and type(copy["n"]) is float and copy["a"].tolist() == [0, 1]
    assert copy["t"] == (1, [None])
    whole = torch.ones(3)
    assert checked({"x": whole})["x"].data_ptr() == whole.data_ptr()
    with pytest.raises(ConfigurationError, match=r"state\['a'\]\[1\] is a set"):
        portable({"a": [1, {2}]})
    with pytest.raises(ConfigurationError, match="tuple as a key"):
        portable({(1, 2): 3})


def test_what_cannot_be_stored_of_a_peer_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    store, shot = Store(str(tmp_path), "run", "outer"), snapshot(1)
    with pytest.raises(ConfigurationError, match=r"state\['f'\] is a function"):
        store.write_peer(*shot.identity, "eu-1", {"f": lambda: None})
    with pytest.raises(ConfigurationError, match="not a name"):
        store.write_peer(*shot.identity, "../eu-1", {})
    assert list(tmp_path.rglob("*")) == []


# --- configuration ----------------------------------------------------------------------------------------------------


def test_configuration_refuses_what_cannot_work() -> None:
    for arguments in ({"url": ""}, {"url": "x", "every": 0}, {"url": "x", "keep": 0}, {"url": "x", "keep": 1.5}):
        with pytest.raises(ConfigurationError):
            Checkpoints(**arguments)
    for url in ("nonsense://x", "s3nope://b/c"):
        with pytest.raises(ConfigurationError, match=f"cannot store anything at '{url}'"):
            Checkpoints(url).store("run", "outer")
    for run, tag in (("..", "outer"), ("run", "a/b")):
        with pytest.raises(ConfigurationError, match="is not a name"):
            Store("memory://x", run, tag)


@pytest.mark.parametrize(
    ("url", "shared"),
    [
        ("/data", False),
        ("data/x", False),
        ("file:///x", False),
        ("local://x", False),
        ("s3://b", True),
        ("gs://b", True),
    ],
)
def test_a_place_is_shared_if_its_url_says_so(url: str, shared: bool) -> None:
    assert Checkpoints(url).is_shared is shared
    assert Checkpoints(url, shared=not shared).is_shared is not shared


# --- damage -----------------------------------------------------------------------------------------------------------


def two_checkpoints(url: str) -> Store:
    store = Store(url, "run", "outer")
    for number in (1, 2):
        store.save(snapshot(number), peer="eu-1", state={"x": torch.arange(10), "n": [1, {"a": "b"}]})
    return store


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a store of two checkpoints, by path."""
    root = tmp_path_factory.mktemp("original")
    two_checkpoints(str(root))
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def of_second(original: dict[str, bytes]) -> list[str]:
    return sorted(path for path in original if "v00000002" in path)


def in_memory(files: dict[str, bytes]) -> Store:
    url = f"memory://{uuid.uuid4().hex}"
    filesystem, root = fsspec.core.url_to_fs(url)
    for path, data in files.items():
        filesystem.pipe_file(f"{root}/{path}", data)
    return Store(url, "run", "outer")


def assert_refused(files: dict[str, bytes], path: str) -> None:
    """The second checkpoint is refused, by the name of the file, and the first one used; or a peer's part alone is."""
    store, name = in_memory(files), Path(path).name
    number, refused = newest(store)
    second = store.entries()[0]
    if name.startswith("peer-"):
        assert (number, refused) == (2, [])
        with pytest.raises(CheckpointMismatch, match=f"v00000002-.*/{name}: "):
            store.read_peer(second, "eu-1")
    else:
        assert number == 1
        assert [(r.checkpoint, r.file) for r in refused] == [(str(second.folder), name)] and refused[0].reason
    assert [problem.file for problem in second.problems()] == [name]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_by_its_name(original: dict[str, bytes], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(of_second(original)))
    content = bytearray(original[path])
    at = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["truncated", "changed", "appended"])):
        case "truncated":
            del content[at:]
        case "changed":
            content[at] ^= data.draw(st.integers(1, 255))
        case "appended":
            content += content[at:]
    assert_refused({**original, path: bytes(content)}, path)


def test_every_single_byte_of_the_small_files_counts(original: dict[str, bytes]) -> None:
    for path in of_second(original):
        if path.endswith(".json"):
            for at in range(len(original[path])):
                content = bytearray(original[path])
                content[at] ^= 1 << random.Random(at).randrange(8)
                with pytest.raises(ValueError, match="altered"):
                    unseal(bytes(content))


def test_a_missing_file_is_named(original: dict[str, bytes]) -> None:
    for path in of_second(original):
        rest = {other: data for other, data in original.items() if other != path}
        if Path(path).name == "peer-eu-1.json":
            assert in_memory(rest).read_peer(in_memory(rest).entries()[0], "eu-1") is None
        else:
            assert_refused(rest, path)


def test_files_of_another_checkpoint_do_not_pass(original: dict[str, bytes]) -> None:
    second = {Path(path).name: path for path in of_second(original)}
    first = {Path(path).name: path for path in original if "v00000001" in path}
    for name in ("manifest.json", "peer-eu-1.json"):
        files = {**original, second[name]: original[first[name]]}
        assert_refused(files, second[name])
    [outer] = [path for path in second.values() if path.endswith(".safetensors")]
    [other] = [path for path in first.values() if path.endswith(".safetensors")]
    assert len(original[outer]) == len(original[other])
    assert_refused({**original, outer: original[other]}, outer)


@pytest.mark.parametrize("key", ["run", "tag", "algorithm", "fingerprint"])
def test_what_belongs_to_something_else_is_refused_with_both_names(key: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path), "run", "outer")
    store.write_outer(snapshot(1))
    other = Store(str(tmp_path), "other", "outer") if key == "run" else Store(str(tmp_path), "run", "other")
    changes = {key: "other"} if key in ("algorithm", "fingerprint") else {}
    other.write_outer(snapshot(2, **changes))
    entry = other.entries()[0]
    if not changes:
        os.rename(entry.folder.path, f"{store.folder.path}/{entry.name}")
    else:
        store.write_outer(snapshot(2, **changes))
    number, [refusal] = newest(store)
    assert number == 1 and refusal.file == "manifest.json"
    assert f"is of {key} 'other', not " in refusal.reason


def forged(store: Store, path: str, **changes: Any) -> None:
    """Writes a file again with other content and a hash that fits."""
    folder = store.entries()[0].folder
    folder.put(path, seal({**unseal(folder.read(path)), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "elastic-checkpoint-2"},
        {"fragments": []},
        {"fragments": [{"version": 2}]},
        {"fragments": None},
        {"outer": {"name": "../../../x", "bytes": 1, "digest": ""}},
        {"outer": {"name": "peer-eu-1.json", "bytes": 1, "digest": ""}},
        {"outer": None},
        {"run_state": "%%"},
        {"run_state": 7},
        {"time_unix": True},
        {"summary": []},
        {"run": 5},
    ],
)
def test_a_manifest_of_another_make_is_refused(changes: dict[str, Any]) -> None:
    store = two_checkpoints(f"memory://{uuid.uuid4().hex}")
    forged(store, "manifest.json", **changes)
    number, [refusal] = newest(store)
    assert number == 1 and refusal.file == "manifest.json" and refusal.reason


def test_shapes_that_do_not_fit_the_file_are_refused() -> None:
    store = two_checkpoints(f"memory://{uuid.uuid4().hex}")
    body = unseal(store.entries()[0].folder.read("manifest.json"))
    for shape in ([17], [1 << 40], [0]):
        fragment = {**body["fragments"][0], "parameters": [["w", shape]]}
        forged(store, "manifest.json", fragments=[fragment])
        number, [refusal] = newest(store)
        assert number == 1 and refusal.file.startswith("outer-")
    for parameters in ([["w", [-18]]], [["w", [True]]], [["w"]], [[1, [18]]], "w"):
        forged(store, "manifest.json", fragments=[{**body["fragments"][0], "parameters": parameters}])
        number, [refusal] = newest(store)
        assert number == 1 and refusal.file == "manifest.json"


def test_tensors_must_be_those_that_the_manifest_names() -> None:
    store = two_checkpoints(f"memory://{uuid.uuid4().hex}")
    folder = store.entries()[0].folder
    outer = unseal(folder.read("manifest.json"))["outer"]
    content = folder.read(outer["name"])
    others = {
        "fragment 0 has state hash": content[:-1] + bytes([content[-1] ^ 1]),
        "holds other tensors": content.replace(b'"momentum"', b'"momentun"'),
    }
    for reason, other in others.items():
        digest = xxhash.xxh3_128_hexdigest(other)
        name = f"outer-{digest[:16]}.safetensors"
        folder.put(name, other)
        forged(store, "manifest.json", outer={"name": name, "bytes": len(other), "digest": digest})
        number, [refusal] = newest(store)
        assert (number, refusal.file) == (1, name) and reason in refusal.reason


def test_names_in_a_peers_file_lead_nowhere_else(tmp_path: Path) -> None:
    store = two_checkpoints(str(tmp_path))
    entry = store.entries()[0]
    secret = tmp_path / "peer-eu-1-0123456789abcdef.pt"
    torch.save({"secret": 1}, secret)
    digest = xxhash.xxh3_128_hexdigest(secret.read_bytes())
    for name in (f"../../../{secret.name}", str(secret), "peer-us-1-0123456789abcdef.pt"):
        forged(store, "peer-eu-1.json", file={"name": name, "bytes": secret.stat().st_size, "digest": digest})
        with pytest.raises(CheckpointMismatch, match=r"peer-eu-1\.json: names a file"):
            store.read_peer(entry, "eu-1")
    with pytest.raises(CheckpointMismatch, match="is not a name"):
        store.read_peer(entry, "../../../x")


def test_a_peers_part_of_another_peer_or_run_is_refused(tmp_path: Path) -> None:
    store = two_checkpoints(str(tmp_path))
    entry = store.entries()[0]
    for key, value in (("peer", "us-1"), ("run", "other"), ("tag", "other"), ("format", "elastic-checkpoint-2")):
        before = unseal(entry.folder.read("peer-eu-1.json"))[key]
        forged(store, "peer-eu-1.json", **{key: value})
        with pytest.raises(
            CheckpointMismatch, match=rf"peer-eu-1\.json: belongs to {key} '{value}', not to '{before}'"
        ):
            store.read_peer(entry, "eu-1")
        forged(store, "peer-eu-1.json", **{key: before})


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("make", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_peers_part_is_not_run(tmp_path: Path, make: Callable[[Any, Path], object]) -> None:
    store, marker = two_checkpoints(str(tmp_path)), tmp_path / "ran"
    entry = store.entries()[0]
    name = unseal(entry.folder.read("peer-eu-1.json"))["file"]["name"]
    path = Path(entry.folder.path) / name
    make({"x": Bomb(marker)}, path)
    data = path.read_bytes()
    forged(store, "peer-eu-1.json", file={"name": name, "bytes": len(data), "digest": xxhash.xxh3_128_hexdigest(data)})
    with pytest.raises(CheckpointMismatch, match=f"{name}: cannot be loaded"):
        store.read_peer(entry, "eu-1")
    assert not marker.exists()


def test_a_file_that_cannot_be_read_is_a_refusal_too(tmp_path: Path) -> None:
    store = two_checkpoints(str(tmp_path))
    manifest = Path(store.entries()[0].folder.path) / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    number, [refusal] = newest(store)
    assert number == 1 and refusal.file == "manifest.json"


def test_refusals_cross_process_borders() -> None:
    store = in_memory({})
    with pytest.raises(CheckpointMismatch) as caught:
        store.read(store.entry(1, "0" * 32))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copy, CheckpointMismatch) and str(copy) == str(caught.value)
    assert "manifest.json: is missing" in str(copy)


# --- writers that die, and writers together ---------------------------------------------------------------------------


def killed(mode: str, root: Path, *numbers: int) -> Any:
    command = [sys.executable, str(KILLS), mode, str(root), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


def test_a_writer_killed_at_any_of_its_steps_leaves_nothing_wrong(tmp_path: Path) -> None:
    assert killed("every-step", tmp_path) > 20


def test_two_writers_killed_at_any_moment_leave_nothing_wrong(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    assert killed("any-moment", tmp_path, 40, seed) > 0


def test_writers_of_the_same_version_at_once_never_tear_it(tmp_path: Path) -> None:
    shot = snapshot(1, versions=(version(1, 300_000),), parameters=((("w", (300_000,)),),))
    stores = [Store(str(tmp_path), "run", "outer") for _ in range(4)]
    stores[0].write_outer(shot)
    done = threading.Event()

    def read() -> int:
        reads = 0
        while not done.is_set() or reads == 0:
            outer = stores[0].read(stores[0].entry(*shot.identity), algorithm=ALGORITHM, fingerprint=FINGERPRINT)
            assert same_bits(outer.versions[0].parameters, shot.versions[0].parameters)
            reads += 1
        return reads

    def write(store: Store, name: str) -> None:
        for _ in range(10):
            store.save(shot, peer=name, state={"name": name})

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        writers = [pool.submit(write, store, f"p{i}") for i, store in enumerate(stores)]
        try:
            for writer in writers:
                writer.result()
        finally:
            done.set()
        assert reader.result() > 0
    entry = stores[0].entry(*shot.identity)
    assert entry.problems() == [] and entry.peers() == ["p0", "p1", "p2", "p3"]
    assert len([name for name in entry.folder.list() if name.endswith(".safetensors")]) == 1
    assert not list(tmp_path.rglob("*.part"))


# --- how many are kept ------------------------------------------------------------------------------------------------


def names(store: Store) -> list[int]:
    return [entry.number for entry in store.entries()]


def aged(entry: Entry) -> None:
    old = time.time() - elastic.checkpoints.ABANDONED_SECONDS - 60
    for path in [*Path(entry.folder.path).iterdir(), Path(entry.folder.path)]:
        os.utime(path, (old, old))


def test_the_newest_are_kept(url: str) -> None:
    store = Store(url, "run", "outer", keep=3)
    for number in range(1, 7):
        store.save(snapshot(number))
        assert names(store) == list(range(number, max(0, number - 3), -1))
    assert newest(store) == (6, [])
    needless = [entry.name for entry in store.entries()[1:]]
    assert Store(url, "run", "outer", keep=1).prune() == needless
    assert names(store) == [6] and newest(store) == (6, [])


def test_damaged_ones_do_not_count_and_a_good_one_is_never_removed(tmp_path: Path) -> None:
    store = Store(str(tmp_path), "run", "outer", keep=1)
    store.write_outer(snapshot(1))
    for number in (2, 3):
        store.write_outer(snapshot(number))
        [file] = Path(store.entries()[0].folder.path).glob("outer-*")
        os.truncate(file, 10)
    assert store.prune() == [] and newest(store)[0] == 1
    aged(store.entry(*snapshot(2).identity))
    assert store.prune() == [], "they are newer than what is kept, and may be unreadable only for now"
    store.save(snapshot(4))
    assert names(store) == [4, 3], "the second was old enough, the third was written to a moment ago"


def test_what_was_never_finished_goes_once_it_is_old(tmp_path: Path) -> None:
    store = Store(str(tmp_path), "run", "outer")
    for number in (1, 2, 3):
        store.write_outer(snapshot(number))
    for number in (2, 3):
        store.entry(*snapshot(number).identity).folder.delete("manifest.json")
    aged(store.entry(*snapshot(2).identity))
    assert store.prune() == [store.entry(*snapshot(2).identity).name]
    assert names(store) == [3, 1]
    store.write_outer(snapshot(3))
    assert newest(store) == (3, [])


def test_age_in_a_store_that_tells_no_times_is_not_known() -> None:
    store = two_checkpoints(f"memory://{uuid.uuid4().hex}")
    assert store.entries()[0].age() < 60
    assert store.entry(9, "0" * 32).age() == 0.0


def test_another_models_checkpoints_are_left_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path), "run", "outer", keep=1)
    for number in (8, 9):
        store.write_outer(snapshot(number, fingerprint="another"))
    for number in (1, 2):
        store.save(snapshot(number))
    assert names(store) == [9, 8, 2]
    assert newest(store)[0] == 2


def test_a_run_that_went_back_keeps_what_it_writes(tmp_path: Path) -> None:
    store = Store(str(tmp_path), "run", "outer", keep=2)
    for number in (1, 2, 3, 4):
        store.save(snapshot(number))
    other = version(33, 18)
    again = snapshot(3, versions=(Version(3, other.parameters, other.momentum),))
    store.save(again)
    assert again.identity[1][:12] in [entry.prefix for entry in store.entries()]
    store.save(snapshot(5))
    assert names(store) == [5, 4]


def test_what_was_just_written_stays_whatever_its_name(tmp_path: Path) -> None:
    other = version(33, 18)
    both = [snapshot(3), snapshot(3, versions=(Version(3, other.parameters, other.momentum),))]
    for i, order in enumerate((both, both[::-1])):
        store = Store(str(tmp_path / str(i)), "run", "outer", keep=1)
        for shot in order:
            store.save(shot)
            assert store.entry(*shot.identity) in store.entries()


def test_a_run_that_went_far_back_keeps_as_many_of_its_new_ones(tmp_path: Path) -> None:
    store = Store(str(tmp_path), "run", "outer", keep=2)
    for number in (8, 9, 2, 3, 4):
        store.save(snapshot(number))
    assert names(store) == [9, 8, 4, 3]
    store.save(snapshot(10))
    assert names(store) == [10, 9]


def test_pruning_an_empty_place_does_nothing(url: str) -> None:
    store = Store(url, "run", "outer")
    assert store.prune() == [] and store.entries() == [] and newest(store) == (0, [])


def test_other_files_in_the_place_are_left_alone(tmp_path: Path) -> None:
    store = two_checkpoints(str(tmp_path))
    for name in ("notes.txt", "v00000001-nothex", "v1-000000000000"):
        (tmp_path / "run" / "outer" / name).mkdir()
    (tmp_path / "run" / "outer" / "v00000009-000000000000").write_text("a file")
    assert names(store) == [2, 1] and store.prune() == []


def test_checkpoints_are_found_from_any_folder_above(url: str) -> None:
    for run in ("a", "b"):
        Store(url, run, "outer").write_outer(snapshot(1))
    store = Store(url, "a", "outer")
    assert [entry.folder.parent.parent.name for entry in find(url)] == ["a", "b"]
    assert find(f"{url}/a") == find(f"{url}/a/outer/") == store.entries()
    assert find(f"{url}/a/outer/{store.entries()[0].name}") == store.entries()
    assert find(f"{url}/nothing") == []


# --- the writer in the background -------------------------------------------------------------------------------------


def test_the_newest_waiting_job_wins() -> None:
    writer, began, go = Writer(), threading.Event(), threading.Event()
    done: list[int] = []

    def job(number: int) -> Callable[[], int]:
        def work() -> int:
            began.set()
            assert go.wait(60)
            done.append(number)
            return 100 * number

        return work

    writer.submit(job(1))
    assert began.wait(60)
    for number in (2, 3, 4):
        writer.submit(job(number))
    assert not writer.flush(timeout=0)
    go.set()
    assert writer.flush() and done == [1, 4]
    statistics = writer.statistics()
    assert (statistics.written, statistics.superseded, statistics.failed) == (2, 2, 0)
    assert statistics.bytes == 400 and statistics.seconds >= 0 and statistics.last_error == ""
    assert writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "elastic-checkpoints"]
    with pytest.raises(ConfigurationError, match="closed"):
        writer.submit(job(5))


def test_closing_writes_what_waits_or_gives_it_up_in_time() -> None:
    writer, began, go = Writer(), threading.Event(), threading.Event()

    def slow() -> int:
        began.set()
        assert go.wait(60)
        return 0

    writer.submit(slow)
    assert began.wait(60)
    writer.submit(lambda: 1)
    assert not writer.close(timeout=0)
    go.set()
    assert writer.flush()
    assert (writer.statistics().written, writer.statistics().superseded) == (1, 1)
    assert Writer().close()


def test_errors_of_storage_stay_in_the_writer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told: list[Exception] = []
    writer = Writer(on_error=told.append)
    broken, good = Store(str(tmp_path / "file" / "x"), "run", "outer"), Store(str(tmp_path), "run", "outer")
    writer.submit(lambda: broken.save(snapshot(1)))
    assert writer.flush()
    writer.submit(lambda: good.save(snapshot(1)))
    assert writer.close()
    statistics = writer.statistics()
    assert (statistics.written, statistics.failed) == (1, 1) and statistics.bytes > 144
    assert str(tmp_path / "file") in statistics.last_error and isinstance(told[0], OSError)


def test_a_callback_that_fails_does_not_end_the_writer() -> None:
    def fail() -> int:
        raise OSError("no bucket")

    def on_error(error: Exception) -> None:
        raise RuntimeError(f"callback for {error}")

    writer = Writer(on_error)
    writer.submit(fail)
    assert writer.flush()
    assert writer.statistics().last_error == "on_error: RuntimeError: callback for no bucket"
    writer.submit(lambda: 5)
    assert writer.close() and writer.statistics().written == 1


def test_a_full_disk_loses_neither_training_nor_the_checkpoint_before(tmp_path: Path) -> None:
    facts = killed("no-space", tmp_path)
    assert facts["during"] == 1 and facts["after"] == 2 and facts["left"] == []
    assert (facts["written"], facts["failed"]) == (1, 2) and facts["told"] == ["OSError", "OSError"]
    assert "File too large" in facts["last_error"] and ".pt" in facts["last_error"]


# --- stores that are not local ----------------------------------------------------------------------------------------


class LostNetwork(Exception):
    """As libraries of object stores raise: no OSError."""


class Upload(MemoryFile):
    """Becomes visible when it is closed, as in an object store, and never if it is discarded."""

    def write(self, data: Any) -> int:
        if Bucket.broken:
            raise LostNetwork("the bucket is gone")
        return super().write(data)

    def close(self) -> None:
        if not self.discarded:
            self.fs.store[self.path] = MemoryFile(self.fs, self.path, self.getvalue())

    discarded = False

    def discard(self) -> None:
        self.discarded = True


class Bucket(MemoryFileSystem):
    protocol = "bucket"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    broken = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("bucket://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return Upload(self, path) if mode == "wb" else super()._open(path, mode, **options)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if Bucket.broken:
            raise LostNetwork("the bucket is gone")
        self.store[path] = MemoryFile(self, path, value)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        if Bucket.broken:
            raise LostNetwork("the bucket is gone")
        return super().ls(path, detail, **options)

    def modified(self, path: str) -> Any:
        raise NotImplementedError


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "broken", False)
    return f"bucket://{uuid.uuid4().hex}"


def test_a_bucket_that_is_lost_in_mid_upload_keeps_what_it_had(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = two_checkpoints(bucket)
    assert newest(store) == (2, [])
    writer = Writer()
    monkeypatch.setattr(Bucket, "broken", True)
    for number in (2, 3):  # the second one is there already, and whole
        writer.submit(lambda number=number: store.save(snapshot(number), peer="eu-1", state={}))  # type: ignore[misc]
        assert writer.flush()
    with pytest.raises(OSError, match="LostNetwork: the bucket is gone"):
        store.entries()
    assert writer.statistics().failed == 2
    assert writer.statistics().last_error == "OSError: LostNetwork: the bucket is gone"
    monkeypatch.setattr(Bucket, "broken", False)
    assert newest(store) == (2, []) and store.entries()[0].problems() == []
    writer.submit(lambda: store.save(snapshot(3)))
    assert writer.close() and newest(store) == (3, [])


def test_where_ages_are_not_known_nothing_counts_as_abandoned(bucket: str) -> None:
    store = two_checkpoints(bucket)
    store.entries()[0].folder.delete("manifest.json")
    assert store.prune() == [] and names(store) == [2, 1]
