"""Lengths of real preference data, in tokens of Llama 3.1: what benchmarks make their pairs of.

``lengths.json``, beside this file, maps names of sets to the [prompt, chosen, rejected] lengths of their pairs: HH-RLHF
(harmless-base, test), the Capybara, Orca and UltraFeedback parts of a mixture for DPO, four-shot GSM8K, and TL;DR.
Every benchmark that takes lengths takes another file of this form too.
"""

import argparse
from pathlib import Path

REAL = Path(__file__).resolve().parent / "lengths.json"


def add_lengths(parser: argparse.ArgumentParser) -> None:
    """Add the file of lengths to a benchmark's arguments, as ``lengths``."""
    of = "[prompt, chosen, rejected] token lengths of the pairs of named sets (benchmarks/lengths.json, of real sets)"
    parser.add_argument("lengths", type=Path, nargs="?", default=REAL, metavar="LENGTHS.json", help=of)
