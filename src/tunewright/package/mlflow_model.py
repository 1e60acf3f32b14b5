"""What MLflow runs to answer: `mlflow models predict -m models:/NAME/VERSION --env-manager local ...`.

Input: a table with the column `text` (or `messages`, each a list of chat messages, and `tools`: the functions that the
model may call, as a list or as JSON text). Output: `prediction`, and for a
classifier its `probability`. The parameter `max_new_tokens` is the longest answer of a model that writes text; unless
it is given, as long as in evaluation. MLflow copies this file into the model; it is not imported anywhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from tunewright import chat, models
from tunewright.chat import Equipment, Message
from tunewright.data import shapes
from tunewright.data.sources import Row
from tunewright.errors import DataError
from tunewright.generate import LocalCompleter
from tunewright.run import read_json


class TunedModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["model"])
        rendering = read_json(Path(context.artifacts["rendering"]))
        tokenizer = models.load_folder_tokenizer(folder)
        found = chat.differences(tokenizer, rendering, folder)
        if found:
            raise ValueError(f"this model renders prompts otherwise than in training: {found[0]}")
        equipment = Equipment(**{key: rendering[key] for key in Equipment.__dataclass_fields__})
        self.completer = LocalCompleter(models.load_folder(folder), tokenizer, equipment)
        self.task: str = rendering["task"]
        self.labels: list[str] | None = rendering["labels"]
        self.system: str | None = rendering["system"]

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        rows: list[dict[str, Any]] = model_input.to_dict("records")
        prompts = [self._prompt(row) for row in rows]
        if self.labels is None:
            room: int = (params or {})["max_new_tokens"]
            return pd.DataFrame({"prediction": self.completer.generate(prompts, max_new_tokens=room)})
        import torch

        tree = self.completer.tree(self.labels)
        scores = torch.tensor(self.completer.score(prompts, tree), dtype=torch.float64)
        best = scores.softmax(dim=1).max(dim=1)
        return pd.DataFrame(
            {"prediction": [self.labels[place] for place in best.indices.tolist()], "probability": best.values.tolist()}
        )

    def _prompt(self, row: dict[str, Any]) -> list[int]:
        """What the model goes on from, as evaluation asked it."""
        text, messages = row.get("text"), row.get("messages")
        if not isinstance(text, str) and not isinstance(messages, list):
            raise DataError("a row needs `text`, or `messages`: a list of tables with role and content")
        if self.task == "pretraining" and isinstance(text, str):
            return chat.encode(self.completer.tokenizer, text)
        system = [Message("system", self.system)] if self.system else []
        if not isinstance(messages, list):
            return chat.render_prompt(self.completer.tokenizer, [*system, Message("user", str(text))])
        tools = row.get("tools")
        fields = {"messages": messages, "tools": tools if isinstance(tools, str | list) else None}
        asked, declared = shapes.conversation(Row("the row", fields), "messages")
        return chat.render_prompt(self.completer.tokenizer, asked, declared)


mlflow.models.set_model(TunedModel())
