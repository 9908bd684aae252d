"""What device time costs: only estimates and reports read it, never a result."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config.base import execution, require


@dataclass
class Cost:
    """Prices of device time and what estimates assume; docs/cost.md has the sources.

    A device is a GPU, or what one process computes on where there is none.
    """

    watts_per_gpu: float = execution(400.0)
    """Power of a GPU; 400 W is an A100's [paper, Table 2]."""
    watts_per_core: float = execution(10.0)
    """Power per thread of a process without GPU: a server processor's 4 to 7 W and its memory."""
    pue: float = execution(1.1)
    """Energy of the whole building over that of its devices [LLaMA-1]."""
    kg_co2_per_kwh: float = execution(0.385)
    """Carbon intensity of electricity; 0.385 is the mean of the USA [LLaMA-1]."""
    price_per_device_hour: float | None = execution(None)
    """What an hour of a device costs; null prints no money."""
    currency: str = execution("USD")
    """Currency of that price."""
    peak_flops: float | None = execution(None)
    """FLOP/s of a device at most; null measures a processor and looks up a GPU."""
    training_utilisation: float = execution(0.4)
    """Expected share of the peak in training and scoring, where no finished node tells it."""
    generation_utilisation: float = execution(0.01)
    """The same while sampling, which waits for memory."""
    response_share: float = execution(0.5)
    """Expected mean response over the longest allowed one, before any evaluation is done."""

    def __post_init__(self) -> None:
        for name in ("watts_per_gpu", "watts_per_core"):
            value = getattr(self, name)
            require(value > 0, f"cost.{name}", value, "give watts above 0")
        require(self.pue >= 1, "cost.pue", self.pue, "give 1 or more: a building adds, never saves")
        for name in ("kg_co2_per_kwh", "price_per_device_hour"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"cost.{name}", value, "give 0 or more")
        require(
            self.peak_flops is None or self.peak_flops > 0,
            "cost.peak_flops",
            self.peak_flops,
            "give FLOP/s above 0, such as 312e12, or null",
        )
        for name in ("training_utilisation", "generation_utilisation", "response_share"):
            value = getattr(self, name)
            require(0 < value <= 1, f"cost.{name}", value, "give a share above 0, at most 1")
