"""model + bank's method -> confusion matrices and sample masks: all stages and baselines on the same photographs."""

import json
from typing import Any

import numpy as np
import torch
from PIL import Image

from transfgu_ray.algorithms.labels.bank import add_background, decode_scores, encode_scores
from transfgu_ray.algorithms.scores.pamr import refined_argmax
from transfgu_ray.algorithms.scores.upsampling import upsample_argmax
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.listing import ImageRef
from transfgu_ray.engine.parts import TableResult, batched_rows, refusals, require_some
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.images import to_working
from transfgu_ray.models.model import load_model
from transfgu_ray.models.names import Names
from transfgu_ray.pipeline.baselines import BaselineMapper, PatchFeatures
from transfgu_ray.pipeline.context import Context
from transfgu_ray.pipeline.inputs import list_scored, scored_split
from transfgu_ray.pipeline.labels import load_labeller
from transfgu_ray.pipeline.scoring import (
    EXTREMES,
    Scorer,
    choose_extremes,
    choose_samples,
    read_counts,
    read_scored_ids,
    score_photos,
    token_batches,
)
from transfgu_ray.reports.scores import REFINED, STAGE_NAMES, photo_mious
from transfgu_ray.storage import Folder


def run_stage(context: Context) -> dict[str, Any]:
    """Score the stages of a run, or segment samples where there are no labels; return what the manifest says of it."""
    from transfgu_ray.models.model import load_model_config
    from transfgu_ray.models.names import load_names
    from transfgu_ray.pipeline.atlas import build_atlas
    from transfgu_ray.pipeline.baselines import fit_baselines
    from transfgu_ray.pipeline.samples import bank_image_ids
    from transfgu_ray.pipeline.scoring import read_counts
    from transfgu_ray.reports.scores import metrics_json

    run, config = context.run, context.run.config
    scored = list_scored(config)
    if scored is None:
        # Only to be looked at: take those that are known to be readable.
        readable = set(bank_image_ids(run.folder))
        images = [image for image in context.listing.images if image.image_id in readable]
    else:
        images = list(scored.images)
    weights_sha256 = run.require("extract")["weights_sha256"]
    model = Folder(run.folder.uri_of("model"))
    kinds = load_model_config(model).kinds
    names = load_names(model, kinds)
    centroids, drawn = {}, {}
    if scored is not None and config.evaluate.baselines:
        centroids, drawn = fit_baselines(
            run.folder,
            config,
            context.fingerprint,
            context.root,
            context.listing.images,
            len(kinds),
            context.resources,
            context.progress,
        )
        drawn = {"baselines": drawn}
    # The photographs that are scored are no part of the run's input.
    fingerprint = context.fingerprint if scored is None else f"{context.fingerprint} {scored.fingerprint}"
    result = evaluate(
        run.folder,
        config,
        kinds,
        fingerprint,
        context.root,
        images,
        scored is not None,
        centroids,
        context.resources,
        context.progress,
    )
    stats = result.stats
    if scored is not None:
        require_some(stats, len(images))
    atlas, atlas_mb = {}, 0
    if config.evaluate.num_samples:
        atlas, atlas_mb = build_atlas(
            run.folder, config, context.fingerprint, context.root, context.listing.images, context.resources
        )
    counts = read_counts(run.folder, len(config.class_names), len(kinds))
    metrics = metrics_json(config, scored_split(config), stats.images, counts, names, weights_sha256)
    run.folder.write_bytes("metrics.json", json.dumps(metrics, indent=1).encode())
    return {
        **refusals(stats, (context.listing if scored is None else scored).refused),
        "rows_out": stats.images,
        "scored": metrics["scored"],
        "parts": result.num_parts,
        "parts_resumed": result.num_resumed,
        **drawn,
        "atlas": atlas,
        "peak_memory_mb": max(result.peak_mb, atlas_mb),
        "weights_sha256": weights_sha256,
    }


# So many photographs of the best scores are shown, and of the worst.
_NUM_EXTREMES = 3


