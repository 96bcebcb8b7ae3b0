"""Serving: requests, answers, turns, batches, asyncio."""
