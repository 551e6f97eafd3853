"""Several processes that are one peer: how what their leader decides reaches the others, between two inner steps.

Every call that has to do with the run is made by all ranks, in the same order: a *meeting*. In it the leader alone acts
(it is the one that talks to the coordinator and to other peers); the others carry out what it orders, in which all take
part (say: write these parameters), until it tells how the call ended. Then all return the same, or raise the same.

It stands on a gloo group of its own over the ranks of the script's process group, so that it works beside NCCL, and
does not mix with the script's own collectives. It stays within a site: the ranks trust each other (they pickle).
"""

from __future__ import annotations

import io
import pickle
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import ConfigurationError, ElasticError, ParityError, TransportError

LETTER = 4096  # bytes that travel at once: what is longer takes a second message
Result = TypeVar("Result")
Move = Callable[[torch.Tensor], torch.Tensor]  # sends what is in it, or fills it


class Alone:
    """A peer of one process: it meets nobody, and all that `Ranks` does costs nothing."""

    size, leads = 1, True

    def together(self, label: str, lead: Callable[[], Result]) -> Result:
        return lead()

    def teach(self, name: str, act: Callable[[], object]) -> None:
        pass

    def mirror(self, name: str, collect: Callable[[], Any], reflect: Callable[[Any], None]) -> None:
        pass

    def forget(self, *names: str) -> None:
        pass

    def order(self, name: str) -> None:
        pass

    def tick(self) -> None:
        pass

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def scatter(self, values: list[Any] | None = None) -> Any:
        return values[0] if values else None

    def pass_on(self, value: Any) -> Any:
        return value

    def share(self, items: list[Any]) -> list[Any]:
        return items


@dataclass(frozen=True, slots=True)
class _Order:
    name: str


@dataclass(frozen=True, slots=True)
class _End:
    """How the leader's call ended, and what has changed with it."""

    result: Any = None
    error: BaseException | None = None
    mirrored: dict[str, Any] = field(default_factory=dict)


