"""Schema 1 of report.json as nested types, and the check that a report follows it."""

import math
from typing import Any

from distill.errors import UserError

STAGES = ("teacher", "cache", "baseline", "distill", "evaluate", "export")
NETWORKS = ("teacher", "baseline", "student")

NUMBER = (int, float)
NETWORK: dict[str, Any] = {
    "name": str,
    "weights": str,
    "params": int,
    "macs": int,
    "flops": int,
    "bytes": int,
    "metrics": {"accuracy": NUMBER, "*": NUMBER},
    "latency_ms": {"p50": NUMBER, "p90": NUMBER, "batch": int, "threads": int, "device": str},
}
# A key ending in "?" may be null; "*" types every key not named; [x] is a list of x; other extra keys are allowed.
SCHEMA: dict[str, Any] = {
    "schema": int,
    "run": {
        "name": str,
        "command": str,
        "seed": int,
        "smoke": bool,
        "started": str,
        "seconds": {f"{stage}?": NUMBER for stage in STAGES},
        "versions": {"python": str, "*?": str},
        "hardware": {"*?": (str, int, float)},
    },
    "data": {"name": str, "fingerprint": str, "train": int, "val": int, "test": int, "classes": int},
    "teacher": NETWORK,
    "student": NETWORK | {"metrics": NETWORK["metrics"] | {"agreement": NUMBER}, "digest": str},
    "baseline?": NETWORK,
    "ratios": {"params": NUMBER, "macs": NUMBER, "bytes": NUMBER, "latency_p50": NUMBER},
    "gap_closed?": NUMBER,
    "loss": {"*": (int, float, dict)},
    "exports": [
        {
            "format": str,
            "path": str,
            "bytes": int,
            "max_abs_diff?": NUMBER,
            "metrics": {"*": NUMBER},
            "latency_ms": {"*?": (str, int, float)},
        }
    ],
}


def validate(report: Any) -> None:
    """Check a report against schema 1.

    Raises UserError naming a field that is missing, of the wrong type or not finite.
    """
    _check(report, SCHEMA, "report")
    _finite(report, "report")
    if report["schema"] != 1:
        raise UserError(f"report.schema is {report['schema']}: this version reads 1; use the version that wrote it")


def _check(value: Any, expected: Any, at: str) -> None:
    types = dict if isinstance(expected, dict) else list if isinstance(expected, list) else expected
    wrong_bool = isinstance(value, bool) and expected is not bool
    if wrong_bool or not isinstance(value, types):
        wanted = " or ".join(kind.__name__ for kind in (types if isinstance(types, tuple) else (types,)))
        found = "null" if value is None else f"{type(value).__name__} {value!r}"[:60]
        raise UserError(f"{at} is {found}: schema 1 wants {wanted}; correct the field or run again")
    if isinstance(expected, list):
        for position, item in enumerate(value):
            _check(item, expected[0], f"{at}[{position}]")
    elif isinstance(expected, dict):
        keys = {key.rstrip("?"): key for key in expected}
        for name in dict.fromkeys([*(name for name in keys if name != "*"), *value]):
            if name in keys and name not in value:
                raise UserError(f"{at}.{name} is missing: schema 1 needs it; add the field or run again")
            key = keys.get(name, keys.get("*"))
            if key and not (value[name] is None and key.endswith("?")):
                _check(value[name], expected[key], f"{at}.{name}")


def _finite(value: Any, at: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{at} is {value}: numbers must be finite; look in metrics.csv for what diverged")
    if isinstance(value, dict):
        for name, item in value.items():
            _finite(item, f"{at}.{name}")
    elif isinstance(value, list):
        for position, item in enumerate(value):
            _finite(item, f"{at}[{position}]")
