"""Quantization: schemes, calibration, rounding."""
