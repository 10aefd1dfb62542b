"""The artifacts of a run: its folder, stages, tables, checksums, lock and provenance."""
