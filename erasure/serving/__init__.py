"""A small HTTP service around a locked pipeline: requests are checked, queued, drawn together, and answered.

It needs the extra `serve` (FastAPI and uvicorn).
"""
