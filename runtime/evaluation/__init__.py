"""Evaluation: scoring, quality, speed."""
