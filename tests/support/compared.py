"""Keys that the four forms of `compare --json` have had since they were first documented; none may go."""

from __future__ import annotations

from pipestill.compare.figures import Comparison

_TIMES = "strategy seconds_per_step seconds_per_step_spread speedup speedup_spread"
_PREDICTED = "predicted_seconds_per_step limit_seconds_per_step utilisation"
_PIPELINE = f"{_PREDICTED} predicted_utilisation bubble stash_peak staleness student_partition teacher_partition"
_BLOCKWISE = f"{_PREDICTED} window memory_bytes plan"
_PEER = f"{_TIMES} share_of_ceiling speedup_share_of_ceiling peak_memory_bytes"
_MACHINE = "devices rounds alone_seconds_per_step together_seconds_per_step ceiling ceiling_spread link"
KEYS = {  # calibration, results
    "pipeline": (f"{_MACHINE} microbatches steps interference", f"{_PEER} {_PIPELINE}"),
    "pipeline without a plan": (f"{_MACHINE} microbatches steps interference", _PEER),
    "blockwise": (
        f"{_MACHINE} blocks allreduce_ranks allreduce_seconds",
        f"{_TIMES} share_of_ceiling share_of_ceiling_spread peak_memory_bytes {_BLOCKWISE}",
    ),
    "virtual pipeline": (
        "virtual devices microbatches rounds steps share_of_ideal share_of_ideal_spread late",
        f"{_TIMES} {_PIPELINE}",
    ),
    "virtual blockwise": (
        "virtual devices batch rounds steps late slower",
        f"{_TIMES} {_BLOCKWISE} predicted_utilisation cost_model_seconds_per_step",
    ),
}


def assert_keys(comparison: Comparison, form: str) -> None:
    """Every key of the form is there; of strategies that have no plan, those without one."""
    calibration, result = (set(keys.split()) for keys in KEYS[form])
    assert calibration <= comparison.figures["calibration"].keys()
    for figures in comparison.figures["results"]:
        without = set(KEYS["pipeline without a plan"][1].split())
        assert (result if figures["strategy"] in comparison.traces else without) <= figures.keys()
