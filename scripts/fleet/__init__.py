"""What scripts/simulate_fleet.py is made of: measured step times, boards that take them, users who ask."""
