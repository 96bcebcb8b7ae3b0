"""Schemes, calibration, rounding."""
