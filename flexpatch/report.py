"""How a verification came out: its checks, and the table that shows them."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Check:
    """One comparison. It passes if ``error <= bound``; a negative control if ``error > margin * bound``.

    Attributes:
        name: What was compared.
        error: Tokens that leak, nats, or a relative norm.
        bound: What is allowed.
        detail: Where the worst error is.
        margin: For a negative control: how far beyond the bound it must be.
    """

    name: str
    error: float
    bound: float
    detail: str = ""
    margin: float | None = None

    @property
    def passed(self) -> bool:
        """NaN passes nothing."""
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
    """Hold the checks of one model, where they ran, and how they came out.

    Attributes:
        model: Its name.
        settings: Device, dtype, versions, and whatever else the results hold for.
        checks: Comparisons and negative controls, in the order they were made.
    """

    model: str
    settings: dict[str, str]
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check holds and every negative control was caught."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"model": self.model, "passed": self.passed, "settings": self.settings, "checks": checks}

    def __str__(self) -> str:
        settings = " · ".join(f"{key} {value}" for key, value in self.settings.items())
        head = f"{'check':<50} {'error':>8} {'bound':>8}"
        verdict = "parity holds" if self.passed else "PARITY FAILS"
        return "\n".join([self.model, settings, "", head, *map(str, self.checks), "", verdict])
