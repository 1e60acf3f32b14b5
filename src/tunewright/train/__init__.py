"""Training: `supervised.fit` is a stage; follow it through `assembling` (batches) and `exact` (what is kept)."""
