"""Runs cases: what each row of the table says."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.case import Case, Peer, Run
from benchmarks.timing import Pace, Timing, run_once, take_turns

OURS = "mambakit"
FULL_PACE = Pace()
Notice = Callable[[str], None]


@dataclass(frozen=True)
class PeerResult:
    """One peer beside ours; `absent` says why there is no timing."""

    peer: Peer
    timing: Timing | None
    absent: str = ""


@dataclass(frozen=True)
class CaseResult:
    """What was measured of a case."""

    case: Case
    ours: Timing
    peers: tuple[PeerResult, ...]

    def ratio(self, result: PeerResult) -> float | None:
        """The peer's median time over ours."""
        return None if result.timing is None else result.timing.median / self.ours.median

    def met(self, result: PeerResult) -> bool | None:
        """Whether the peer's goal is met; None where there is no goal or no timing."""
        ratio = self.ratio(result)
        return None if ratio is None or result.peer.goal is None else result.peer.goal.met(ratio)


def run_case(case: Case, notice: Notice, *, quick: bool = False, pace: Pace = FULL_PACE) -> CaseResult:
    """Time ours and the peers in turns, then the peers of a single run; `notice` announces those."""
    inputs = case.inputs()
    runs: dict[str, Run] = {OURS: case.ours(inputs)}
    absent: dict[str, str] = {}
    for peer in case.peers:
        if quick and peer.once:
            absent[peer.name] = "left out by --quick"
            continue
        try:
            runs[peer.name] = peer.prepare(inputs)
        except ImportError as error:
            absent[peer.name] = f"not installed ({error.name})"
    slow = [peer.name for peer in case.peers if peer.once and peer.name in runs]
    timings = take_turns({name: run for name, run in runs.items() if name not in slow}, pace)
    for name in slow:
        notice(f"{case.name}: one run of {name}, which may take minutes ...")
        timings[name] = run_once(runs[name])
    peers = tuple(PeerResult(peer, timings.get(peer.name), absent.get(peer.name, "")) for peer in case.peers)
    return CaseResult(case, timings[OURS], peers)
