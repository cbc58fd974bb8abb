"""Stock trainers of TRL against applied ones, as the table of docs/trainers.md. Takes a few minutes on one core.

python tests/programs/trl_table.py benchmarks/results/trl.md [CASE ...]
python tests/programs/trl_table.py benchmarks/results/trl_hybrids.md
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
from helpers import trl_hybrids, trl_matrix


def main(file: Path, names: list[str]) -> int:
    warnings.simplefilter("ignore")
    datasets.disable_caching()
    datasets.disable_progress_bars()
    hybrids = file.stem == "trl_hybrids"
    if hybrids:
        cases = trl_hybrids.cases(*names or [*trl_hybrids.ONE_LINE, *trl_hybrids.PACKED])
    else:
        cases = [(case, kind) for case in names or trl_matrix.CASES for kind in trl_matrix.KINDS]
    lines = [trl_hybrids.HEAD if hybrids else trl_matrix.HEAD]
    wrong = 0
    file = file.absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for case, kind in cases:
            if hybrids:
                row = trl_hybrids.line(case, kind)
                faults = row.faults()
            else:
                row = trl_matrix.compare(case, kind)
                faults = trl_matrix.faults(row)
            lines.append(str(row))
            wrong += bool(faults)
            print(row, *faults, file=sys.stderr, flush=True)
        os.chdir(file.parent)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
