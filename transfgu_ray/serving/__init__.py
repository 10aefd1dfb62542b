"""New photographs: predict, serve, export."""