class Evaluator(Scorer):
    """Scores all stages of a run, and its baselines."""

    shown = STAGE_NAMES

    def __init__(
        self,
        config: dict[str, Any],
        num_classes: int,
        samples: dict[str, str],
        centroids: dict[str, np.ndarray],
        **part: Any,
    ) -> None:
        super().__init__(config, num_classes, samples, **part)
        self._labeller = load_labeller(self.run, self.config, self.device)
        model = Folder(self.run.uri_of("model"))
        self._models = [load_model(model, self.device, name) for name in ("decoder_round_0", "decoder")]
        self._centroids = centroids
        if centroids:
            self._baselines = BaselineMapper(PatchFeatures(self.run, self.config, self.device), centroids)

    def predict(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        """Masks of each image at the scored size: of the stages, refined, of the baselines."""
        scored = self.config.evaluate_image_size
        masks = []
        for image, maps in zip(images, self._stage_maps(images), strict=True):
            of_image = {name: upsample_argmax(m, scored) for name, m in zip(STAGE_NAMES, maps, strict=True)}
            if self.config.evaluate.refinement == "pamr":
                of_image[REFINED] = refined_argmax(
                    maps[-1], torch.from_numpy(to_working(image, scored)).to(self.device)
                )
            masks.append(of_image)
        if self._centroids and images:
            working = [to_working(image, self.config.data.image_size) for image in images]
            for of_image, maps in zip(masks, self._baselines(working), strict=True):
                of_image |= {name: upsample_argmax(m, scored) for name, m in zip(self._centroids, maps, strict=True)}
        return [{name: mask.cpu().numpy() for name, mask in of_image.items()} for of_image in masks]

    def sample_maps(self, image: Image.Image) -> dict[str, np.ndarray]:
        """The foreground prior, 0-255, and the pseudo-label of each patch."""
        config, encoder = self.config, self._labeller.encoder
        working = to_working(image, config.cam_image_size)
        images = torch.from_numpy(working[None]).to(self.device)
        tokens, grid_hw = encoder.prefix(images), encoder.grid_hw(config.cam_image_size)
        row = encoder.class_row(tokens, grid_hw)
        (prior,) = encoder.saliency(tokens, row, grid_hw, config.extract.foreground_prior)
        shares = (prior - prior.min()) / (prior.max() - prior.min()).clamp(min=1e-12)
        ((bank, *_),) = self._stage_maps([image])
        return {"prior": (255 * shares).round().cpu().numpy(), "pseudo_label": bank.argmax(0).cpu().numpy()}

    def _stage_maps(self, images: list[Image.Image]) -> list[tuple[torch.Tensor, ...]]:
        """Maps (K, h, w) of each image, one a stage."""
        config = self.config
        maps: list[list[torch.Tensor]] = [[], [], []]
        if not images:
            return []
        for _, batch in batched_rows(
            np.stack([to_working(i, config.cam_image_size) for i in images]), config.cam.batch_size
        ):
            # Through the bank's stored form, so that it is the bank that is scored.
            scores = decode_scores(*encode_scores(self._labeller(torch.from_numpy(batch).to(self.device))[0]))
            if config.has_background:
                scores = add_background(scores, config.cam.background_threshold)
            maps[0] += scores
        for tokens in token_batches(self._models[0], images, config.evaluate.batch_size):
            for stage, model in enumerate(self._models, start=1):
                maps[stage] += model.decode(tokens, model.config.image_size)
        return list(zip(*maps, strict=True))


def evaluate(
    run: Folder,
    config: RunConfig,
    kinds: tuple[str, ...],
    fingerprint: str,
    root: Folder,
    images: list[ImageRef],
    scored: bool,
    centroids: dict[str, np.ndarray],
    resources: Resources,
    progress: Progress,
) -> TableResult:
    """Brings the table of confusions up to date, then shows the best and the worst photographs; see `score_photos`.

    Args:
        run: run folder with a finished model.
        config: its configuration.
        kinds: of the model's classes.
        fingerprint: of what the table depends on.
        root: the dataset.
        images: photographs to score, or to look at.
        scored: whether they have labels.
        centroids: of each baseline, or its linear head.
        resources: workers and devices.
        progress: takes photographs done.
    """
    samples = choose_samples([image.image_id for image in images], config.evaluate.num_samples, config.seed)
    arguments = {"centroids": centroids}
    result = score_photos(
        run, config, fingerprint, root, images, samples, scored, Evaluator, arguments, resources, progress
    )
    counts = read_counts(run, len(config.class_names), len(kinds))
    if counts:
        scores = photo_mious(config, counts[STAGE_NAMES[-1]], Names(kinds, {}))
        count = min(_NUM_EXTREMES, config.evaluate.num_samples)
        extremes = choose_extremes(read_scored_ids(run), scores, count)
        chosen = [image for image in images if image.image_id in extremes]
        score_photos(
            run,
            config,
            # They are chosen by the scores, which follow from what the fingerprint says.
            fingerprint,
            root,
            chosen,
            extremes,
            scored,
            Evaluator,
            {"centroids": {}},
            resources,
            lambda *_, **__: progress(0),
            EXTREMES,
        )
    return result
