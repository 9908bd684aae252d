"""What a run costs: FLOPs from configuration and data, rates, energy, carbon, money."""
