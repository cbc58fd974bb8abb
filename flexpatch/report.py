"""Report of a verification: its checks, and the table that shows them."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Check:
    """One comparison, or one negative control.

    A comparison passes if ``error <= bound``. A negative control has a mistake built in, and passes if the mistake is
    caught: ``error > margin * bound``.

    Attributes:
        name: Name of the comparison.
        error: Worst error: a number of tokens, nats, or a relative norm.
        bound: Largest error that is allowed, in the unit of ``error``.
        detail: Place of the worst error.
        margin: Factor by which a negative control must exceed the bound; ``None`` for a comparison.
    """

    name: str
    error: float
    bound: float
    detail: str = ""
    margin: float | None = None

    @property
    def passed(self) -> bool:
        """``True`` if the comparison holds or the control was caught. An error of NaN never passes."""
        return self.error <= self.bound if self.margin is None else self.error > self.margin * self.bound

    def __str__(self) -> str:
        if self.margin is None:
            verdict = "ok" if self.passed else f"FAILS  {self.detail}"
        else:
            verdict = ("caught" if self.passed else "NOT CAUGHT") + (
                f", {self.error / self.bound:.0e} x bound" if self.bound else ""
            )
        return f"{self.name:<50} {self.error:>8.2g} {self.bound:>8.2g}  {verdict}"


@dataclass
class Report:
    """Checks of one model, and the settings they hold for.

    Attributes:
        model: Name of the model.
        settings: Device, dtype, versions and other settings of the run.
        checks: Comparisons and negative controls, in the order they were made.
    """

    model: str
    settings: dict[str, str]
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """``True`` if every comparison holds and every negative control was caught."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Convert the report to JSON types."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"model": self.model, "passed": self.passed, "settings": self.settings, "checks": checks}

    def __str__(self) -> str:
        settings = " · ".join(f"{key} {value}" for key, value in self.settings.items())
        head = f"{'check':<50} {'error':>8} {'bound':>8}"
        verdict = "parity holds" if self.passed else "PARITY FAILS"
        return "\n".join([self.model, settings, "", head, *map(str, self.checks), "", verdict])
