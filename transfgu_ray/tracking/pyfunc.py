"""The model as MLflow loads it: RGB photographs in, class ids of all pixels out."""

from typing import Any

import mlflow
import numpy as np
from PIL import Image


class TransfguModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow imports pyfunc late, without types
    """A segmentation model behind MLflow's pyfunc interface."""

    def load_context(self, context: Any) -> None:
        """Load config.json and safetensors; no pickle."""
        from transfgu_ray.models.model import load_model
        from transfgu_ray.models.names import load_names
        from transfgu_ray.storage import Folder

        folder = Folder(context.artifacts["model"])
        self._model = load_model(folder)
        self._names = load_names(folder, self._model.config.kinds)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Return masks of uint8 RGB photographs of one size: (b, h, w, 3) -> (b, h, w)."""
        masks = self._model.segment([Image.fromarray(photo) for photo in model_input])
        return np.stack([self._names.apply(mask) for mask in masks])


mlflow.models.set_model(TransfguModel())
