"""A trained model into something that others can load, and proof that it is still the same model.

formats        merged model, adapter, tokenizer, golden ids, MLflow; package/manifest.json last
fidelity       is what was written what was trained?
card           the model card
mlflow_model   the code that MLflow runs to answer
"""
