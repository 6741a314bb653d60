"""Ours beside its peers: in one process, taking turns, with the floor that the machine sets.

    python -m benchmarks                 everything; transformers' backward takes most of it
    python -m benchmarks --quick         without the peers that take minutes a run
    python -m benchmarks --only scan     the cases whose name contains "scan"
    python -m benchmarks --json FILE     every sample too

Absolute times hold for the machine at that moment; ratios travel. Where other programs keep the cores busy, set
OMP_WAIT_POLICY=passive: threads that spin while they wait lose a slice of the scheduler to the other program at every
parallel region, torch's as well as ours, and milliseconds become tens of them. A new case is a `Case` in a file of
`benchmarks/cases`, listed in that folder's `__init__`.
"""
