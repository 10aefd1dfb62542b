"""The stages of a run: what each reads, leaves, and depends on."""

STAGES = ("extract", "concepts", "labels", "train", "evaluate", "report", "register")

# Sections that each stage reads beside those of the stages before it.
SECTIONS = {
    "extract": ("data", "encoder", "extract"),
    "concepts": ("seed", "concepts"),
    "labels": ("cam",),
    "train": ("train",),
    "evaluate": ("evaluate",),
    "report": (),
    "register": (),
}

NAMES = "model/names.yaml"

# What each stage leaves beside its manifest.
OUTPUTS = {
    "extract": ("features", "model/encoder.safetensors"),
    "concepts": ("concepts.parquet", NAMES),
    "labels": ("labels",),
    "train": (
        "train",
        "tokens",
        "model/config.json",
        "model/backbone.safetensors",
        "model/decoder.safetensors",
        "model/decoder_round_0.safetensors",
    ),
    "evaluate": ("metrics.json", "samples", "baselines", "confusions", "extremes", "atlas", "atlas.json"),
    "report": ("report.html", "atlas.html"),
    "register": (),
}

# Ray Train's own storage, what is deleted once it was used, copies of what report.html holds, and what people write.
UNSEALED = ("train/rounds-", "tokens/", "samples/strip_", NAMES)

# The stages whose output depends on the names of concepts.
NAMED = STAGES[STAGES.index("evaluate") :]
