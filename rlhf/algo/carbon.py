"""Energy and carbon of device time (paper section 2.2.1 and Table 2).

    kWh    = device-hours x W / 1000                         at the device
    kgCO2e = kWh x PUE x kg per kWh                          PUE: what the building adds

The paper's table follows from PUE 1.1 and 0.385 kg/kWh, the constants of LLaMA-1 (Touvron et al.
2023a, section 6). Embodied carbon of the hardware is not part of it.
"""

from __future__ import annotations

SECONDS_PER_HOUR = 3600.0
JOULES_PER_KWH = 3.6e6


def device_kwh(device_hours: float, *, watts: float) -> float:
    """Return the energy that devices of so many watts take in so many hours, in kWh."""
    return device_hours * watts / 1000.0


def co2_kg(kwh: float, *, pue: float, kg_per_kwh: float) -> float:
    """Return the carbon of energy at the device, in kg of CO2 equivalent."""
    return kwh * pue * kg_per_kwh
