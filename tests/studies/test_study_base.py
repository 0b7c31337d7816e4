"""What a study prints."""

import io

from matplotlib.figure import Figure
from rich.console import Console

from hf_oscqat.studies.base import LONGEST_CELL, Study, StudyResult, show


def test_what_is_too_long_for_a_cell_comes_below_the_table():
    trials = "; ".join(f"0.0{i}: 70.{i}0" for i in range(9))
    assert len(trials) > LONGEST_CELL
    rows = [
        {"network": "net_a", "method": "lsq", "seeds": 3, "after": "75.29 ± 0.14", "trials": trials},
        {"network": "net_b", "method": "lsq", "seeds": 0, "after": "", "trials": ""},
    ]
    study = Study("name", "Does it?", "Someone (1999)", dict, lambda settings: StudyResult(rows, Figure(), "Yes."))
    out = io.StringIO()
    show(study, study.run({}), [], Console(file=out, width=60))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert f"net_a lsq: trials: {trials}" in lines
    assert not any(line.startswith("net_b lsq: trials") for line in lines)
    assert "75.29 ± 0.14" in out.getvalue()
    header = next(line for line in lines if "network" in line)
    assert header.split() == ["network", "method", "seeds", "after"]
