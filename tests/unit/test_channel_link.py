"""The link: two ends, one state table, flow-control windows, and final faults."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.fuzz.fuzz_channel import DENIED, EXITED, NONCE, SEED, START, one_input
from x07_sandbox.channel.frames import (
    CONTROL_MAX,
    DATA_MAX,
    HEADER,
    LAST_FILE,
    SENDER,
    WINDOW,
    Kind,
    Role,
    Stream,
    encode,
    encode_body,
    stream_sender,
)
from x07_sandbox.channel.link import DATA_STATES, NEXT, Control, Credit, Data, Eof, Event, Link, State
from x07_sandbox.errors import ChannelUsageError, PeerError

BODY: dict[Kind, dict[str, object]] = {
    Kind.HELLO: {"protocol": 1},
    Kind.WARM: {"preload": [], "hostname": "x07", "output": False, "network": False, "limits": {}, "commands": []},
    Kind.WARMED: {},
    Kind.SEED: SEED,
    Kind.SEEDED: {"nonce": NONCE},
    Kind.START: START,
    Kind.STARTED: {},
    Kind.STOP: {},
    Kind.DENIED: DENIED,
    Kind.EXITED: EXITED,
    Kind.FAILED: {"stage": "init", "errno": 2, "message": "no"},
}
STREAMS = [*(stream for stream in Stream if stream != Stream.CONTROL), LAST_FILE]
CONTROL = sorted(SENDER)


def path_to(state: State) -> list[Kind]:
    """The shortest sequence of control frames that leads to a state."""
    ways: dict[State, list[Kind]] = {State.WAITING: []}
    while state not in ways:
        ways |= {end: [*ways[begin], kind] for (begin, kind), end in NEXT.items() if begin in ways and end not in ways}
    return ways[state]


def control(kind: Kind) -> bytes:
    """An encoded control frame."""
    return encode(kind, 0, encode_body(kind, BODY[kind]))


def link_in(state: State, role: Role) -> Link:
    """One end that has reached a state by frames of the table."""
    link = Link(role)
    for kind in path_to(state):
        if SENDER[kind] is role:
            link.send(kind, BODY[kind])
        else:
            assert list(link.receive(control(kind))) == [Control(kind, BODY[kind])]
    link.sent(link.pending())
    assert link.state is state
    return link


def pair_in(state: State) -> dict[Role, Link]:
    """Both ends in the same state."""
    return {role: link_in(state, role) for role in Role}


def carry(sender: Link, receiver: Link, most: int = 2**30) -> list[Event]:
    """Move bytes from one end to the other; return the events."""
    data = sender.data_to_send(most)
    sender.sent(len(data))
    return list(receiver.receive(data))


# the table of states


def test_every_state_can_be_reached() -> None:
    """Every state is reachable and has a transition."""
    assert {state for state in State if path_to(state)} == set(State) - {State.WAITING}
    assert {state for state, _ in NEXT} == set(State)


def test_the_guest_speaks_first() -> None:
    """Only the guest's HELLO opens a conversation."""
    assert [(kind, SENDER[kind]) for state, kind in NEXT if state is State.WAITING] == [(Kind.HELLO, Role.GUEST)]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(("state", "kind"), list(itertools.product(State, CONTROL)))
def test_received_control_frames_follow_the_table(state: State, kind: Kind, role: Role) -> None:
    """A received control frame follows the state table, or raises PeerError."""
    link = link_in(state, role)
    if SENDER[kind] is not role and (state, kind) in NEXT:
        assert list(link.receive(control(kind))) == [Control(kind, BODY[kind])]
        assert link.state is NEXT[state, kind]
    else:
        with pytest.raises(PeerError):
            list(link.receive(control(kind)))
        assert link.state is state


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(("state", "kind"), list(itertools.product(State, CONTROL)))
def test_sent_control_frames_follow_the_table(state: State, kind: Kind, role: Role) -> None:
    """A sent control frame follows the state table, or raises ChannelUsageError."""
    link = link_in(state, role)
    if SENDER[kind] is role and (state, kind) in NEXT:
        link.send(kind, BODY[kind])
        assert link.state is NEXT[state, kind]
        assert link.data_to_send(2**30) == control(kind)
    else:
        with pytest.raises(ChannelUsageError):
            link.send(kind, BODY[kind])
        assert (link.state, link.pending()) == (state, 0)


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.EOF])
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(("state", "stream"), list(itertools.product(State, STREAMS)))
def test_data_follows_the_table(state: State, stream: int, role: Role, kind: Kind) -> None:
    """Data is accepted only from its stream's sender and in the states of the table."""
    payload = b"x" if kind is Kind.DATA else b""
    in_order = state in DATA_STATES[min(stream, Stream.FIRST_FILE)]
    link = link_in(state, role)
    if in_order and stream_sender(stream) is not role:
        event: Event = Data(stream, payload) if kind is Kind.DATA else Eof(stream)
        assert list(link.receive(encode(kind, stream, payload))) == [event]
    else:
        with pytest.raises(PeerError):
            list(link.receive(encode(kind, stream, payload)))
    link = link_in(state, role)
    if in_order and stream_sender(stream) is role:
        give(link, kind, stream)
        assert link.data_to_send(100) == encode(kind, stream, payload)
    else:
        with pytest.raises(ChannelUsageError):
            give(link, kind, stream)
        assert link.pending() == 0


