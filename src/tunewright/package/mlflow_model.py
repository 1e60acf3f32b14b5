"""What MLflow runs to answer: `mlflow models predict -m models:/NAME/VERSION --env-manager local ...`.

Input: a table with the column `text` (or `messages`, each a list of chat messages). Output: `prediction`, and for a
classifier its `probability`. MLflow copies this file into the model; it is not imported anywhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from tunewright import chat, models
from tunewright.chat import Equipment, Message
from tunewright.generate import LocalCompleter
from tunewright.run import read_json

MAX_NEW_TOKENS = 256


class TunedModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["model"])
        rendering = read_json(Path(context.artifacts["rendering"]))
        tokenizer = models.load_folder_tokenizer(folder)
        found = chat.differences(tokenizer, rendering)
        if found:
            raise ValueError(f"this model renders prompts otherwise than in training: {found[0]}")
        equipment = Equipment(**{key: rendering[key] for key in Equipment.__dataclass_fields__})
        self.completer = LocalCompleter(models.load_folder(folder), tokenizer, equipment)
        self.labels: list[str] | None = rendering["labels"]
        self.system: str | None = rendering["system"]

    def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
        prompts = [chat.render_prompt(self.completer.tokenizer, self._messages(row)) for row in _rows(model_input)]
        if self.labels is None:
            return pd.DataFrame({"prediction": self.completer.generate(prompts, max_new_tokens=MAX_NEW_TOKENS)})
        import torch

        scores = torch.tensor(self.completer.score(prompts, self.completer.tree(self.labels)))
        best = scores.softmax(dim=1).max(dim=1)
        return pd.DataFrame(
            {"prediction": [self.labels[place] for place in best.indices.tolist()], "probability": best.values.tolist()}
        )

    def _messages(self, row: dict[str, Any]) -> list[Message]:
        if "messages" in row:
            return [Message(one["role"], one["content"]) for one in row["messages"]]
        system = [Message("system", self.system)] if self.system else []
        return [*system, Message("user", str(row["text"]))]


def _rows(table: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pd.DataFrame(table).to_dict("records")
    return rows


mlflow.models.set_model(TunedModel())
