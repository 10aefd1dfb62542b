"""model + labeller -> confusion matrices and sample masks: all stages and baselines on the same photographs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from transfgu_ray.algorithms.labels.bank import add_background, decode_scores, encode_scores
from transfgu_ray.algorithms.scores.pamr import refined_argmax
from transfgu_ray.algorithms.scores.upsampling import upsample_argmax
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.outputs import mark_outputs
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.build import TableResult
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import batched_rows, refusals, require_some
from transfgu_ray.engine.progress import Heartbeat
from transfgu_ray.images import to_working
from transfgu_ray.models.model import load_model, load_model_config
from transfgu_ray.models.names import Names, load_names
from transfgu_ray.pipeline.atlas import build_atlas
from transfgu_ray.pipeline.baselines import BaselineMapper, PatchFeatures, chosen_photos, fit_baselines
from transfgu_ray.pipeline.context import StageJob
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
from transfgu_ray.pipeline.train_data import bank_image_ids
from transfgu_ray.reports.scores import REFINED, STAGE_NAMES, metrics_json, photo_mious
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder


def run_stage(job: StageJob) -> dict[str, Any]:
    """Score the stages of a run, or segment samples if there are no labels; return the content of the manifest."""
    run, config = job.run, job.config
    # The run may lie among photographs, and this is the stage that writes pictures.
    mark_outputs(run.folder, STAGES["evaluate"].outputs)
    scored = list_scored(config)
    if scored is None:
        # The samples are only shown, so choose among photographs known to be readable.
        readable = set(bank_image_ids(run.folder))
        images = [image for image in job.listing.images if image.image_id in readable]
        job.progress.expect(min(config.evaluate.num_samples, len(images)))
    else:
        images = list(scored.images)
        job.progress.expect(len(images) + len(chosen_photos(config, job.listing.images)))
    weights_sha256 = run.require("extract")["weights_sha256"]
    model = Folder(run.folder.uri_of("model"))
    kinds = load_model_config(model).kinds
    names = load_names(model, kinds)
    centroids: dict[str, np.ndarray] = {}
    drawn: dict[str, Any] = {}
    if scored is not None and config.evaluate.baselines:
        centroids, counts_drawn = fit_baselines(job, job.listing.images, num_clusters=len(kinds))
        drawn = {"baselines": counts_drawn}
    # The scored photographs are not part of the run's input.
    fingerprint = job.fingerprint if scored is None else f"{job.fingerprint} {scored.fingerprint}"
    result = evaluate(
        replace(job, fingerprint=fingerprint), images, kinds=kinds, scored=scored is not None, centroids=centroids
    )
    stats = result.stats
    if scored is not None:
        require_some(stats, len(images))
    atlas: dict[str, int] = {}
    atlas_mb = 0
    if config.evaluate.num_samples:
        atlas, atlas_mb = build_atlas(job, job.listing.images)
    counts = read_counts(run.folder, len(config.class_names), len(kinds))
    metrics = metrics_json(
        config, scored_split(config), num_images=stats.images, counts=counts, names=names, weights_sha256=weights_sha256
    )
    run.folder.write_json("metrics.json", metrics)
    return {
        **refusals(stats, (job.listing if scored is None else scored).refused),
        "rows_out": stats.images,
        "scored": metrics["scored"],
        "parts": result.num_parts,
        "parts_resumed": result.num_resumed,
        **drawn,
        "atlas": atlas,
        "peak_memory_mb": max(result.peak_mb, atlas_mb),
        "weights_sha256": weights_sha256,
    }


# Photographs shown with the best scores, and as many with the worst.
_NUM_EXTREMES = 3


class Evaluator(Scorer):
    """A scorer of all stages of a run and its baselines."""

    shown = STAGE_NAMES

    def __init__(self, config: RunConfig, run_uri: str, *, centroids: dict[str, np.ndarray], **part: Any) -> None:
        super().__init__(config, run_uri, **part)
        self._labeller = load_labeller(self.run_folder, self.config, self.device)
        model = Folder(self.run_folder.uri_of("model"))
        self._models = [load_model(model, self.device, name) for name in ("decoder_round_0", "decoder")]
        self._centroids = centroids
        if centroids:
            self._baselines = BaselineMapper(PatchFeatures(self.run_folder, self.config, self.device), centroids)

    def predict(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        """Return the masks of each image at the scored size: of the stages, refined, of the baselines."""
        scored = self.config.evaluate_image_size
        masks = []
        for image, maps in self.signed(zip(images, self._stage_maps(images), strict=True)):
            of_image = {name: upsample_argmax(m, scored) for name, m in zip(STAGE_NAMES, maps, strict=True)}
            if self.config.evaluate.refinement == "pamr":
                of_image[REFINED] = refined_argmax(
                    maps[-1], torch.from_numpy(to_working(image, scored, self.config.data.resample)).to(self.device)
                )
            masks.append(of_image)
        if self._centroids and images:
            working = [to_working(image, self.config.data.image_size, self.config.data.resample) for image in images]
            for of_image, of_baselines in zip(masks, self._baselines(working), strict=True):
                named = zip(self._centroids, of_baselines, strict=True)
                of_image |= {name: upsample_argmax(m, scored) for name, m in named}
        return [{name: mask.cpu().numpy() for name, mask in of_image.items()} for of_image in masks]

    def sample_maps(self, image: Image.Image) -> dict[str, np.ndarray]:
        """Return the foreground prior, 0-255, and the pseudo-label of each patch."""
        config, encoder = self.config, self._labeller.encoder
        working = to_working(image, config.cam_image_size, config.cam_resample)
        images = torch.from_numpy(working[None]).to(self.device)
        tokens, grid_hw = encoder.prefix(images), encoder.grid_hw(config.cam_image_size)
        row = encoder.class_row(tokens, grid_hw)
        (prior,) = encoder.saliency(tokens, row, grid_hw=grid_hw, prior=config.extract.foreground_prior)
        shares = (prior - prior.min()) / (prior.max() - prior.min()).clamp(min=1e-12)
        ((bank, *_),) = self._stage_maps([image])
        return {"prior": (255 * shares).round().cpu().numpy(), "pseudo_label": bank.argmax(0).cpu().numpy()}

    def _stage_maps(self, images: list[Image.Image]) -> list[tuple[torch.Tensor, ...]]:
        """Return the maps (K, h, w) of each image, one per stage."""
        config = self.config
        maps: list[list[torch.Tensor]] = [[], [], []]
        if not images:
            return []
        for _, batch in batched_rows(
            np.stack([to_working(i, config.cam_image_size, config.cam_resample) for i in images]), config.cam.batch_size
        ):
            # Encoded and decoded as in the bank, so that exactly the stored pseudo-labels are scored.
            scores = decode_scores(*encode_scores(self._labeller(torch.from_numpy(batch).to(self.device))[0]))
            if config.has_background:
                scores = add_background(scores, config.cam.background_threshold)
            maps[0] += scores
        for tokens in token_batches(self._models[0], images, config.evaluate.batch_size):
            for stage, model in enumerate(self._models, start=1):
                maps[stage] += model.decode(tokens, model.config.image_size)
        return list(zip(*maps, strict=True))


def evaluate(
    job: Job, images: Sequence[ImageRef], *, kinds: tuple[str, ...], scored: bool, centroids: dict[str, np.ndarray]
) -> TableResult:
    """Bring the table of confusions up to date, then show the best and the worst photographs; see `score_photos`.

    Args:
        job: job of a run with a finished model.
        images: photographs to score, or to choose samples from.
        kinds: kinds of the model's classes.
        scored: whether the photographs have labels.
        centroids: centroids of each baseline, or its linear head.
    """
    config = job.config
    samples = choose_samples([image.image_id for image in images], config.evaluate.num_samples, config.seed)
    arguments = {"centroids": centroids}
    result = score_photos(job, images, samples=samples, scored=scored, scorer=Evaluator, arguments=arguments)
    counts = read_counts(job.folder, len(config.class_names), len(kinds))
    if counts:
        scores = photo_mious(config, counts[STAGE_NAMES[-1]], Names(kinds, {}))
        count = min(_NUM_EXTREMES, config.evaluate.num_samples)
        extremes = choose_extremes(read_scored_ids(job.folder), scores, count)
        # Chosen by scores that the fingerprint determines. A table of their own keeps them from being counted twice.
        score_photos(
            replace(job, progress=Heartbeat(job.progress)),
            [image for image in images if image.image_id in extremes],
            samples=extremes,
            scored=scored,
            scorer=Evaluator,
            arguments={"centroids": {}},
            table=EXTREMES,
        )
    return result
