"""Benchmarks: ratios against a peer, measured in one run, medians with their spread. Never a test."""
