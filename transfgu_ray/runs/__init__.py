"""What a run leaves: its folder, stages, tables, checksums, lock and provenance."""
