"""Serving: requests, answers, the scheduler, batches, streams, asyncio."""
