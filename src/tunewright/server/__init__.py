"""An OpenAI and Azure OpenAI resource of one's own: `tunewright serve`.

    app          the routes put together; errors in OpenAI's envelope; keys; metrics
    files        files and uploads in parts
    jobs         fine-tuning jobs as clients see them: create, list, events, checkpoints, cancel, pause
    worker       where jobs happen: claims one, and asks `life.advance` for its run
    models       base models by the names that clients send, tuned models, checkpoints
    chat         completions of both kinds, passed on to an engine
    responses    the same in OpenAI's newer form, with what was said before
    batches      files of requests, answered beside those of waiting clients
    admission    what a name in a request leads to, and on which terms
    engines      a child process for each base model, which serves it and all its adapters
    admission    what is before an engine: which model answers to a name, its quota, its filter; usage by key
    quota        tokens and requests a minute for each deployment
    filter       what is not let through, and the annotations that say so; words: the list that ships
    moderations  the filter's classifier, asked by itself
    management   Azure's control plane: deployments, models, usages; accounts, account_keys, policies, arm (its forms)
    metrics      what Prometheus reads; logs: lines or JSON
    tables, store, migrations, blobs     what is kept

No weights are loaded in the server's own process.
"""