def give(link: Link, kind: Kind, stream: int) -> None:
    """Send one byte, or the end of the stream."""
    if kind is Kind.DATA:
        link.send_data(stream, b"x")
    else:
        link.end_stream(stream)


@pytest.mark.parametrize(
    ("state", "last"),
    # While warming and seeding there is no job yet, so the host cannot have sent anything of it.
    [
        (state, kind)
        for state, kind in NEXT
        if kind in {Kind.EXITED, Kind.FAILED} and state not in {State.WARMING, State.SEEDING}
    ],
)
def test_frames_crossing_the_end_are_accepted(state: State, last: Kind) -> None:
    """STOP, input and files that cross the end of the run on the wire are accepted."""
    ends = pair_in(state)
    host, guest = ends[Role.HOST], ends[Role.GUEST]
    guest.send(last, BODY[last])
    host.send(Kind.STOP, {})
    host.send_data(Stream.STDIN, b"late")
    host.end_stream(Stream.FIRST_FILE)
    late = [Control(Kind.STOP, {}), Data(Stream.STDIN, b"late"), Eof(Stream.FIRST_FILE)]
    assert carry(host, guest) == late
    assert carry(guest, host) == [Control(last, BODY[last])]
    assert host.state is guest.state


# faults


def test_a_fault_is_final() -> None:
    """After a fault a link repeats the same error, whatever it receives."""
    link = Link(Role.HOST)
    with pytest.raises(PeerError) as first:
        list(link.receive(control(Kind.STARTED)))
    with pytest.raises(PeerError) as second:
        list(link.receive(control(Kind.HELLO)))
    assert second.value is first.value
    assert link.state is State.WAITING


def test_a_reply_between_events_counts() -> None:
    """A reply sent between two events counts for the second one, even if both arrived together."""
    link = Link(Role.HOST)
    seen = []
    for event in link.receive(control(Kind.HELLO) + control(Kind.SEEDED)):
        seen.append(event)
        if event == Control(Kind.HELLO, BODY[Kind.HELLO]):
            link.send(Kind.SEED, SEED)
    assert [event.kind for event in seen if isinstance(event, Control)] == [Kind.HELLO, Kind.SEEDED]


def test_leftover_events_are_returned_later() -> None:
    """Events left over from an abandoned iteration are returned by the next one."""
    link = link_in(State.RUNNING, Role.HOST)
    wire = b"".join(encode(Kind.DATA, Stream.STDOUT, b"%d" % number) for number in range(3))
    assert next(link.receive(wire)) == Data(Stream.STDOUT, b"0")
    assert list(link.receive(b"")) == [Data(Stream.STDOUT, b"1"), Data(Stream.STDOUT, b"2")]


@given(st.binary(max_size=300))
def test_any_bytes_keep_the_promises_of_the_fuzz_target(data: bytes) -> None:
    """Junk yields events or PeerError, within bounds and along the state table."""
    one_input(data)


