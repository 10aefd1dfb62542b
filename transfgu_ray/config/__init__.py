"""What fixes a run: strict sections and named presets."""
