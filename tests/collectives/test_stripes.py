"""Stripes that come and go while a link works, and peers with several addresses."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from plane import assert_exact, groups, make_start, numbers, run_all, together
from plane import eventually as patiently

from collectives import Group, LinkOptions, Member
from collectives.frames import HEADER_BYTES, NO_KEY, Hello, Kind, Purpose, checksum, encode, name_hash
from collectives.handshake import Dialling, Self
from collectives.links import Link, Outgoing, Stripe
from collectives.sockets import congestion_control, format_address, listen_on, parse_address

MIB = (1 << 20) // 4
PACING = 47  # SO_MAX_PACING_RATE

eventually = partial(patiently, seconds=20.0)


def links_of(made: Sequence[Group]) -> list[Link]:
    return [link for group in made for link in group._links.values()]


def reduce(made: Sequence[Group], round_: int, elements: int = 3 * MIB) -> None:
    start = make_start([group.member for group in made], elements, round=round_)
    sources = {group.member.name: numbers(elements, seed) for seed, group in enumerate(made)}
    assert_exact(start, sources, *run_all(made, start, sources))


@contextmanager
def pair(stripes: int | str = 1, **changes: object) -> Iterator[list[Group]]:
    options = LinkOptions(chunk_bytes=1 << 16, stripes=stripes, shared_memory=False, **changes)  # type: ignore[arg-type]
    with groups(2, options) as made:
        yield made


def test_near_links_have_one_stripe_by_themselves() -> None:
    with pair("auto") as made:
        for round_ in range(3):
            reduce(made, round_)
        for group in made:
            (link,) = group.statistics().links
            assert (link.stripes, link.state) == (1, "up")
            eventually(lambda group=group: group.statistics().links[0].goodput > 0)  # type: ignore[misc]
            assert 0 < group.statistics().links[0].rtt < 0.1


def test_stripes_come_and_go_while_it_works() -> None:
    with pair(1) as made:
        reduce(made, 0)
        dialler, other = links_of(made)

        def change() -> None:
            for wanted in (6, 2, 9, 1):
                dialler.care.base = wanted
                made[0]._porter.ring()
                eventually(lambda wanted=wanted: [len(each.stripes) for each in (dialler, other)] == [wanted] * 2)  # type: ignore[misc]

        def work() -> None:
            for round_ in range(1, 40):
                reduce(made, round_, MIB)

        assert together(change, work) == [None, None]
        reduce(made, 50)
        assert all(link.failure is None for link in (dialler, other))
        used = [stripe for stripe in (*dialler.stripes, *dialler.retired) if stripe.bytes_sent > 1 << 16]
        assert len(dialler.retired) == 12 and len(used) > 1, "added stripes carried nothing"


def test_whoever_was_dialled_gets_the_stripes_that_it_asks_for() -> None:
    with pair("auto") as made:
        reduce(made, 0)
        dialler, other = links_of(made)
        other.send(Outgoing(Kind.STRIPES, NO_KEY, 5))
        eventually(lambda: [len(each.stripes) for each in (dialler, other)] == [5, 5])
        reduce(made, 1)


def test_a_slow_stripe_is_redialled_from_another_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BUSY_SECONDS": 0.02, "BUSY_TRIPS": 0.1, "LONG": 1}.items():
        monkeypatch.setattr(f"collectives.tuning.{name}", value)
    monkeypatch.setattr("collectives.handshake._SWEEP_SECONDS", 0.05)
    with pair(3, send_buffer=1 << 17) as made:
        reduce(made, 0)
        dialler, _ = links_of(made)
        for stripe in dialler.stripes:
            pace(stripe, 20 << 20)
        slow = dialler.stripes[1]
        port = slow.socket.getsockname()[1]
        pace(slow, 2 << 20)
        for round_ in range(1, 60):
            reduce(made, round_)
            if made[0].statistics().links[0].redialled:
                break
        (link,) = made[0].statistics().links
        assert link.redialled == 1
        eventually(lambda: slow in dialler.retired and len(dialler.stripes) == 3)
        assert port not in [stripe.socket.getsockname()[1] for stripe in dialler.stripes]
        assert all(each.state == "up" for group in made for each in group.statistics().links)
        reduce(made, 99)


def test_on_a_long_path_the_last_frames_are_followed_by_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collectives.links.FAR", 0.0)
    said: list[tuple[Kind, int]] = []
    say = Link._say

    def spy(link: Link, stripe: Stripe, kind: Kind) -> None:
        said.append((kind, stripe.bytes_sent))
        say(link, stripe, kind)

    monkeypatch.setattr(Link, "_say", spy)
    with pair(3) as made:
        for round_ in range(5):
            reduce(made, round_)
        trails = [sent for kind, sent in said if kind is Kind.TRAIL]
        chunks = 5 * len(made) * 3 * MIB * 4 // (1 << 16)
        assert all(trails) and 5 <= len(trails) < chunks / 2, "only behind numbers, and only behind the last"
        assert all(link.failure is None and link.stale_frames == 0 for link in links_of(made))


def test_a_slow_stripe_takes_a_frame_while_enough_is_still_to_come() -> None:
    with pair(2) as made:
        reduce(made, 0, 1000)
        link = links_of(made)[0]
        fast, slow = link.stripes
        fast.busy, fast.rate, slow.rate = True, 1e8, 1e6
        numbers = np.zeros(1 << 14, dtype=np.float32)
        left = [1000]
        item = Outgoing(Kind.GATHER, NO_KEY, numbers=numbers, owed=lambda: left[0])
        assert link._best_idle(item) is slow
        left[0] = 1
        assert link._best_idle(item) is None, "the fast one will be through with it earlier"
        fast.busy = False


def pace(stripe: Stripe, rate: int) -> None:
    stripe.socket.setsockopt(socket.SOL_SOCKET, PACING, struct.pack("=Q", rate))


def test_a_late_stripe_that_is_given_up_does_no_harm() -> None:
    with pair(2) as made:
        reduce(made, 0)
        dialler, other = links_of(made)
        me = Self(name_hash("run"), made[0].member.incarnation, made[0].options)
        late = Dialling(me, made[1].member, Purpose.STRIPE, 3, 5.0, link=dialler.ident).connect()
        eventually(lambda: len(other.stripes) == 5)
        reduce(made, 1)
        for sock in late:
            sock.close()
        eventually(lambda: len(other.stripes) == 2)
        reduce(made, 2)
        assert dialler.failure is None and other.failure is None


def test_a_late_stripe_for_no_link_is_refused() -> None:
    with groups(1) as (group,):
        me = Self(name_hash("run"), 7, group.options)
        with pytest.raises(OSError, match="there is no such link"):
            Dialling(me, group.member, Purpose.STRIPE, 1, 5.0, link=5).connect()


@pytest.mark.parametrize("name", ["reno", "cubic"])
def test_every_socket_has_the_congestion_control_that_was_asked_for(name: str) -> None:
    with pair(3, congestion_control=name) as made:
        reduce(made, 0)
        found = {congestion_control(each.socket) for link in links_of(made) for each in link.stripes}
        assert found == {name}
        assert {link.congestion_control for group in made for link in group.statistics().links} == {name}


def test_what_is_accepted_has_its_congestion_control_from_the_first_packet() -> None:
    with listen_on("127.0.0.1:0", LinkOptions(congestion_control="reno")) as listener:
        assert congestion_control(listener) == "reno"


def test_near_links_never_pace_with_bbr() -> None:
    with pair(2) as made:
        reduce(made, 0)
        assert "bbr" not in {congestion_control(each.socket) for link in links_of(made) for each in link.stripes}


def test_stripes_are_spread_over_all_addresses() -> None:
    options = LinkOptions(chunk_bytes=4096, stripes=6)
    with (
        Group(run="run", name="a", incarnation=1, options=options) as a,
        Group(run="run", name="b", incarnation=2, options=options, listen="127.0.0.1:0,127.0.0.2:0,[::1]:0") as b,
    ):
        assert [parse_address(each)[0] for each in b.addresses] == ["127.0.0.1", "127.0.0.2", "::1"]
        reduce([a, b], 0)
        reached = sorted(stripe.socket.getpeername()[0] for link in links_of([a]) for stripe in link.stripes)
        assert reached == ["127.0.0.1"] * 2 + ["127.0.0.2"] * 2 + ["::1"] * 2


def test_addresses_that_nobody_answers_do_not_hold_up_one_that_works() -> None:
    with groups(2) as (a, b), socket.socket() as closed, socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        closed.bind(("127.0.0.1", 0))
        dead = [format_address(*each.getsockname()) for each in (closed, silent)]
        b.member = Member(name="p1", incarnation=101, addresses=(*dead, *b.addresses))
        a.connect([b.member])
        reduce([a, b], 0, 1000)


def test_a_name_with_several_addresses_is_tried_through() -> None:
    with groups(1) as (group,):
        port = parse_address(group.addresses[0])[1]
        found = {each[4][0] for each in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
        assert "127.0.0.1" in found
        member = Member(name="p0", incarnation=100, addresses=(f"localhost:{port}",))
        (sock,) = Dialling(Self(name_hash("run"), 7, group.options), member, Purpose.PROBE, 1, 5.0).connect()
        sock.close()


def test_refused_by_one_address_is_not_refused_by_all() -> None:
    with socket.socket() as closed, socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        closed.bind(("127.0.0.1", 0))
        addresses = tuple(format_address(*each.getsockname()) for each in (closed, silent))
        me = Self(1, 7, LinkOptions())
        with pytest.raises(ConnectionRefusedError):
            Dialling(me, Member(name="b", incarnation=2, addresses=addresses[:1]), Purpose.PROBE, 1, 0.3).connect()
        with pytest.raises(TimeoutError):
            Dialling(me, Member(name="b", incarnation=2, addresses=addresses), Purpose.PROBE, 1, 0.3).connect()


def test_one_connection_that_gets_no_answer_holds_up_no_other() -> None:
    given: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        member = Member(name="b", incarnation=2, addresses=(format_address(*listener.getsockname()),))

        def answer_all_but_the_second() -> None:
            for _ in range(3):
                sock = listener.accept()[0]
                accepted.append(sock)
                hello = Hello.unpack(sock.recv(HEADER_BYTES + Hello.SIZE, socket.MSG_WAITALL)[HEADER_BYTES:])
                if hello.stripe != 1:
                    sock.sendall(encode(Kind.WELCOME, run=1, incarnation=2, length=0, digest=checksum(b"")))

        accepted: list[socket.socket] = []
        with ThreadPoolExecutor(1) as pool:
            pool.submit(answer_all_but_the_second)
            dialling = Dialling(Self(1, 7, LinkOptions()), member, Purpose.FETCH, 3, 1.0)
            with pytest.raises(TimeoutError):
                dialling.connect(given.append)
    assert len(given) == 2 and all(sock.fileno() >= 0 for sock in given), "those that were answered are in use"
    for sock in (*given, *accepted):
        sock.close()


def test_a_dialling_stopped_before_it_begins_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(Dialling, "_connected", lambda self, pending, patience: waits.append(patience) or [])
    member = Member(name="b", incarnation=2, addresses=("127.0.0.1:1",))
    dialling = Dialling(Self(1, 7, LinkOptions()), member, Purpose.FETCH, 1, 20.0)
    dialling.stop()
    with pytest.raises(OSError, match="stopped"):
        dialling.connect()
    assert not waits, "it waited although nothing was on its way"


def test_advertised_lists_go_with_the_listeners() -> None:
    listen, advertise = "127.0.0.1:0,127.0.0.2:0", "192.0.2.1:0,192.0.2.2:5,localhost:0"
    with Group(run="run", name="a", incarnation=1, listen=listen, advertise=advertise) as group:
        first = group._porter.ports[0][1]
        assert group.addresses == (f"192.0.2.1:{first}", "192.0.2.2:5", f"localhost:{first}")
    with Group(run="run", name="a", incarnation=1, listen=listen, advertise="192.0.2.1:0,192.0.2.2:0") as group:
        ports = [port for _, port in group._porter.ports]
        assert group.addresses == tuple(f"192.0.2.{index}:{port}" for index, port in enumerate(ports, 1))


@pytest.mark.parametrize("stripes", [0, 65, "many", 2.5])
def test_no_other_number_of_stripes(stripes: int) -> None:
    with pytest.raises(ValueError, match="choose 1 to 64"):
        LinkOptions(stripes=stripes)