@given(
    st.lists(
        st.sampled_from([control(kind) for kind in CONTROL])
        | st.builds(encode, st.just(Kind.DATA), st.sampled_from(STREAMS), st.binary(min_size=1, max_size=9))
        | st.builds(encode, st.just(Kind.EOF), st.sampled_from(STREAMS))
        | st.builds(
            encode,
            st.just(Kind.CREDIT),
            st.sampled_from(STREAMS),
            st.integers(0, WINDOW).map(lambda n: n.to_bytes(4, "big")),
        )
        | st.binary(max_size=9),
        max_size=12,
    ),
    st.binary(max_size=3),
    st.sampled_from([0, 0x40, 0x80, 0xC0]),
)
def test_any_frames_keep_the_promises_of_the_fuzz_target(parts: list[bytes], sizes: bytes, switches: int) -> None:
    """Any sequence of frames and junk yields events or PeerError, the same for any cut."""
    guest_ready = b"".join(control(kind) for kind in (Kind.HELLO, Kind.SEEDED, Kind.STARTED))
    host_ready = control(Kind.SEED) + control(Kind.START)
    head = bytes([switches | len(sizes)]) + sizes
    one_input(head + (host_ready if switches & 0x80 else guest_ready) + b"".join(parts))
    one_input(head + b"".join(parts))


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_the_host_holds_no_more_than_one_frame_of_a_guest(step: int) -> None:
    """The host buffers at most one frame of a guest."""
    most = HEADER.size + max(CONTROL_MAX, DATA_MAX)
    for wire in (
        encode(Kind.DATA, Stream.STDOUT, bytes(DATA_MAX)),
        HEADER.pack(4 << 20, Kind.START, 0, 0) + bytes(most),
    ):
        link = link_in(State.RUNNING, Role.HOST)
        held = 0
        try:
            for at in range(0, len(wire), step):
                list(link.receive(wire[at : at + step]))
                held = max(held, len(link._in))  # noqa: SLF001 - the bound on it is the promise
        except PeerError:
            assert wire[4] == Kind.START
        assert held <= most


# credit


@pytest.mark.parametrize("stream", [Stream.STDOUT, Stream.STDERR])
def test_a_sender_stops_at_the_window(stream: int) -> None:
    """A sender stops at the window, and a stalled stream does not block another."""
    ends = pair_in(State.RUNNING)
    guest, host = ends[Role.GUEST], ends[Role.HOST]
    assert guest.send_data(stream, bytes(WINDOW + 1)) == WINDOW
    assert guest.send_data(stream, b"x") == 0
    assert guest.window(stream) == 0
    other = Stream.STDOUT + Stream.STDERR - stream
    assert guest.send_data(other, b"goes on") == 7
    assert sum(len(event.payload) for event in carry(guest, host) if isinstance(event, Data)) == WINDOW + 7


