"""Stock trainers of TRL against applied ones, as the table of docs/trainers.md. Takes a few minutes on one core.

python tests/programs/trl_table.py benchmarks/results/trl.md [CASE ...]
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
from helpers.trl_matrix import CASES, HEAD, KINDS, compare, faults


def main(file: Path, cases: list[str]) -> int:
    warnings.simplefilter("ignore")
    datasets.disable_caching()
    datasets.disable_progress_bars()
    lines = [HEAD]
    wrong = 0
    file = file.absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for case in cases:
            for kind in KINDS:
                row = compare(case, kind)
                lines.append(str(row))
                wrong += bool(faults(row))
                print(row, *faults(row), file=sys.stderr, flush=True)
        os.chdir(file.parent)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:] or list(CASES)))
