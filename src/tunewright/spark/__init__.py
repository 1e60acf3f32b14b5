"""The stages as Spark jobs. What runs here is the driver; `work` hands it a stage.

    session     the Spark session of a run: our package on the executors, versions compared, enough slots
    preparing   data: read, select, shape, check, clip, as jobs
    training    TorchDistributor around the ordinary training code
    scoring     evaluation, the model loaded once for each executor
    batching    batch inference, likewise
    tasks       what a task says: a value, or an error for a person

Nothing here is imported by `backends`; a backend starts `python -m tunewright.work STAGE RUN --on spark`.
"""
