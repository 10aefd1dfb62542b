"""Teacher-student rounds of the Segmenter decoder (3.3)."""
