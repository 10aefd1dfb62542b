"""What a run will cost, predicted before it starts."""
