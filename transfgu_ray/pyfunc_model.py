"""The model as MLflow loads it: RGB photographs in, class ids of every pixel out."""

from typing import Any

import mlflow
import numpy as np
from PIL import Image


class TransfguModel(mlflow.pyfunc.PythonModel):
    """A Segmenter behind MLflow's pyfunc interface."""

    def load_context(self, context: Any) -> None:
        """Loads config.json and safetensors; no pickle."""
        from transfgu_ray.model import load_model
        from transfgu_ray.storage import Folder

        self._model = load_model(Folder(context.artifacts["model"]))

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Masks of uint8 RGB photographs of one size: (b, h, w, 3) -> (b, h, w)."""
        return np.stack(self._model.segment([Image.fromarray(photo) for photo in model_input]))


mlflow.models.set_model(TransfguModel())
