"""The parts of scripts/simulate_fleet.py: measured step times, boards with these times, and users."""
