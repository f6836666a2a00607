"""Latency, memory, multiply-adds."""
