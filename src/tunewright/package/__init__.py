"""A trained model into something that others can load, and proof that it is still the same model.

formats        merged model, adapter, tokenizer, golden ids, GGUF, MLflow; package/manifest.json last
gguf_export    the packaged model as one file, and back
fidelity       is what was written what was trained?
card           the model card
mlflow_model   the code that MLflow runs to answer
"""
