"""Data: where rows come from, what shape they have, what is wrong with them, and what a run uses of them.

sources   hub data sets, jsonl, csv, parquet, txt: rows with the place where a person finds them
shapes    a row's columns into an Example
prepare   the whole: read, split, select, check, clip; and data/checks.json
"""
