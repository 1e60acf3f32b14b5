"""Data: where rows come from, what shape they have, what is wrong with them, and what a run uses of them.

sources   hub data sets, jsonl, csv, parquet, txt: rows with the place where a person finds them
shapes    a row's columns into an Example
findings  what a person should know about rows, on disk
tokens    the rows' token ids and loss masks, on disk, mapped into memory
account   how many rows of what length and class, and which test rows are training rows too
prepare   the whole: read, split, select, check, clip, store; and data/checks.json
"""
