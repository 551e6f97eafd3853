"""The data: what is read, what is refused and how, and that held-out bytes are never trained on."""

import importlib.util
import os
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


text = load("text")
Document, TextError = text.Document, text.TextError


def documents(*sizes: int) -> list[Document]:
    """Of different contents: no two share a run of bytes as long as a window."""
    draw = random.Random(1)
    return [Document(f"{i}.txt", bytes(draw.choices(range(97, 123), k=size))) for i, size in enumerate(sizes)]


def total(parts: list[Document]) -> int:
    return sum(len(document.data) for document in parts)


def refusal(*paths: Path, minimum_bytes: int = 1) -> str:
    with pytest.raises(TextError) as caught:
        text.load_text(paths, minimum_bytes=minimum_bytes)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- reading ---


def test_reads_files_and_folders_in_sorted_order(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "z.md").write_text("zed")
    (folder / "b" / "ä.txt").write_text("größer", encoding="utf-8")
    (folder / "empty.py").touch()
    (tmp_path / "one.txt").write_text("one")
    loaded = text.load_text([folder, tmp_path / "one.txt"], minimum_bytes=1)
    assert loaded == [("b/ä.txt", "größer".encode()), ("z.md", b"zed"), ("one.txt", b"one")]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert len(text.load_text([tmp_path, tmp_path / "a.txt", tmp_path], minimum_bytes=1)) == 1


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.txt") == f"{tmp_path}/none.txt: no such file or folder"


def test_what_is_not_utf8_is_named_with_its_offset(tmp_path: Path) -> None:
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 ".encode("latin-1"))
    expected = f"{tmp_path}/latin.txt: not UTF-8 text (byte 0xe9 at offset 3)"
    assert refusal(tmp_path / "latin.txt") == expected
    assert refusal(tmp_path) == expected


def test_an_empty_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert refusal(tmp_path / "empty.txt").endswith("empty.txt: the file is empty")
    assert refusal(tmp_path).endswith("the folder holds no text")


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").endswith("pipe: neither a regular file nor a folder")


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal of the system is played."""

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.setattr(Path, "read_bytes", denied)
    assert refusal(tmp_path) == f"{tmp_path}/secret.txt: cannot be read (Permission denied)"


def test_a_name_too_long_and_a_loop_of_links_are_named(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    assert refusal(long) == f"{long}: cannot be read (File name too long)"
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert refusal(loop) == f"{loop}: cannot be read (Too many levels of symbolic links)"


def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may enter everything, so the refusal of the system is played."""
    (tmp_path / "closed").mkdir()
    file = tmp_path / "closed" / "secret.txt"
    file.write_text("secret")
    real = Path.stat

    def denied(path: Path, **options: bool) -> os.stat_result:
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", denied)
    for path in (file, tmp_path):
        assert refusal(path) == f"{file}: cannot be read (Permission denied)"


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 1234)
    message = refusal(tmp_path / "short.txt", minimum_bytes=50_000)
    assert "1,234 bytes" in message and "50,000" in message and "short.txt" in message
    assert "too little text" in refusal()


def test_by_default_the_standard_library_is_read() -> None:
    loaded = text.load_text()
    names = {document.name for document in loaded}
    assert {"json/decoder.py", "asyncio/tasks.py"} <= names
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert 5e6 < total(loaded) < 30e6


# --- train and held out ---


def test_split_by_file_keeps_every_byte_and_the_share() -> None:
    given = documents(*[1000] * 200)
    train, held_out = text.split(given, 0.05, seed=1)
    assert sorted(train + held_out) == sorted(given)
    assert total(held_out) == 10_000


def test_split_depends_on_contents_and_seed_only() -> None:
    given = documents(*range(500, 700))
    renamed = [Document(f"elsewhere/{d.name}", d.data) for d in reversed(given)]
    held_out = {d.data for d in text.split(given, seed=1)[1]}
    assert held_out == {d.data for d in text.split(renamed, seed=1)[1]}
    assert held_out != {d.data for d in text.split(given, seed=2)[1]}


def test_copies_of_one_text_are_on_the_same_side() -> None:
    given = documents(*[1000] * 50)
    copies = [Document(f"copy of {d.name}", d.data) for d in given]
    for seed in range(20):
        train, held_out = text.split(given + copies, 0.1, seed)
        assert held_out and not {d.data for d in train} & {d.data for d in held_out}


@pytest.mark.parametrize("sizes", [(10_000,), (10_000, 60), (10_000, 9_000), (5_000, 10_000, 7_000), (50,) * 3])
def test_few_files_still_give_two_sides(sizes: tuple[int, ...]) -> None:
    given = documents(*sizes)
    train, held_out = text.split(given, 0.05)
    assert total(train) + total(held_out) == sum(sizes)
    assert total(train) > 0 and total(held_out) >= 0.025 * sum(sizes)


def test_a_single_file_holds_out_its_tail() -> None:
    [given] = documents(10_000)
    [train], [held_out] = text.split([given], 0.1)
    assert train.data + held_out.data == given.data
    assert len(held_out.data) == 1000


def test_copies_of_a_cut_file_are_not_trained_on() -> None:
    [given] = documents(10_000)
    for copies in (1, 30):
        train, [held_out] = text.split([given, *[Document("copy", given.data)] * copies], 0.1)
        assert [document.data + held_out.data for document in train] == [given.data]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(TextError, match="between 0 and 1"):
        text.split(documents(1000), share)


# --- windows ---


def test_every_byte_is_a_target_once() -> None:
    dataset = text.ByteDataset(documents(1000, 500), context=64)
    joined = b"\n".join(d.data for d in documents(1000, 500))
    windows = [dataset[i] for i in range(len(dataset))]
    assert all(w.dtype == torch.int64 and w.shape == (65,) for w in windows)
    targets = torch.cat([w[1:] for w in windows])
    assert bytes(targets.tolist()) == joined[1 : 1 + len(targets)]
    assert len(joined) - len(targets) <= 64
    assert dataset.tokens_per_sample == 64


@pytest.mark.parametrize(("size", "windows"), [(65, 1), (128, 1), (129, 2)])
def test_the_last_window_is_whole(size: int, windows: int) -> None:
    dataset = text.ByteDataset(documents(size), context=64)
    assert len(dataset) == windows
    assert dataset[windows - 1].shape == (65,)
    for outside in (windows, -1):
        with pytest.raises(IndexError):
            dataset[outside]


def test_no_whole_window_is_refused() -> None:
    with pytest.raises(TextError, match="one window needs 65"):
        text.ByteDataset(documents(64), context=64)


def test_held_out_batches_are_fixed_and_spread_over_the_text() -> None:
    held_out = documents(64 * 100 + 1)
    batches = text.held_out_batches(held_out, 64, batch_size=4, batches=5)
    again = text.held_out_batches(held_out, 64, batch_size=4, batches=5)
    assert [inputs.shape for inputs, _ in batches] == [(4, 64)] * 5
    for (inputs, targets), (same, _) in zip(batches, again, strict=True):
        assert torch.equal(inputs, same)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(batches[1][0][0].tolist()) == held_out[0].data[20 * 64 : 21 * 64]


def test_held_out_batches_take_what_there_is() -> None:
    batches = text.held_out_batches(documents(64 * 5 + 1), 64, batch_size=4, batches=5)
    assert [len(inputs) for inputs, _ in batches] == [4, 1]
