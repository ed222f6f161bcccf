"""Samples that spoil updates: who has how many strikes, and who is out. training.md §9."""

from __future__ import annotations

from dataclasses import dataclass, field

STRIKES = 2
"""Skipped updates that a sample may not have been part of."""


@dataclass(slots=True)
class Quarantine:
    """Samples that are no longer read; with the strikes of all others it is part of what a checkpoint holds."""

    strikes: dict[str, int] = field(default_factory=dict[str, int])
    names: set[str] = field(default_factory=set[str])

    def strike(self, sample: str, count: int = 1) -> bool:
        """Whether this put the sample into quarantine."""
        self.strikes[sample] = self.strikes.get(sample, 0) + count
        is_new = self.strikes[sample] >= STRIKES and sample not in self.names
        if is_new:
            self.names.add(sample)
        return is_new

    def take(self, strikes: dict[str, int]) -> None:
        """Those of another rank, in place: loaders hold on to `names`."""
        self.strikes = dict(strikes)
        self.names.update(sample for sample, count in strikes.items() if count >= STRIKES)

    @classmethod
    def of(cls, strikes: dict[str, int]) -> Quarantine:
        return cls(dict(strikes), {sample for sample, count in strikes.items() if count >= STRIKES})
