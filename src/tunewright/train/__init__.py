"""Training: `supervised.fit` is the stage; follow it through `assembling` (batches) and `checkpoints`."""