class Ranks(Alone):
    """The ranks of `group`, rank 0 of which leads. Made by all of them at once.

    patience: seconds to wait for another rank; the leader may wait as long for other peers.

    A rank that is lost, or that is not there for `patience` seconds, is a TransportError on the others: the ranks of a
    peer live and die together. Not safe for several threads: meet in the thread that made this.
    """

    def __init__(self, group: dist.ProcessGroup, patience: float) -> None:
        members = dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), len(members)
        self.leads = self.rank == 0
        self.wants_end = False
        self.on_wanted_end: Callable[[], None] = lambda: None
        self._thread = threading.get_ident()
        self._depth = 0
        self._taught: dict[str, Callable[[], object]] = {}
        self._mirrors: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
        self._mirrored: dict[str, Any] = {}
        self._closing = False
        self._group: dist.ProcessGroup | None = dist.new_group(
            members, timeout=timedelta(seconds=patience), backend="gloo", use_local_synchronization=True
        )

    # --- meetings -----------------------------------------------------------------------------------------------------

    def together(self, label: str, lead: Callable[[], Result]) -> Result:
        """All ranks call this; the leader acts; all return what `lead` returns there, or raise what it raises.

        Tensors in it come on the kind of device that they had. Raises ParityError on all ranks if they do not make the
        same call. Within a meeting, the leader's calls are its own.
        """
        if self._depth:
            return lead()
        if threading.get_ident() != self._thread:
            raise ConfigurationError(f"{label}: a peer of several ranks is used in the thread that made it")
        self._depth += 1
        try:
            self._meet(label)
            result: Result = self._lead(lead) if self.leads else self._follow()
            return result
        finally:
            self._depth -= 1
            if self._closing:
                self.close()

    def _meet(self, label: str) -> None:
        here = zlib.crc32(label.encode())
        seen = torch.tensor([here, -here, self.wants_end])
        self._do(seen, lambda group: dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group))
        highest, lowest, wanted = int(seen[0]), -int(seen[1]), bool(seen[2])
        if highest != lowest:
            raise ParityError(
                f"rank {self.rank} calls {label}, another rank of this peer something else: all ranks must make the "
                "same calls, in the same order"
            )
        if wanted:
            self.on_wanted_end()

    def _lead(self, lead: Callable[[], Result]) -> Result:
        try:
            result = lead()
        except BaseException as error:
            if self._group is not None:  # else it is this that went wrong
                self._send(_End(error=_sendable(error), mirrored=self._news()), self.spread)
            raise
        self._send(_End(result, mirrored=self._news()), self.spread)
        return result

    def _news(self) -> dict[str, Any]:
        now = {name: collect() for name, (collect, _) in self._mirrors.items()}
        news = {name: value for name, value in now.items() if value != self._mirrored.get(name)}
        self._mirrored = now
        self._reflect(news)
        return news

    def _reflect(self, news: dict[str, Any]) -> None:
        for name, value in news.items():
            if name in self._mirrors:
                self._mirrors[name][1](value)

    def _follow(self) -> Any:
        while True:
            message = self._receive(self.spread)
            if isinstance(message, _End):
                self._reflect(message.mirrored)
                if message.error is not None:
                    raise message.error
                return message.result
            if message.name:
                self._obey(message.name)

    def _obey(self, name: str) -> None:
        try:
            self._taught[name]()
        except BaseException:
            self._part()  # the leader would wait for what this rank does not do
            raise

    def teach(self, name: str, act: Callable[[], object]) -> None:
        """What a rank does when the leader orders `name`."""
        self._taught[name] = act

    def mirror(self, name: str, collect: Callable[[], Any], reflect: Callable[[Any], None]) -> None:
        """State that changes on the leader at any time, and everywhere else, as seen by the script, in meetings.

        collect: its value, on the leader. reflect: called with it on all ranks when it has changed.
        """
        self._mirrors[name] = collect, reflect

    def forget(self, *names: str) -> None:
        """Of what was taught or mirrored."""
        for name in names:
            self._taught.pop(name, None)
            self._mirrors.pop(name, None)
            self._mirrored.pop(name, None)

    # --- within a meeting ---------------------------------------------------------------------------------------------

    def order(self, name: str) -> None:
        """The others do now what they were taught; the leader takes part on its own."""
        self._send(_Order(name), self.spread)

    def tick(self) -> None:
        """Tells the others to wait on."""
        self.order("")

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """The leader's values for all: written into `tensor`, contiguous and of one length on each rank."""
        self._do(tensor, lambda group: dist.broadcast(tensor, group=group, group_src=0))
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank; empty but on the leader."""
        if self.leads:
            return [value, *(self._receive(self._from(rank)) for rank in range(1, self.size))]
        self._send(value, self._to(0))
        return []

    def scatter(self, values: list[Any] | None = None) -> Any:
        """The inverse of `gather`: values is the leader's."""
        if values is None:
            return self._receive(self._from(0))
        for rank in range(1, self.size):
            self._send(values[rank], self._to(rank))
        return values[0]

    def pass_on(self, value: Any) -> Any:
        """The leader's value, on all ranks."""
        if not self.leads:
            return self._receive(self.spread)
        self._send(value, self.spread)
        return value

    def share(self, items: list[Any]) -> list[Any]:
        """This rank's part of `items`; who would have none has one that another has, too."""
        first, last = (len(items) * each // self.size for each in (self.rank, self.rank + 1))
        return items[first:last] or items[first % len(items) :][:1]

    def close(self) -> None:
        """Lets go of the others, once a meeting that goes on is over. To them this rank is lost from then on."""
        if self._depth and self._group is not None:
            self._closing = True
        else:
            self._part()

    def _part(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)

    # --- letters ------------------------------------------------------------------------------------------------------

    def _send(self, value: Any, move: Move) -> None:
        text, tensors = _packed(value)
        letter = torch.zeros(LETTER, dtype=torch.uint8)
        letter[:8].view(torch.int64)[0] = len(text)
        whole = torch.frombuffer(text, dtype=torch.uint8)
        letter[8 : 8 + len(text)] = whole[: LETTER - 8]
        move(letter)
        move(whole[LETTER - 8 :])
        for tensor in tensors:
            move(tensor)

    def _receive(self, move: Move) -> Any:
        letter = move(torch.empty(LETTER, dtype=torch.uint8))
        size = int(letter[:8].view(torch.int64)[0])
        text = letter[8 : 8 + size].numpy().tobytes()
        text += move(torch.empty(size - len(text), dtype=torch.uint8)).numpy().tobytes()
        return _Unpickler(io.BytesIO(text), move).load()

    def _to(self, rank: int) -> Move:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            self._do(tensor, lambda group: dist.send(tensor, group=group, group_dst=rank))
            return tensor

        return move

    def _from(self, rank: int) -> Move:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            self._do(tensor, lambda group: dist.recv(tensor, group=group, group_src=rank))
            return tensor

        return move

    def _do(self, moved: torch.Tensor, call: Callable[[dist.ProcessGroup], Any]) -> None:
        if not moved.numel():
            return
        if self._group is None:
            raise TransportError("the ranks of this peer have parted: end them all, and start them anew")
        try:
            call(self._group)
        except RuntimeError as error:
            self._part()
            raise TransportError(f"a rank of this peer is lost ({error}): end them all, and start them anew") from error


class _Pickler(pickle.Pickler):
    """Leaves the tensors out: they travel behind, as they lie in memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []
        self._known: dict[tuple[int, int], int] = {}

    def persistent_id(self, value: Any) -> Any:
        """(which memory, its bytes, then how this tensor lies in it); two views of one memory stay that."""
        if not isinstance(value, torch.Tensor):
            return None
        memory = value.detach().untyped_storage()
        key = memory.data_ptr(), memory.nbytes()
        if key not in self._known:
            self._known[key] = len(self.tensors)
            self.tensors.append(torch.empty(0, dtype=torch.uint8, device=value.device).set_(memory).cpu())
        shape, stride, offset = tuple(value.shape), value.stride(), value.storage_offset()
        return self._known[key], memory.nbytes(), value.dtype, value.device.type, shape, stride, offset


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, fill: Move) -> None:
        super().__init__(file)
        self._fill = fill
        self._memories: list[torch.Tensor] = []

    def persistent_load(self, pid: Any) -> torch.Tensor:
        which, size, dtype, device, shape, stride, offset = pid
        if which == len(self._memories):  # in the order in which they were packed
            self._memories.append(self._fill(torch.empty(size, dtype=torch.uint8)).to(device))
        memory = self._memories[which].untyped_storage()
        return torch.empty(0, dtype=dtype, device=device).set_(memory, offset, shape, stride)


def _packed(value: Any) -> tuple[bytearray, list[torch.Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return bytearray(file.getbuffer()), pickler.tensors


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ElasticError(f"the leader of this peer's ranks failed: {error!r}")
    return error


ALONE = Alone()
