"""Fine-tuning by an API that trains elsewhere: OpenAI's, Azure OpenAI's, a server of one's own. What runs here is a
child process that hands over, looks on and asks.

    settings   what the recipe's `backend` table says
    calls      clients whose calls have an end, and what their errors mean to a person
    places     OpenAI and Azure behind one face: which model is asked, what stands, what is removed
    azure      the control plane: account, regions with quota, deployments
    rows       prepared rows in the form that the API takes
    training   files and a job, made once whatever is killed; its events as our metrics
    asking     evaluation and tests by chat completions
    packaging  a card and a pointer instead of weights

Nothing here is told a secret by a recipe, and none is written down: keys come from the environment, tokens from a
sign-in.
"""
