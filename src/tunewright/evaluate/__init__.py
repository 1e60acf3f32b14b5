"""Did it get better? `measure.evaluate` is the stage.

metrics     numbers for one model from its answers
baselines   models to compare with that need no training of ours
compare     intervals, the paired test, the verdict
measure     tuned, base and baselines on the same rows; predictions.parquet, report.json
report      report.json as a page and as Markdown
"""