def test_a_peer_past_its_window_is_at_fault() -> None:
    """Data beyond the window, and an empty data frame, raise PeerError."""
    host = link_in(State.RUNNING, Role.HOST)
    full = encode(Kind.DATA, Stream.STDOUT, bytes(DATA_MAX))
    assert len(list(host.receive(full * (WINDOW // DATA_MAX)))) == WINDOW // DATA_MAX
    with pytest.raises(PeerError):
        list(host.receive(encode(Kind.DATA, Stream.STDOUT, b"x")))
    with pytest.raises(PeerError):
        list(link_in(State.RUNNING, Role.HOST).receive(encode(Kind.DATA, Stream.STDOUT)))


@pytest.mark.parametrize("payload", [b"", b"\0\0\0\1\0"[:3], bytes(4), b"\0\0\0\2", b"\xff" * 4])
def test_invalid_credit_is_a_fault(payload: bytes) -> None:
    """Credit of the wrong size, of zero, or beyond the bytes sent raises PeerError."""
    host = link_in(State.RUNNING, Role.HOST)
    host.send_data(Stream.STDIN, b"x")
    with pytest.raises(PeerError):
        list(host.receive(encode(Kind.CREDIT, Stream.STDIN, payload)))


@pytest.mark.parametrize("stream", [*STREAMS, 0, 5, LAST_FILE + 1])
def test_acknowledging_unreceived_bytes_is_an_error(stream: int) -> None:
    """Acknowledging more bytes than arrived raises ChannelUsageError and grants no credit."""
    for role in Role:
        link = link_in(State.RUNNING, role)
        with pytest.raises(ChannelUsageError):
            link.consumed(stream, 1)
        link.consumed(stream, 0)
        assert link.pending() == 0


def test_a_stream_ends_once() -> None:
    """A stream ends once: nothing is sent or accepted after its end."""
    host = link_in(State.RUNNING, Role.HOST)
    host.end_stream(Stream.STDIN)
    host.end_stream(Stream.STDIN)
    wire = host.data_to_send(100)
    assert wire == encode(Kind.EOF, Stream.STDIN)
    with pytest.raises(ChannelUsageError):
        host.send_data(Stream.STDIN, b"x")
    for more in (wire, encode(Kind.DATA, Stream.STDIN, b"x")):
        guest = link_in(State.RUNNING, Role.GUEST)
        assert list(guest.receive(wire)) == [Eof(Stream.STDIN)]
        with pytest.raises(PeerError):
            list(guest.receive(more))


class Pair(RuleBasedStateMachine):
    """Two links joined by two pipes: every byte arrives in order, under any interleaving and any stall."""

    FLOWS: ClassVar[tuple[tuple[Role, int], ...]] = (
        (Role.HOST, Stream.STDIN),
        (Role.HOST, Stream.FIRST_FILE),
        (Role.GUEST, Stream.STDOUT),
        (Role.GUEST, Stream.STDERR),
    )

    def __init__(self) -> None:
        super().__init__()
        self.ends = pair_in(State.RUNNING)
        self.given = {flow: bytearray() for flow in self.FLOWS}
        self.came = {flow: bytearray() for flow in self.FLOWS}
        self.taken = dict.fromkeys(self.FLOWS, 0)  # received bytes that a possibly stalled reader has read
        self.ended: set[tuple[Role, int]] = set()
        self.seen_end: set[tuple[Role, int]] = set()
        self.pipes = {role: bytearray() for role in Role}  # by its writer

    @precondition(lambda self: len(self.ended) < len(self.FLOWS))
    @rule(flow=st.sampled_from(FLOWS), size=st.integers(1, 2 * WINDOW), fill=st.integers(0, 255))
    def give(self, flow: tuple[Role, int], size: int, fill: int) -> None:
        """Offer data, more than the window at times."""
        if flow in self.ended:
            return
        data = bytes([fill, (fill * 7 + 1) % 256, 0]) * (size // 3 + 1)
        window = self.ends[flow[0]].window(flow[1])
        count = self.ends[flow[0]].send_data(flow[1], memoryview(data)[:size])
        assert count == min(size, window)
        self.given[flow] += data[:count]

    @rule(role=st.sampled_from(Role), most=st.integers(1, 200_000))
    def write(self, role: Role, most: int) -> None:
        """The pipe takes some bytes."""
        data = self.ends[role].data_to_send(most)
        assert len(data) <= most
        self.ends[role].sent(len(data))
        self.pipes[role] += data

    @rule(role=st.sampled_from(Role), most=st.integers(1, 200_000))
    def read(self, role: Role, most: int) -> None:
        """The peer reads some bytes."""
        data = bytes(self.pipes[role][:most])
        del self.pipes[role][:most]
        other = Role.GUEST if role is Role.HOST else Role.HOST
        for event in self.ends[other].receive(data):
            match event:
                case Data(stream, payload):
                    self.came[role, stream] += payload
                case Eof(stream):
                    self.seen_end.add((role, stream))
                case Credit(stream):
                    assert self.ends[other].window(stream) > 0
                case Control():
                    pytest.fail("no control frame was sent")

    @rule(flow=st.sampled_from(FLOWS), most=st.integers(1, WINDOW))
    def take(self, flow: tuple[Role, int], most: int) -> None:
        """The reader of a stream consumes some of its bytes."""
        count = min(most, len(self.came[flow]) - self.taken[flow])
        other = Role.GUEST if flow[0] is Role.HOST else Role.HOST
        self.ends[other].consumed(flow[1], count)
        self.taken[flow] += count

    @rule(flow=st.sampled_from(FLOWS))
    def end(self, flow: tuple[Role, int]) -> None:
        """A stream ends."""
        self.ends[flow[0]].end_stream(flow[1])
        self.ended.add(flow)

    @invariant()
    def in_order(self) -> None:
        """Received bytes are a prefix of the bytes sent, and nothing follows the end."""
        for flow in self.FLOWS:
            assert self.given[flow].startswith(self.came[flow])
            assert flow not in self.seen_end or self.came[flow] == self.given[flow]

    @invariant()
    def within_the_window(self) -> None:
        """Unconsumed bytes never exceed the window."""
        for flow in self.FLOWS:
            assert len(self.given[flow]) - self.taken[flow] <= WINDOW

    def teardown(self) -> None:
        """Once all readers read, every byte arrives."""
        for flow in self.FLOWS:
            rest = bytes(range(256)) * (2 * WINDOW // 256) if flow not in self.ended else b""
            for _ in range(20):
                if rest:
                    count = self.ends[flow[0]].send_data(flow[1], rest)
                    self.given[flow] += rest[:count]
                    rest = rest[count:]
                for role in Role:
                    self.write(role, 2**30)
                    self.read(role, 2**30)
                for each in self.FLOWS:
                    self.take(each, 2**30)
            assert not rest, "credit ran dry"
            self.end(flow)
        for role in Role:
            self.write(role, 2**30)
            self.read(role, 2**30)
        self.in_order()
        assert self.seen_end == set(self.FLOWS)
        assert self.came == self.given


def test_two_ends_deliver_every_byte_in_order() -> None:
    """All streams arrive whole, in order and within their windows, under any interleaving and stall."""
    run_state_machine_as_test(Pair, settings=settings(stateful_step_count=30))
