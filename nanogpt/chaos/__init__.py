"""Breaks a cluster on purpose, and checks that its clients notice a pause at most.

    python -m nanogpt.chaos                       a minute of random faults under load
    python -m nanogpt.chaos --kills 1000 --duration 14400 --faults kill-rank,kill-all
    python -m nanogpt.chaos overload --duration 600
    python -m nanogpt.chaos idle --duration 1800

A run starts a cluster of its own on a free port, asks an oracle (the same requests, without
faults), then sends requests and injects faults, and writes down what the clients saw. The history
is checked afterwards, from the file alone: `check.py` says what counts as a violation.
"""
